"""Bounds of evaluations: returns, ends and stops of runs."""

import json
import types
from unittest import mock

import numpy as np
import pytest
import trainings

from mtv_jax.checkpoint.reading import (
  saved_steps,
)
from mtv_jax.cli.train import dry_run, train
from mtv_jax.evals.core import results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.hooks.evaluation import EvaluationHook, evals_path
from mtv_jax.train.config import EvalConfig
from mtv_jax.train.rollback import (
  Bound,
  BoundError,
  RollbackError,
)
from mtv_jax.train.run import Run, open_run
from mtv_jax.utils.errors import ConfigError

LEAST = Bound("x", min=0.5)


@pytest.mark.parametrize(
  ("bound", "metrics", "step", "error", "message"),
  [
    (LEAST, {"x": 0.5}, 8, None, None),
    (LEAST, {"x": 0.4}, 8, RollbackError, "drift/x is 0.4 at .* 8, below 0.5"),
    (LEAST, {"x": float("nan")}, 8, RollbackError, "below 0.5"),
    (Bound("x", max=1.0), {"x": 1.5}, 8, RollbackError, "above 1"),
    (
      LEAST,
      {"x": 0.4},
      0,
      BoundError,
      "out of bounds .config.evals.drift",
    ),
    (LEAST, {"y": 0.4}, 8, ConfigError, "has no 'x'. There are: y"),
  ],
)
def test_when_a_bound_is_not_met(bound, metrics, step, error, message):
  result = Result(metrics, {})

  def check():
    is_met = bound.metric in metrics and bound.is_met(result, None)
    bound.check("drift", result, step, last_within=4, is_met=is_met)

  if error is None:
    check()
    return
  with pytest.raises(error, match=message) as caught:
    check()
  if error is RollbackError:
    assert (caught.value.first, caught.value.last) == (5, 8)


def test_a_drop_is_beyond_the_noise_of_the_items():
  """A paired interval: the two evaluations share their items' noise."""

  def result(value, noise):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2, 400), scale=[[0.05], [noise]]).sum(axis=0)
    return Result({"x": value}, {}, resamples={"x": value + shared})

  bound = Bound("x", drop=0.03)
  start = result(0.8, 0.0)
  assert bound.is_met(result(0.78, 0.001), start)
  assert not bound.is_met(result(0.76, 0.001), start)
  assert bound.is_met(result(0.76, 0.03), start)
  assert not bound.is_met(Result({"x": 0.76}, {}), start)
  assert not bound.is_met(Result({"x": float("nan")}, {}), start)


def test_a_minimum_is_beyond_the_noise_if_asked():
  resamples = np.random.default_rng(0).normal(0.58, 0.02, size=400)
  result = Result({"x": 0.58}, {}, resamples={"x": resamples})
  for least, expected in ((0.6, True), (0.63, False)):
    bound = Bound("x", min=least, beyond_noise=True)
    assert bound.is_met(result, None) == expected
    assert not Bound("x", min=least).is_met(result, None)
  assert not Bound("x", max=0.5, beyond_noise=True).is_met(result, None)
  assert Bound("x", max=0.55, beyond_noise=True).is_met(result, None)


@pytest.mark.parametrize(
  ("value", "bound", "missing"),
  [
    (None, None, True),  # No file.
    (0.4, None, False),
    (0.4, LEAST, True),
    (0.6, LEAST, False),
    (float("nan"), LEAST, True),
    (0.6, Bound("y", min=0.5), True),
    ("folder", LEAST, True),  # No file that can be read.
  ],
)
def test_a_last_evaluation_beyond_its_bound_is_missing(
  tmp_path, value, bound, missing
):
  """The last step is saved before it is evaluated."""
  hook = EvaluationHook()
  hook.evaluators = {"drift": None}
  run = mock.Mock(
    spec=Run,
    workdir=tmp_path,
    total_steps=9,
    config=types.SimpleNamespace(
      evals={"drift": EvalConfig(type="drift", bound=bound)}
    ),
  )
  if value == "folder":
    evals_path(run, "drift", 9).mkdir(parents=True)
  elif value is not None:
    evals = {"drift": Result({"x": value}, {})}
    outcome = results.Outcome("a", "a", "ema", evals)
    results.write(evals_path(run, "drift", 9), [outcome])
  assert hook.list_missing(run, 9) == ["drift"] * missing


@pytest.mark.parametrize(
  ("bound", "message"),
  [
    (dict(), "evals.retrieval.bound has no min, max or drop"),
    (dict(least=1), "retrieval.bound.*least"),
    (dict(min=0.5, then="back"), "bound.then"),
  ],
)
def test_wrong_bounds_are_rejected_before_the_run(tmp_path, bound, message):
  config = recipe()
  config.evals.retrieval.bound = dict(metric="x", **bound)
  with pytest.raises(ConfigError, match=message):
    open_run(config, tmp_path)


def test_metrics_known_to_be_missing_are_rejected_before_the_run(tmp_path):
  config = trainings.smallest(evals={})
  for kind, metric in (("drift", "cosine_layer"), ("knn", "top5_k20")):
    bound = dict(metric=metric, min=0.5)
    config.evals = {kind: dict(type=kind, bound=bound)}
    with pytest.raises(ConfigError, match=f"{kind} has no '{metric}'"):
      EvaluationHook().open(open_run(config, tmp_path))


def recipe(then="rollback"):
  """The smallest config with a bound."""
  bound = dict(metric="x", min=0.5, then=then)
  config = trainings.smallest("steps=6,save=1")
  config.checkpoint.keep = 20
  config.evals = dict(retrieval=dict(count=8, every_steps=2, bound=bound))
  return config


@pytest.fixture
def metric(monkeypatch):
  """Makes the metric x low in evaluations at some steps, once each."""
  low = []

  def run(self, encoder):
    step = int(encoder.source.split()[-1])
    value = 0.25 if step in low else 1.0
    if step in low:
      low.remove(step)
    return Result({"x": value}, {})

  monkeypatch.setattr(Retrieval, "run", run)
  return low


@pytest.mark.slow
def test_a_run_returns_to_the_last_checkpoint_within_the_bound_or_stops(
  tmp_path, metric
):
  """Step 4 is beyond it: back to 2, without the rows of steps 3 and 4."""
  stopped = tmp_path / "stopped"
  metric += [4, 6, 6]
  message = "x is 0.25 at step {}, below 0.5, and config.evals.retrieval.bound"
  for step in (4, 6, 6):
    with pytest.raises(BoundError, match=message.format(step)):
      train(recipe("stop"), stopped)
    # The last step is saved before it is evaluated.
    assert saved_steps(stopped)[-1] == (3 if step == 4 else 6)
  # If the metric is within it on restart, the run completes.
  train(recipe("stop"), stopped)

  workdir = tmp_path / "run"
  # The value at the start is an error only if the evaluation is `at_start`.
  metric += [0, 4]
  train(recipe(), workdir)
  timing = next((workdir / "checkpoints" / "6" / "timing").iterdir())
  assert json.loads(timing.read_text())["skipped_batches"] == [[2, 2]]
  rows = trainings.rows(workdir)
  assert [r["step"] for r in rows if "loss" in r] == list(range(1, 7))
  values = [r["retrieval/x"] for r in rows if "retrieval/x" in r]
  assert values == [0.25, 1.0, 1.0, 1.0]
  plain, actual = map(trainings.losses, (stopped, workdir))
  assert plain[2] == actual[2] and plain[3] != actual[3]


@pytest.mark.slow
def test_a_run_ends_at_the_last_checkpoint_within_a_drop(
  tmp_path, metric, caplog
):
  """Step 6 is saved before it is evaluated, step 5 isn't evaluated."""
  config = recipe()
  config.evals.retrieval.bound = dict(metric="x", drop=0.5, then="return")
  metric.append(6)
  state = train(config, tmp_path)
  # Exports read the last checkpoint, which is within the bound.
  assert state.step == 4 and saved_steps(tmp_path)[-1] == 4
  # The same config ends again, and another one trains on.
  (tmp_path / "origin.json").write_text("{")
  assert train(config, tmp_path).step == 4 and saved_steps(tmp_path)[-1] == 4
  for text in (caplog.text, dry_run(config, tmp_path)):
    assert "topped by a bound: retrieval/x is 0.25 at step 6" in text
  # Derived again from the config.
  assert "origin.json" in caplog.text
  assert '"training": "full"' in (tmp_path / "origin.json").read_text()
  config.seed = 1
  (tmp_path / "evals" / "retrieval_0.json").unlink()
  with pytest.raises(ConfigError, match="retrieval_0.json, which lacks 'x'"):
    train(config, tmp_path)


@pytest.mark.slow
def test_a_metric_is_checked_before_the_first_update(tmp_path, metric):
  config = recipe()
  config.evals.retrieval.bound.metric = "y"
  with pytest.raises(ConfigError, match="retrieval has no 'y'. There are: x"):
    train(config, tmp_path / "misspelt")
  metric.append(0)
  config = recipe()
  config.evals.retrieval.at_start = True
  with pytest.raises(BoundError, match="the run starts out of bounds"):
    train(config, tmp_path / "start")
  for name in ("misspelt", "start"):
    assert saved_steps(tmp_path / name) == []
