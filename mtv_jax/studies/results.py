"""Results of a study's finished runs, as the statistics take them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mtv_jax.evals.core import results as results_lib
from mtv_jax.evals.core.base import Result
from mtv_jax.studies import runner
from mtv_jax.studies.contrasts import Measurements, Metric
from mtv_jax.studies.expand import Study
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class StudyResults:
  """Measurements of the finished runs; metrics are `EVALUATION/METRIC`."""

  study: Study
  measurements: Measurements  # arms in the study's order
  metrics: tuple[Metric, ...]  # in the order of the evaluations
  unfinished: tuple[str, ...]  # names of runs


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation of a run at its last step."""

  result: Result
  resamples: Mapping[str, np.ndarray]
  path: pathlib.Path  # of its JSON


def read_study(folder: pathlib.Path) -> StudyResults:
  """Reads the finished runs of a study.

  Raises:
    InputError: it is not a study, or the folder of a run has other settings
      than the study's.
  """
  study = runner.read(folder)
  arms = dict.fromkeys(run.arm for run in study.runs)
  values, errors, resamples = ({arm: {} for arm in arms} for _ in range(3))
  metrics: dict[str, Metric] = {}
  unfinished = []
  for run in study.runs:
    if not runner.is_finished(folder, run):
      unfinished.append(run.name)
      continue
    evaluations = read_evaluations(
      folder / runner.RUNS / run.name, run.settings["evals"], run.steps
    )
    for kind, into in (
      ("metrics", values),
      ("errors", errors),
    ):
      into[run.arm][run.seed] = {
        f"{name}/{metric}": value
        for name, evaluation in evaluations.items()
        for metric, value in getattr(evaluation.result, kind).items()
      }
    resamples[run.arm][run.seed] = {
      f"{name}/{metric}": array
      for name, evaluation in evaluations.items()
      for metric, array in evaluation.resamples.items()
    }
    for name, evaluation in evaluations.items():
      for metric in describe_metrics(name, evaluation.result):
        metrics.setdefault(metric.name, metric)
  return StudyResults(
    study,
    Measurements(values, errors, resamples),
    tuple(metrics.values()),
    tuple(unfinished),
  )


def read_evaluations(
  path: pathlib.Path, names: Sequence[str] | Mapping, step: int
) -> dict[str, Evaluation]:
  """A run's evaluations after a step, by name."""
  evaluations = {}
  for name in names:
    file = path / "evals" / f"{name}_{step}.json"
    (outcome,) = results_lib.read(file)
    if name not in outcome.results:
      raise InputError(f"{file} has no results of {name!r}.")
    evaluations[name] = Evaluation(
      outcome.results[name], results_lib.read_resamples(file), file
    )
  return evaluations


def describe_metrics(name: str, result: Result) -> list[Metric]:
  """Units, directions and chance of an evaluation's metrics."""
  return [
    Metric(
      f"{name}/{metric}",
      unit=result.units.get(metric, "%"),
      lower=metric in result.lower,
      chance=result.chance.get(metric),
    )
    for metric in result.metrics
  ]
