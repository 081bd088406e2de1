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
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import mtv_jax
from mtv_jax.report.contrasts import ArmMeasurements, Metric
from mtv_jax.report.run_folders import group_by_arm
from mtv_jax.studies import page, runner, scaling, statistics
from mtv_jax.studies.expand import Study, StudyRun
from mtv_jax.studies.lengths import check_differ_in_length
from mtv_jax.studies.statistics import StudyResults
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

log = logging.getLogger(__name__)

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

  The laws have one variable, the images seen, and need four lengths. Arms with
  fewer than two are left out; one that was predicted keeps its prediction, and
  then further arms that have started are left out as well. Raises InputError if
  no arm was predicted before and one to predict has started, if an arm differs
  from its shorter runs in more than what scales with a run's length, or if no
  arm can be predicted.
  """
  runs = {arm: run for arm, (run, *_) in group_by_arm(study.runs).items()}
  current = _read_current(folder, runs)
  missing = {arm: run for arm, run in runs.items() if arm not in current}
  results = [statistics.read_study(other) for other in others if missing]
  found = {
    arm: _predict_longer_run(run, results) for arm, run in missing.items()
  }
  entries = {arm: entry for arm, entry in found.items() if entry is not None}
  # Other runners of the study may have written theirs in the meantime.
  current = _read_current(folder, runs)
  for arm in [arm for arm in entries if arm not in current]:
    try:
      _check_unstarted(folder, study, arm)
    except InputError as error:
      if not current:
        raise
      log.warning("No prediction of %s", error)
      del entries[arm]
  if not (predictions := entries | current):
    names = ", ".join(map(str, others))
    raise InputError(
      f"{names}: no finished runs of two shorter lengths; train them first."
    )
  return _write(folder, predictions)


def _read_current(
  folder: pathlib.Path, runs: Mapping[str, StudyRun]
) -> dict[str, Any]:
  """The predictions of arms of unchanged length."""
  return {
    arm: entry
    for arm, entry in statistics.read_predictions(folder).items()
    if arm in runs and entry["size"]["images"] == runs[arm].images
  }


def _predict_longer_run(
  run: StudyRun, results: Sequence[StudyResults]
) -> dict[str, Any] | None:
  """The prediction of a run's arm; None without two shorter lengths."""
  values, protocols, sizes, metrics = {}, {}, {}, {}
  for other in results:
    shorter = group_by_arm(other.study.runs).get(run.arm, ())
    data, names = statistics.add_losses(other)
    if not data.values.get(run.arm) or shorter[0].images >= run.images:
      continue
    advice = "name only studies whose runs differ from these in length."
    settings = [shorter[0].settings, run.settings]
    check_differ_in_length(run.arm, settings, advice)
    name = f"{run.arm}, {shorter[0].steps:,} steps"
    sizes[name] = {"images": shorter[0].images}
    for merged, runs in (values, data.values), (protocols, data.protocols):
      rows = merged.setdefault(name, {})
      for seed, row in runs.get(run.arm, {}).items():
        rows[seed] = {**rows.get(seed, {}), **row}
    metrics |= {metric.name: metric for metric in names}
  if len(sizes) < 2:
    return None
  data = ArmMeasurements(values, protocols=protocols)
  metrics = [*metrics.values()]
  return _make_entry(data, metrics, sizes, {"images": run.images})


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
