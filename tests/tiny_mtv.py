"""The recipe of configs/mtv_tiny.py, reduced for tests of the train step."""

import functools
import pathlib

import numpy as np

from mtv_jax.config import recipes
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec, make_loader, open_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = 16
LABELS = {
  "contrastive": ("caption", "caption_valid"),
  "depth": ("depth",),
  "grounding": ("box_valid",),
}


def read():
  """The recipe of configs/mtv_tiny.py, smaller yet."""
  config = recipes.read_config(str(ROOT / "configs" / "mtv_tiny.py:tiny"))
  config.batch_size = ROWS
  config.data.train[0]["size"] = 32
  config.data.ops = (
    "decode|canvas(32)|caption(16)|depth(16)|regions(2, phrase_length=8)"
  )
  config.views["image"].ops = "crop(32, 0.5, 1.0)|flip"
  config.views["global"].ops = "crop(32, 0.4, 1.0)|blocks(0.2, 0.5, patch=8)"
  config.views["local"].ops = "crop(16, 0.1, 0.4)"
  config.views["mae"].ops = "crop(32, 0.4, 1.0)|keep(0.25, patch=8)"
  config.model.image_size = 32
  config.model.text.length = 16
  shape = dict(width=32, heads=2, mlp_dim=64, depth=2)
  config.model.update(shape)
  config.model.text.update(shape)
  return config


@functools.cache
def built():
  return build_spec(resolve(read()), total_steps=100)


@functools.cache
def everything(accumulate=1, remat="none"):
  """The step of every objective, with rotary positions and drop path.

  But for feature distillation, whose teacher is a folder.
  """
  config = read()
  config.model.update(
    positions="rope", rope=dict(jitter=1.2, rescale=1.5), drop_path=0.3
  )
  config.objectives.captioning = dict(depth=1, regions=2, bins=8, chunk=None)
  config.objectives.gram = dict(teacher="anchor")
  config.objectives.next_token = dict(
    vocab_size=260,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_dim=48,
    chunk=100,
  )
  config.objectives.lejepa = dict(hidden=16, channels=8, directions=8)
  config.teachers = dict(anchor=dict())
  config.accumulate = accumulate
  config.model.remat = remat
  if remat != "none":
    config.objectives.mae.remat = "qkv,mlp_hidden"
  return build_spec(resolve(config), total_steps=100)


@functools.cache
def rows():
  """A batch off the real pipeline, with fewer labels on some devices."""
  run = open_run(read(), "unused")
  with make_loader(run, 0) as loader:
    batch = dict(next(loader))
  # The first of eight devices lacks labels, the second one of its two.
  batch["depth"][:3] = 0
  batch["box_valid"][:2] = False
  batch["caption"][:2] = 0
  batch["caption_valid"][:2] = False
  # The caption answers the image; the last row has no image.
  texts = np.pad(batch["caption"], ((0, 0), (1, 0)), constant_values=-1)
  batch["conversation_answer"] = texts > 0
  texts[-1, 0] = 2
  batch["conversation"] = texts
  return batch
