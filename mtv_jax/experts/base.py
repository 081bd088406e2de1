"""What labelling asks of an expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A record as an expert takes it.

  Attributes:
    group: records of one group have arrays of the same shapes and can share a
      batch.
    arrays: what goes to the device, without the batch's dimension.
    meta: what `finish` needs to know of the record.
  """

  group: Hashable
  arrays: Mapping[str, np.ndarray]
  meta: Any = None


@runtime_checkable
class Expert(Protocol):
  """A model that labels images, a batch at a time.

  `prepare` and `finish` run on the host, in several threads; `run` is called
  by one, returns before the devices are done, and so keeps them busy.

  Attributes:
    kind: of the labels, "depth" or "boxes".
    settings: everything that decides what the labels are (JSON), for the
      manifest: the model and a hash of its weights, sizes, thresholds.
    rows: how many rows `run` takes, of all devices of this host together.
  """

  kind: str
  settings: Mapping[str, Any]
  rows: int

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """Makes a decoded image ready.

    Args:
      image: as it is shown (EXIF applied), of any size.
      record: key, captions (perhaps none) and `meta`, what its .json says.

    Raises:
      BadRecord: it can't be labelled; it is counted, with the reason.
    """
    ...

  def run(
    self, arrays: Mapping[str, np.ndarray]
  ) -> Mapping[str, jax.Array | np.ndarray]:
    """Starts the model on `rows` records of one group.

    Args:
      arrays: each `[rows, ...]`, as `prepare` made them.

    Returns:
      Arrays `[rows, ...]` on the devices, or NumPy's of an expert that runs on
      the host.
    """
    ...

  def finish(self, outputs: Mapping[str, np.ndarray], meta: Any) -> Outcome:
    """The label of one record.

    Args:
      outputs: its row of each of `run`'s arrays.
      meta: from `prepare`.
    """
    ...
