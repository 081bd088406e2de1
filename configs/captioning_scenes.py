"""Captioning (captions, boxes, region captions) on the built-in scenes.

Command; `difficulty` selects the scenes (docs/data.md):

  python -m mtv_jax.main --workdir=runs/captions \
    --config=configs/captioning_scenes.py:difficulty=easy

Hardware, time and result: docs/results.md. Small batches, many steps: the
decoder first learns a language model, and attends to the image only after
thousands of updates.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.data.tokenizers.builtin import EMBEDDING_ROWS


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    tokenizer="words",  # Learns faster than bytes.
    vocab=0,  # Rows of the embedding; 0: as many as the tokenizer's ids.
    batch=16,
    steps=12_000,
    difficulty="hard",
  )

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch
  config.total_steps = arg.steps

  rows = EMBEDDING_ROWS if arg.tokenizer == "words" else None
  length = 64 if arg.tokenizer == "bytes" else 24
  scenes = dict(type="scenes", difficulty=arg.difficulty)
  config.data = dict(
    train=[dict(size=64, length=200_000, **scenes)],
    ops=f"decode|canvas(64)|caption({length})|regions(2, phrase_length=16)",
  )
  config.views = dict(image=dict(count=1, ops="resize(64)"))
  shape = dict(width=64, depth=3, heads=4, mlp_dim=256)
  config.model = dict(
    variant="mu/8",
    image_size=64,
    pool="map",
    dtype="float32",
    **shape,
    text=dict(
      variant="mu",
      length=length,
      tokenizer=arg.tokenizer,
      clean="lower",
      vocab_size=arg.vocab or rows,
    ),
  )
  # 64 bins suffice for 64 pixels.
  config.objectives = dict(
    captioning=dict(depth=2, regions=2, bins=64, chunk=None)
  )
  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=1e-4, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=5)
  evaluation = dict(type="captioning", data=scenes, count=512)
  config.evals = dict(captioning=evaluation)
  config.checkpoint = dict(every_steps=2000, keep=1)
  config.log = dict(every_steps=100)

  if arg.tiny:
    config.update(total_steps=30, batch_size=16, log=dict(every_steps=10))
    config.xla_flags = "quick"
    config.evals.captioning.count = 8
  return config
