"""Predictions of a scaling study's arm, written before it is trained.

`predictions.json` in the study's folder holds for each arm the date, and for
each metric the law fitted to the finished arms, the predicted value and its
95 % interval for one run, or why there is none. An arm is predicted once, and
only while none of its runs has started.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import mtv_jax
from mtv_jax.studies import page, runner, scaling, statistics
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean


def write_predictions(folder: pathlib.Path, arm: str) -> pathlib.Path:
  """Predicts an arm from the finished ones; returns the file.

  Raises ConfigError if the study isn't a scaling study or lacks the arm,
  InputError if the arm has started or was already predicted.
  """
  results = statistics.read_study(folder)
  study, path = results.study, folder / statistics.PREDICTIONS
  if study.kind != "scaling":
    raise ConfigError(
      f"{folder} is a {study.kind} study; predict needs a scaling study."
    )
  sizes = page.measure_sizes(study)
  if arm not in sizes:
    raise ConfigError(f"--arm={arm}: {did_you_mean(arm, sizes)}")
  started = [
    run.name
    for run in study.runs
    if run.arm == arm and (folder / runner.RUNS / run.name).exists()
  ]
  if started or arm in results.predictions:
    why = f"the run {started[0]} has started" if started else "it was predicted"
    raise InputError(
      f"--arm={arm}: {why}; a prediction is written once, before the arm's "
      "first run."
    )
  data, metrics = statistics.add_losses(results)
  finished = {name: runs for name, runs in data.values.items() if runs}
  finished = dataclasses.replace(data, values=finished)
  fits = scaling.fit_metrics(finished, metrics, sizes)
  entry = dict(
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    mtv_jax=mtv_jax.__version__,
    arms={name: len(runs) for name, runs in finished.values.items()},
    size={k: v for k, v in sizes[arm].items() if k != "model"},
    metrics={name: _predict(fit, sizes[arm]) for name, fit in fits.items()},
  )
  text = json.dumps({**results.predictions, arm: entry}, indent=1)
  atomic.write_text(path, f"{text}\n")
  return path


def _predict(fit: scaling.ScalingFit, size: dict[str, Any]) -> dict[str, Any]:
  """A metric's prediction as JSON, in the stored unit."""
  row: dict[str, Any] = dict(law=fit.formula, points=fit.points)
  if not fit.is_identifiable:
    return row | {"note": fit.note}
  parameters = {k: vars(p) for k, p in fit.parameters.items()}
  predicted = fit.predict_interval({name: size[name] for name in fit.centres})
  return row | {"parameters": parameters} | vars(predicted)
