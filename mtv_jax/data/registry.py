"""Source registry: opens the sources that configs and command lines name."""

import inspect
import os
from collections.abc import Collection, Mapping
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
from mtv_jax.utils.errors import InputError

# Source classes, by `type` in a config.
SOURCES: dict[str, type[Source]] = {
  "array_record": ArrayRecordSource,
  "folder": FolderSource,
  "parquet": ParquetSource,
  "scenes": SceneSource,
  "tfds": TFDSSource,
  "webdataset": WebDatasetSource,
}


def build_source(config: Mapping[str, Any]) -> Source:
  """Builds the source of an entry of `data.train`, with its label sets.

  The entry has `type` (a key of `SOURCES`) and the arguments of that class.
  `labels` (see `labels.join`) adds label sets; `limit` takes that many records,
  evenly spaced; `weight` is the mixing weight and ignored here.
  """
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
  """Opens data files as a source; the suffix gives the type (default: tar).

  Options that are None or unknown to the type are ignored.
  """
  listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  kind = source_type(paths)
  parameters = inspect.signature(SOURCES[kind]).parameters
  given = {k: v for k, v in options.items() if v is not None}
  options = {k: v for k, v in given.items() if k in parameters}
  return build_source({"type": kind, "path": listed, **options})


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
