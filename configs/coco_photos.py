"""Overfits a few hundred COCO photos: an end-to-end check on real data.

Write tars of the photos, then train on the first caption of each:

  mtv-jax make_shards annotations/captions_train2017.json \
    --images=train2017 --output=data/coco
  python -m mtv_jax.main --workdir=runs/coco \
    --config=configs/coco_photos.py:path='data/coco/*.tar',tokenizer=X.model

Hardware, time and result: docs/results.md. Retrieval is measured on the
training photos on purpose: if the encoder cannot retrieve its training
captions, there is a bug between the tar and the metric.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    path="data/coco/*.tar",
    tokenizer="",
    batch=128,
    steps=200,
    size=96,
  )
  tokenizer = arg.tokenizer or ("bytes" if arg.tiny else "")

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch
  config.total_steps = arg.steps

  config.data = dict(
    train=[dict(type="webdataset", path=arg.path)],
    ops=f"decode|canvas({arg.size})|caption(32, pick='first')",
  )
  config.views = dict(image=dict(count=1, ops=f"resize({arg.size})"))
  shape = dict(width=192, depth=4, heads=3, mlp_dim=768)
  config.model = dict(
    variant="Ti/16",
    image_size=arg.size,
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
  # Slightly below log(1/128), which balances positive and negative pairs.
  config.objectives = dict(contrastive=dict(weight=1.0, init_bias=-6.0))
  config.optim = dict(name="adamw", lr=1e-3, weight_decay=0.01, b2=0.95)
  config.schedule = dict(name="cosine", warmup_percent=10)
  config.evals = dict(
    retrieval=dict(
      type="retrieval", data=arg.path, max_captions=1, every_percent=10
    )
  )
  config.checkpoint = dict(every_steps=200, keep=1)
  config.log = dict(every_steps=10)

  if arg.tiny:
    config.update(
      batch_size=32,
      total_steps=20,
      xla_flags="quick",
      data=dict(
        train=[dict(type="scenes", size=32, length=64)],
        ops="decode|canvas(32)|caption(32, pick='first')",
      ),
      views=dict(image=dict(ops="resize(32)")),
      model=dict(image_size=32),
      evals=dict(retrieval=dict(data="scenes", count=64)),
    )
  return config
