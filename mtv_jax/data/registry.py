"""Source registry: opens the sources that configs and command lines name."""

import glob
import inspect
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from mtv_jax.config.options import PositiveInt, build, build_entry
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.labels.join import join_labels
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.base import LimitedSource, Paths, Source
from mtv_jax.data.sources.folder import FolderSource
from mtv_jax.data.sources.parquet import ParquetSource
from mtv_jax.data.sources.tfds import TFDSSource
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError
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
# In the names of a split's shards or folder, as on the hub.
_TRAINING, _HELD_OUT = (
  re.compile(rf"(?:^|[-_./])(?:{names})(?:[-_./]|$)")
  for names in ("train", "val|valid|validation|dev|test")
)


def build_source(config: Mapping[str, Any]) -> Source:
  """Builds the source of an entry of `data.train`, with its label sets.

  The entry has `type` (a key of `SOURCES`, or `MODULE:NAME` for a user's class)
  and the arguments of that class.
  Without `type`, `find_source` finds it from `path`.
  `labels` (see `labels.join`) adds label sets; `limit` takes that many records,
  evenly spaced; `weight` is the mixing weight and ignored here.
  """
  if config.get("type") is None and config.get("path") is not None:
    others = {k: v for k, v in config.items() if k != "path"}
    config = others | find_source(config["path"])
  reserved = "labels", "weight", "limit"
  source = build_entry(
    SOURCES, config, where="data.train", reserved=reserved, base=Source
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

  The suffix gives the type of shards (default: tar); .json, .csv and .tsv are
  listings of image files. "scenes" are the built-in scenes. A folder with
  images is a folder of image files; another one, and a data set of the hub
  (`hf://datasets/ORG/NAME`), stand for their shards. If names tell splits,
  `train` is what is not held out, and `test` is the validation or test split.

  Raises InputError for a bucket's folder without shards, and for `test` if the
  shards are those of a training split.
  """
  listed = split_paths(path)
  if listed == ["scenes"]:
    return {"type": "scenes"}
  if len(listed) == 1 and _is_folder(folder := listed[0]):
    if not path_lib.is_remote(folder):
      folder = os.path.expanduser(folder)
    for kind in _BY_PREFERENCE:
      if files := _list_shards(folder, SOURCES[kind].suffix):
        return {"type": kind, "path": _choose_split(files, folder, split)}
    if path_lib.is_remote(folder):
      raise InputError(
        f"There are no shards in {folder} (*.tar, *.parquet or"
        " *.array_record); image files of a bucket are not read one by one."
      )
    return {"type": "folder", "path": folder}
  if len(listed) == 1 and listed[0].lower().endswith(_LISTINGS):
    return {"type": "folder", "path": listed[0]}
  suffixes = tuple(SOURCES[kind].suffix for kind in _BY_PREFERENCE)
  for name in listed:
    if not (name.endswith(suffixes) or glob.has_magic(name) or "{" in name):
      exists = path_lib.exists(os.path.expanduser(name))
      problem = "a file of another kind" if exists else "missing"
      raise (InputError if exists else MissingFileError)(
        f"{name} is no data: {problem}. Expected a folder of images, shards"
        " (*.tar, *.parquet,"
        " *.array_record) or a folder of them, a listing (.json, .csv, .tsv),"
        " hf://datasets/ORG/NAME or scenes."
      )
  return {"type": source_type(listed), "path": listed}


def _is_folder(path: str) -> bool:
  if not path_lib.is_remote(path):
    return os.path.isdir(os.path.expanduser(path))
  suffixes = tuple(SOURCES[kind].suffix for kind in _BY_PREFERENCE)
  return not (glob.has_magic(path) or "{" in path or path.endswith(suffixes))


def _list_shards(folder: str, suffix: str) -> list[str]:
  """Shards in a folder or, if it has none, in the folders below.

  None if images are beside them: they are then something else.
  """
  if hub.is_hub(folder):
    try:
      pattern = f"{pin(folder).rstrip('/')}/**/*{suffix}"
      return [*map(os.fspath, expand_path(pattern, suffix=suffix))]
    except MissingFileError:
      return []
  if path_lib.is_remote(folder):
    names = path_lib.list_folder(folder)
    return [f"{folder.rstrip('/')}/{n}" for n in names if n.endswith(suffix)]
  entries = sorted(os.path.join(folder, name) for name in os.listdir(folder))
  below = [entry for entry in entries if os.path.isdir(entry)]
  for folders in ([folder], below):
    files = [f for part in folders for f in _list_files(part, suffix)]
    if files or any(map(_has_images, folders)):
      return [] if any(map(_has_images, folders)) else files
  return []


def _list_files(folder: str, suffix: str) -> list[str]:
  names = (name for name in os.listdir(folder) if name.endswith(suffix))
  return sorted(os.path.join(folder, name) for name in names)


def _has_images(folder: str) -> bool:
  return any(n.lower().endswith(IMAGE_SUFFIXES) for n in os.listdir(folder))


def _choose_split(files: Sequence[str], folder: str, split: str) -> list[str]:
  start = 0 if hub.is_hub(folder) else len(folder)
  names = {file: file[start:].lower() for file in files}
  held_out = [f for f in files if _HELD_OUT.search(names[f])]
  if split == "test" and held_out:
    return held_out
  training = [f for f in files if _TRAINING.search(names[f])]
  if split == "test" and len(training) == len(files):
    raise InputError(
      f"The shards in {folder} are those of a training split"
      f" ({list_first(files, 3)}): name held-out ones."
    )
  return training or [f for f in files if f not in held_out] or list(files)


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
