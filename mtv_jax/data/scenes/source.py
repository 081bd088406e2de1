"""Built-in scenes as a data source, and the cache of rendered records.

The cache is a folder of memory-mapped arrays, one file per field, and
`manifest.json`, which is written last and stores the settings of the records.
Texts are UTF-8, joined by line feeds within a record. For fields of varying
length, `NAME_ends.npy` stores where each record ends.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import filelock
import numpy as np

from mtv_jax.data.records import Record
from mtv_jax.data.scenes import layout
from mtv_jax.data.scenes import render as render_lib
from mtv_jax.data.scenes.layout import DIFFICULTIES, CaptionKind, Level
from mtv_jax.data.scenes.world import CLASS_NAMES
from mtv_jax.data.sources.base import Source
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError, InputError, check_choice
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.threads import map_ahead

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MAX_LENGTH = 10**8  # A mistyped length must not exhaust memory.
_FORMAT = 1
_FIXED = ("image", "depth", "segmentation", "label")  # Of constant shape.
_BOXES = ("boxes", "box_scores")
_TEXTS = ("captions", "phrases")

_Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(eq=False)
class SceneSource(Source):
  """Random-access source of scenes: record i is scene `first + i`.

  Args:
    size: pixels per side of the rendered images.
    length: number of records; also the length of an epoch.
    first: index of the first scene. Training and evaluation use disjoint
      ranges, such as `first=1_000_000` for evaluation.
    seed: the series of scenes.
    difficulty: see `layout.Difficulty`.
    cache: a folder for rendered records, shared by all runs with these
      settings; filled at the first read. Doesn't change the records.
    caption_kinds: the captions that records have, of those of the difficulty;
      all by default. The cache stores all.
  """

  size: int = 96
  _: dataclasses.KW_ONLY
  length: int = 10_000
  first: int = 0
  seed: int = 0
  difficulty: Level = "hard"
  cache: str | None = None
  caption_kinds: tuple[CaptionKind, ...] | None = None

  name = "scenes"
  fields = frozenset(
    ("key", "image", "captions", "depth", "segmentation")
    + ("boxes", "phrases", "box_scores", "label")
  )

  def __post_init__(self):
    render_lib.check_arguments(self.first, self.size, self.seed)
    if not 1 <= self.length <= _MAX_LENGTH:
      raise InputError(
        f"Scenes length {self.length}: expected 1 to {_MAX_LENGTH:,}."
      )
    check_choice("difficulty", self.difficulty, tuple(DIFFICULTIES))
    kinds = DIFFICULTIES[self.difficulty].captions
    chosen = kinds if self.caption_kinds is None else self.caption_kinds
    if not chosen or not {*chosen} <= {*kinds}:
      raise ConfigError(
        f"caption_kinds={self.caption_kinds}: {self.difficulty} scenes have"
        f" {', '.join(kinds)}."
      )
    self._kept_captions = [i for i, kind in enumerate(kinds) if kind in chosen]
    # Not file-based: use a single shard for block shuffling.
    self.shards = np.array([self.length], np.int64)
    # One entry per process: the memory-mapped arrays.
    self._arrays = ProcessCache(self._open_cache, limit=1)

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record i, see `Scene`; depth is inverse, box scores are 1."""
    _, i = self._locate(i)
    if self.cache is None:
      record = self._render(i)
    else:
      record = {"key": self.key(i), **_read_record(self._arrays.get(0), i)}
    captions = record["captions"]
    return {**record, "captions": [captions[k] for k in self._kept_captions]}

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

  def _open_cache(self, _: int) -> _Arrays:
    names = ("size", "length", "first", "seed", "difficulty")
    settings = {name: getattr(self, name) for name in names}
    # Include the ranges, which may change with the version.
    settings["ranges"] = dataclasses.asdict(DIFFICULTIES[self.difficulty])
    refuse_remote(self.cache, "The cache", "Pass a folder of this machine.")
    folder = pathlib.Path(self.cache)
    return _open_arrays(folder, settings, self._render, self.length)


def _open_arrays(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  render: Callable[[int], Record],
  length: int,
) -> _Arrays:
  """Maps the arrays of a folder; one process renders them if missing.

  `settings` (JSON) is everything that the records depend on.
  """
  settings = json.loads(json.dumps(settings))  # Tuples become lists.
  if not _is_complete(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
      # If the file system lacks locks, several processes render equal files.
      with contextlib.suppress(NotImplementedError, OSError):
        stack.enter_context(lock)
      if not _is_complete(folder, settings):
        atomic.remove_abandoned(folder)
        _write_cache(folder, settings, render, length)
  names = json.loads((folder / MANIFEST).read_bytes())["arrays"]
  mapped = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in names}
  # Plain array views: slicing a `memmap` is slow.
  return {name: np.asarray(array) for name, array in mapped.items()}


def _read_record(arrays: _Arrays, i: int) -> Record:
  """Returns record i, without its key; arrays are views of the files."""
  record: Record = {name: arrays[name][i] for name in _FIXED}
  record["label"] = int(record["label"])
  for name in (*_BOXES, *_TEXTS):
    ends = arrays["boxes_ends" if name in _BOXES else f"{name}_ends"]
    values = arrays[name][ends[i - 1] if i else 0 : ends[i]]
    if name in _TEXTS:
      values = values.tobytes().decode().split("\n") if len(values) else []
    record[name] = values
  return record


def _is_complete(folder: pathlib.Path, settings: Mapping[str, Any]) -> bool:
  """Whether the folder is complete; ConfigError if its settings differ."""
  try:
    manifest = json.loads((folder / MANIFEST).read_bytes())
  except FileNotFoundError:
    return False
  except ValueError:
    manifest = {}
  expected = {"format": _FORMAT, "settings": dict(settings)}
  if {k: manifest.get(k) for k in expected} != expected:
    raise ConfigError(
      f"cache={folder} has records of {manifest.get('settings')}, expected"
      f" {dict(settings)}. Choose another folder, or remove this one."
    )
  return True


def _write_cache(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  render: Callable[[int], Record],
  length: int,
) -> None:
  """Renders all records and writes the files, manifest last."""
  log.info("Rendering %d scenes to %s, once.", length, folder)
  start = time.perf_counter()
  first_record = render(0)
  parts = {name: [] for name in (*_BOXES, *_TEXTS)}
  arrays = {}
  with contextlib.ExitStack() as stack:
    for name in _FIXED:
      value = np.asarray(first_record[name])
      path = folder / f"{name}.npy"
      temporary = stack.enter_context(atomic.replace_file(path))
      shape = (length, *value.shape)
      arrays[name] = np.lib.format.open_memmap(
        temporary, "w+", value.dtype, shape
      )
    for i, record in enumerate(map_ahead(render, range(length))):
      for name in _FIXED:
        arrays[name][i] = record[name]
      for name in _BOXES:
        parts[name].append(record[name])
      for name in _TEXTS:
        text = "\n".join(record[name]).encode()
        parts[name].append(np.frombuffer(text, np.uint8))
    for array in arrays.values():
      array.flush()
  for name, values in parts.items():
    arrays[name] = np.concatenate(values)
    _save_array(folder, name, arrays[name])
  for name in ("boxes", *_TEXTS):
    arrays[f"{name}_ends"] = np.cumsum([len(values) for values in parts[name]])
    _save_array(folder, f"{name}_ends", arrays[f"{name}_ends"])
  manifest = {
    "format": _FORMAT,
    "settings": dict(settings),
    "arrays": {
      name: [str(array.dtype), *array.shape] for name, array in arrays.items()
    },
  }
  atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
  log.info("Rendered in %.0f s.", time.perf_counter() - start)


def _save_array(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
  with (
    atomic.replace_file(folder / f"{name}.npy") as temporary,
    temporary.open("wb") as stream,
  ):
    np.save(stream, array)
