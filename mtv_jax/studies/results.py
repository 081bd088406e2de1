"""Results of a study's finished runs, as the statistics take them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import read_resamples
from mtv_jax.studies import runner
from mtv_jax.studies.contrasts import Measurements, Metric
from mtv_jax.studies.expand import Study
from mtv_jax.studies.folders import RunFolder, read_run
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class StudyResults:
  """Measurements of the finished runs; metrics are `EVALUATION/METRIC`."""

  study: Study
  runs: tuple[RunFolder, ...]  # that are finished
  measurements: Measurements  # arms in the study's order
  metrics: tuple[Metric, ...]  # in the order of the evaluations
  unfinished: tuple[str, ...]  # names of runs


def read_study(folder: pathlib.Path) -> StudyResults:
  """Reads the finished runs of a study.

  Raises:
    InputError: it is not a study, the folder of a run has other settings than
      the study's, or a file can't be read.
  """
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
    evaluations = {
      name: with_resamples(result, read[-1].files[name])
      for name, result in _select_results(
        read[-1], run.settings["evals"]
      ).items()
    }
    arms[run.arm][run.seed] = evaluations
    for name, result in evaluations.items():
      for metric in describe_metrics(name, result):
        metrics.setdefault(metric.name, metric)
  return StudyResults(
    study,
    tuple(read),
    collect_measurements(arms),
    tuple(metrics.values()),
    tuple(unfinished),
  )


def with_resamples(result: Result, file: pathlib.Path) -> Result:
  """A result with the resamples beside its JSON, if there are any."""
  return dataclasses.replace(result, resamples=read_resamples(file))


def collect_measurements(
  arms: Mapping[str, Mapping[int, Mapping[str, Result]]],
) -> Measurements:
  """The results of arms, by seed and evaluation, as the statistics take them.

  Metrics become `EVALUATION/METRIC`.
  """
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
  return Measurements(*fields)


def _select_results(run: RunFolder, names: Iterable[str]) -> dict[str, Result]:
  """The results of a run's own evaluations."""
  results = run.outcome.results
  for name in names:
    if name not in results:
      raise InputError(f"{run.files[name]} has no results of {name!r}.")
  return {name: results[name] for name in names}


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
