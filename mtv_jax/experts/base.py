"""Contract of an expert: a model that labels images in batches."""

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


@dataclasses.dataclass(frozen=True)
class PreparedInput:
  """An expert's input for one record."""

  group: Hashable  # Records of one group have equal shapes and share batches.
  arrays: Mapping[str, np.ndarray]  # For `run`, without a batch dimension.
  meta: Any = None  # For `finish`.


@runtime_checkable
class Expert(Protocol):
  """A model that labels images, a batch at a time.

  `prepare` and `finish` run on the host in several threads; `run` is called
  from one thread and returns before the devices are done, which overlaps host
  and device.
  """

  kind: str  # Kind of the labels, of `label_values.KINDS`.
  # All that determines the labels (JSON), for the manifest: the model and a
  # hash of its weights, sizes, thresholds.
  settings: Mapping[str, Any]
  rows: int  # Batch size of `run`, over all devices of this host.

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> PreparedInput:
    """Preprocesses a decoded image.

    Args:
      image: of any size, with EXIF rotation applied.
      record: key, captions (possibly none) and `meta`, the fields of its .json.

    Raises:
      BadRecord: it cannot be labelled; it is counted, with the reason.
    """
    ...

  def run(
    self, arrays: Mapping[str, np.ndarray]
  ) -> Mapping[str, jax.Array | np.ndarray]:
    """Starts the model on the stacked arrays `[rows, ...]` of one group.

    Returns arrays `[rows, ...]`, NumPy's from an expert that runs on the host.
    """
    ...

  def finish(
    self, outputs: Mapping[str, np.ndarray], meta: Any
  ) -> LabelOutcome:
    """Makes one record's label from its row in each of `run`'s arrays."""
    ...


def check_options(load: Callable[..., Expert]) -> Callable[..., Expert]:
  """Decorates `load_expert`: checks options against its annotations."""
  name = load.__module__.removeprefix("mtv_jax.experts.")

  @functools.wraps(load, updated=())
  def checked_load(path: str | os.PathLike, **options: Any) -> Expert:
    return build(functools.partial(load, path), options, where=name)

  return checked_load
