"""Built-in scenes as a data source."""

import dataclasses
from typing import SupportsIndex

import numpy as np

from mtv_jax.data.records import Record
from mtv_jax.data.scenes import render as render_lib
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(eq=False)
class SceneSource(Source):
  """Random-access source of scenes: record i is scene `first + i`.

  Args:
    size: pixels per side of the rendered images.
    length: number of records; also the length of an epoch.
    first: number of the first scene. Training and evaluation take disjoint
      ranges, such as `first=1_000_000` for evaluation.
    seed: the series of scenes.
  """

  size: int = 96
  _: dataclasses.KW_ONLY
  length: int = 10_000
  first: int = 0
  seed: int = 0

  name = "scenes"
  fields = frozenset(
    ("key", "image", "captions", "depth", "segmentation")
    + ("boxes", "phrases", "box_scores", "label")
  )

  def __post_init__(self):
    render_lib.check_arguments(self.first, self.size, self.seed)
    if self.length < 1:
      raise InputError(f"Scenes length {self.length}: expected 1 or more.")
    # Rendered records are in no file: one shard for a shuffle by blocks.
    self.shards = np.array([self.length], np.int64)

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Record i: see `Scene`; depth is inverse, the boxes' scores are 1."""
    _, i = self._locate(i)
    scene = render_lib.render(self.first + i, size=self.size, seed=self.seed)
    return {
      "key": f"scene-{self.seed}-{self.first + i}",
      "image": scene.image,
      "captions": list(scene.captions),
      "depth": scene.inverse_depth,
      "segmentation": scene.segmentation,
      "boxes": scene.boxes,
      "phrases": list(scene.phrases),
      "box_scores": np.ones(len(scene.boxes), np.float32),
      "label": scene.label,
    }
