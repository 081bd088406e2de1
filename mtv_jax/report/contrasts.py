"""Differences between arms, with one interval over seeds and items.

An arm is an encoder, or a study's setting with several seeds. The interval of a
setting adds two half widths in quadrature (Zou and Donner 2008): Welch's over
all seeds, widened by `_WIDENING`, with the smallest degrees of freedom of any
arm; and the normal one over the items of the test set.
`tools/interval_coverage.py` simulates the coverage of several such intervals,
also for bimodal arms. Arms are not paired by seed, as runs of one seed hardly
correlate, and the spread of five differences is often too small by chance.
With fewer than `MIN_SEEDS` seeds there is no test. P values are corrected for
the number of tests of a family (Holm 1979).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from scipy import special

from mtv_jax.evals.core.base import Result, registered_class
from mtv_jax.evals.core.results import jsonable

# Nested by arm, seed and metric.
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
Resamples = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]
Protocols = Mapping[str, Mapping[int, Mapping[str, str]]]

BETTER, WORSE = "better", "worse"
NOT_DISTINGUISHABLE, MISSING = "not distinguishable", "missing"
NO_VERDICT, NOT_COMPARABLE = "no verdict", "measured in different ways"
LEVEL = 0.95
MIN_SEEDS = 5  # Per arm, for a test and an interval over seeds.
# Widens the half width over seeds, see the module docstring.
_WIDENING = 1.25
# Standard errors up to this share of the largest value are rounding errors.
_ROUNDING = 1e-9
# Protocol keys that comparable results share, besides the data.
COMPARED = ("protocol", "options", "train_hash", "train_data_hash", "regions")


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
  # How a metric was measured, see `protocol_key`.
  protocols: Protocols = dataclasses.field(default_factory=dict)
  # Whether arms are fixed encoders: intervals and tests are over items alone.
  fixed: bool = False

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

  def is_measured_alike(
    self, metric: Metric, seeds: Mapping[str, Sequence[int]]
  ) -> bool:
    """Whether the values of the seeds, by arm, have one protocol."""
    keys = (self.read("protocols", metric, *item) for item in seeds.items())
    return len({*itertools.chain(*keys)}) <= 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
  """A difference between arms on one metric; None if unknown, see `note`."""

  metric: Metric
  n: int = 0  # seeds of the arm with the fewest
  # What the interval and `p` cover; "" if there is none.
  covers: Literal["seeds and items", "seeds", "items", ""] = ""
  difference: float | None = None
  low: float | None = None  # 95 % interval
  high: float | None = None
  p: float | None = None  # two-sided; None if not tested
  p_holm: float | None = None  # Holm-corrected over its family
  # Source of the variation over items: paired resamples, or the runs' standard
  # errors, assumed independent, which give a wider interval.
  items: Literal["resamples", "errors", ""] = ""
  item_error: float | None = None  # standard deviation over items
  note: str = ""  # caveats

  @property
  def gain(self) -> float | None:
    """The difference, signed so that positive is an improvement."""
    if self.difference is None:
      return None
    return self.metric.sign * self.difference

  @property
  def verdict(self) -> str:
    """Direction of a significant difference: corrected p is below 0.05."""
    if self.difference is None:
      return NOT_COMPARABLE if self.note == NOT_COMPARABLE else MISSING
    if self.p_holm is None:
      return NO_VERDICT
    if self.p_holm >= 1 - LEVEL:
      return NOT_DISTINGUISHABLE
    return BETTER if self.gain > 0 else WORSE


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
    if main is None:  # As in results of older versions.
      main = registered_class(evaluation, result.type).main
    for metric in result.metrics:
      name, unit = f"{evaluation}/{metric}", result.units.get(metric, "%")
      chance, lower = result.chance.get(metric), metric in result.lower
      is_main = None if main is None else metric in main
      entry = Metric(name, unit, lower, chance, result.type, is_main)
      metrics.setdefault(name, entry)
  return [*metrics.values()]


def collect_measurements(
  arms: Mapping[str, Mapping[int, Mapping[str, Result]]], *, fixed: bool = False
) -> ArmMeasurements:
  """Collects results by arm, seed and evaluation into measurements."""

  def collect(read_fn):
    return {
      arm: {
        seed: {
          f"{name}/{metric}": value
          for name, result in results.items()
          for metric, value in read_fn(result).items()
        }
        for seed, results in seeds.items()
      }
      for arm, seeds in arms.items()
    }

  return ArmMeasurements(
    *(
      collect(lambda result, field=field: getattr(result, field))
      for field in ("metrics", "errors", "resamples")
    ),
    collect(lambda r: dict.fromkeys(r.metrics, protocol_key(r))),
    fixed,
  )


def protocol_key(result: Result, *, whole: bool = True) -> str:
  """A key of the data and, if `whole`, of the protocol and options."""
  keys = ["data_hash", *COMPARED] if whole else ["data_hash"]
  values = [jsonable(result.protocol.get(key)) for key in keys]
  return json.dumps(values, default=str)


def compare_arms(
  data: ArmMeasurements, metric: Metric, arm: str, baseline: str
) -> Comparison:
  """An arm minus the baseline on one metric, uncorrected."""
  contrast = estimate_contrast(data, metric, {arm: 1.0, baseline: -1.0})
  return Comparison(**vars(contrast), arm=arm, baseline=baseline)


C = TypeVar("C", bound=Contrast)


def correct_contrasts(rows: Iterable[C], *, pending: int = 0) -> list[C]:
  """Adds Holm's p values to the contrasts of one family, see `holm`."""
  rows = list(rows)
  adjusted = holm([row.p for row in rows], pending=pending)
  pairs = zip(rows, adjusted, strict=True)
  return [dataclasses.replace(row, p_holm=p) for row, p in pairs]


def correct_by_key(
  rows: Mapping[Any, C | None], *, pending: int = 0
) -> dict[Any, C]:
  """Applies `correct_contrasts` to the rows that are not None."""
  present = {key: row for key, row in rows.items() if row is not None}
  corrected = correct_contrasts(present.values(), pending=pending)
  return dict(zip(present, corrected, strict=True))


def holm(
  p_values: Sequence[float | None], *, pending: int = 0
) -> list[float | None]:
  """Holm's step-down adjusted p values (Holm 1979).

  In ascending order, the i-th of m is max over j <= i of (m - j + 1) p_j, at
  most 1. A missing p value is not a test. `pending` tests have not run yet, and
  count as if their p values were 1.
  """
  tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted: list[float | None] = [None] * len(p_values)
  running_max, count = 0.0, len(tested) + pending
  for rank, (p, i) in enumerate(tested):
    running_max = max(running_max, min(1.0, (count - rank) * p))
    adjusted[i] = running_max
  return adjusted


def estimate_contrast(
  data: ArmMeasurements,
  metric: Metric,
  weights: Mapping[str, float],
  constant: float | int = 0.0,
) -> Contrast:
  """Weighted sum of the arms' means, plus a constant; uncorrected.

  The interval covers seeds and items if each arm has `MIN_SEEDS` seeds, and
  items alone for one seed, or for fixed encoders.
  """
  seeds = {arm: data.seeds(arm, metric.name) for arm in weights}
  if missing := [arm for arm in weights if not seeds[arm]]:
    return Contrast(metric=metric, note=f"no value of {', '.join(missing)}")
  if not data.is_measured_alike(metric, seeds):
    return Contrast(metric=metric, note=NOT_COMPARABLE)
  values, errors, resamples = (
    {arm: data.read(field, metric, arm, seeds[arm]) for arm in weights}
    for field in ("values", "errors", "resamples")
  )
  difference = constant + sum(
    w * np.mean(values[a]) for a, w in weights.items()
  )
  n = min(map(len, seeds.values()))
  item_error, source = _item_std(errors, resamples, weights)
  common_fields = dict(metric=metric, n=n, items=source, item_error=item_error)
  contrast = Contrast(**common_fields, difference=float(difference))
  has_seeds = not data.fixed and n >= MIN_SEEDS
  if has_seeds:
    variance = sum(
      w**2 * np.var(values[arm], ddof=1) / len(values[arm])
      for arm, w in weights.items()
    )
    error, degrees = combine_errors(math.sqrt(variance), item_error or 0.0, n)
    covers = "seeds and items" if source else "seeds"
  elif source and (data.fixed or n == 1):
    error, degrees, covers = item_error, math.inf, "items"
  else:
    note = f"{n} seed{'s' * (n > 1)}: no interval"
    return dataclasses.replace(contrast, note=note)
  if error <= _ROUNDING * max(np.abs(x).max() for x in values.values()):
    if has_seeds:
      return dataclasses.replace(contrast, note="no variation: no interval")
    # Equal on every resample, such as all items correct: no test.
    ends = dict.fromkeys(("low", "high"), contrast.difference)
    return dataclasses.replace(contrast, **ends, covers=covers)
  half_width = float(special.stdtrit(degrees, (1 + LEVEL) / 2) * error)
  p = float(2 * special.stdtr(degrees, -abs(difference) / error))
  is_tested = has_seeds or data.fixed
  return dataclasses.replace(
    contrast,
    covers=covers,
    low=contrast.difference - half_width,
    high=contrast.difference + half_width,
    p=p if is_tested else None,
    note="" if is_tested else "one seed: the interval is over items alone",
  )


def combine_errors(
  seeds_error: float | np.ndarray, item_error: float, n: int
) -> tuple[float | np.ndarray, int]:
  """The error of a t interval over seeds and items, and degrees of freedom.

  `n` counts the seeds of the arm with the fewest. See the module docstring.
  """
  quantile = (1 + LEVEL) / 2
  ratio = special.ndtri(quantile) / special.stdtrit(n - 1, quantile)
  return np.hypot(_WIDENING * seeds_error, ratio * item_error), n - 1


def _item_std(
  errors: Mapping[str, Sequence[Any]],
  resamples: Mapping[str, Sequence[Any]],
  weights: Mapping[str, float],
) -> tuple[float | None, Literal["resamples", "errors", ""]]:
  """Standard deviation of a contrast over items, and its source.

  From paired resamples if all runs have them, else from independent standard
  errors: an arm's is the mean over its seeds that have one, as all seeds share
  the items.
  """
  runs = [run for arm_runs in resamples.values() for run in arm_runs]
  # Lengths differ if the data sets do.
  if all(run is not None for run in runs) and len({*map(len, runs)}) == 1:
    resampled = sum(
      w * np.mean(resamples[arm], axis=0) for arm, w in weights.items()
    )
    # Drop resamples with a missing value, such as a class without items.
    has_value = np.isfinite(resampled)
    if has_value.mean() >= 0.5:
      return float(np.std(resampled[has_value], ddof=1)), "resamples"
  known = {arm: [*filter(is_finite, errors[arm])] for arm in weights}
  if not all(known.values()):
    return None, ""
  variances = [(w * np.mean(known[arm])) ** 2 for arm, w in weights.items()]
  return math.sqrt(sum(variances)), "errors"


def is_finite(value: float | None) -> bool:
  """Whether a value is neither None, infinite nor NaN."""
  return value is not None and math.isfinite(value)
