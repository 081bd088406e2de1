"""Every objective on a few hundred real photos: does the whole recipe learn?

COCO photos with captions and boxes, NYU photos with depth, in one batch; boxes
and depth of other photos are looked at before, during and after. Make shards
and labels (docs/results.md has the commands in full), then

  python -m mtv_jax.main --workdir=runs/photos \
    --config=configs/mtv_photos.py:coco=C,nyu=N,tokenizer=T,boxes=B,rooms=R

with C and N folders of tars, their labels in C_boxes and N_depth; T a
SentencePiece model; B COCO's instances JSON and R a folder of NYU images, both
of photos that are not trained on.

Hardware, time and result: docs/results.md. A few hundred photos teach an
encoder little that holds on others: what has to fall is each loss, and what is
looked at on held-out photos is only that it gets better.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    coco="data/coco",
    nyu="data/nyu",
    boxes="",
    rooms="",
    tokenizer="bytes",
    batch=48,
    steps=300,
  )
  size, local, canvas = (32, 16, 40) if arg.tiny else (128, 64, 160)
  patch = 8 if arg.tiny else 16
  shape = (
    dict(width=64, depth=2, heads=2, mlp_dim=128)
    if arg.tiny
    else dict(width=192, depth=4, heads=3, mlp_dim=768)
  )

  config = ConfigDict()
  config.seed = 0
  config.batch_size = 16 if arg.tiny else arg.batch
  config.total_steps = 30 if arg.tiny else arg.steps

  # Neither has all labels: a caption and boxes here, depth there.
  photos = [
    dict(
      type="webdataset",
      path=f"{arg.coco}/*.tar",
      labels=dict(boxes=f"{arg.coco}_boxes"),
    ),
    dict(
      type="webdataset",
      path=f"{arg.nyu}/*.tar",
      captions="ignored",
      labels=dict(depth=f"{arg.nyu}_depth"),
    ),
  ]
  scenes = [dict(type="scenes", size=canvas, length=64)]
  config.data = dict(
    train=scenes if arg.tiny else photos,
    ops=f"decode|canvas({canvas})|caption(32)|depth(64)"
    "|regions(4, phrase_length=8)",
  )
  colours = "flip|jitter(0.8)|grey(0.2)"
  config.views = {
    "image": dict(count=1, ops=f"crop({size}, 0.5, 1.0)"),
    "global": dict(
      count=1,
      ops=f"crop({size}, 0.4, 1.0)|{colours}|blocks(0.1, 0.5, patch={patch})",
    ),
    "local": dict(count=2, ops=f"crop({local}, 0.1, 0.4)|{colours}"),
    "mae": dict(
      count=1, ops=f"crop({size}, 0.4, 1.0)|flip|keep(0.25, patch={patch})"
    ),
  }
  config.model = dict(
    variant=f"Ti/{patch}",
    image_size=size,
    dtype="float32",
    **shape,
    text=dict(
      variant="Ti",
      length=32,
      tokenizer=arg.tokenizer,
      clean="lower",
      vocab_size=258 if arg.tokenizer == "bytes" else 32_000,
      **shape,
    ),
  )
  # As many prototypes as a batch can tell apart, and assignments sharp enough
  # to say something in a few hundred steps.
  prototypes = dict(
    prototypes=64,
    hidden=256,
    bottleneck=64,
    teacher_temp=0.03,
    teacher_temp_start=0.03,
    chunk=None,
  )
  config.objectives = dict(
    contrastive=dict(weight=1.0, init_bias=-4.0),
    distillation=dict(weight=1.0, **prototypes),
    masked_latent=dict(weight=1.0, **prototypes),
    masked_pixels=dict(
      weight=0.5, decoder_width=128, decoder_depth=2, decoder_heads=4
    ),
    depth=dict(weight=1.0, features=32, channels=(32, 32, 32, 32)),
    grounding=dict(weight=1.0, regions=4, init_bias=-4.0),
  )
  config.teacher = dict(momentum=0.98)
  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=0.02, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=10)
  held_out = dict(at_start=True, every_percent=25)
  config.evals = dict()
  if arg.boxes:
    config.evals.grounding = dict(data=arg.boxes, **held_out)
  if arg.rooms:
    config.evals.relative_depth = dict(data=arg.rooms, **held_out)
  config.checkpoint = dict(every_steps=100, keep=1)
  config.log = dict(every_steps=10, gradients_steps=100)
  return config
