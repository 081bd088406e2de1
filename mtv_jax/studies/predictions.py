"""Predictions of a study's arm, written before it is trained.

`predictions.json` in the study's folder holds for each arm the date, and for
each metric the law fitted to finished runs, the predicted value and its 95 %
interval for one run, or why there is none. The law is fitted to the other arms
of a scaling study, or to shorter runs of the same arm in other studies. An arm
is predicted once, and only while none of its runs has started.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import mtv_jax
from mtv_jax.report.contrasts import ArmMeasurements, Metric
from mtv_jax.report.run_folders import group_by_arm
from mtv_jax.studies import page, runner, scaling, statistics
from mtv_jax.studies.expand import Study, StudyRun
from mtv_jax.studies.lengths import list_unscaled_differences
from mtv_jax.studies.statistics import StudyResults
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

_ONCE = "a prediction is written once, before the arm's first run."


def write_predictions(folder: pathlib.Path, arm: str) -> pathlib.Path:
  """Predicts an arm from the finished ones; returns the file.

  Raises ConfigError if the study isn't a scaling study or lacks the arm,
  InputError if the arm has started or was already predicted.
  """
  results = statistics.read_study(folder)
  study = results.study
  if study.kind != "scaling":
    raise ConfigError(
      f"{folder} is a {study.kind} study; predict needs a scaling study."
    )
  sizes = page.measure_sizes(study)
  if arm not in sizes:
    raise ConfigError(f"--arm={arm}: {did_you_mean(arm, sizes)}")
  if arm in results.predictions:
    raise InputError(f"--arm={arm}: it was predicted; {_ONCE}")
  _check_unstarted(folder, study, arm)
  data, metrics = statistics.add_losses(results)
  finished = {name: runs for name, runs in data.values.items() if runs}
  finished = dataclasses.replace(data, values=finished)
  entry = _make_entry(finished, metrics, sizes, sizes[arm])
  return _write(folder, {**results.predictions, arm: entry})


def predict_longer_runs(
  folder: pathlib.Path, study: Study, others: Sequence[pathlib.Path]
) -> pathlib.Path:
  """Predicts a study's arms from their shorter runs in other studies.

  The laws have one variable, the images seen. An arm that was predicted keeps
  its prediction. Raises InputError if one that was not has started, or differs
  from its shorter runs in more than what scales with a run's length.
  """
  predictions = statistics.read_predictions(folder)
  results = [statistics.read_study(other) for other in others]
  for arm, (run, *_) in group_by_arm(study.runs).items():
    if arm in predictions:
      continue
    _check_unstarted(folder, study, arm)
    entry = _predict_longer_run(run, results)
    if entry is not None:
      predictions = {**predictions, arm: entry}
  return _write(folder, predictions)


def _predict_longer_run(
  run: StudyRun, results: Sequence[StudyResults]
) -> dict[str, Any] | None:
  """The prediction of a run's arm; None without shorter runs."""
  values, sizes, metrics, data = {}, {}, {}, None
  for other in results:
    shorter = group_by_arm(other.study.runs).get(run.arm, ())
    data, names = statistics.add_losses(other)
    if not data.values.get(run.arm) or shorter[0].images >= run.images:
      continue
    settings = [shorter[0].settings, run.settings]
    if keys := list_unscaled_differences(settings):
      raise InputError(
        f"the runs of {run.arm!r} differ in {', '.join(keys)}: only runs that"
        " differ in length predict longer ones."
      )
    name = f"{run.arm}, {shorter[0].steps:,} steps"
    sizes[name] = {"images": shorter[0].images}
    values[name] = {**values.get(name, {}), **data.values[run.arm]}
    metrics |= {metric.name: metric for metric in names}
  if not values:
    return None
  data = dataclasses.replace(data, values=values)
  return _make_entry(data, [*metrics.values()], sizes, {"images": run.images})


def _check_unstarted(folder: pathlib.Path, study: Study, arm: str) -> None:
  for run in study.runs:
    if run.arm == arm and (folder / runner.RUNS / run.name).exists():
      raise InputError(f"{arm}: the run {run.name} has started; {_ONCE}")


def _make_entry(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  sizes: Mapping[str, Mapping[str, Any]],
  size: Mapping[str, Any],
) -> dict[str, Any]:
  """The prediction of an arm of a size, as JSON."""
  fits = scaling.fit_metrics(data, metrics, sizes)
  return dict(
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    mtv_jax=mtv_jax.__version__,
    arms={name: len(runs) for name, runs in data.values.items()},
    size={k: v for k, v in size.items() if k != "model"},
    metrics={name: _predict(fit, size) for name, fit in fits.items()},
  )


def _write(
  folder: pathlib.Path, predictions: Mapping[str, Any]
) -> pathlib.Path:
  path = folder / statistics.PREDICTIONS
  atomic.write_text(path, f"{json.dumps(predictions, indent=1)}\n")
  return path


def _predict(
  fit: scaling.ScalingFit, size: Mapping[str, Any]
) -> dict[str, Any]:
  """A metric's prediction as JSON, in the stored unit."""
  row: dict[str, Any] = dict(law=fit.formula, points=fit.points)
  if not fit.is_identifiable:
    return row | {"note": fit.note}
  parameters = {k: vars(p) for k, p in fit.parameters.items()}
  predicted = fit.predict_interval({name: size[name] for name in fit.centres})
  return row | {"parameters": parameters} | vars(predicted)
