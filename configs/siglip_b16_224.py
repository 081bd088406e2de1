"""SigLIP ViT-B/16 at 224 pixels on web image-text pairs.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/siglip_b16 --distributed \
    --config=configs/siglip_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: batch 32,768 is meant for a pod of 64 chips or more, 512
images a chip, which needs full rematerialisation. Not trained to the end by us,
so no time is given.

Expected: the published SigLIP B/16-224, on 10 billion pairs, reaches 76.2 %
zero-shot on ImageNet (MTV, Table 5). On other data, or for fewer examples seen:
less. With tokenizer=bytes, which is for trying out, captions are cut to 64
bytes: expect nothing.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, tiny=False, batch=0, res=224, variant="B", tokenizer="bytes"
  )
  size = 32 if arg.tiny else arg.res
  shape = "mu" if arg.tiny else arg.variant

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (64 if arg.tiny else 32_768)
  if arg.tiny:
    config.total_steps = 60
  else:
    config.total_examples = 10_000_000_000

  config.data = dict(
    train=[
      dict(type="scenes", size=size)
      if arg.tiny
      else dict(type="webdataset", path="/data/web/{00000..09999}.tar")
    ],
    ops=f"decode|canvas({size})|caption(64)",
  )
  config.views = dict(image=dict(count=1, ops=f"resize({size})"))
  config.model = dict(
    variant=f"{shape}/{8 if arg.tiny else 16}",
    image_size=size,
    pool="map",
    dtype="float32" if arg.tiny else "bfloat16",
    remat="none" if arg.tiny else "full",
    text=dict(
      variant=shape,
      length=64,
      # The published runs used a 32k SentencePiece model of C4, on lower case
      # without punctuation: pass tokenizer=PATH.model.
      tokenizer=arg.tokenizer,
      clean="canonicalize",
      vocab_size=258 if arg.tokenizer == "bytes" else 32_000,
    ),
  )
  # -10 starts 32,768 rows where almost all pairs are negative, as they are;
  # with 64 rows that many steps would go into undoing it.
  config.objectives = dict(
    contrastive=dict(
      weight=1.0,
      loss_type="sigmoid",
      init_bias=-4.0 if arg.tiny else -10.0,
    )
  )

  # Rates and warm-up: SigLIP and SigLIP 2 (Adam 1e-3, clip 1, 20k warm-up steps
  # at batch 32k, cosine). Their decay of 1e-4 is not multiplied by the rate;
  # ours is, so 0.1 x 1e-3 is the same. b2=0.95 keeps the sigmoid loss stable
  # at large batches (Zhai et al. 2023, section 4.6).
  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=10 if arg.tiny else 6.5)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)

  shared = dict(count=200) if arg.tiny else dict(every_percent=10)
  config.evals = dict(
    zero_shot=dict(type="zero_shot", **shared),
    retrieval=dict(type="retrieval", **shared),
  )
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=50_000)
  config.log = dict(every_steps=10 if arg.tiny else 100)
  return config
