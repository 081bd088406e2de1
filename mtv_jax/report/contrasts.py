"""Differences between arms, with intervals over seeds and items.

An arm is an encoder, a run, or a study's setting with several seeds. Runs of
one seed share initial parameters, data order and crops, so arms are paired by
seed. The paired t interval covers the choice of seeds for fixed test sets. A
second interval covers the test items, and the seeds too if there are several.
P values are corrected for the number of comparisons (Holm 1979).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from scipy import special

from mtv_jax.evals.core.base import Result, registered_class

# Nested by arm, seed and metric.
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
Resamples = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]

BETTER, WORSE = "better", "worse"
NOT_DISTINGUISHABLE, MISSING = "not distinguishable", "missing"
DISTINCT = (BETTER, WORSE)
LEVEL = 0.95
# Seed draws per resample of the items.
_SEED_DRAWS = 10
# Relative tolerance below which differences count as equal.
_EQUAL = 1e-9


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric's name, unit, direction and chance level."""

  name: str  # EVALUATION/METRIC
  unit: str = "%"  # "%" for fractions, else the metric's unit ("m", or "")
  lower: bool = False  # whether lower is better
  chance: float | None = None  # expected value of a random encoder
  # Type of the evaluation; empty if the result doesn't record it.
  type: str = ""
  # Whether reports chart it; None: if it is the first of its evaluation.
  is_main: bool | None = dataclasses.field(default=None, compare=False)

  @property
  def scale(self) -> float:
    """Factor from stored values to the displayed unit."""
    return 100.0 if self.unit == "%" else 1.0

  @property
  def label(self) -> str:
    """Name with unit and direction."""
    unit = f" ({self.unit})" if self.unit else ""
    return f"{self.name}{unit}{' ↓' if self.lower else ''}"

  @property
  def sign(self) -> int:
    """1 if higher is better, -1 if lower is."""
    return -1 if self.lower else 1


@dataclasses.dataclass(frozen=True)
class ArmMeasurements:
  """Metric values of runs, with their errors over items if known."""

  values: Values
  # Standard errors over the items of the test set.
  errors: Values = dataclasses.field(default_factory=dict)
  # Values [B] on B resamples of the items, shared by all runs.
  resamples: Resamples = dataclasses.field(default_factory=dict)

  def seeds(self, arm: str, metric: str) -> list[int]:
    """Seeds of an arm with a finite value."""
    runs = self.values.get(arm, {}).items()
    return [seed for seed, run in runs if is_finite(run.get(metric))]

  def read(
    self, field: str, metric: Metric, arm: str, seeds: Sequence[int]
  ) -> list[Any]:
    """The values, errors or resamples of an arm's seeds; None if unknown."""
    runs = getattr(self, field).get(arm, {})
    return [runs.get(seed, {}).get(metric.name) for seed in seeds]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
  """A difference between arms on one metric; None is unknown, see `note`."""

  metric: Metric
  n: int = 0  # number of seeds that all arms share; 0 if not paired
  test: Literal["paired t", "Welch t", "items", ""] = ""  # source of `p`
  difference: float | None = None
  low: float | None = None  # 95 % interval over seeds
  high: float | None = None
  p: float | None = None  # two-sided
  p_holm: float | None = None  # Holm-corrected over its family
  item_low: float | None = None  # 95 % over items, and seeds if several
  item_high: float | None = None
  # Source of the item interval: paired resamples of the items, or the runs'
  # standard errors, assumed independent, which give a wider interval.
  items: Literal["resamples", "errors", ""] = ""
  note: str = ""  # caveats

  @property
  def gain(self) -> float | None:
    """The difference, signed so that positive is an improvement."""
    if self.difference is None:
      return None
    return self.metric.sign * self.difference

  @property
  def verdict(self) -> str:
    """Direction of a significant difference: corrected p is below 0.05.

    The interval over items, if known, must exclude 0.
    """
    if self.difference is None:
      return MISSING
    is_distinct = self.p_holm is not None and self.p_holm < 1 - LEVEL
    if self.item_low is not None and self.item_low <= 0 <= self.item_high:
      is_distinct = False
    if not is_distinct:
      return NOT_DISTINGUISHABLE
    return BETTER if self.gain > 0 else WORSE

  def compare_with(self, reference: str) -> str:
    """The verdict as text, such as "better than REFERENCE"."""
    than = "than" if self.verdict in DISTINCT else "from"
    return f"{self.verdict} {than} {reference}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Contrast):
  """An arm minus the baseline."""

  arm: str
  baseline: str

  @property
  def name(self) -> str:
    """The subtraction, as `ARM − BASELINE`."""
    return f"{self.arm} − {self.baseline}"


def list_metrics(results: Iterable[tuple[str, Result]]) -> list[Metric]:
  """The distinct metrics of evaluations, in order."""
  metrics: dict[str, Metric] = {}
  for evaluation, result in results:
    main = result.main
    if main is None:  # Also results of versions that did not write it.
      main = registered_class(evaluation, result.type).main
    for metric in result.metrics:
      name, unit = f"{evaluation}/{metric}", result.units.get(metric, "%")
      chance, lower = result.chance.get(metric), metric in result.lower
      is_main = None if main is None else metric in main
      found = Metric(name, unit, lower, chance, result.type, is_main)
      metrics.setdefault(name, found)
  return [*metrics.values()]


def collect_measurements(
  arms: Mapping[str, Mapping[int, Mapping[str, Result]]],
) -> ArmMeasurements:
  """Collects results by arm, seed and evaluation into measurements."""
  fields = [
    {
      arm: {
        seed: {
          f"{name}/{metric}": value
          for name, result in results.items()
          for metric, value in getattr(result, field).items()
        }
        for seed, results in seeds.items()
      }
      for arm, seeds in arms.items()
    }
    for field in ("metrics", "errors", "resamples")
  ]
  return ArmMeasurements(*fields)


def compare_arms(
  data: ArmMeasurements, metric: Metric, arm: str, baseline: str
) -> Comparison:
  """An arm minus the baseline on one metric, uncorrected."""
  contrast = estimate_contrast(data, metric, {arm: 1.0, baseline: -1.0})
  return Comparison(**vars(contrast), arm=arm, baseline=baseline)


C = TypeVar("C", bound=Contrast)


def correct_contrasts(rows: Iterable[C]) -> list[C]:
  """Adds Holm's p values to the contrasts of one family."""
  rows = list(rows)
  pairs = zip(rows, holm([row.p for row in rows]), strict=True)
  return [dataclasses.replace(row, p_holm=p) for row, p in pairs]


def correct_by_key(rows: Mapping[Any, C | None]) -> dict[Any, C]:
  """`correct_contrasts` of the rows that are known."""
  known = {key: row for key, row in rows.items() if row is not None}
  return dict(zip(known, correct_contrasts(known.values()), strict=True))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Holm's step-down adjusted p values (Holm 1979).

  In ascending order, the i-th of m is max over j <= i of (m - j + 1) p_j, at
  most 1. A missing p value is not a test.
  """
  tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted: list[float | None] = [None] * len(p_values)
  largest = 0.0
  for rank, (p, i) in enumerate(tested):
    largest = max(largest, min(1.0, (len(tested) - rank) * p))
    adjusted[i] = largest
  return adjusted


def estimate_contrast(
  data: ArmMeasurements,
  metric: Metric,
  weights: Mapping[str, float],
  constant: float | int = 0.0,
) -> Contrast:
  """Weighted sum of the arms' means, plus a constant.

  With at least 2 common seeds, the interval is Student's t over per-seed sums.
  Else, if each arm has at least 2 seeds, it is Welch's (1947) interval for
  unequal variances. Else only the interval over items is known.
  """
  seeds_by_arm = {arm: data.seeds(arm, metric.name) for arm in weights}
  common = sorted(set.intersection(*map(set, seeds_by_arm.values())))
  missing = [arm for arm, seeds in seeds_by_arm.items() if not seeds]
  if missing:
    return Contrast(metric=metric, note=f"no value of {', '.join(missing)}")
  is_welch = len(common) < 2 and min(map(len, seeds_by_arm.values())) > 1
  is_paired = bool(common) and not is_welch
  used = dict.fromkeys(seeds_by_arm, common) if is_paired else seeds_by_arm
  n = len(common) if is_paired else 0
  runs = {
    arm: np.array(data.read("values", metric, arm, seeds), np.float64)
    for arm, seeds in used.items()
  }
  centre = sum(w * runs[arm].mean() for arm, w in weights.items())
  difference = constant + centre
  notes = []
  num_unused = sum(
    len(seeds_by_arm[arm]) - len(used[arm]) for arm in seeds_by_arm
  )
  if num_unused:
    count = f"{num_unused} run{'s' * (num_unused > 1)}"
    notes.append(f"not used, as other arms lack the seed: {count}")
  error, degrees = None, 0.0
  if is_paired and n > 1:
    sums = sum(w * runs[arm] for arm, w in weights.items())
    error, degrees = standard_error(sums), n - 1
  elif is_welch:
    notes.append("the arms' seeds differ: not paired")
    variances = {
      arm: (w * standard_error(runs[arm])) ** 2 for arm, w in weights.items()
    }
    total = sum(variances.values())
    spread = sum(v**2 / (len(runs[arm]) - 1) for arm, v in variances.items())
    error, degrees = math.sqrt(total), total**2 / spread if spread else 1.0
  elif n == 1:
    notes.append("one seed: the interval is over items alone")
  else:
    notes.append("no common seed: the interval is over items alone")
  scale = max(np.abs(x).max() for x in runs.values())
  if error is not None and error <= _EQUAL * scale:
    notes.append("all seeds differ equally: no interval over seeds")
    error = None

  low = high = p = None
  test = ""
  if error is not None:
    test = "Welch t" if is_welch else "paired t"
    low, high = t_interval(difference, error, degrees)
    p = float(2 * special.stdtr(degrees, -abs(difference) / error))
  errors, resamples = (
    {arm: data.read(field, metric, arm, used[arm]) for arm in weights}
    for field in ("errors", "resamples")
  )
  items = _draw_items(resamples, weights, paired=is_paired)
  items = items or _item_errors(errors, weights, centre, error or 0.0)
  item_low, item_high, item_error, source = items or (None, None, None, "")
  if source:
    # The item interval lacks the constant.
    item_low, item_high = item_low + constant, item_high + constant
  if p is None and source and item_error > 0:
    test = "items"
    p = float(2 * special.ndtr(-abs(difference) / item_error))
  return Contrast(
    metric=metric,
    n=n,
    test=test,
    difference=float(difference),
    low=low,
    high=high,
    p=p,
    p_holm=p,
    item_low=item_low,
    item_high=item_high,
    items=source,
    note="; ".join(notes),
  )


# Low, high, standard error and source of an interval over items.
ItemInterval = tuple[float, float, float, str]


def _item_errors(
  errors: Mapping[str, Sequence[Any]],
  weights: Mapping[str, float],
  centre: float,
  seeds_error: float,
) -> ItemInterval | None:
  """Interval from independent standard errors; None if one is unknown.

  An arm's error is the mean over its seeds, not divided by their number, since
  all seeds share the items.
  """
  variance = seeds_error**2
  for arm, weight in weights.items():
    if not all(map(is_finite, errors[arm])):
      return None
    variance += (weight * np.mean(errors[arm])) ** 2
  error = math.sqrt(variance)
  half = float(special.ndtri((1 + LEVEL) / 2)) * error
  return float(centre - half), float(centre + half), error, "errors"


def _draw_items(
  resamples: Mapping[str, Sequence[Any]],
  weights: Mapping[str, float],
  *,
  paired: bool,
) -> ItemInterval | None:
  """Percentile interval over items and seeds; None without resamples.

  Both are drawn independently (Owen 2007, "The pigeonhole bootstrap").
  """
  runs = [run for table in resamples.values() for run in table]
  # Lengths differ if the data sets do.
  if any(run is None for run in runs) or len({len(run) for run in runs}) != 1:
    return None
  # Drop resamples with a missing value, such as a class without items.
  whole = np.isfinite(np.stack(runs)).all(axis=0)
  if whole.mean() < 0.5:
    return None
  rng = np.random.default_rng(0)
  count = int(whole.sum())
  total, draws = 0.0, None
  for arm, weight in weights.items():
    table = np.stack(resamples[arm])[:, whole]  # [S, B]
    if draws is None or not paired:
      draws = rng.integers(len(table), size=(len(table), _SEED_DRAWS, count))
    total = total + weight * table[draws, np.arange(count)].mean(axis=0)
  tail = 50 * (1 - LEVEL)
  low, high = np.percentile(total, [tail, 100 - tail])
  return float(low), float(high), float(np.std(total, ddof=1)), "resamples"


def standard_error(values: np.ndarray) -> float:
  """Standard error of the mean of at least two values."""
  return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def t_interval(
  centre: float, error: float, degrees: float | int
) -> tuple[float, float]:
  """95 % interval of Student's t."""
  half = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
  return float(centre - half), float(centre + half)


def is_finite(value: float | None) -> bool:
  """Whether a value is neither None, infinite nor NaN."""
  return value is not None and math.isfinite(value)
