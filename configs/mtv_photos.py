"""Every objective on a few hundred real photos: configs/mtv_tiny.py, larger.

Mixes COCO photos with captions and boxes and NYU photos with depth in a batch.
Evaluates boxes and depth on held-out photos before, during and after training.
Write shards and labels (commands in docs/results.md), then

  python -m mtv_jax.main --workdir=runs/photos \
    --config=configs/mtv_photos.py:coco=C,nyu=N,tokenizer=T,boxes=B,rooms=R

C and N are folders of tars with label sets C_boxes and N_depth; T is a
SentencePiece model. B, a COCO instances JSON, and R, a folder of NYU images,
are for evaluation.

Hardware, time and result: docs/results.md. A few hundred photos do not
generalise; each loss must fall and the held-out metrics must improve.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    coco="data/coco",
    nyu="data/nyu",
    boxes="",
    rooms="",
    tokenizer="",
    batch=48,
    steps=300,
  )
  tokenizer = arg.tokenizer or ("bytes" if arg.tiny else "")
  config = read_config("mtv_tiny", batch=arg.batch, steps=arg.steps)
  # COCO has captions and boxes, NYU has depth.
  config.data.train = [
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
  config.data.ops = (
    "decode|canvas(160)|caption(32)|depth(64)|regions(4, phrase_length=8)"
  )
  config.views = make_views(128, local=64, patch=16)
  shape = dict(width=192, depth=4, heads=3, mlp_dim=768)
  config.model = dict(
    variant="Ti/16",
    image_size=128,
    dtype="float32",
    **shape,
    text=dict(
      variant="Ti",
      length=32,
      tokenizer=tokenizer,
      clean="lower",
      **shape,
    ),
  )
  config.objectives.update(
    dino=dict(weight=1.0, hidden=256),
    ibot=dict(weight=1.0, hidden=256),
    mae=dict(decoder_width=128, decoder_depth=2),
    depth=dict(weight=1.0, features=32, channels=(32, 32, 32, 32)),
    grounding=dict(regions=4),
  )
  config.optim.update(lr=1e-3, weight_decay=0.02)
  held_out = dict(at_start=True, every_percent=25)
  config.evals = dict()
  if arg.boxes:
    config.evals.grounding = dict(data=arg.boxes, **held_out)
  if arg.rooms:
    config.evals.relative_depth = dict(data=arg.rooms, **held_out)
  config.checkpoint = dict(every_steps=100, keep=1)
  config.log.every_steps = 10

  if arg.tiny:
    shape = dict(width=64, depth=2, heads=2, mlp_dim=128)
    config.update(
      batch_size=16,
      total_steps=30,
      xla_flags="quick",
      data=dict(
        train=[dict(type="scenes", size=40, length=64)],
        ops=config.data.ops.replace("canvas(160)", "canvas(40)"),
      ),
      views=make_views(32, local=16, patch=8),
      model=dict(variant="Ti/8", image_size=32, text=shape, **shape),
    )
  return config


def make_views(size, local, patch):
  """As in configs/mtv_tiny.py, with a moderate crop for text and labels."""
  colours = "flip|jitter(0.8)|grey(0.2)"
  crop = f"crop({size}, 0.4, 1.0)"
  return {
    "image": dict(count=1, ops=f"crop({size}, 0.5, 1.0)"),
    "global": dict(
      count=1, ops=f"{crop}|{colours}|blocks(0.1, 0.5, patch={patch})"
    ),
    "local": dict(count=2, ops=f"crop({local}, 0.1, 0.4)|{colours}"),
    "mae": dict(count=1, ops=f"{crop}|flip|keep(0.25, patch={patch})"),
  }
