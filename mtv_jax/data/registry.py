"""Source registry: opens the sources that configs and command lines name."""

import glob
import inspect
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mtv_jax.config.options import PositiveInt, build, build_entry
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
# In the names of a training split's shards or folder, as on the hub.
_TRAINING = re.compile(r"(?:^|[-_./])train(?:[-_./]|$)")


def build_source(config: Mapping[str, Any]) -> Source:
  """Builds the source of an entry of `data.train`, with its label sets.

  The entry has `type` (a key of `SOURCES`) and the arguments of that class.
  Without `type`, `find_source` finds it from `path`.
  `labels` (see `labels.join`) adds label sets; `limit` takes that many records,
  evenly spaced; `weight` is the mixing weight and ignored here.
  """
  if config.get("type") is None and config.get("path") is not None:
    others = {k: v for k, v in config.items() if k != "path"}
    config = others | find_source(config["path"])
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


def find_source(path: Paths) -> dict[str, Any]:
  """Returns `type` and `path` of the source that a path alone names.

  The suffix gives the type of shards (default: tar); .json, .csv and .tsv are
  listings of image files. A folder, and a data set of the hub
  (`hf://datasets/ORG/NAME`), stand for their shards, those of the training
  split if names tell it; a local folder without shards, for its image files.
  "scenes" are the built-in scenes.
  """
  listed = split_paths(path)
  if listed == ["scenes"]:
    return {"type": "scenes"}
  if len(listed) == 1 and _is_folder(folder := listed[0]):
    for kind, source in SOURCES.items():
      if source.suffix and (files := _list_shards(folder, source.suffix)):
        training = [f for f in files if _TRAINING.search(f[len(folder) :])]
        return {"type": kind, "path": training or files}
    if path_lib.is_remote(folder):
      raise InputError(
        f"There are no shards in {folder} (*.tar, *.parquet or"
        " *.array_record); image files of a bucket are not read one by one."
      )
    return {"type": "folder", "path": folder}
  if len(listed) == 1 and listed[0].lower().endswith(_LISTINGS):
    return {"type": "folder", "path": listed[0]}
  return {"type": source_type(listed), "path": listed}


def _is_folder(path: str) -> bool:
  if not path_lib.is_remote(path):
    return os.path.isdir(os.path.expanduser(path))
  return not (glob.has_magic(path) or "{" in path or Path(path).suffix)


def _list_shards(folder: str, suffix: str) -> list[str]:
  """Shards in a folder or, if it has none, in the folders below."""
  if hub.is_hub(folder):
    try:
      pattern = f"{pin(folder).rstrip('/')}/**/*{suffix}"
      return [*map(os.fspath, expand_path(pattern, suffix=suffix))]
    except MissingFileError:
      return []
  if path_lib.is_remote(folder):
    names = path_lib.list_folder(folder)
    return [f"{folder.rstrip('/')}/{n}" for n in names if n.endswith(suffix)]
  folder = glob.escape(os.path.expanduser(folder))
  direct = glob.glob(f"{folder}/*{suffix}")
  return sorted(direct or glob.glob(f"{folder}/*/*{suffix}"))


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
