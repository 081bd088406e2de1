"""Label values (depth, boxes, features): validation and serialization.

Depth labels are inverse depth (larger is nearer) of the whole image, squashed
to a square and scaled to 16 bits. Box labels are boxes in the unit square, each
with a phrase and a score. `make_depth` and `make_boxes` drop unusable raw
values and count them by reason.

A serialized label is a msgpack map with `key`, `valid` and, if valid, `png16`
(an image file of values up to 2^`bits` - 1, by default 16 bits), `lo`, `hi`,
`side` for depth; `boxes` (uint16, 65535 times the coordinate), `scores`
(float32) and `phrases` for boxes; `format` and for each array `NAME` (codes),
`NAME/scale` (float32) and `NAME/width` for features.
"""

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import cv2
import ml_dtypes  # noqa: F401  Registers float8 with NumPy.
import msgpack
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8, UInt16

from mtv_jax.config.feature_layout import DTYPES, FeatureLayout, Format
from mtv_jax.config.options import Range
from mtv_jax.data.records import LABEL_FIELDS, content_errors
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.utils.errors import InputError

KINDS = tuple(LABEL_FIELDS)

UINT16_MAX = 65535
# Minimum labelled pixels per map: the loss fits a scale and a shift to them.
MIN_VALID = 16
MIN_SIDE = 4
# Default size of a depth label (docs/experts.md).
SIDE, BITS = 96, 10
# Bits of a stored value: a map needs at least 2^2 levels.
Bits = Annotated[int, Range(min=2, max=16)]
# Limits of a stored label, far above the sizes of experts and data sets.
_MAX_SIDE = 4096
_MAX_WIDTH = 1 << 16
_MAX_ENTRIES = 10_000
_MAX_BYTES = 1 << 26
_MAX_CODE = {"float8": 448.0, "int8": 127.0}  # By format.
# A map with a smaller relative range is constant, up to float32 rounding.
_MIN_RELATIVE_RANGE = 1e-5
# Distance outside the image that is attributed to rounding errors.
_BOUNDARY_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class DepthLabel:
  """Inverse depth of one image."""

  # 0 is unlabelled; 1 to 65535 map to `low` to `high`, in the original unit.
  values: UInt16[np.ndarray, "side side"]
  low: float
  high: float
  bits: int = 16  # Precision of the values.

  @property
  def inverse_depth(self) -> Float32[np.ndarray, "side side"]:
    """Inverse depth in the original unit; NaN if unlabelled."""
    fraction = (self.values.astype(np.float32) - 1) / (UINT16_MAX - 1)
    inverse = self.low + fraction * (self.high - self.low)
    return np.where(self.values > 0, inverse, np.nan).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class BoxLabel:
  """Boxes (y0, x0, y1, x1) of one image in the unit square; may be empty."""

  boxes: Float32[np.ndarray, "n 4"]
  phrases: tuple[str, ...]
  scores: Float32[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Quantized:
  """8-bit vectors: codes, stored as bytes, times a scale per vector.

  The scale maps a vector's largest absolute value to the format's largest. The
  rounding error is half a step of 1/127 of that value for `int8`, and at most
  1/16 of each value for `float8` (e4m3), which preserves small channels next to
  very large ones.
  """

  codes: UInt8[np.ndarray, "n d"]
  scale: Float32[np.ndarray, " n"]

  @classmethod
  def of(cls, x: Float[np.ndarray, "n d"], format: Format) -> "Quantized":
    """Rounds vectors to the nearest codes."""
    largest = np.abs(x).max(axis=1, initial=0.0)
    scale = (largest / _MAX_CODE[format]).astype(np.float32)
    # Avoids a zero scale, and keeps products with a scale finite.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    codes = np.clip(x / scale[:, None], -_MAX_CODE[format], _MAX_CODE[format])
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
    shapes = {n: a.codes.shape for n, a in self.arrays.items()}
    layout_shapes = {n: shapes.get(n) for n in layout.shapes}
    if self.format == layout.format and layout_shapes == dict(layout.shapes):
      return ""
    expected = f"{layout.format} of {dict(layout.shapes)}"
    return f"are {self.format} of {shapes}; expected {expected}"

  @classmethod
  def unpack(cls, packed: Mapping[str, Any]) -> "FeatureLabel":
    """Inverse of `pack`; raises ValueError for malformed input."""
    kind = _read_field(packed, "format", str)
    if kind not in DTYPES:
      raise ValueError(f"format is {kind!r}, expected one of {sorted(DTYPES)}")
    arrays = {}
    names = [n.removesuffix("/scale") for n in packed if n.endswith("/scale")]
    for name in names:
      width = _read_field(packed, f"{name}/width", int)
      if not 1 <= width <= _MAX_WIDTH:
        raise ValueError(f"{name}/width is {width}, expected 1 to {_MAX_WIDTH}")
      data = np.frombuffer(_read_field(packed, name, bytes), np.uint8)
      scale = np.frombuffer(_read_field(packed, f"{name}/scale", bytes), "<f4")
      if len(data) % width:
        raise ValueError(f"{name} has {len(data):,} bytes for rows of {width}")
      codes = data.reshape(-1, width)
      if len(codes) != len(scale):
        raise ValueError(f"{name} has {len(codes)} rows, {len(scale)} scales")
      if not np.isfinite(scale).all():
        raise ValueError(f"{name} has scales that are not finite")
      arrays[name] = Quantized(codes, scale.astype(np.float32))
      if kind == "float8" and (codes & 0x7F == 0x7F).any():  # NaN.
        raise ValueError(f"{name} has numbers that are not finite")
    return cls(arrays, kind)


Label = DepthLabel | BoxLabel | FeatureLabel


@dataclasses.dataclass(frozen=True)
class LabelOutcome:
  """A label or None, with counts of dropped or changed parts by reason."""

  label: Label | None
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def no_label(reason: str) -> LabelOutcome:
  """Outcome for an image without a label."""
  return LabelOutcome(None, {reason: 1})


def _round_values(
  values: UInt16[np.ndarray, "h w"], top: int, new_top: int
) -> UInt16[np.ndarray, "h w"]:
  """Maps values 1 to `top` to 1 to `new_top`, and 0 to 0."""
  fraction = (values.astype(np.float64) - 1) / (top - 1)
  scaled = 1 + np.rint(fraction * (new_top - 1))
  return np.where(values > 0, scaled, 0).astype(np.uint16)


def make_depth(
  inverse: Float[np.ndarray, "h w"],
  *,
  side: int,
  bits: int = 16,
  valid: Bool[np.ndarray, "h w"] | None = None,
  min_valid: int = MIN_VALID,
) -> LabelOutcome:
  """Makes a depth label from 1 / depth or from a disparity in any unit.

  A stored pixel is the mean over the finite and `valid` part of its area. It is
  labelled if that part is more than half. A label needs at least `min_valid`
  labelled pixels.
  """
  counts = {}
  finite = np.isfinite(inverse)
  valid = np.ones_like(finite) if valid is None else valid
  usable = finite & valid
  if (valid & ~finite).any():
    counts["depth: a map with NaN or infinite pixels, left without label"] = 1
  values, labelled = _squash(np.where(usable, inverse, 0), usable, side)
  pixels = values[labelled]
  if pixels.size < max(min_valid, 2):
    counts[f"depth: a map with fewer than {min_valid} labelled pixels"] = 1
    return LabelOutcome(None, counts)
  low, high = float(pixels.min()), float(pixels.max())
  if not high - low > _MIN_RELATIVE_RANGE * max(abs(low), abs(high)):
    counts["depth: a map that is the same everywhere"] = 1
    return LabelOutcome(None, counts)
  fraction = (values.astype(np.float64) - low) / (high - low)
  scaled = 1 + np.rint(fraction.clip(0, 1) * (UINT16_MAX - 1))
  scaled = np.where(labelled, scaled, 0).astype(np.uint16)
  if bits < 16:
    top = 2**bits - 1
    scaled = _round_values(scaled, UINT16_MAX, top)
    scaled = _round_values(scaled, top, UINT16_MAX)
  return LabelOutcome(DepthLabel(scaled, low, high, bits), counts)


def depth_settings(options: Mapping[str, Any]) -> dict[str, Any]:
  """Options as stored in settings, which leave out the default of 16 bits."""
  return {k: v for k, v in options.items() if (k, v) != ("bits", 16)}


def _squash(
  values: np.ndarray, usable: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 means of usable values, and a mask of labelled pixels."""
  height, width = values.shape
  if (height, width) == (side, side):
    return values.astype(np.float32), usable
  planes = np.dstack([values, usable]).astype(np.float32)
  # INTER_AREA averages only if both dimensions shrink: shrink, then enlarge.
  dsize = (min(width, side), min(height, side))
  if dsize != (width, height):
    planes = cv2.resize(planes, dsize, interpolation=cv2.INTER_AREA)
  if dsize != (side, side):
    planes = cv2.resize(planes, (side, side), interpolation=cv2.INTER_LINEAR)
  total, fraction = planes[..., 0], planes[..., 1]
  return total / np.maximum(fraction, 0.5), fraction > 0.5


def make_boxes(
  boxes: Float[np.ndarray, "n 4"],
  phrases: Sequence[str],
  scores: Float[np.ndarray, " n"] | None = None,
) -> LabelOutcome:
  """Makes a box label; boxes are clipped to the image, unusable ones dropped.

  Boxes are (y0, x0, y1, x1) in the unit square and may extend past it. There is
  one phrase and one score (default: 1) per box.
  """
  boxes = boxes.astype(np.float32)
  ones = np.ones(len(boxes), np.float32)
  scores = ones if scores is None else scores.astype(np.float32)
  if not len(boxes) == len(phrases) == len(scores):
    counts = f"{len(boxes)} boxes, {len(phrases)} phrases"
    raise InputError(
      f"{counts} and {len(scores)} scores: expected equal counts."
    )
  if _are_usable(boxes, phrases, scores):
    return LabelOutcome(BoxLabel(boxes, tuple(phrases), scores))
  finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
  raw = np.where(finite[:, None], boxes, 0)
  clipped = raw.clip(0, 1)
  extent = (raw[:, 2:] - raw[:, :2]).min(1, initial=np.inf)
  quantized = _quantize(clipped).astype(np.int32)
  is_thin = ((quantized[:, 2:] - quantized[:, :2]) < 1).any(1)
  beyond = (abs(raw - clipped) > _BOUNDARY_TOLERANCE).any(1)
  blank = np.array([not phrase.strip() for phrase in phrases], np.bool_)
  # Only the first reason is counted.
  reasons = {
    "boxes: NaN or infinite": ~finite,
    "boxes: inverted": extent < 0,
    "boxes: empty": (extent == 0) | (is_thin & ~beyond),
    "boxes: outside the image": is_thin,
    "boxes: without a phrase": blank,
  }
  counts, usable = {}, np.ones(len(boxes), np.bool_)
  for reason, is_wrong in reasons.items():
    counts[reason] = int((usable & is_wrong).sum())
    usable &= ~is_wrong
  counts["boxes: reached outside the image, cut"] = int((usable & beyond).sum())
  label = BoxLabel(
    clipped[usable],
    tuple(phrases[i] for i in np.flatnonzero(usable)),
    scores[usable],
  )
  return LabelOutcome(label, {reason: n for reason, n in counts.items() if n})


def _are_usable(
  boxes: np.ndarray, phrases: Sequence[str], scores: np.ndarray
) -> bool:
  """Whether `make_boxes` would keep the boxes as they are; False for NaN."""
  return bool(
    len(boxes)
    and boxes.min() >= 0
    and boxes.max() <= 1
    and (boxes[:, 2:] - boxes[:, :2]).min() > 2 / UINT16_MAX
    and np.isfinite(scores).all()
    and all(map(str.strip, phrases))
  )


def _quantize(boxes: np.ndarray) -> np.ndarray:
  return np.rint(boxes.astype(np.float64) * UINT16_MAX).astype(np.uint16)


def phrase_id(phrase: str) -> int:
  """32-bit hash of a phrase, ignoring case, punctuation and spacing."""
  text = canonicalize(phrase) or phrase.strip()
  digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


@dataclasses.dataclass(frozen=True)
class StoredLabel:
  """A deserialized label; None if the record with this key lacks one."""

  key: str
  label: Label | None


def encode(key: str, label: Label | None) -> bytes:
  """Serializes a label."""
  packed: dict[str, Any] = {"key": key, "valid": label is not None}
  if isinstance(label, DepthLabel):
    values = _round_values(label.values, UINT16_MAX, 2**label.bits - 1)
    _, png = cv2.imencode(".png", values)
    packed |= {
      "png16": png.tobytes(),
      "lo": label.low,
      "hi": label.high,
      "side": len(label.values),
      **({"bits": label.bits} if label.bits < 16 else {}),
    }
  elif isinstance(label, BoxLabel):
    packed |= {
      "boxes": _quantize(label.boxes).astype("<u2").tobytes(),
      "scores": label.scores.astype("<f4").tobytes(),
      "phrases": list(label.phrases),
    }
  elif isinstance(label, FeatureLabel):
    packed |= label.pack()
  return msgpack.packb(packed)


def decode(data: bytes, *, kind: str, where: str) -> StoredLabel:
  """Deserializes a label; BadRecord at `where` if corrupt or too large."""
  unpack = {
    "depth": _unpack_depth,
    "boxes": _unpack_boxes,
    "features": FeatureLabel.unpack,
  }[kind]
  with content_errors(where, f"is not a {kind} label"):
    packed = _unpack_map(data)
    key = _read_field(packed, "key", str)
    valid = _read_field(packed, "valid", bool)
    return StoredLabel(key, unpack(packed) if valid else None)


def _unpack_depth(packed: Mapping[str, Any]) -> DepthLabel:
  png = _read_field(packed, "png16", bytes)
  side = _read_field(packed, "side", int)
  low, high = (_read_field(packed, k, float, int) for k in ("lo", "hi"))
  if not np.isfinite([low, high]).all():
    raise ValueError(f"its range is {low} to {high}")
  if not 1 <= side <= _MAX_SIDE:
    raise ValueError(f"side is {side}, expected 1 to {_MAX_SIDE}")
  header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", side, side)
  # 16 bits per pixel, grey.
  if png[: len(header) + 2] != header + b"\x10\0":
    raise ValueError(f"png16 is not a 16-bit grey PNG of {side}x{side}")
  array = np.frombuffer(png, np.uint8)
  values = cv2.imdecode(array, cv2.IMREAD_UNCHANGED)
  if values is None or values.dtype != np.uint16:
    raise ValueError("png16 is damaged")
  if values.shape != (side, side):
    raise ValueError(f"png16 is {values.shape}, but side is {side}")
  bits = packed.get("bits", 16)
  if type(bits) is not int or not 2 <= bits <= 16 or values.max() >= 2**bits:
    raise ValueError(f"bits is {bits}, the largest value is {values.max()}")
  if bits < 16:
    values = _make_table(bits).take(values, mode="clip")
  return DepthLabel(values, low, high, bits)


@functools.cache
def _make_table(bits: int) -> UInt16[np.ndarray, " levels"]:
  levels = np.arange(2**bits, dtype=np.uint16)[None]
  return _round_values(levels, 2**bits - 1, UINT16_MAX)[0]


def _unpack_boxes(packed: Mapping[str, Any]) -> BoxLabel:
  quantized = np.frombuffer(_read_field(packed, "boxes", bytes), "<u2")
  quantized = quantized.reshape(-1, 4)
  scores = np.frombuffer(_read_field(packed, "scores", bytes), "<f4")
  phrases = tuple(_read_field(packed, "phrases", list))
  counts = [len(quantized), len(phrases), len(scores)]
  if len(set(counts)) > 1:
    raise ValueError(f"numbers of boxes, phrases and scores are {counts}")
  if bad := [p for p in phrases if not isinstance(p, str)]:
    raise ValueError(f"a phrase is a {type(bad[0]).__name__}, not a string")
  boxes = quantized.astype(np.float32) / np.float32(UINT16_MAX)
  return BoxLabel(boxes, phrases, scores.astype(np.float32))


def _unpack_map(data: bytes) -> dict[str, Any]:
  """Parses a flat msgpack map of scalars and lists of scalars."""
  if len(data) > _MAX_BYTES:
    raise ValueError(f"{len(data):,} bytes, expected at most {_MAX_BYTES:,}")
  unpacker = msgpack.Unpacker(max_buffer_size=len(data) + 1)
  unpacker.feed(data)
  packed = {}
  for _ in range(unpacker.read_map_header()):
    name = _unpack_scalar(unpacker, data)
    if _is_list(data, unpacker.tell()):
      count = unpacker.read_array_header()
      if count > _MAX_ENTRIES:
        raise ValueError(
          f"{name} has {count:,} entries, above {_MAX_ENTRIES:,}"
        )
      value = [_unpack_scalar(unpacker, data) for _ in range(count)]
    else:
      value = _unpack_scalar(unpacker, data)
    packed[name] = value
  if (end := unpacker.tell()) != len(data):
    raise ValueError(f"{len(data) - end} bytes after its end")
  return packed


def _is_list(data: bytes, offset: int) -> bool:
  return data[offset] & 0xF0 == 0x90 or data[offset] in (0xDC, 0xDD)


def _unpack_scalar(unpacker: msgpack.Unpacker, data: bytes) -> Any:
  """Reads a value; rejects nested ones, whose bytes cost much memory."""
  at = unpacker.tell()
  if _is_list(data, at) or data[at] & 0xF0 == 0x80 or data[at] in (0xDE, 0xDF):
    raise ValueError(f"a nested value at byte {at}")
  return unpacker.unpack()


def _read_field(packed: Mapping[str, Any], name: str, *kinds: type) -> Any:
  """Returns a field; ValueError if it is missing or of another type."""
  if name not in packed:
    raise ValueError(f"it has no {name!r}")
  # Not isinstance: a bool is an int.
  if type(packed[name]) not in kinds:
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(
      f"{name!r} is a {type(packed[name]).__name__}, not {names}"
    )
  return packed[name]
