"""MTV ViT-B/16 at 224 pixels: every objective in one step.

Command, on every host of a TPU pod, with label sets of `tools/make_labels.py`:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16 --distributed \
    --config=configs/mtv_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: batch 16,384 fits a pod of 256 chips of v5e, 64 images a
chip, with full rematerialisation (docs/pods.md says how closely; on fewer chips
set accumulate). Not trained to the end by us, so no time is given.

Expected: the released MTV B/16, trained on 100 million images in an unknown
number of passes, reaches 69.5 % zero-shot on ImageNet and an RMSE of 0.469 m on
NYUv2 (MTV, Table 5). Weights, views, rates and schedule are not published: what
is not SigLIP's or DINOv2's below is our choice.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU; configs/mtv_tiny.py is the recipe for a CPU.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, tiny=False, batch=0, res=224, variant="B", tokenizer="bytes"
  )
  size, local, canvas = (32, 16, 40) if arg.tiny else (arg.res, 96, 384)
  shape, patch = ("mu", 8) if arg.tiny else (arg.variant, 16)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (16 if arg.tiny else 16_384)
  if arg.tiny:
    config.total_steps = 40
  else:
    config.total_examples = 1_000_000_000

  config.data = dict(
    train=[
      dict(type="scenes", size=canvas)
      if arg.tiny
      else dict(
        type="webdataset",
        path="/data/web/{00000..09999}.tar",
        labels=dict(depth="/data/web_depth", boxes="/data/web_boxes"),
      )
    ],
    ops=f"decode|canvas({canvas})|caption(64)|depth(128)|regions(4)",
  )

  # Captions, boxes and depth speak of the picture as it is; self-supervision
  # reads crops of its own, one global and eight local ones (SigLIP 2). Colours
  # are those of DINOv2's local crops. The student sees the global crop with
  # half of its patches hidden (SigLIP 2), and DINO and iBOT read that one
  # encoding.
  colours = "flip|jitter(0.8)|grey(0.2)|blur(0.5)"
  config.views = {
    "image": dict(count=1, ops=f"resize({size})"),
    "global": dict(
      count=1,
      ops=f"crop({size}, 0.32, 1.0)|{colours}"
      f"|blocks(0.5, 0.5, p=1.0, patch={patch})",
    ),
    "local": dict(count=8, ops=f"crop({local}, 0.05, 0.32)|{colours}"),
  }
  config.model = dict(
    variant=f"{shape}/{patch}",
    image_size=size,
    pool="map",
    dtype="float32" if arg.tiny else "bfloat16",
    remat="none" if arg.tiny else "full",
    text=dict(
      variant=shape,
      length=64,
      # The released model's is SigLIP's 32k SentencePiece model: pass
      # tokenizer=PATH.model.
      tokenizer=arg.tokenizer,
      clean="canonicalize",
      vocab_size=258 if arg.tokenizer == "bytes" else 32_000,
    ),
  )

  # Constant, as MTV's are said to be; that they are equal is our choice.
  prototypes = (
    dict(prototypes=64, hidden=64, bottleneck=32, chunk=None)
    if arg.tiny
    else dict(prototypes=65_536)
  )
  # -10 suits the batch of a pod; see configs/siglip_b16_224.py.
  bias = -4.0 if arg.tiny else -10.0
  config.objectives = dict(
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=bias),
    # Of the one global crop too: with holes, it is not what the teacher sees.
    distillation=dict(weight=1.0, same_crop="include", **prototypes),
    masked_latent=dict(weight=1.0, **prototypes),
    depth=dict(weight=1.0),
    grounding=dict(weight=1.0, regions=4, init_bias=bias),
  )
  # Constant: beside text, a momentum that goes to 1 stops the teacher from
  # learning what the text teaches (SILC).
  config.teacher = dict(momentum=0.994)

  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0
  )
  # 5,000 of 61,000 steps.
  config.schedule = dict(name="cosine", warmup_percent=10 if arg.tiny else 8)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)

  shared = dict(count=100) if arg.tiny else dict(every_percent=10)
  config.evals = dict(
    zero_shot=dict(type="zero_shot", **shared),
    retrieval=dict(type="retrieval", **shared),
  )
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=20_000)
  config.log = dict(
    every_steps=10 if arg.tiny else 100,
    gradients_steps=None if arg.tiny else 2000,
  )
  return config
