"""Base class of host ops."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtv_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Field:
  """Shape and dtype of a row of one batch field."""

  shape: tuple[int, ...]
  dtype: np.dtype


class HostOp(abc.ABC):
  """An op in `data.ops`: a frozen dataclass whose fields are its arguments."""

  # Whether the op draws random numbers; `rng` is None if not.
  random: ClassVar[bool] = False
  # Shape and dtype of each batch field that the op adds; a string in a shape
  # names the argument with the length.
  batch_fields: ClassVar[Mapping[str, tuple[tuple[int | str, ...], Any]]] = {}
  # Whether to leave the op out if the run reads none of these fields.
  is_optional: ClassVar[bool] = False
  # Each must exist in at least one source, or the op would only add zeros.
  record_fields: ClassVar[frozenset[str]] = frozenset()
  # At least one of these must exist in some source, unless the set is empty.
  any_record_field: ClassVar[frozenset[str]] = frozenset()

  @functools.cached_property
  def fields(self) -> dict[str, Field]:
    """The batch fields that the op adds."""
    return {
      name: Field(
        tuple(getattr(self, n) if isinstance(n, str) else n for n in shape),
        np.dtype(dtype),
      )
      for name, (shape, dtype) in self.batch_fields.items()
    }

  @abc.abstractmethod
  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    """Returns the new record; may modify its argument. Raises BadRecord."""
