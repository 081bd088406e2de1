"""The smallest recipe: contrast on the built-in scenes, on a laptop's CPU.

Command (what `make quickstart` runs):

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/quickstart

Hardware and time: two CPU cores, see docs/results.md.
"""

from ml_collections import ConfigDict

from mtv_jax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=128, steps=600)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch
  config.total_steps = 40 if arg.tiny else arg.steps

  config.data = dict(
    train=[dict(type="scenes", size=64, length=20_000)],
    ops="decode|canvas(64)|caption(64)",
  )
  config.views = dict(image=dict(count=1, ops="resize(64)"))
  config.model = dict(
    variant="mu/8",
    image_size=64,
    pool="map",
    dtype="float32",
    text=dict(
      variant="mu", length=64, tokenizer="bytes", clean="lower", vocab_size=258
    ),
  )
  config.objectives = dict(
    # Near log(1/128), where the pairs of a batch balance.
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=-4.0)
  )
  config.optim = dict(
    name="adamw", lr=2e-3, weight_decay=1e-4, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=10)
  config.evals = dict(
    zero_shot=dict(type="zero_shot"), retrieval=dict(type="retrieval")
  )
  config.checkpoint = dict(every_steps=200, keep=2)
  config.log = dict(every_steps=20)
  return config
