"""Predictions of arms and of longer runs."""

import dataclasses
import json

import numpy as np
import pytest
import study_samples
from study_samples import OBJECTIVES

from mtv_jax.studies import page as study_page
from mtv_jax.studies import predictions, runner, scaling, statistics
from mtv_jax.utils.errors import InputError


def compute_error(x):
  return 0.2 + 0.3 * x**-0.4


def set_errors(folder, error_fn):
  """Sets the zero-shot errors of a study's runs, with noise of 0.2 %."""
  runs = runner.read(folder).runs
  rng = np.random.default_rng(runs[0].steps)
  for run in runs:
    name = f"zero_shot_{run.steps}.json"
    file = folder / runner.RUNS / run.name / "evals" / name
    content = json.loads(file.read_text())
    error = error_fn(run) * (1 + 0.002 * rng.normal())
    content["evals"]["zero_shot"]["metrics"]["top1"] = 1 - error
    file.write_text(json.dumps(content))


def test_a_prediction_is_written_before_its_arm_is_trained(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(study_page, "count_parameters", lambda c: 1000)
  monkeypatch.setattr(scaling, "_RESAMPLES", 20)
  arms = [(f"s-{1000 * 2**i}", OBJECTIVES[:1], 0.0) for i in range(8)]
  study_samples.write_study(tmp_path, "scaling", arms, seeds=2, sheets=())
  errors = {arm: compute_error(float(arm[2:]) / 8000) for arm, *_ in arms}
  set_errors(tmp_path, lambda run: errors[run.arm])
  last, later = arms[-1][0], tmp_path / "later"
  later.mkdir()
  for run in (tmp_path / "runs").glob(f"{last}-*"):
    run.rename(later / run.name)
  file = predictions.write_predictions(tmp_path, last)
  entry = json.loads(file.read_text())[last]
  row = entry["metrics"]["zero_shot/top1"]
  assert entry["date"] and entry["arms"] == {arm: 2 for arm, *_ in arms[:-1]}
  assert row["low"] < 1 - errors[last] < row["high"] < row["low"] + 0.03
  exponent = row["parameters"]["exponent images"]
  assert exponent["low"] < 0.4 < exponent["high"]
  # A constant metric has no law.
  assert (
    "not identifiable" in entry["metrics"]["retrieval/text_to_image_r1"]["note"]
  )
  with pytest.raises(InputError, match="it was predicted; a prediction is"):
    predictions.write_predictions(tmp_path, last)
  with pytest.raises(InputError, match="the run s-1000-s0 has started"):
    predictions.write_predictions(tmp_path, "s-1000")
  for run in later.iterdir():
    run.rename(tmp_path / "runs" / run.name)
  head, *rows = study_page.predictions_table(statistics.read_study(tmp_path))
  (found,) = (dict(zip(head, r, strict=True)) for r in rows if "top1" in r[1])
  assert found["arm"] == last and found["inside"] == "2 of 2 runs"


def test_longer_runs_are_predicted_from_shorter_ones(tmp_path, monkeypatch):
  monkeypatch.setattr(scaling, "_RESAMPLES", 20)
  arms = [("vl", OBJECTIVES[:1], 0.0), ("all", OBJECTIVES, 0.2)]
  options = dict(seeds=2, sheets=(), interference=False)
  folders = [tmp_path / str(i) for i in range(7)]
  for i, folder in enumerate(folders):
    shown = arms if i % 2 else arms[:1]  # Few lengths of "all" have runs.
    study_samples.write_study(
      folder, "ladder", shown, budget=2.0 ** (i - 4), **options
    )
    set_errors(folder, lambda run: compute_error(run.steps / 100))
  *shorter, last = folders
  study_samples.write_study(
    last / "plan", "ladder", arms, budget=4.0, **options
  )
  study = runner.read(last / "plan")
  with pytest.raises(InputError, match="the run vl-s0 has started; a"):
    predictions.predict_longer_runs(last, study, shorter)
  later = (last / "runs").rename(tmp_path / "later")
  with pytest.raises(InputError, match="no finished runs of two"):
    predictions.predict_longer_runs(tmp_path / "new", study, [last / "plan"])
  # A study of longer runs tells nothing of shorter ones.
  longer = study_samples.write_study(
    tmp_path / "longer", "ladder", arms, budget=8.0, **options
  )
  file = predictions.predict_longer_runs(last, study, [*shorter, longer])
  entries = json.loads(file.read_text())
  assert [*entries] == ["vl", "all"]
  top1 = entries["vl"]["metrics"]["zero_shot/top1"]
  true = 1 - compute_error(16)
  assert top1["low"] < true < top1["high"] < top1["low"] + 0.03
  assert entries["vl"]["arms"]["vl, 25 steps"] == 2
  assert "3 different" in entries["all"]["metrics"]["zero_shot/top1"]["note"]
  file.write_text(file.read_text()[:99])
  with pytest.raises(InputError, match="is damaged. Restore it"):
    predictions.predict_longer_runs(last, study, folders)
  # Predicted once: later runs change nothing, and no started arm is added.
  later.rename(last / "runs")
  file.write_text(json.dumps({"all": entries["all"]}))
  predictions.predict_longer_runs(last, study, folders)
  assert json.loads(file.read_text()) == {"all": entries["all"]}
  # Another runner predicts and trains while this one fits.
  file.unlink()
  with monkeypatch.context() as patch:
    patch.setattr(
      predictions,
      "_predict_longer_run",
      lambda *_: file.write_text(json.dumps(entries)) and {},
    )
    predictions.predict_longer_runs(last, study, folders)
  assert json.loads(file.read_text()) == entries
  assert predictions.predict_longer_runs(last, study, folders) == file
  assert json.loads(file.read_text()) == entries
  _, page = study_page.write_study(last)
  (row,) = [
    line
    for line in page.read_text().splitlines()
    if line.startswith("| vl | zero_shot/top1 (%)")
  ]
  assert "2 of 2 runs" in row and "images 0.4" in row
  first = study.runs[0]
  changed = dataclasses.replace(
    first, settings={**first.settings, "batch_size": 32}
  )
  other = dataclasses.replace(study, runs=(changed,))
  with pytest.raises(InputError, match="'vl' differ in batch_size"):
    predictions.predict_longer_runs(tmp_path / "new", other, shorter)
