"""Average precision of boxes as in COCO (Lin et al. 2014), without crowds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
_RECALLS = np.linspace(0, 1, 101)
_MAX_BOXES = 100  # per image and class


def match_boxes(
  overlaps: Float[np.ndarray, "d g"],
) -> Bool[np.ndarray, "t d"]:
  """Detections that match an annotated box, by IoU threshold.

  Detections are sorted by decreasing score; each matches the free box with the
  largest IoU, the last one on ties.
  """
  is_matched = np.zeros((len(_THRESHOLDS), len(overlaps)), bool)
  for t, threshold in enumerate(_THRESHOLDS):
    is_free = np.ones(overlaps.shape[1], bool)
    for d, row in enumerate(overlaps):
      free_overlaps = np.where(is_free, row, -1)[::-1]
      best = len(row) - 1 - int(np.argmax(free_overlaps)) if len(row) else -1
      if best >= 0 and is_free[best] and row[best] >= min(threshold, 1 - 1e-10):
        is_matched[t, d], is_free[best] = True, False
  return is_matched


def average_precision(
  overlaps: Sequence[Float[np.ndarray, "_ _"]],
  scores: Sequence[Float[np.ndarray, " _"]],
  detected: Sequence[Int[np.ndarray, " _"]],
  annotated: Sequence[Int[np.ndarray, " _"]],
) -> dict[str, float]:
  """AP over IoU 0.5 to 0.95, AP50, AP75, and average recall of 100 boxes.

  Args:
    overlaps: per image, IoU of each detection with each annotated box.
    scores: scores of the detections.
    detected: classes of the detections.
    annotated: classes of the annotated boxes; means are over these classes.
  """
  precisions, recalls = [], []
  for label in np.unique(np.concatenate(annotated)):
    matched, class_scores, count = [], [], 0
    rows = zip(overlaps, scores, detected, annotated, strict=True)
    for overlap, score, classes, truth in rows:
      indices = np.flatnonzero(classes == label)
      indices = indices[np.argsort(-score[indices], kind="stable")][:_MAX_BOXES]
      matched.append(match_boxes(overlap[indices][:, truth == label]))
      class_scores.append(score[indices])
      count += int(np.sum(truth == label))
    order = np.argsort(-np.concatenate(class_scores), kind="stable")
    hits = np.cumsum(np.concatenate(matched, axis=1)[:, order], axis=1)
    recall = hits / count
    precision = hits / np.arange(1, len(order) + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Precision is zero beyond the largest recall.
    envelope = np.pad(envelope, ((0, 0), (0, 1)))
    pairs = zip(envelope, recall, strict=True)
    precisions.append(
      [b[np.searchsorted(r, _RECALLS)].mean() for b, r in pairs]
    )
    recalls.append(recall[:, -1] if len(order) else np.zeros(len(recall)))
  by_threshold = np.mean(precisions, axis=0)
  return {
    "ap": float(by_threshold.mean()),
    "ap50": float(by_threshold[0]),
    "ap75": float(by_threshold[5]),
    "ar100": float(np.mean(recalls)),
  }
