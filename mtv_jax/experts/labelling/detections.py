"""Post-processing of detections: filters and non-maximum suppression."""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import LabelOutcome

# Detectors that pad images to a square also report boxes in the padding. Boxes
# with less than this fraction of their area inside the image are dropped.
_MIN_INSIDE = 0.5


@dataclasses.dataclass(frozen=True)
class Detections:
  """Raw detections: boxes (y0, x0, y1, x1) in the unit square or beyond."""

  boxes: Float32[np.ndarray, "n 4"]
  scores: Float32[np.ndarray, " n"]
  phrases: tuple[str, ...]


def suppress(
  boxes: Float[np.ndarray, "n 4"],
  scores: Float[np.ndarray, " n"],
  *,
  iou: float,
) -> Int[np.ndarray, " k"]:
  """Class-agnostic non-maximum suppression; earlier boxes win ties.

  Boxes (y0, x0, y1, x1) must have positive areas. `iou` is the maximum IoU of
  two retained boxes. Returns the retained indices, best first.
  """
  order = np.argsort(-scores, kind="stable")
  boxes = boxes[order].astype(np.float64)
  areas = compute_area(boxes)
  is_retained = np.ones(len(boxes), np.bool_)
  for i in range(len(boxes)):
    if not is_retained[i]:
      continue
    later = i + 1 + np.flatnonzero(is_retained[i + 1 :])
    top = np.maximum(boxes[i, :2], boxes[later, :2])
    bottom = np.minimum(boxes[i, 2:], boxes[later, 2:])
    shared = (bottom - top).clip(0).prod(1)
    is_retained[later] = shared <= iou * (areas[i] + areas[later] - shared)
  return order[is_retained]


def select(
  detections: Detections,
  *,
  nms: float,
  max_boxes: int,
  min_side: float,
  max_area: float,
) -> LabelOutcome:
  """Selects the boxes of an image's label, best first.

  Drops boxes mostly outside the image, small boxes and large boxes before
  suppression, so that dropped boxes suppress nothing. Sizes are measured inside
  the image, as fractions of it: a box above `max_area` adds nothing to the
  caption. `nms` is the `iou` of `suppress`; of the retained boxes, at most
  `max_boxes` are selected.
  """
  boxes, scores = detections.boxes, detections.scores
  clipped = boxes.clip(0, 1)
  sides = clipped[:, 2:] - clipped[:, :2]
  valid = np.isfinite(boxes).all(1) & np.isfinite(scores)
  valid &= (boxes[:, 2:] > boxes[:, :2]).all(1)
  with np.errstate(invalid="ignore", over="ignore"):
    reasons = {
      "boxes: mostly outside the image": (
        compute_area(clipped) < _MIN_INSIDE * compute_area(boxes)
      ),
      "boxes: small": (sides < min_side).any(1),
      "boxes: as large as the image": compute_area(clipped) > max_area,
    }
  counts: dict[str, int] = {}
  usable = valid.copy()
  for reason, is_dropped in reasons.items():
    counts[reason] = int((usable & is_dropped).sum())
    usable &= ~is_dropped
  rows = np.flatnonzero(usable)
  best = rows[suppress(clipped[rows], scores[rows], iou=nms)]
  counts["boxes: duplicates of better ones"] = len(rows) - len(best)
  counts["boxes: more than wanted"] = len(best) - len(best[:max_boxes])
  # `make_boxes` counts invalid boxes.
  rows = np.concatenate([best[:max_boxes], np.flatnonzero(~valid)])
  outcome = label_values.make_boxes(
    boxes[rows], [detections.phrases[i] for i in rows], scores[rows]
  )
  counts = {reason: n for reason, n in counts.items() if n}
  return LabelOutcome(outcome.label, {**counts, **outcome.counts})


def compute_area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
  """Area of each box; 0 for inverted boxes."""
  return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
