"""Where records come from: random access to tars, ArrayRecord, TFDS, scenes.

A source has `len`, `source[i]` (a record, see `records.py`), `fields` (the
record fields it gives), `name`, a short `repr` and `shards` (int64, cumulative
record counts of its files, by which a shuffle in blocks keeps reads together).
It may be read by several threads and pickled to other processes.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from mtv_jax.data.labels import join as labels
from mtv_jax.data.records import Record
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.tfds import TFDSSource
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.utils.errors import did_you_mean

__all__ = [
  "ArrayRecordSource",
  "Source",
  "TFDSSource",
  "WebDatasetSource",
  "build_source",
]


@runtime_checkable
class Source(Protocol):
  """What the pipeline asks of a source."""

  name: str
  fields: frozenset[str]
  shards: np.ndarray

  def __len__(self) -> int: ...

  def __getitem__(self, i: SupportsIndex) -> Record: ...


def build_source(config: Mapping[str, Any]) -> Source:
  """The source that an entry of `data.train` describes.

  Args:
    config: `type` ("webdataset", "array_record", "tfds" or "scenes") and the
      arguments of its class; `labels` (see `labels.join`) adds label sets;
      `weight` is for the mixture and not read here.

  Raises:
    ValueError: for a type or an argument that there is not, or one missing, or
      a label set that does not fit.
    FileNotFoundError: for files that are missing.
  """
  beside = ("type", "weight", "labels")
  options = {k: v for k, v in config.items() if k not in beside}
  if "type" not in config:
    raise ValueError(
      f"A data source needs a type; got only {sorted(config)}."
      f" {did_you_mean('', _TYPES)}"
    )
  kind = config["type"]
  if kind not in _TYPES:
    raise ValueError(
      f"Unknown data source type {kind!r}. {did_you_mean(str(kind), _TYPES)}"
    )
  make = _TYPES[kind]()
  parameters = inspect.signature(make).parameters
  for option in options:
    if option not in parameters:
      raise ValueError(
        f"A source of type {kind!r} has no option {option!r}."
        f" {did_you_mean(option, parameters)}"
      )
  for name, parameter in parameters.items():
    if parameter.default is parameter.empty and name not in options:
      raise ValueError(
        f"A source of type {kind!r} needs {name!r}; got {sorted(options)}."
      )
  source = make(**options)
  if config.get("labels") is None:
    return source
  return labels.join(source, config["labels"])


def _scenes() -> Callable[..., Source]:
  # Late: drawing needs its textures, reading does not.
  from mtv_jax.data.scenes.source import SceneSource

  return SceneSource


_TYPES: dict[str, Callable[[], Callable[..., Source]]] = {
  "array_record": lambda: ArrayRecordSource,
  "scenes": _scenes,
  "tfds": lambda: TFDSSource,
  "webdataset": lambda: WebDatasetSource,
}
