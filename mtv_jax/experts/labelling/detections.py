"""From a detector's boxes to a box label: duplicates and useless ones go."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import Outcome

# A detector that sees an image in a padded square also finds what is not there.
# Of such a box less than this share of its area is in the image.
INSIDE = 0.5


@dataclasses.dataclass(frozen=True)
class Detections:
  """What a detector found in one image.

  Attributes:
    boxes: (y0, x0, y1, x1) in the unit square of the image; they may reach
      outside of it.
    scores: how sure the detector is.
    phrases: what is in each.
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
  """What every detector is asked for, as its settings have it.

  Raises:
    ValueError: for a number outside of its range.
  """
  shares = dict(threshold=threshold, nms=nms, min_side=min_side)
  for name, value in (shares | dict(max_area=max_area)).items():
    if not 0 <= value <= 1:
      raise ValueError(
        f"{name}={value}: expected a number from 0 to 1; it is a share of the "
        "image, of two boxes, or a probability, not in pixels or percent."
      )
  if max_boxes < 1:
    raise ValueError(f"max_boxes={max_boxes}; expected at least 1.")
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
  """Non-maximum suppression whatever the boxes' phrases say.

  The best box stays and those go that overlap it by more than `iou`
  (intersection over union); then the best of the others, and so on. Of equal
  scores the earlier comes first.

  Args:
    boxes: (y0, x0, y1, x1), of positive area.
    scores: how sure the detector is.
    iou: 1 keeps every box.

  Returns:
    Indices of the boxes that stay, best first.
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

  Boxes that lie mostly outside of the image, and small and large ones, are
  left out before duplicates are, so that no box goes in favour of one that
  goes too. Everything is measured of the part inside the image.

  Args:
    detections: above the detector's threshold, in any order.
    nms: `iou` of `suppress`.
    max_boxes: the best by score stay.
    min_side: a box with a shorter side, as a share of the image's, is left
      out.
    max_area: a box of a larger area, as a share of the image's, is left out:
      it says no more than the caption.

  Returns:
    The label, its boxes best first, and how many were left out, by reason.
  """
  boxes, scores = detections.boxes, detections.scores
  inside = boxes.clip(0, 1)
  extent = inside[:, 2:] - inside[:, :2]
  # What is wrong in itself goes on to `make_boxes`, which says why.
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
  """Of each box, in units of its coordinates'; 0 for an inverted one."""
  return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
