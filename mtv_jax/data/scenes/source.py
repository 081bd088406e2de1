"""Built-in scenes as a data source."""

import dataclasses
import pathlib
from typing import SupportsIndex

import numpy as np

from mtv_jax.data.records import Record
from mtv_jax.data.scenes import cache as cache_lib
from mtv_jax.data.scenes import layout
from mtv_jax.data.scenes import render as render_lib
from mtv_jax.data.scenes.difficulty import DIFFICULTIES, Level
from mtv_jax.data.scenes.shapes import CLASS_NAMES
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.process_cache import ProcessCache


@dataclasses.dataclass(eq=False)
class SceneSource(Source):
  """Random-access source of scenes: record i is scene `first + i`.

  Args:
    size: pixels per side of the rendered images.
    length: number of records; also the length of an epoch.
    first: index of the first scene. Training and evaluation use disjoint
      ranges, such as `first=1_000_000` for evaluation.
    seed: the series of scenes.
    difficulty: see `difficulty.Difficulty`.
    cache: a folder for rendered records, shared by all runs with these
      settings; filled at the first read. Doesn't change the records.
  """

  size: int = 96
  _: dataclasses.KW_ONLY
  length: int = 10_000
  first: int = 0
  seed: int = 0
  difficulty: Level = "hard"
  cache: str | None = None

  name = "scenes"
  fields = frozenset(
    ("key", "image", "captions", "depth", "segmentation")
    + ("boxes", "phrases", "box_scores", "label")
  )

  def __post_init__(self):
    render_lib.check_arguments(self.first, self.size, self.seed)
    if self.length < 1:
      raise InputError(f"Scenes length {self.length}: expected 1 or more.")
    # Not file-based: use a single shard for block shuffling.
    self.shards = np.array([self.length], np.int64)
    # One entry, per process: the memory-mapped arrays.
    self._arrays = ProcessCache(self._open_cache, limit=1)

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record i, see `Scene`; depth is inverse, box scores are 1."""
    _, i = self._locate(i)
    if self.cache is None:
      return self._render(i)
    record = cache_lib.read_record(self._arrays.get(0), i)
    return {"key": self.key(i), **record}

  def key(self, i: int) -> str:
    """Returns the key of record i."""
    level = "" if self.difficulty == "hard" else f"{self.difficulty}-"
    return f"scene-{level}{self.seed}-{self.first + i}"

  def label(self, i: int) -> int:
    """Returns the label of record i, without rendering it."""
    number = self.first + i
    world = layout.sample_world(number, self.seed, self.difficulty)
    return CLASS_NAMES.index(world.objects[0].name)

  def _render(self, i: int) -> Record:
    options = {"size": self.size, "difficulty": self.difficulty}
    scene = render_lib.render(self.first + i, seed=self.seed, **options)
    return {
      "key": self.key(i),
      "image": scene.image,
      "captions": list(scene.captions),
      "depth": scene.inverse_depth,
      "segmentation": scene.segmentation,
      "boxes": scene.boxes,
      "phrases": list(scene.phrases),
      "box_scores": np.ones(len(scene.boxes), np.float32),
      "label": scene.label,
    }

  def _open_cache(self, _: int) -> cache_lib.Arrays:
    names = ("size", "length", "first", "seed", "difficulty")
    settings = {name: getattr(self, name) for name in names}
    # Include the ranges, which may change with the version.
    settings["ranges"] = dataclasses.asdict(DIFFICULTIES[self.difficulty])
    refuse_remote(self.cache, "The cache", "Name a folder of this machine.")
    folder = pathlib.Path(self.cache)
    return cache_lib.open_cache(folder, settings, self._render, self.length)
