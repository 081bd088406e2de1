"""Feature labels: a teacher's pooled and patch features, quantized to 8 bits.

Each vector (a patch, or the pooled one) has 8-bit codes and a scale that maps
its largest absolute value to the format's largest. The rounding error is half a
step of 1/127 of that value for `int8`, and at most 1/16 of each value for
`float8` (e4m3), which preserves small channels next to very large ones.

A serialized label has `key`, `valid`, `format` and for each array `NAME`
(codes), `NAME/scale` (float32) and `NAME/width`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  Registers float8 with NumPy.
import numpy as np
from jaxtyping import Float, Float32, UInt8

from mtv_jax.config.feature_layout import DTYPES, FeatureLayout, Format
from mtv_jax.data.labels.packing import read_typed_field

_LARGEST = {"float8": 448.0, "int8": 127.0}
_MAX_WIDTH = 1 << 16


@dataclasses.dataclass(frozen=True)
class Quantized:
  """8-bit vectors: codes, stored as bytes, times a scale per vector."""

  codes: UInt8[np.ndarray, "n d"]
  scale: Float32[np.ndarray, " n"]

  @classmethod
  def of(cls, x: Float[np.ndarray, "n d"], format: Format) -> "Quantized":
    """Rounds vectors to the nearest codes."""
    largest = np.abs(x).max(axis=1, initial=0.0)
    scale = (largest / _LARGEST[format]).astype(np.float32)
    # Avoids a zero scale, and keeps products with a scale finite.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    codes = np.clip(x / scale[:, None], -_LARGEST[format], _LARGEST[format])
    codes = np.rint(codes) if format == "int8" else codes
    return cls(codes.astype(np.dtype(DTYPES[format])).view(np.uint8), scale)

  def values(self, format: Format) -> Float32[np.ndarray, "n d"]:
    """Dequantizes the vectors."""
    codes = self.codes.view(np.dtype(DTYPES[format])).astype(np.float32)
    return codes * self.scale[:, None]


@dataclasses.dataclass(frozen=True)
class FeatureLabel:
  """Features of one image: `pooled` `[1, e]`, and `patches` or `layerI`.

  Patches are `[p, d]`, row-major over a square grid that covers the image.
  """

  arrays: Mapping[str, Quantized]
  format: Format

  def pack(self) -> dict[str, Any]:
    """Returns the fields of a serialized label."""
    packed: dict[str, Any] = {"format": self.format}
    for name, array in self.arrays.items():
      packed |= {
        name: array.codes.tobytes(),
        f"{name}/scale": array.scale.astype("<f4").tobytes(),
        f"{name}/width": array.codes.shape[1],
      }
    return packed

  def problem_with(self, layout: FeatureLayout) -> str:
    """Describes how the label differs from a layout; empty if it fits."""
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
    """The inverse of `pack`; ValueError for malformed input."""
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
      if kind == "float8" and (codes & 0x7F == 0x7F).any():  # NaN.
        raise ValueError(f"{name} has numbers that are not finite")
    return cls(arrays, kind)
