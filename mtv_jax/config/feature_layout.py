"""Batch layout of teacher features, shared by data and objectives."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

# 8-bit formats, and their dtype names; ml_dtypes registers float8.
Format = Literal["float8", "int8"]
DTYPES = {"float8": "float8_e4m3fn", "int8": "int8"}


@dataclasses.dataclass(frozen=True)
class FeatureLayout:
  """Shapes of one teacher's features in a batch."""

  format: Format
  shapes: Mapping[str, tuple[int, int]]  # (vectors, channels) by name.

  def fields(self, teacher: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of a row, by batch field."""
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
      field_name(teacher, "valid"): ((), np.bool_)
    }
    for name, shape in self.shapes.items():
      fields[field_name(teacher, name)] = (shape, np.uint8)
      fields[field_name(teacher, name, "scale")] = (shape[:1], np.float32)
    return fields


def field_name(teacher: str, name: str, part: str = "") -> str:
  """Name of a batch field with a teacher's features."""
  return "_".join(filter(None, ("features", teacher, name, part)))
