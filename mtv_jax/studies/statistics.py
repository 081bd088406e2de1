"""Statistics of a study: results of runs, means of arms, synergy of pairs.

`report/contrasts.py` estimates differences and their intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from mtv_jax.report import contrasts
from mtv_jax.report.charts import Row
from mtv_jax.report.contrasts import (
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
  compare_arms,
  correct_by_key,
  correct_contrasts,
  estimate_contrast,
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


def read_study(folder: pathlib.Path) -> StudyResults:
  """Reads the finished runs of a study."""
  study = runner.read(folder)
  arms = {run.arm: {} for run in study.runs}
  read, results, unfinished = [], [], []
  for run in study.runs:
    if not runner.is_finished(folder, run):
      unfinished.append(run.name)
      continue
    path = folder / runner.RUNS / run.name
    read.append(read_run(path, name=run.name, arm=run.arm, step=run.steps))
    known = read[-1].outcome.results
    for name in run.settings["evals"]:
      if name not in known:
        file = read[-1].files[name]
        raise InputError(f"{file} lacks results of {name!r}.")
    arms[run.arm][run.seed] = {
      name: known[name] for name in run.settings["evals"]
    }
    results += arms[run.arm][run.seed].items()
  measured = contrasts.collect_measurements(arms)
  metrics = tuple(contrasts.list_metrics(results))
  runs, unfinished = tuple(read), tuple(unfinished)
  return StudyResults(study, runs, measured, metrics, unfinished)


def compare(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  *,
  baseline: str | None = None,
) -> list[Comparison]:
  """Contrasts of one family: arm and baseline, by default the arm before it."""
  arms = list(data.values)
  if baseline not in (None, *arms):
    names = ", ".join(arms)
    raise InputError(f"the baseline {baseline!r} is none of the arms: {names}")
  pairs = itertools.pairwise(arms)
  if baseline is not None:
    pairs = ((baseline, arm) for arm in arms if arm != baseline)
  jobs = itertools.product(metrics, list(pairs))
  return correct_contrasts(
    compare_arms(data, metric, arm, before) for metric, (before, arm) in jobs
  )


def find_synergies(
  data: ArmMeasurements, metrics: Sequence[Metric]
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
    over_better = estimate_contrast(data, metric, {arm: 1.0, better: -1.0})
    over_additive = None
    if metric.chance is not None:
      weights = {arm: 1.0, first: -1.0, second: -1.0}
      over_additive = estimate_contrast(data, metric, weights, metric.chance)
    rows.append(Synergy(arm, first, second, better, over_better, over_additive))
  better = correct_contrasts(row.over_better for row in rows)
  additive = correct_by_key({i: r.over_additive for i, r in enumerate(rows)})
  return [
    dataclasses.replace(
      row, over_better=better[i], over_additive=additive.get(i)
    )
    for i, row in enumerate(rows)
  ]


def summarise_arm(data: ArmMeasurements, metric: Metric, arm: str) -> Row:
  """Mean of an arm with its seeds and chance, in the displayed unit.

  The 95 % interval is Student's t over several seeds, else over items.
  """
  scale, seeds = metric.scale, data.seeds(arm, metric.name)
  chance = None if metric.chance is None else scale * metric.chance
  if not seeds:
    return Row(arm, None, chance=chance)
  x = scale * np.array(data.read("values", metric, arm, seeds), np.float64)
  mean, ends, points = float(np.mean(x)), (None, None), ()
  errors = data.read("errors", metric, arm, seeds)
  if len(x) > 1:
    error, points = contrasts.standard_error(x), x.tolist()
    ends = contrasts.t_interval(mean, error, len(x) - 1)
  elif contrasts.is_finite(errors[0]):
    half = Z_95 * scale * errors[0]
    ends = mean - half, mean + half
  return Row(arm, mean, *ends, points, chance)
