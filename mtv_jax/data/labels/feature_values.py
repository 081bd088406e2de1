"""Feature labels: a teacher's pooled and patch features in 8 bits.

Each vector (of a patch, or the pooled one) has codes of 8 bits and a scale: its
largest absolute value is the largest one of the format. `int8` rounds by half a
step of 1/127 of that, `float8` (e4m3) by 1/16 of each value at most, which
keeps the small channels of features with a few very large ones.

A serialized label has, beside `key` and `valid`, `format` and for each array
`NAME` (codes), `NAME/scale` (float32) and `NAME/width`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows float8 by it.
import numpy as np
from jaxtyping import Float, Float32, UInt8

from mtv_jax.config.feature_layout import DTYPES, FeatureLayout, Format
from mtv_jax.data.labels.packing import read_typed_field

_LARGEST = {"float8": 448.0, "int8": 127.0}
_MAX_WIDTH = 1 << 16


@dataclasses.dataclass(frozen=True)
class Quantized:
  """Vectors in 8 bits: codes, as bytes, times a scale for each vector."""

  codes: UInt8[np.ndarray, "n d"]
  scale: Float32[np.ndarray, " n"]

  @classmethod
  def of(cls, x: Float[np.ndarray, "n d"], format: Format) -> "Quantized":
    """Rounds vectors to the nearest codes."""
    largest = np.abs(x).max(axis=1, initial=0.0)
    scale = (largest / _LARGEST[format]).astype(np.float32)
    # Not zero, and so that no product with a scale overflows.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    codes = np.clip(x / scale[:, None], -_LARGEST[format], _LARGEST[format])
    codes = np.rint(codes) if format == "int8" else codes
    return cls(codes.astype(np.dtype(DTYPES[format])).view(np.uint8), scale)

  def values(self, format: Format) -> Float32[np.ndarray, "n d"]:
    """The vectors, up to rounding."""
    codes = self.codes.view(np.dtype(DTYPES[format])).astype(np.float32)
    return codes * self.scale[:, None]


@dataclasses.dataclass(frozen=True)
class FeatureLabel:
  """Features of one image: `pooled` `[1, e]`, and `patches` or `layerI`.

  Patches are `[p, d]`, row by row of a square grid over the whole image.
  """

  arrays: Mapping[str, Quantized]
  format: Format

  def pack(self) -> dict[str, Any]:
    """The fields of a serialized label."""
    packed: dict[str, Any] = {"format": self.format}
    for name, array in self.arrays.items():
      packed |= {
        name: array.codes.tobytes(),
        f"{name}/scale": array.scale.astype("<f4").tobytes(),
        f"{name}/width": array.codes.shape[1],
      }
    return packed

  def problem_with(self, layout: FeatureLayout) -> str:
    """How the label differs from a layout; empty if it does not."""
    given = {n: a.codes.shape for n, a in self.arrays.items()}
    found = {n: given.get(n) for n in layout.shapes}
    if self.format == layout.format and found == dict(layout.shapes):
      return ""
    return (
      f"are {self.format} of {given}; expected {layout.format} of "
      f"{dict(layout.shapes)}"
    )

  @classmethod
  def unpack(cls, packed: Mapping[str, Any]) -> "FeatureLabel":
    """The inverse of `pack`; a ValueError for what it can't have written."""
    kind = read_typed_field(packed, "format", str)
    if kind not in DTYPES:
      raise ValueError(f"format is {kind!r}, expected one of {sorted(DTYPES)}")
    arrays = {}
    names = [n.removesuffix("/scale") for n in packed if n.endswith("/scale")]
    for name in names:
      width = read_typed_field(packed, f"{name}/width", int)
      if not 1 <= width <= _MAX_WIDTH:
        raise ValueError(f"{name}/width is {width}, expected 1 to {_MAX_WIDTH}")
      data = np.frombuffer(read_typed_field(packed, name, bytes), np.uint8)
      scale = np.frombuffer(
        read_typed_field(packed, f"{name}/scale", bytes), "<f4"
      )
      if len(data) % width:
        raise ValueError(f"{name} has {len(data):,} bytes, of rows of {width}")
      codes = data.reshape(-1, width)
      if len(codes) != len(scale):
        raise ValueError(f"{name} has {len(codes)} rows, {len(scale)} scales")
      if not np.isfinite(scale).all():
        raise ValueError(f"{name} has scales that are not finite")
      arrays[name] = Quantized(codes, scale.astype(np.float32))
      if kind == "float8" and (codes & 0x7F == 0x7F).any():  # Its NaNs.
        raise ValueError(f"{name} has numbers that are not finite")
    return cls(arrays, kind)
