"""Source registry: opens the sources that configs and command lines name."""

import glob
import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

from mtv_jax.config.options import PositiveInt, build, build_entry
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.labels.join import join_labels
from mtv_jax.data.records import NoRecordsError
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.base import LimitedSource, Paths, Source
from mtv_jax.data.sources.folder import FolderSource
from mtv_jax.data.sources.parquet import ParquetSource, has_images
from mtv_jax.data.sources.tfds import TFDSSource
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  UserError,
  did_you_mean,
)
from mtv_jax.utils.path_patterns import expand_path, pin, split_paths
from mtv_jax.utils.text import list_first

# Source classes, by `type` in a config.
SOURCES: dict[str, type[Source]] = {
  "array_record": ArrayRecordSource,
  "folder": FolderSource,
  "parquet": ParquetSource,
  "scenes": SceneSource,
  "tfds": TFDSSource,
  "webdataset": WebDatasetSource,
}

# Listings of image files, see `sources.listings`.
_LISTINGS = (".json", ".csv", ".tsv")
# Types of shards in a folder; img2dataset writes a table beside each tar.
_BY_PREFERENCE = ("array_record", "webdataset", "parquet")
_SUFFIXES = tuple(SOURCES[kind].suffix for kind in _BY_PREFERENCE)
# In the names of a split's shards or folder, as on the hub.
_SPLITS = [
  re.compile(rf"(?:^|[-_./])(?:{names})(?:[-_./]|$)")
  for names in ("train|training", "val|valid|validation|dev", "test")
]
_EXPECTED = (
  "Expected a folder of images, shards (*.tar, *.parquet, *.array_record) or a"
  " folder of them, a listing (.json, .csv, .tsv), hf://datasets/ORG/NAME or"
  " scenes."
)


def build_source(config: Mapping[str, Any]) -> Source:
  """Builds the source of an entry of `data.train`, with its label sets.

  The entry has `type` (a key of `SOURCES`) and the arguments of that class.
  Without `type`, `find_source` finds it from `path`.
  `labels` (see `labels.join`) adds label sets; `limit` takes that many records,
  evenly spaced; `weight` is the mixing weight and ignored here.
  """
  if config.get("type") is None and config.get("path") is not None:
    found = find_source(config["path"])
    known = inspect.signature(SOURCES[found["type"]]).parameters
    if config.get("images") is not None and "images" not in known:
      raise InputError(
        f"images={config['images']}: the shards {config['path']} contain their"
        " images. Leave out images."
      )
    unread = {"path", "captions", "images"} - {*known}
    config = {k: v for k, v in config.items() if k not in unread} | found
  source = build_entry(
    SOURCES, config, where="data.train", reserved=("labels", "weight", "limit")
  )
  return complete_source(source, config)


def read_weight(config: Mapping[str, Any]) -> float:
  """The mixing weight of an entry of `data.train`."""

  def build_weight(weight: float = 1.0) -> float:
    return float(weight)

  given = {k: v for k, v in config.items() if k == "weight"}
  return build(build_weight, given, where="data.train")


def complete_source(
  source: Source,
  config: Mapping[str, Any],
  *,
  fields: Collection[str] | None = None,
) -> Source:
  """Applies `labels`, of `fields` (None: all), and `limit` to a source."""
  if (labels := config.get("labels")) is not None:
    source = join_labels(source, labels, fields=fields)
  if (limit := config.get("limit")) is None:
    return source

  def limit_source(limit: PositiveInt) -> Source:
    return LimitedSource(source, limit)

  return build(limit_source, {"limit": limit}, where="data.train")


def open_files(paths: Paths, **options: Any) -> Source:
  """Opens files, a folder or a data set of the hub, see `find_source`.

  Options that are None or unknown to the type are ignored.
  """
  entry = find_source(paths)
  parameters = inspect.signature(SOURCES[entry["type"]]).parameters
  given = {k: v for k, v in options.items() if v is not None}
  options = {k: v for k, v in given.items() if k in parameters}
  return build_source(entry | options)


def find_source(
  path: Paths, *, split: Literal["train", "test"] = "train"
) -> dict[str, Any]:
  """Returns `type` and `path` of the source that a path alone names.

  The suffix gives the type of shards (default: tar); .json, .csv, .tsv and a
  .parquet without images are listings of image files. "scenes" are the built-in
  scenes. A folder with images is a folder of image files; another one, and a
  data set of the hub (`hf://datasets/ORG/NAME`), stand for their shards. If the
  names of shards or of a folder's subfolders tell splits, `train` is what is
  not held out, and `test` the validation split, else the test split.

  Raises NoRecordsError for a bucket's folder without shards, InputError for
  `test` if the shards are those of a training split.
  """
  listed = split_paths(path)
  if listed == ["scenes"]:
    return {"type": "scenes"}
  if len(listed) == 1 and _is_folder(folder := listed[0]):
    is_remote = path_lib.is_remote(folder)
    folder = pin(folder) if is_remote else os.path.expanduser(folder)
    for kind in _BY_PREFERENCE:
      if files := _list_shards(folder, SOURCES[kind].suffix):
        return {"type": kind, "path": _choose_split(files, folder, split)}
    if is_remote:
      raise NoRecordsError(
        f"There are no shards in {folder} (*.tar, *.parquet or"
        " *.array_record); image files of a bucket are not read one by one."
      )
    return {"type": "folder", "path": _choose_folder(folder, split)}
  if len(listed) == 1 and _is_listing(listed[0]):
    return {"type": "folder", "path": listed[0]}
  for name in listed:
    _check_shards(name)
  return {"type": source_type(listed), "path": listed}


def list_shared(
  train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]
) -> list[str]:
  """Files and folders of held-out entries that those of `data.train` read.

  Compares paths, not images.
  """
  held = {path for entry in held_out for path in _list_inputs(entry, "test")}
  shared = set()
  for entry in train if held else ():
    trained = {*_list_inputs(entry, "train")}
    shared |= {p for p in held if trained & {p, *map(str, PurePath(p).parents)}}
  return sorted(shared)


def _list_inputs(entry: Mapping[str, Any], split: str) -> list[str]:
  """The shards of a source, or its folder or listing."""
  try:
    if (paths := entry.get("path")) and entry.get("type") is None:
      entry = find_source(paths, split=split)
    paths, kind = entry.get("path", []), entry.get("type")
    paths = [paths] if kind == "folder" else expand_path(paths)
  except UserError:  # Its source or evaluation says why, or reads it itself.
    return []
  paths = [os.path.expanduser(path) for path in paths]
  return [p if path_lib.is_remote(p) else os.path.realpath(p) for p in paths]


def _is_listing(path: str) -> bool:
  """Whether a path is a listing: JSON, a table, or Parquet without images."""
  path = os.path.expanduser(path)
  if path.endswith(ParquetSource.suffix) and os.path.isfile(path):
    return not has_images(path)
  return path.lower().endswith(_LISTINGS)


def _check_shards(name: str) -> None:
  """Raises an error unless a path may name shards."""
  if name.endswith(_SUFFIXES):
    return
  if _is_pattern(name):
    if name.lower().endswith(IMAGE_SUFFIXES):
      raise InputError(f"{name} is a pattern of images: name their folder.")
    return
  path = path_lib.as_path(os.path.expanduser(name))
  if path_lib.exists(path):
    raise InputError(f"{name} is a file of another kind. {_EXPECTED}")
  hint = did_you_mean(path.name, path_lib.list_folder(path.parent), limit=8)
  raise MissingFileError(f"{name} is missing. {hint} {_EXPECTED}")


def _is_pattern(path: str) -> bool:
  return glob.has_magic(path) or "{" in path


def _is_folder(path: str) -> bool:
  if not path_lib.is_remote(path):
    return os.path.isdir(os.path.expanduser(path))
  return not (_is_pattern(path) or path.endswith(_SUFFIXES))


def _list_shards(folder: str, suffix: str) -> list[str]:
  """Shards in a folder or, if it has none, in the folders below.

  None if images are beside them: they are then something else.
  """
  if hub.is_hub(folder):
    try:
      pattern = f"{folder.rstrip('/')}/**/*{suffix}"
      return [*map(os.fspath, expand_path(pattern, suffix=suffix))]
    except MissingFileError:
      return []
  if path_lib.is_remote(folder):
    names = path_lib.list_folder(folder)
    return [f"{folder.rstrip('/')}/{n}" for n in names if n.endswith(suffix)]
  for folders in ([folder], _list_folders(folder)):
    files = [f for part in folders for f in _list_files(part, suffix)]
    if files or any(map(_has_images, folders)):
      return [] if any(map(_has_images, folders)) else files
  return []


def _list_files(folder: str, suffix: str) -> list[str]:
  names = (name for name in os.listdir(folder) if name.endswith(suffix))
  return sorted(os.path.join(folder, name) for name in names)


def _list_folders(folder: str) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.path for entry in entries if entry.is_dir())


def _has_images(folder: str) -> bool:
  return any(n.lower().endswith(IMAGE_SUFFIXES) for n in os.listdir(folder))


def _find_splits(paths: Iterable[str], folder: str) -> list[list[str]]:
  """Paths below a folder that are named as training, validation and test."""
  return [
    [path for path in paths if pattern.search(path[len(folder) :].lower())]
    for pattern in _SPLITS
  ]


def _choose_split(files: Sequence[str], folder: str, split: str) -> list[str]:
  training, validation, test = _find_splits(files, folder)
  if split == "test" and (validation or test):
    return validation or test
  if split == "test" and len(training) == len(files):
    raise InputError(
      f"The shards in {folder} are those of a training split"
      f" ({list_first(files, 3)}): name held-out ones."
    )
  held_out = {*validation, *test}
  return training or [f for f in files if f not in held_out] or list(files)


def _choose_folder(folder: str, split: str) -> str:
  """The subfolder of a split, if a folder's images are all in splits.

  Beside images, or other folders of images, `train` may be a class.
  """
  below = _list_folders(folder)
  training, validation, test = _find_splits(below, folder)
  others = {folder, *below} - {*training, *validation, *test}
  chosen = training if split == "train" else validation or test
  is_whole = len(chosen) != 1 or any(map(_has_images, others))
  return folder if is_whole else chosen[0]


def source_type(paths: Paths) -> str:
  """Returns the `type` of data files; InputError if they differ."""
  listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  by_suffix = {s.suffix: kind for kind, s in SOURCES.items() if s.suffix}
  suffixes = {os.path.splitext(path)[1] for path in listed}
  kinds = {by_suffix.get(suffix, "webdataset") for suffix in suffixes}
  if len(kinds) != 1:
    raise InputError(
      f"{', '.join(map(str, listed))}: expected files of one type, got"
      f" {' and '.join(sorted(kinds))}."
    )
  return kinds.pop()
