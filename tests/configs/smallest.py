"""A run small enough to be killed, resumed and repeated within a test."""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, steps=12, save=4, batch=16)
  tower = dict(width=32, depth=1, heads=2, mlp_dim=64)
  config = ConfigDict()
  config.seed = 3
  config.batch_size = arg.batch
  config.total_steps = arg.steps
  config.data = dict(
    train=[
      dict(type="scenes", size=32, length=50),
      dict(type="scenes", size=32, length=30, first=1000, weight=0.5),
    ],
    ops="decode|canvas(32)|caption(16)",
  )
  config.views = dict(image=dict(count=1, ops="resize(16)"))
  config.model = dict(
    variant='mu/8', image_size=16, dtype='float32', **tower,
    text=dict(variant='mu', length=16, vocab_size=258, **tower),
  )  # fmt: skip
  config.objectives = dict(contrastive=dict(init_bias=-2.0))
  config.optim = dict(name="adamw", lr=1e-3, weight_decay=0.1)
  config.schedule = dict(name="cosine", warmup_steps=2)
  config.ema = dict(decay=0.9)
  config.evals = dict(
    retrieval=dict(type="retrieval", count=24, every_steps=arg.steps)
  )
  config.checkpoint = dict(every_steps=arg.save, keep=3)
  config.log = dict(every_steps=1)
  return config
