"""Label values (depth, boxes): construction, checks, packing.

Depth is inverse depth (larger is nearer) over the whole image, squashed to a
square and scaled to 16 bits. Boxes are in the unit square, each with a phrase
and a score. `make_depth` and `make_boxes` take values from anywhere, leave out
what can't be trained on and count it by reason; what they return is fit for
use as it is.

A packed label is a msgpack map: `key`, `valid` and, if it is, for depth
`png16` (an image file), `lo`, `hi`, `side`, for boxes `boxes` (uint16, 65535
times the coordinate), `scores` (float32) and `phrases`.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import msgpack
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt16

from mtv_jax.data.records import BadRecord
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.utils.errors import InputError

KINDS = ("depth", "boxes")

TOP = 65535
# Fewer labelled pixels say nothing about a picture: a scale and a shift are
# fitted to them.
MIN_VALID = 16
# So many pixels a side hold that many.
MIN_SIDE = 4
# Area averages of a constant map differ in the last bits of float32.
_CONSTANT = 1e-5
# Rounded annotations may end this far outside without being wrong.
_OUTSIDE = 1e-3


@dataclasses.dataclass(frozen=True)
class DepthLabel:
  """Inverse depth of one image.

  Attributes:
    values: 0 has no label; 1 to 65535 is `low` to `high`.
    low, high: least and greatest inverse depth, in the unit it came in.
  """

  values: UInt16[np.ndarray, "side side"]
  low: float
  high: float

  @property
  def inverse(self) -> Float32[np.ndarray, "side side"]:
    """Inverse depth in its own unit, NaN where there is no label."""
    share = (self.values.astype(np.float32) - 1) / (TOP - 1)
    inverse = self.low + share * (self.high - self.low)
    return np.where(self.values > 0, inverse, np.nan).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class BoxLabel:
  """Named boxes of one image; there may be none.

  Attributes:
    boxes: (y0, x0, y1, x1) in the unit square, none empty.
    phrases: what is in each.
    scores: how sure that is; 1 for annotations by people.
  """

  boxes: Float32[np.ndarray, "n 4"]
  phrases: tuple[str, ...]
  scores: Float32[np.ndarray, "n"]


Label = DepthLabel | BoxLabel


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A label made from raw values.

  Attributes:
    label: None where the image has none.
    counts: by reason, what was left out, or changed.
  """

  label: Label | None
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def no_label(reason: str) -> Outcome:
  """An image that has no label, for this reason."""
  return Outcome(None, {reason: 1})


def make_depth(
  inverse: Float[np.ndarray, "h w"],
  *,
  side: int,
  valid: Bool[np.ndarray, "h w"] | None = None,
  min_valid: int = MIN_VALID,
) -> Outcome:
  """The depth label of an image.

  Values times mask and mask are averaged over each stored pixel's area and
  divided, so that a hole does not leak into its rim; a stored pixel is
  labelled if more than half of its area is.

  Args:
    inverse: 1 / depth, or an expert's disparity, in any unit.
    side: pixels a side of the label.
    valid: pixels to use; None for all. Those that are NaN or infinite are
      never used.
    min_valid: a label with fewer labelled pixels is none.
  """
  counts: collections.Counter[str] = collections.Counter()
  finite = np.isfinite(inverse)
  usable = finite if valid is None else finite & valid
  if (~finite if valid is None else valid & ~finite).any():
    counts["depth: a map with NaN or infinite pixels, left without label"] += 1
  values, labelled = _squash(np.where(usable, inverse, 0), usable, side)
  found = values[labelled]
  if found.size < max(min_valid, 2):
    counts[f"depth: a map with fewer than {min_valid} labelled pixels"] += 1
    return Outcome(None, counts)
  low, high = float(found.min()), float(found.max())
  if not high - low > _CONSTANT * max(abs(low), abs(high)):
    counts["depth: a map that is the same everywhere"] += 1
    return Outcome(None, counts)
  share = (values.astype(np.float64) - low) / (high - low)
  scaled = 1 + np.rint(share.clip(0, 1) * (TOP - 1))
  scaled = np.where(labelled, scaled, 0).astype(np.uint16)
  return Outcome(DepthLabel(scaled, low, high), counts)


def _squash(
  values: np.ndarray, usable: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
  """Float32 means of the usable values, and which pixels have one."""
  height, width = values.shape
  if (height, width) == (side, side):
    return values.astype(np.float32), usable
  planes = np.dstack([values, usable]).astype(np.float32)
  # Areas are averaged only if both dimensions shrink: shrink, then enlarge.
  small = (min(width, side), min(height, side))
  if small != (width, height):
    planes = cv2.resize(planes, small, interpolation=cv2.INTER_AREA)
  if small != (side, side):
    planes = cv2.resize(planes, (side, side), interpolation=cv2.INTER_LINEAR)
  total, share = planes[..., 0], planes[..., 1]
  return total / np.maximum(share, 0.5), share > 0.5


def make_boxes(
  boxes: Float[np.ndarray, "n 4"],
  phrases: Sequence[str],
  scores: Float[np.ndarray, "n"] | None = None,
) -> Outcome:
  """The box label of an image: boxes cut to it, unusable ones left out.

  Args:
    boxes: (y0, x0, y1, x1), 0 to 1 being the image.
    phrases: what is in each.
    scores: how sure that is; None for 1.

  Raises:
    InputError: there are not as many of each.
  """
  boxes = boxes.astype(np.float32)
  ones = np.ones(len(boxes), np.float32)
  scores = ones if scores is None else scores.astype(np.float32)
  if not len(boxes) == len(phrases) == len(scores):
    raise InputError(
      f"{len(boxes)} boxes, {len(phrases)} phrases and {len(scores)} scores;"
      " each box has one of each"
    )
  finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
  raw = np.where(finite[:, None], boxes, 0)
  inside = raw.clip(0, 1)
  extent = (raw[:, 2:] - raw[:, :2]).min(1, initial=np.inf)
  stored = quantise(inside).astype(np.int32)
  thin = ((stored[:, 2:] - stored[:, :2]) < 1).any(1)
  beyond = (abs(raw - inside) > _OUTSIDE).any(1)
  blank = np.array([not phrase.strip() for phrase in phrases], np.bool_)
  # The first of these that is true of a box is the reason to leave it out.
  reasons = {
    "boxes: NaN or infinite": ~finite,
    "boxes: inverted": extent < 0,
    "boxes: empty": (extent == 0) | (thin & ~beyond),
    "boxes: outside the image": thin,
    "boxes: without a phrase": blank,
  }
  counts, kept = {}, np.ones(len(boxes), np.bool_)
  for reason, wrong in reasons.items():
    counts[reason] = int((kept & wrong).sum())
    kept &= ~wrong
  counts["boxes: reached outside the image, cut"] = int((kept & beyond).sum())
  label = BoxLabel(
    inside[kept],
    tuple(p for p, keep in zip(phrases, kept, strict=True) if keep),
    scores[kept],
  )
  return Outcome(label, {reason: n for reason, n in counts.items() if n})


def quantise(
  boxes: Float32[np.ndarray, "n 4"],
) -> UInt16[np.ndarray, "n 4"]:
  """Coordinates of the unit square as they are stored."""
  return np.rint(boxes.astype(np.float64) * TOP).astype(np.uint16)


def phrase_id(phrase: str) -> int:
  """32 bits that are equal for phrases that say the same.

  Case, punctuation and spaces make no difference, as in `canonicalize`.
  """
  text = canonicalize(phrase) or phrase.strip()
  digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


# How a label lies in a file.


@dataclasses.dataclass(frozen=True)
class Stored:
  """A packed label: whose it is, and the label if there is one."""

  key: str
  label: Label | None


def encode(key: str, label: Label | None) -> bytes:
  """Bytes of a label."""
  packed: dict[str, Any] = {"key": key, "valid": label is not None}
  if isinstance(label, DepthLabel):
    _, png = cv2.imencode(".png", label.values)
    packed |= {
      "png16": png.tobytes(),
      "lo": label.low,
      "hi": label.high,
      "side": len(label.values),
    }
  elif isinstance(label, BoxLabel):
    packed |= {
      "boxes": quantise(label.boxes).astype("<u2").tobytes(),
      "scores": label.scores.astype("<f4").tobytes(),
      "phrases": list(label.phrases),
    }
  return msgpack.packb(packed)


def decode(data: bytes, *, kind: str, where: str) -> Stored:
  """The label that `encode` packed.

  Args:
    data: the bytes of one label.
    kind: "depth" or "boxes".
    where: names it in errors, such as "00000.array_record:17".

  Raises:
    BadRecord: if the bytes are damaged, or a label of another kind.
  """
  try:
    packed = msgpack.unpackb(data)
    key, valid = packed["key"], packed["valid"]
    unpack = {"depth": _unpack_depth, "boxes": _unpack_boxes}[kind]
    return Stored(key, unpack(packed) if valid else None)
  except (
    ValueError,
    TypeError,
    KeyError,
    msgpack.UnpackException,
    cv2.error,
  ) as error:
    raise BadRecord(
      where, f"is no label of {kind} ({type(error).__name__}: {error})"
    ) from error


def _unpack_depth(packed: Mapping[str, Any]) -> DepthLabel:
  png = np.frombuffer(packed["png16"], np.uint8)
  values = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
  side = packed["side"]
  if values is None or values.dtype != np.uint16:
    raise InputError("png16 is no 16-bit PNG")
  if values.shape != (side, side):
    raise InputError(f"png16 is {values.shape}, side is {side}")
  return DepthLabel(values, packed["lo"], packed["hi"])


def _unpack_boxes(packed: Mapping[str, Any]) -> BoxLabel:
  stored = np.frombuffer(packed["boxes"], "<u2").reshape(-1, 4)
  boxes = stored.astype(np.float32) / np.float32(TOP)
  scores = np.frombuffer(packed["scores"], "<f4").astype(np.float32)
  phrases = tuple(packed["phrases"])
  if not len(boxes) == len(scores) == len(phrases):
    raise InputError(
      f"{len(boxes)} boxes, {len(phrases)} phrases, {len(scores)} scores"
    )
  return BoxLabel(boxes, phrases, scores)
