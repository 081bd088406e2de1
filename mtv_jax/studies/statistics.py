"""Statistics of a study: results, means of arms, tests, synergy, power.

`report/contrasts.py` estimates differences and their intervals.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special, stats

from mtv_jax.evals import store
from mtv_jax.report import contrasts, tables
from mtv_jax.report.charts import Row
from mtv_jax.report.contrasts import (
  LEVEL,
  MIN_SEEDS,
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
  Values,
  compare_arms,
  correct_by_key,
  estimate_contrast,
)
from mtv_jax.report.run_folders import RunRecord, read_run
from mtv_jax.studies import runner
from mtv_jax.studies.expand import ComparisonFamily, Study
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import align_columns, file_name

# Corrected comparisons by metric name, arm and baseline.
Tests = Mapping[tuple[str, str, str], Comparison]

PREDICTIONS = "predictions.json"  # See `predictions.py`.
_POWER = 0.8
_SEED_COUNTS = (5, 10, 20)  # Columns of the power table.
_MAX_SEEDS = 200


@dataclasses.dataclass(frozen=True)
class StudyResults:
  """Measurements of the finished runs; metrics are `EVALUATION/METRIC`."""

  study: Study
  runs: tuple[RunRecord, ...]  # finished runs
  measurements: ArmMeasurements  # arms in the study's order
  metrics: tuple[Metric, ...]  # in evaluation order
  unfinished: tuple[str, ...]  # run names
  losses: Values  # means of the last tenth, see `read_losses`
  predictions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def main(self) -> list[Metric]:
    """The metrics that are charted in reports and compared by the tests."""
    return tables.select_main(self.metrics)

  @property
  def family(self) -> ComparisonFamily:
    """The study's family of tests; the default one if it records none."""
    return self.study.family or ComparisonFamily.of_runs(self.study.runs)


@dataclasses.dataclass(frozen=True)
class Synergy:
  """Gain of training a pair of objectives over training each alone."""

  arm: str  # trained with both
  first: str
  second: str
  better: str  # the better of first and second, by mean
  over_better: Contrast  # arm - better
  # arm - (first + second - chance); None if chance is unknown.
  over_additive: Contrast | None


def read_study(folder: pathlib.Path) -> StudyResults:
  """Reads the finished runs of a study."""
  study = runner.read(folder)
  arms = {run.arm: {} for run in study.runs}
  losses = {arm: {} for arm in arms}
  records, results, unfinished = [], [], []
  for run in study.runs:
    if not runner.is_finished(folder, run):
      unfinished.append(run.name)
      continue
    path = folder / runner.RUNS / run.name
    extra = folder / runner.EVALUATIONS / store.FOLDER / file_name(run.name)
    options = dict(arm=run.arm, step=run.steps, extra_results=extra)
    records.append(read_run(path, name=run.name, **options))
    last_results = records[-1].outcome.results
    for name in run.settings["evals"]:
      if name not in last_results:
        file = records[-1].files[name]
        raise InputError(f"{file} lacks results of {name!r}.")
    arms[run.arm][run.seed] = last_results
    losses[run.arm][run.seed] = read_losses(records[-1])
    results += arms[run.arm][run.seed].items()
  data = contrasts.collect_measurements(arms)
  metrics = tuple(contrasts.list_metrics(results))
  runs, unfinished = tuple(records), tuple(unfinished)
  predictions = read_predictions(folder)
  return StudyResults(
    study, runs, data, metrics, unfinished, losses, predictions
  )


def read_predictions(folder: pathlib.Path) -> Mapping[str, Any]:
  """Predictions by arm, see `predictions.py`; InputError if damaged."""
  path = folder / PREDICTIONS
  if not path.exists():
    return {}
  entries = path_lib.read_json(path)
  if not isinstance(entries, dict) or not all(
    isinstance(entry, dict)
    and isinstance(entry.get("size"), dict)
    and isinstance(entry.get("metrics"), dict)
    for entry in entries.values()
  ):
    raise InputError(
      f"{path} is damaged. Restore it, or remove it to report without"
      " predictions; an arm that has started is not predicted again."
    )
  return entries


def read_losses(run: RunRecord) -> dict[str, float]:
  """Mean of each `OBJECTIVE/loss` over the logged steps in the last tenth."""
  losses = {}
  for name, points in run.series.items():
    if name.endswith("/loss") and points:
      last = [y for x, y in points if x > 0.9 * run.step and y is not None]
      losses[name] = float(np.mean(last or [points[-1][1]]))
  return losses


def add_losses(results: StudyResults) -> tuple[ArmMeasurements, list[Metric]]:
  """Adds the training losses, as `OBJECTIVE/loss`, to the main metrics."""
  data, losses = results.measurements, results.losses
  values = {
    arm: {seed: {**run, **losses[arm][seed]} for seed, run in runs.items()}
    for arm, runs in data.values.items()
  }
  names = dict.fromkeys(
    name for runs in losses.values() for run in runs.values() for name in run
  )
  data = dataclasses.replace(data, values=values)
  return data, [*results.main, *(Metric(n, "", lower=True) for n in names)]


def run_tests(results: StudyResults) -> Tests:
  """Makes the comparisons of the study's family, with Holm's p values.

  Tests that wait for runs count as well, see `find_pending`, so that further
  runs don't make the correction stricter.
  """
  family, data = results.family, results.measurements
  rows = {
    (metric.name, *pair): compare_arms(data, metric, *pair)
    for metric in results.main
    if metric.name.partition("/")[0] in family.evaluations
    for pair in family.comparisons
  }
  return correct_by_key(rows, pending=len(find_pending(results, rows)))


def find_pending(
  results: StudyResults, rows: Tests
) -> set[tuple[str, str, str]]:
  """Keys of the family's tests that lack seeds until more runs finish."""
  data, planned = results.measurements, results.family.seeds
  # Seeds may have been added for all arms, but finished for some only.
  num_runs = collections.Counter(run.arm for run in results.study.runs)

  def is_possible(metric: str, arm: str) -> bool:
    # Finished runs show whether an arm has the metric.
    is_measured = data.seeds(arm, metric) or not data.values.get(arm)
    seeds = max(planned.get(arm, 0), num_runs[arm])
    return bool(is_measured) and seeds >= MIN_SEEDS

  return {
    (metric, *pair)
    for (metric, *pair), row in rows.items()
    if row.p is None
    and row.note != contrasts.NOT_COMPARABLE
    and all(is_possible(metric, arm) for arm in pair)
  }


def compare(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  pairs: Sequence[tuple[str, str]],
  tests: Tests,
) -> list[Comparison]:
  """Compares (arm, baseline) pairs; pairs in `tests` keep their p values."""
  return [
    tests.get((metric.name, arm, before))
    or compare_arms(data, metric, arm, before)
    for metric in metrics
    for arm, before in pairs
  ]


def find_synergies(
  data: ArmMeasurements, metrics: Sequence[Metric], tests: Tests
) -> list[Synergy]:
  """Compares each arm `A+B` with the arms `A` and `B`.

  Selecting the better by its mean underestimates the gain over it.
  """
  pairs = [(arm, *arm.split("+")) for arm in data.values if arm.count("+") == 1]
  pairs = [pair for pair in pairs if {*pair} <= {*data.values}]
  rows = []
  for metric, (arm, first, second) in itertools.product(metrics, pairs):
    means = {
      single: mean * metric.sign
      for single in (first, second)
      if (mean := summarise_arm(data, metric, single).value) is not None
    }
    better = max(means or [first], key=means.get)
    [over_better] = compare(data, [metric], [(arm, better)], tests)
    over_additive = None
    if metric.chance is not None:
      weights = {arm: 1.0, first: -1.0, second: -1.0}
      over_additive = estimate_contrast(data, metric, weights, metric.chance)
    rows.append(Synergy(arm, first, second, better, over_better, over_additive))
  return rows


def summarise_arm(data: ArmMeasurements, metric: Metric, arm: str) -> Row:
  """Mean of an arm with its seeds and chance, in the displayed unit.

  The interval is from `estimate_contrast`.
  """
  scale, seeds = metric.scale, data.seeds(arm, metric.name)
  chance = None if metric.chance is None else scale * metric.chance
  c = estimate_contrast(data, metric, {arm: 1.0})
  if c.difference is None:
    return Row(arm, None, chance=chance)
  ends = (None if end is None else scale * end for end in (c.low, c.high))
  points = [scale * x for x in data.read("values", metric, arm, seeds)]
  points = points if len(points) > 1 else ()
  return Row(arm, scale * c.difference, *ends, points, chance)


def correlate_ranks(
  data: ArmMeasurements, metrics: Sequence[Metric]
) -> dict[tuple[Metric, Metric], tuple[float, int]]:
  """Spearman's correlation of feature ranks with main metrics over all runs.

  By main metric and rank (`evals/feature_rank.py`), with the number of runs;
  positive if runs of a higher rank are better. Skips constant metrics, metrics
  that runs measure in different ways, and pairs with fewer than `MIN_SEEDS`
  runs.
  """
  ranks = [metric for metric in metrics if metric.type == "feature_rank"]
  correlations = {}
  for pair in itertools.product(tables.select_main(metrics), ranks):
    rows, seeds = [], {}
    for arm in data.values:
      common = set.intersection(*({*data.seeds(arm, m.name)} for m in pair))
      seeds[arm] = [*common]
      columns = (data.read("values", m, arm, seeds[arm]) for m in pair)
      rows += zip(*columns, strict=True)
    x, y = np.reshape(rows, (-1, 2)).T
    is_alike = all(data.is_measured_alike(m, seeds) for m in pair)
    if is_alike and len(rows) >= MIN_SEEDS and np.ptp(x) * np.ptp(y):
      rho = float(stats.spearmanr(x, y).statistic)
      correlations[pair] = pair[0].sign * rho, len(rows)
  return correlations


@dataclasses.dataclass(frozen=True)
class Pilot:
  """Standard deviations of a comparison, for the power of its test.

  Attributes:
    spreads: standard deviations over the seeds of both arms.
    item_error: standard deviation of the difference over items.
    alpha: two-sided level of the test.
  """

  spreads: tuple[float, float]
  item_error: float
  alpha: float

  def power(self, effect: float, n: int) -> float:
    """Probability that n seeds per arm make an effect significant."""
    seeds_error = math.hypot(*self.spreads) / math.sqrt(n)
    error, degrees = contrasts.combine_errors(seeds_error, self.item_error, n)
    true_error = max(math.hypot(seeds_error, self.item_error), 1e-12)
    critical = special.stdtrit(degrees, 1 - self.alpha / 2) * error
    ratio = critical / true_error
    # nctdtr is NaN for an effect far above the critical value.
    below = np.nan_to_num(special.nctdtr(degrees, effect / true_error, ratio))
    return float(1 - below)

  def count_seeds(self, effect: float) -> int | None:
    """Fewest seeds with 80 % power; None above 200."""
    counts = range(MIN_SEEDS, _MAX_SEEDS + 1)
    return next((n for n in counts if self.power(effect, n) >= _POWER), None)

  def detectable_effect(self, n: int) -> float:
    """The effect that n seeds per arm detect with 80 % power."""
    low, high = 0.0, 1.0
    while self.power(high, n) < _POWER:
      low, high = high, 2 * high
    for _ in range(40):
      middle = (low + high) / 2
      is_too_small = self.power(middle, n) < _POWER
      low, high = (middle, high) if is_too_small else (low, middle)
    return high


def power_table(
  results: StudyResults, effect: float | None = None
) -> tuple[list[list[str]], int]:
  """The seeds that an effect needs: a header, then a row per comparison.

  The effect is in the displayed unit; by default the pilot's difference. Also
  returns the size of the family.
  """
  data, tests = results.measurements, run_tests(results)
  measured = {key for key, c in tests.items() if c.difference is not None}
  size = len(measured | find_pending(results, tests))  # As in `run_tests`.
  header = ["comparison", "axis", "spreads", "items", "effect", "seeds"]
  rows = [[*header, "in the family", *(f"by {n}" for n in _SEED_COUNTS)]]
  for c in tests.values():
    scale = c.metric.scale
    spreads = tuple(
      scale * float(np.std(data.read("values", c.metric, arm, s), ddof=1))
      for arm in (c.arm, c.baseline)
      if len(s := data.seeds(arm, c.metric.name)) > 1
    )
    if c.difference is None or len(spreads) < 2:
      continue
    pilot = Pilot(spreads, scale * (c.item_error or 0.0), 1 - LEVEL)
    # Holm's first step.
    strict_pilot = dataclasses.replace(pilot, alpha=(1 - LEVEL) / size)
    assumed = scale * abs(c.difference) if effect is None else effect
    counts = (p.count_seeds(assumed) for p in (pilot, strict_pilot))
    effects = (strict_pilot.detectable_effect(n) for n in _SEED_COUNTS)
    numbers = (*spreads, pilot.item_error, assumed, *effects)
    first, second, *texts = (f"{x:.3g}" for x in numbers)
    row = [c.name, c.metric.label, f"{first}, {second}", *texts[:2]]
    row += (str(n or f"> {_MAX_SEEDS}") for n in counts)
    rows.append([*row, *texts[2:]])
  return rows, size


def format_power(results: StudyResults, effect: float | None = None) -> str:
  """The `power_table` as text, with a note."""
  rows, size = power_table(results, effect)
  if len(rows) < 2:
    raise InputError(
      "no two compared arms have two finished seeds: the spread over seeds is "
      "unknown. Train the pilot with --seeds=2 or more."
    )
  note = (
    "In the metric's unit: standard deviations over the seeds of both arms and "
    "over items, and the effect. Seeds of each arm for 80 % power in one test, "
    f"and at Holm's first step in the family of {size}; effects that "
    f"{', '.join(map(str, _SEED_COUNTS))} seeds detect there."
  )
  table = align_columns(rows, left=(0, 1, 2))
  return "\n".join([*table, *textwrap.wrap(note, 80)])
