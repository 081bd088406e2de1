"""Post-processing of detections: filters, non-maximum suppression, label."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.utils.errors import InputError

# Detectors that pad images to a square also report boxes in the padding: those
# with less than this share of their area in the image are dropped.
INSIDE = 0.5


@dataclasses.dataclass(frozen=True)
class Detections:
  """Raw detections of one image.

  Attributes:
    boxes: (y0, x0, y1, x1) in the unit square of the image; may exceed it.
    scores: confidences.
    phrases: one per box.
  """

  boxes: Float32[np.ndarray, "n 4"]
  scores: Float32[np.ndarray, "n"]
  phrases: tuple[str, ...]


def check_options(
  *,
  threshold: float,
  nms: float,
  max_boxes: int,
  min_side: float,
  max_area: float,
) -> dict[str, float]:
  """The checked options of `select`, as a manifest stores them.

  Raises:
    InputError: for a number out of range.
  """
  shares = dict(threshold=threshold, nms=nms, min_side=min_side)
  for name, value in (shares | dict(max_area=max_area)).items():
    if not 0 <= value <= 1:
      raise InputError(
        f"{name}={value}: expected a number from 0 to 1; it is a share of the "
        "image, of two boxes, or a probability, not in pixels or percent."
      )
  if max_boxes < 1:
    raise InputError(f"max_boxes={max_boxes}; expected at least 1.")
  return dict(
    threshold=float(threshold),
    nms=float(nms),
    max_boxes=int(max_boxes),
    min_side=float(min_side),
    max_area=float(max_area),
  )


def suppress(
  boxes: Float[np.ndarray, "n 4"],
  scores: Float[np.ndarray, "n"],
  *,
  iou: float,
) -> Int[np.ndarray, "k"]:
  """Class-agnostic non-maximum suppression.

  Of equal scores the earlier box wins.

  Args:
    boxes: (y0, x0, y1, x1), of positive area.
    scores: confidences.
    iou: maximum intersection over union; 1 retains every box.

  Returns:
    Indices of the retained boxes, best first.
  """
  order = np.argsort(-scores, kind="stable")
  boxes = boxes[order].astype(np.float64)
  areas = area(boxes)
  alive = np.ones(len(boxes), np.bool_)
  for i in range(len(boxes)):
    if not alive[i]:
      continue
    rest = i + 1 + np.flatnonzero(alive[i + 1 :])
    top = np.maximum(boxes[i, :2], boxes[rest, :2])
    bottom = np.minimum(boxes[i, 2:], boxes[rest, 2:])
    shared = (bottom - top).clip(0).prod(1)
    alive[rest] = shared <= iou * (areas[i] + areas[rest] - shared)
  return order[alive]


def select(
  detections: Detections,
  *,
  nms: float,
  max_boxes: int,
  min_side: float,
  max_area: float,
) -> Outcome:
  """The box label of an image.

  Boxes mostly outside of the image, small ones and large ones are dropped
  before duplicates, so that none is suppressed by a dropped one. All measures
  refer to the part inside the image.

  Args:
    detections: above the detector's threshold, in any order.
    nms: `iou` of `suppress`.
    max_boxes: maximum number, the best by score.
    min_side: minimum side, as a share of the image's.
    max_area: maximum area, as a share of the image's: a larger box adds
      nothing to the caption.

  Returns:
    The label, its boxes best first, and the dropped boxes by reason.
  """
  boxes, scores = detections.boxes, detections.scores
  inside = boxes.clip(0, 1)
  extent = inside[:, 2:] - inside[:, :2]
  # `make_boxes` reports invalid boxes.
  sound = np.isfinite(boxes).all(1) & np.isfinite(scores)
  sound &= (boxes[:, 2:] > boxes[:, :2]).all(1)
  broken, kept = np.flatnonzero(~sound), np.flatnonzero(sound)
  counts: collections.Counter[str] = collections.Counter()

  def drop(reason: str, wrong: np.ndarray) -> np.ndarray:
    counts[f"boxes: {reason}"] = int(wrong[kept].sum())
    return kept[~wrong[kept]]

  with np.errstate(invalid="ignore", over="ignore"):
    outside = area(inside) < INSIDE * area(boxes)
    small = (extent < min_side).any(1)
    large = area(inside) > max_area
  kept = drop("mostly outside the image", outside)
  kept = drop("small", small)
  kept = drop("as large as the image", large)
  best = kept[suppress(inside[kept], scores[kept], iou=nms)]
  counts["boxes: duplicates of better ones"] = len(kept) - len(best)
  counts["boxes: more than wanted"] = len(best) - len(best[:max_boxes])
  rows = np.concatenate([best[:max_boxes], broken])
  outcome = label_values.make_boxes(
    boxes[rows], [detections.phrases[i] for i in rows], scores[rows]
  )
  counts.update(outcome.counts)
  return Outcome(outcome.label, {k: n for k, n in counts.items() if n})


def area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
  """Area of each box; 0 for an inverted one."""
  return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
