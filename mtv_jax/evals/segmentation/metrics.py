"""Segmentation metrics of a whole set, from one confusion matrix."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.utils.errors import InputError

AVERAGING = (
  "intersections and unions are summed over the whole set; mean over classes "
  "with a union, mean accuracy over classes with a true pixel"
)


def confusion(
  truth: Int[np.ndarray, "*n"] | UInt8[np.ndarray, "*n"],
  predicted: Int[np.ndarray, "*n"] | UInt8[np.ndarray, "*n"],
  *,
  classes: int,
) -> Int64[np.ndarray, "{classes} {classes}"]:
  """Counts of pixels by (true class, predicted class), without `IGNORE`.

  Raises:
    InputError: for a class out of range.
  """
  counted = truth != IGNORE
  rows = truth[counted].astype(np.int64)
  columns = predicted[counted].astype(np.int64)
  for name, values in (("labels", rows), ("predictions", columns)):
    if values.size and not 0 <= values.min() <= values.max() < classes:
      raise InputError(
        f"{name} from {values.min()} to {values.max()}; expected 0 to "
        f"{classes - 1}, or {IGNORE} for a label to ignore"
      )
  # Integers: float bins lose counts beyond 2**24.
  counts = np.bincount(rows * classes + columns, minlength=classes**2)
  return counts.astype(np.int64).reshape(classes, classes)


def class_ious(counts: Int64[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
  """IoU of each class; NaN where neither truth (rows) nor prediction has it."""
  hit = np.diag(counts)
  union = counts.sum(axis=1) + counts.sum(axis=0) - hit
  return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def scores(counts: Int64[np.ndarray, "k k"]) -> dict[str, float]:
  """`miou`, `macc` and `aacc` of a confusion matrix whose rows are the truth.

  `miou` counts a class that is only predicted as 0; `macc` averages over the
  classes of the ground truth; `aacc` is the share of correct pixels.

  Raises:
    InputError: if no pixel was counted.
  """
  if not counts.sum():
    raise InputError("every pixel is ignored")
  hit, true = np.diag(counts), counts.sum(axis=1)
  recall = hit[true > 0] / true[true > 0]
  return {
    "miou": float(np.nanmean(class_ious(counts))),
    "macc": float(recall.mean()),
    "aacc": float(hit.sum() / counts.sum()),
  }


def chance(counts: Int64[np.ndarray, "k k"]) -> dict[str, float]:
  """The expected metrics of a uniform guess at every pixel.

  With a share g of the pixels in a class and K classes, the intersection is
  g / K and the union g + 1 / K - g / K.
  """
  classes = len(counts)
  share = counts.sum(axis=1) / counts.sum()
  iou = share / (1 + (classes - 1) * share)
  return {"miou": float(iou.mean()), "macc": 1 / classes, "aacc": 1 / classes}
