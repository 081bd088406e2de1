"""Region and boundary metrics of video object segmentation (DAVIS).

Perazzi et al. 2016, section 5, as the official evaluation computes them: J is
the IoU of an object's masks, F the F-measure of their boundaries, where a
boundary pixel is matched if the other boundary has one within 0.8 % of the
image's diagonal, rounded up. An object's figure is the mean over its frames
without the first and the last, and the set's the mean over objects; the recall
is the share of frames above 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float64, UInt8

_BOUND = 0.008  # of the diagonal
_RECALL = 0.5


def region_iou(
  truth: Bool[np.ndarray, "h w"], predicted: Bool[np.ndarray, "h w"]
) -> float:
  """J: intersection over union; 1 if both masks are empty."""
  union = np.count_nonzero(truth | predicted)
  return np.count_nonzero(truth & predicted) / union if union else 1.0


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
  """Pixels that differ from the next one to the right, below or diagonally.

  Beyond the last row and column the mask goes on as it is there.
  """
  padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
  right, below = padded[:-1, 1:], padded[1:, :-1]
  return (mask != right) | (mask != below) | (mask != padded[1:, 1:])


def boundary_f(
  truth: Bool[np.ndarray, "h w"], predicted: Bool[np.ndarray, "h w"]
) -> float:
  """F: harmonic mean of the boundaries' precision and recall.

  1 if neither mask has a boundary, 0 if one has.
  """
  lines = [boundary(mask) for mask in (predicted, truth)]
  counts = [np.count_nonzero(line) for line in lines]
  if not all(counts):
    return float(not any(counts))
  radius = int(np.ceil(_BOUND * np.hypot(*truth.shape)))
  y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
  disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
  near = [cv2.dilate(line.view(np.uint8), disk) > 0 for line in lines]
  precision = np.count_nonzero(lines[0] & near[1]) / counts[0]
  recall = np.count_nonzero(lines[1] & near[0]) / counts[1]
  total = precision + recall
  return 2 * precision * recall / total if total else 0.0


def score_video(
  truth: Sequence[UInt8[np.ndarray, "h w"]],
  predicted: Sequence[UInt8[np.ndarray, "h w"]],
  *,
  objects: int,
) -> dict[str, Float64[np.ndarray, " {objects}"]]:
  """Figures of each object of a video, by metric.

  Both are the maps of the scored frames, with 1 to `objects` for an object.
  """
  j = np.empty((objects, len(truth)))
  f = np.empty((objects, len(truth)))
  for t, maps in enumerate(zip(truth, predicted, strict=True)):
    for k in range(objects):
      masks = [labels == k + 1 for labels in maps]
      j[k, t], f[k, t] = region_iou(*masks), boundary_f(*masks)
  return {
    "j_and_f": (j.mean(axis=1) + f.mean(axis=1)) / 2,
    "j": j.mean(axis=1),
    "f": f.mean(axis=1),
    "j_recall": (j > _RECALL).mean(axis=1),
    "f_recall": (f > _RECALL).mean(axis=1),
  }
