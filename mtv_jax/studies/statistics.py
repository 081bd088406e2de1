"""Statistics of a study: results of runs, means of arms, synergy of pairs.

`report/contrasts.py` estimates differences and their intervals.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mtv_jax.evals.core.base import Result
from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import (
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
  compare_arms,
  correct_contrasts,
)
from mtv_jax.report.evaluations import Z_95
from mtv_jax.report.run_folders import RunRecord, read_run
from mtv_jax.studies import runner
from mtv_jax.studies.expand import Study
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class StudyResults:
  """Measurements of the finished runs; metrics are `EVALUATION/METRIC`."""

  study: Study
  runs: tuple[RunRecord, ...]  # finished runs
  measurements: ArmMeasurements  # arms in the study's order
  metrics: tuple[Metric, ...]  # in evaluation order
  unfinished: tuple[str, ...]  # run names


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


@dataclasses.dataclass(frozen=True)
class Summary:
  """Mean of an arm on one metric."""

  n: int  # number of seeds
  mean: float | None
  # 95 %: Student's t over seeds if there are several, else over items.
  interval: tuple[float, float] | None


def read_study(folder: pathlib.Path) -> StudyResults:
  """Reads the finished runs of a study."""
  study = runner.read(folder)
  arms = {run.arm: {} for run in study.runs}
  metrics: dict[str, Metric] = {}
  read, unfinished = [], []
  for run in study.runs:
    if not runner.is_finished(folder, run):
      unfinished.append(run.name)
      continue
    path = folder / runner.RUNS / run.name
    read.append(read_run(path, name=run.name, arm=run.arm, step=run.steps))
    arms[run.arm][run.seed] = {
      name: _get_result(read[-1], name) for name in run.settings["evals"]
    }
    for name, result in arms[run.arm][run.seed].items():
      for metric in contrasts.describe_metrics(name, result):
        metrics.setdefault(metric.name, metric)
  return StudyResults(
    study,
    tuple(read),
    contrasts.collect_measurements(arms),
    tuple(metrics.values()),
    tuple(unfinished),
  )


def _get_result(run: RunRecord, name: str) -> Result:
  if name not in run.outcome.results:
    raise InputError(f"{run.files[name]} lacks results of {name!r}.")
  return run.outcome.results[name]


def compare(
  data: ArmMeasurements, metrics: Sequence[Metric], *, baseline: str
) -> list[Comparison]:
  """Compares each arm with the baseline per metric, corrected as one family."""
  arms = [arm for arm in data.values if arm != baseline]
  if len(arms) == len(data.values):
    names = ", ".join(data.values)
    raise InputError(f"the baseline {baseline!r} is none of the arms: {names}")
  return correct_contrasts(
    compare_arms(data, metric, arm, baseline)
    for metric in metrics
    for arm in arms
  )


def compare_in_order(
  data: ArmMeasurements, metrics: Sequence[Metric]
) -> list[Comparison]:
  """Compares each arm with its predecessor, corrected as one family."""
  arms = list(data.values)
  return correct_contrasts(
    compare_arms(data, metric, arm, before)
    for metric in metrics
    for before, arm in zip(arms, arms[1:], strict=False)
  )


def find_synergies(
  data: ArmMeasurements, metrics: Sequence[Metric]
) -> list[Synergy]:
  """Compares each arm `A+B` with the arms `A` and `B`.

  Selecting the better of A and B by its mean biases that mean upwards, so
  `over_better` tends to underestimate the gain.
  """
  pairs = [(arm, *arm.split("+")) for arm in data.values if arm.count("+") == 1]
  pairs = [pair for pair in pairs if {*pair} <= {*data.values}]
  rows = [
    _estimate_synergy(data, metric, pair)
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
  data: ArmMeasurements,
  metric: Metric,
  pair: tuple[str, str, str],
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
  weights = {arm: 1.0, first: -1.0, second: -1.0}
  over_additive = None
  if metric.chance is not None:
    over_additive = contrasts.estimate_contrast(
      data, metric, weights, metric.chance
    )
  return Synergy(arm, first, second, better, over_better, over_additive)


def summarise_arm(data: ArmMeasurements, metric: Metric, arm: str) -> Summary:
  """Mean and interval of an arm over its seeds."""
  seeds = data.seeds(arm, metric.name)
  if not seeds:
    return Summary(0, None, None)
  x = np.array([data.values[arm][s][metric.name] for s in seeds], np.float64)
  mean, interval = float(np.mean(x)), None
  errors = [data.errors.get(arm, {}).get(s, {}).get(metric.name) for s in seeds]
  if len(seeds) > 1:
    error = contrasts.standard_error(x)
    interval = contrasts.t_interval(mean, error, len(x) - 1)
  elif all(map(contrasts.is_finite, errors)):
    half = Z_95 * float(np.mean(errors))
    interval = mean - half, mean + half
  return Summary(len(seeds), mean, interval)
