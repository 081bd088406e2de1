"""Segmentation metrics of a whole data set, from confusion matrices."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.utils.errors import InputError

AVERAGING = (
  "intersections and unions are summed over the whole set; mean over classes "
  "with a union, mean accuracy over classes with a true pixel"
)


Labels = Int[np.ndarray, "*n"] | UInt8[np.ndarray, "*n"]
Sums = Int64[np.ndarray, "3 k"] | Float[np.ndarray, "3 k"]


def confusion_matrix(
  truth: Labels, predicted: Labels, *, classes: int
) -> np.ndarray:
  """Pixel counts by (true class, predicted class), without `IGNORE`."""
  is_labelled = truth != IGNORE
  rows = truth[is_labelled].astype(np.int64)
  columns = predicted[is_labelled].astype(np.int64)
  for name, values in (("labels", rows), ("predictions", columns)):
    if values.size and not 0 <= values.min() <= values.max() < classes:
      raise InputError(
        f"{name} from {values.min()} to {values.max()}; expected 0 to "
        f"{classes - 1}, or {IGNORE} for a label to ignore"
      )
  # Integers: float bins lose counts beyond 2**24.
  counts = np.bincount(rows * classes + columns, minlength=classes**2)
  return counts.astype(np.int64).reshape(classes, classes)


def class_sums(counts: Int64[np.ndarray, "*n k k"]) -> np.ndarray:
  """Correct, true and predicted pixels of each class, `[*n, 3, k]`.

  Rows of `counts` are the truth. All metrics depend only on these sums.
  """
  hit = np.diagonal(counts, axis1=-2, axis2=-1)
  return np.stack([hit, counts.sum(axis=-1), counts.sum(axis=-2)], axis=-2)


def class_ious(sums: Sums) -> Float[np.ndarray, " k"]:
  """IoU per class; NaN if a class is in neither truth nor prediction."""
  hit, true, predicted = sums
  union = true + predicted - hit
  return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def scores(sums: Sums) -> dict[str, float]:
  """`miou`, `macc` and `aacc` from the `class_sums` of a set.

  In `miou`, classes that are predicted but not in the truth have IoU 0; `macc`
  averages over classes in the truth; `aacc` is the fraction of correct pixels.
  """
  hit, true, _ = sums
  if not true.sum():
    raise InputError("every pixel is ignored")
  recall = hit[true > 0] / true[true > 0]
  return {
    "miou": float(np.nanmean(class_ious(sums))),
    "macc": float(recall.mean()),
    "aacc": float(hit.sum() / true.sum()),
  }


def estimate(sums: Int64[np.ndarray, "n 3 k"]) -> Estimate:
  """`scores` of n images, with standard errors over images."""
  flat = sums[sums[:, 1].any(axis=-1)].reshape(-1, 3 * sums.shape[-1])
  if not len(flat):
    raise InputError("every pixel is ignored")
  flat = flat.astype(np.float64)  # exact below 2**53
  return bootstrap.estimate(
    lambda weights: scores((weights @ flat).reshape(3, -1)), len(flat)
  )


def chance(sums: Int64[np.ndarray, "3 k"]) -> dict[str, float]:
  """Expected metrics of a uniform guess at every pixel.

  For a class with a fraction g of the pixels, among K classes, the intersection
  is g / K and the union g + 1 / K - g / K.
  """
  classes = sums.shape[1]
  share = sums[1] / sums[1].sum()
  iou = share / (1 + (classes - 1) * share)
  return {"miou": float(iou.mean()), "macc": 1 / classes, "aacc": 1 / classes}
