"""Expert protocol, and a decorator that checks experts' options."""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from mtv_jax.config.options import build
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record

Image = UInt8[np.ndarray, "h w 3"]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PreparedInput:
  """An expert's input for one record."""

  group: Hashable  # A group's records have equal shapes and share batches.
  arrays: Arrays  # For `run`, without a batch dimension.
  meta: Any = None  # For `finish`.


@runtime_checkable
class Expert(Protocol):
  """A model that labels images in batches.

  `prepare` and `finish` run on the host in several threads. `run` is called
  from one thread and returns before the devices are done, to overlap host and
  device work.
  """

  kind: str  # Kind of labels, one of `label_values.KINDS`.
  # Everything that determines the labels (JSON), for the manifest: model, hash
  # of the weights, sizes, thresholds.
  settings: Mapping[str, Any]
  rows: int  # Batch size of `run`, over all devices of this host.

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses a decoded image.

    Args:
      image: image of any size, with EXIF rotation applied.
      record: key, captions (possibly empty) and `meta`, its .json fields.

    Raises:
      BadRecord: the record cannot be labelled; it is counted by reason.
    """
    ...

  def run(self, arrays: Arrays) -> Mapping[str, jax.Array | np.ndarray]:
    """Starts the model on stacked arrays `[rows, ...]` of one group.

    Returns arrays `[rows, ...]`; experts that run on the host return NumPy.
    """
    ...

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Converts one record's row of `run`'s arrays to its label."""
    ...


def check_options(load: Callable[..., Expert]) -> Callable[..., Expert]:
  """Decorates `load_expert` to check options against its annotations."""
  name = load.__module__.removeprefix("mtv_jax.experts.")

  @functools.wraps(load, updated=())
  def checked_load(path: str | os.PathLike, **options: Any) -> Expert:
    return build(functools.partial(load, path), options, where=name)

  return checked_load
