"""Statistics of a study: comparisons of arms, synergy of pairs.

An arm is a setting (a set of objectives, a size) that is run with several
seeds; `contrasts.py` computes a difference and its intervals. Comparisons are
corrected for their number (Holm 1979).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mtv_jax.studies import contrasts
from mtv_jax.studies.contrasts import Contrast, Measurements, Metric
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Contrast):
  """An arm minus the baseline."""

  metric: str
  arm: str
  baseline: str


@dataclasses.dataclass(frozen=True)
class Synergy:
  """What a pair of objectives gives beyond each of the two."""

  metric: str
  arm: str  # trained with both
  first: str
  second: str
  better: str  # of first and second, by their means
  over_better: Contrast  # arm - better
  # arm - (first + second - baseline); None if the baseline is not known.
  over_additive: Contrast | None


@dataclasses.dataclass(frozen=True)
class Summary:
  """The mean of an arm on one metric."""

  metric: str
  arm: str
  n: int  # seeds
  mean: float | None
  low: float | None  # 95 % t interval over seeds; None for fewer than 2
  high: float | None
  item_error: float | None  # mean standard error of a run over items


def compare(
  data: Measurements,
  metrics: Sequence[Metric],
  *,
  baseline: str,
  family: Literal["table", "metric", "arm"] = "table",
) -> list[Comparison]:
  """Compares every other arm with the baseline on each metric.

  Args:
    data: of all arms.
    metrics: rows, in order.
    baseline: an arm.
    family: comparisons that are corrected together: all of them, those of a
      metric, or those of an arm.

  Raises:
    InputError: if there is no such arm.
  """
  arms = [arm for arm in data.values if arm != baseline]
  if len(arms) == len(data.values):
    names = ", ".join(data.values)
    raise InputError(f"the baseline {baseline!r} is none of the arms: {names}")
  rows = []
  for metric in metrics:
    for arm in arms:
      contrast = contrasts.estimate_contrast(
        data, metric, {arm: 1.0, baseline: -1.0}
      )
      names = dict(metric=metric.name, arm=arm, baseline=baseline)
      rows.append(Comparison(**vars(contrast), **names))
  if family == "table":
    return correct_contrasts(rows)
  families = [getattr(row, family) for row in rows]
  corrected = {
    name: iter(
      correct_contrasts([r for r in rows if getattr(r, family) == name])
    )
    for name in families
  }
  return [next(corrected[name]) for name in families]


def find_synergies(
  data: Measurements,
  metrics: Sequence[Metric],
  *,
  baseline: str | None = None,
) -> list[Synergy]:
  """Compares the arms `A+B` with the arms `A` and `B`.

  The better of A and B is chosen by its mean, which is then on average too
  good by a part of its error: the gain over it is rather too small.

  Args:
    data: of all arms; those whose parts are not arms are left out.
    metrics: rows, in order.
    baseline: the arm with neither A nor B; None for chance.
  """
  pairs = [(arm, *arm.split("+")) for arm in data.values if arm.count("+") == 1]
  pairs = [pair for pair in pairs if {*pair} <= {*data.values}]
  rows = [
    _estimate_synergy(data, metric, pair, baseline)
    for metric in metrics
    for pair in pairs
  ]
  better = correct_contrasts([row.over_better for row in rows])
  tested = [row.over_additive for row in rows if row.over_additive is not None]
  additive = iter(correct_contrasts(tested))
  return [
    dataclasses.replace(
      row,
      over_better=contrast,
      over_additive=None if row.over_additive is None else next(additive),
    )
    for row, contrast in zip(rows, better, strict=True)
  ]


def _estimate_synergy(
  data: Measurements,
  metric: Metric,
  pair: tuple[str, str, str],
  baseline: str | None,
) -> Synergy:
  arm, first, second = pair
  means = {
    single: mean * metric.sign
    for single in (first, second)
    if (mean := summarise_arm(data, metric, single).mean) is not None
  }
  better = max(means or [first], key=means.get)
  over_better = contrasts.estimate_contrast(
    data, metric, {arm: 1.0, better: -1.0}
  )
  weights, constant = {arm: 1.0, first: -1.0, second: -1.0}, metric.chance
  if baseline is not None:
    weights[baseline], constant = 1.0, 0.0
  over_additive = None
  if constant is not None:
    over_additive = contrasts.estimate_contrast(data, metric, weights, constant)
  return Synergy(
    metric.name, arm, first, second, better, over_better, over_additive
  )


def summarise_arm(data: Measurements, metric: Metric, arm: str) -> Summary:
  """The mean of an arm over its seeds, with its t interval."""
  seeds = data.seeds(arm, metric.name)
  x = np.array([data.values[arm][s][metric.name] for s in seeds], np.float64)
  errors = [data.errors.get(arm, {}).get(s, {}).get(metric.name) for s in seeds]
  mean = low = high = item_error = None
  if seeds:
    mean = float(np.mean(x))
  if len(seeds) > 1:
    low, high = contrasts.t_interval(
      mean, contrasts.standard_error(x), len(x) - 1
    )
  if seeds and all(map(contrasts.is_finite, errors)):
    item_error = float(np.mean(errors))
  return Summary(metric.name, arm, len(seeds), mean, low, high, item_error)


def correct_contrasts(rows: Sequence[Contrast]) -> list:
  """The contrasts of one family, with Holm's p values."""
  corrected = holm([row.p for row in rows])
  return [
    dataclasses.replace(row, p_holm=p)
    for row, p in zip(rows, corrected, strict=True)
  ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Holm's step-down adjusted p values (Holm 1979).

  In ascending order, the i-th of m is max over j <= i of (m - j + 1) p_j, at
  most 1. A missing p value is no test, and does not count.
  """
  tested = [i for i, p in enumerate(p_values) if p is not None]
  adjusted: list[float | None] = [None] * len(p_values)
  largest = 0.0
  for rank, i in enumerate(sorted(tested, key=lambda i: p_values[i])):
    largest = max(largest, min(1.0, (len(tested) - rank) * p_values[i]))
    adjusted[i] = largest
  return adjusted
