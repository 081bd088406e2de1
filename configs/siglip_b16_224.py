"""SigLIP ViT-B/16 at 224 pixels on web image-text pairs (Zhai et al. 2023).

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/siglip_b16 --distributed \
    --config=configs/siglip_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Published values: Zhai et al. 2023, second-hand but for big_vision at 0127fb6
(trainers and configs of proj/image_text, models), and SigLIP 2's text, which
repeats the optimizer.

  hyper-parameter     published                             ours
  data                WebLI, 10B images (not released)      path of the user's
  examples seen       40B                                   =
  batch               32,768                                =
  rate, warm-up       1e-3, 20,000 steps, cosine to 0       =
  weight decay        1e-4, not multiplied by the rate      0.1 x rate
  Adam, clipping      0.9, 0.95; 1.0                        =
  scale, bias         10, -10                               =
  towers              B and B, MAP; last token, 64 tokens   =
  vocabulary          32k SentencePiece of C4, lower case   =
                      without punctuation
  image               squashed to 224, pixels in -1 to 1    =
  GELU                tanh                                  =
  initialisation      big_vision's                          =
  precision           bfloat16, first moment too            bfloat16, float32

Their decay follows the schedule as the rate does, so that 0.1 times the rate is
the same. The rate is published for one batch size: it does not follow `batch`.

Hardware and time: batch 32,768 is sized for 64 or more chips, 512 images per
chip, with full rematerialisation. Not trained to completion here.

Expected: the published SigLIP B/16-224 reaches 76.2 % zero-shot on ImageNet
(MTV, Table 5). Other data or fewer examples give less. tokenizer=bytes is for
smoke tests only: it cuts captions to 64 bytes.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="")
  tokenizer = arg.tokenizer or ("bytes" if arg.tiny else "")

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or 32_768
  config.total_examples = 40_000_000_000

  config.data = dict(
    train=[dict(type="webdataset", path="/data/web/{00000..09999}.tar")],
    ops=f"decode|canvas({arg.res})|caption(64)",
  )
  config.views = dict(image=dict(count=1, ops=f"resize({arg.res})"))
  config.model = dict(
    variant=f"{arg.variant}/16",
    image_size=arg.res,
    pool="map",
    init="siglip",
    dtype="bfloat16",
    remat="full",
    text=dict(
      variant=arg.variant,
      length=64,
      # The published runs use a 32k SentencePiece model of C4 on lower-cased
      # text without punctuation: tokenizer=PATH.model.
      tokenizer=tokenizer,
      clean="canonicalize",
      vocab_size=258 if tokenizer == "bytes" else 32_000,
    ),
  )
  # The prior of 32,768 rows, where almost all pairs are negative.
  config.objectives = dict(
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=-10.0)
  )

  # b2=0.95 keeps the sigmoid loss stable at large batches (Zhai et al. 2023,
  # section 4.6).
  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_examples=20_000 * 32_768)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)

  config.evals = dict(
    zero_shot=dict(type="zero_shot", every_percent=10),
    retrieval=dict(type="retrieval", every_percent=10),
  )
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=50_000)
  config.log = dict(every_steps=100)

  if arg.tiny:
    config.update(
      batch_size=arg.batch or 64,
      total_examples=None,
      total_steps=60,
      data=dict(
        train=[dict(type="scenes", size=32)],
        ops="decode|canvas(32)|caption(64)",
      ),
      views=dict(image=dict(ops="resize(32)")),
      model=dict(
        variant="mu/8",
        image_size=32,
        dtype="float32",
        remat="none",
        text=dict(variant="mu"),
      ),
      # Undoing a bias of -10 would take all of these steps.
      objectives=dict(contrastive=dict(init_bias=-4.0)),
      schedule=dict(warmup_examples=None, warmup_percent=10),
      evals=dict(
        zero_shot=dict(count=200, every_percent=None),
        retrieval=dict(count=200, every_percent=None),
      ),
      log=dict(every_steps=10),
    )
  return config
