"""Bootstrap standard errors of metrics over the items of a test set.

An item is the unit of independent sampling: an image or a pair of images.
Captions, boxes and keypoints are resampled with their image or pair. The mean
of one value per item has the closed form s / sqrt(n), with s the sample
standard deviation. Ratios and class means are recomputed for resamples of the
items with replacement (the bootstrap, Efron 1979), whose deviations from the
metric are scaled by sqrt(n / (n - 1)), since a bootstrap variance divides by n,
not n - 1. Trained heads and ranking candidates are not resampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

# A standard error from B resamples has relative error sqrt(1 / 2 B): 3.5 %.
RESAMPLES = 400


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Metrics and their standard errors, if defined."""

  metrics: dict[str, float]
  errors: dict[str, float]  # in the units of the metrics
  # Metrics of `RESAMPLES` resamples of the items; NaN if undefined. Resamples
  # depend only on n, so that two encoders can be compared resample by resample.
  resamples: dict[str, Float64[np.ndarray, " b"]] = dataclasses.field(
    default_factory=dict, compare=False
  )

  def __or__(self, other: Estimate) -> Estimate:
    """Merges two estimates; `other` wins."""
    return Estimate(
      self.metrics | other.metrics,
      self.errors | other.errors,
      self.resamples | other.resamples,
    )

  def rename(self, pattern: str) -> Estimate:
    """Formats each metric name into the `{}` of a pattern."""
    return Estimate(
      *(
        {pattern.format(k): v for k, v in values.items()}
        for values in (self.metrics, self.errors, self.resamples)
      )
    )


def means(
  values: Mapping[str, Float[np.ndarray, " m"] | Bool[np.ndarray, " m"]],
  *,
  groups: Int[np.ndarray, " m"] | None = None,
) -> Estimate:
  """Means of m values, by metric: one per item, or several with `groups`.

  The error is s / sqrt(m), as above. If all values are 0 or all are 1, it
  is 1 / m, as if one value differed (our choice: s = 0 would understate it).
  A single value other than 0 or 1 gets no error. `groups` is the item of each
  value, such as a caption's image; items are resampled with all their values.
  """
  if groups is not None:
    return _estimate_group_means(groups, values)
  metrics, errors = {}, {}
  for name, x in values.items():
    x = np.asarray(x, np.float64)
    metrics[name] = float(np.mean(x))
    if (x == 0).all() or (x == 1).all():
      errors[name] = 1 / len(x)
    elif len(x) > 1:
      errors[name] = float(np.std(x, ddof=1) / np.sqrt(len(x)))
  return Estimate(metrics, errors, _resample_means(values))


def estimate(
  metrics: Callable[[Float64[np.ndarray, " n"]], Mapping[str, float]],
  count: int,
) -> Estimate:
  """Metrics of a set of n items, and their standard deviation over resamples.

  As in `means`, a fraction that is constant over resamples has error 1 / n.
  `metrics` maps weights (how often each item occurs) to fractions; it may omit
  metrics that are undefined for a resample (a class without items).
  """
  all_items = {k: float(v) for k, v in metrics(np.ones(count)).items()}
  resampled = {name: np.full(RESAMPLES, np.nan) for name in all_items}
  for i, weights in enumerate(_draw_weights(count)):
    for name, value in metrics(weights).items():
      if name in resampled and np.isfinite(value):
        resampled[name][i] = _rescale(value, all_items[name], count)
  finite = {name: x[np.isfinite(x)] for name, x in resampled.items()}
  errors = {
    name: float(np.std(x, ddof=1)) if np.ptp(x) > 1e-9 else 1 / count
    for name, x in finite.items()
    if len(x) > 1
  }
  return Estimate(all_items, errors, resampled)


def _draw_weights(count: int) -> Iterator[Float64[np.ndarray, " n"]]:
  """Yields each resample's item counts."""
  rng = np.random.default_rng(0)
  for _ in range(RESAMPLES):
    indices = rng.integers(count, size=count)
    yield np.bincount(indices, minlength=count).astype(np.float64)


def _resample_means(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Means of one value per item, for the resamples of `estimate`."""
  result = {}
  for count in {len(x) for x in values.values()} - {0}:
    names = [name for name, x in values.items() if len(x) == count]
    table = np.stack([np.asarray(values[n], np.float64) for n in names], 1)
    resampled = np.stack([w @ table for w in _draw_weights(count)], 1) / count
    resampled = _rescale(resampled, table.mean(axis=0)[:, None], count)
    result |= dict(zip(names, resampled, strict=True))
  return result


def _rescale(resampled: Any, metric: Any, count: int) -> Any:
  """Scales the deviation of resamples to the sample variance of n items."""
  return metric + np.sqrt(count / max(1, count - 1)) * (resampled - metric)


def jackknife_error(values: Float64[np.ndarray, " n"]) -> float:
  """Jackknife standard error from n leave-one-out values (Tukey 1958).

  For a metric that is too slow to compute for every resample.
  """
  count = len(values)
  return float(np.sqrt((count - 1) * np.var(values)))


def _estimate_group_means(groups: np.ndarray, values: Mapping) -> Estimate:
  _, item = np.unique(groups, return_inverse=True)
  counts = np.bincount(item)
  sums = {k: np.bincount(item, v.astype(np.float64)) for k, v in values.items()}

  def metrics(weights):
    return {k: weights @ s / (weights @ counts) for k, s in sums.items()}

  return estimate(metrics, len(counts))
