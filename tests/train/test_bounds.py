"""Bounds of evaluations: return to a checkpoint, or stop."""

import json
import types

import pytest
import trainings

from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config import recipes, sections
from mtv_jax.evals.core import results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.train.bounds import Bound, BoundError
from mtv_jax.train.experiment import build_experiment
from mtv_jax.train.numerics import RollbackError
from mtv_jax.train.run import EvalConfig
from mtv_jax.train.train import train
from mtv_jax.train.train_loop import Trainer
from mtv_jax.utils.errors import ConfigError


def test_when_a_bound_is_not_met():
  least = Bound("x", min=0.5)
  least.check("drift", {"x": 0.5}, 8, last_step_within=4)
  with pytest.raises(RollbackError, match="drift/x is 0.4 at .* 8, below 0.5"):
    least.check("drift", {"x": 0.4}, 8, last_step_within=4)
  with pytest.raises(RollbackError) as caught:
    least.check("drift", {"x": float("nan")}, 8, last_step_within=4)
  assert (caught.value.first, caught.value.last) == (5, 8)
  with pytest.raises(RollbackError, match="above 1"):
    Bound("x", max=1.0).check("drift", {"x": 1.5}, 8, last_step_within=4)
  with pytest.raises(
    BoundError, match="starts beyond config.evals.drift.bound"
  ):
    least.check("drift", {"x": 0.4}, 0, last_step_within=0)
  with pytest.raises(ConfigError, match="has no 'x'. There are: y"):
    least.check("drift", {"y": 0.4}, 8, last_step_within=4)


@pytest.mark.parametrize(
  ("value", "bound", "missing"),
  [
    (None, None, True),  # No file.
    (0.4, None, False),
    (0.4, Bound("x", min=0.5), True),
    (0.6, Bound("x", min=0.5), False),
    (float("nan"), Bound("x", min=0.5), True),
    (0.6, Bound("y", min=0.5), True),
    ("folder", Bound("x", min=0.5), True),  # No file that can be read.
  ],
)
def test_a_last_evaluation_beyond_its_bound_is_missing(
  tmp_path, value, bound, missing
):
  """The last step is saved before it is evaluated."""
  trainer = object.__new__(Trainer)
  trainer.experiment = types.SimpleNamespace(
    workdir=tmp_path,
    total_steps=9,
    config=types.SimpleNamespace(
      evals={"drift": EvalConfig(type="drift", bound=bound)}
    ),
  )
  if value == "folder":
    trainer.evals_path("drift", 9).mkdir(parents=True)
  elif value is not None:
    evals = {"drift": Result({"x": value}, {})}
    outcome = results.Outcome("a", "a", "ema", evals)
    results.write(trainer.evals_path("drift", 9), [outcome])
  assert trainer.missing_evaluations(9) == ["drift"] * missing


def test_wrong_bounds_are_rejected():
  for entry, message in (
    (dict(metric="x"), "neither min nor max"),
    (dict(metric="x", least=1), "drift.bound.*least"),
    (dict(metric="x", min=0.5, then="return"), "bound.then"),
  ):
    with pytest.raises(ConfigError, match=message):
      sections.read(Bound, entry, "config.evals.drift.bound")


def recipe(then="rollback", **changes):
  """The smallest config; `values` of the metric by step, 1 by default."""
  config = recipes.read_config(f"{trainings.CONFIG}:steps=9,save=1")
  config.checkpoint.keep = 20
  config.evals = dict(
    retrieval=dict(
      count=8, every_steps=3, bound=dict(metric="x", min=0.5, then=then)
    )
  )
  config.update(changes)
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
def test_a_run_returns_to_the_last_checkpoint_within_the_bound(
  tmp_path, metric
):
  """Step 6 is beyond it: back to 3, without the rows of steps 4 to 6."""
  finals = []
  for name in ("a", "b"):
    metric.append(6)
    workdir = tmp_path / name
    train(recipe(), workdir)
    timing = next((workdir / "checkpoints" / "9" / "timing").iterdir())
    assert json.loads(timing.read_text())["skipped_batches"] == [[3, 3]]
    rows = trainings.rows(workdir)
    losses = [r["step"] for r in rows if "loss" in r]
    assert losses == list(range(1, 10))
    assert {r["retrieval/x"] for r in rows if "retrieval/x" in r} == {1.0}
    finals.append(trainings.losses(workdir))
  assert finals[0] == finals[1]
  train(recipe(), tmp_path / "c")
  plain = trainings.losses(tmp_path / "c")
  assert plain[3] == finals[0][3] and plain[4] != finals[0][4]


@pytest.mark.slow
def test_a_run_stops(tmp_path, metric):
  metric.append(6)
  message = "x is 0.25 at step 6, below 0.5, and config.evals.retrieval.bound"
  with pytest.raises(BoundError, match=message):
    train(recipe("stop"), tmp_path / "stop")
  assert saved_steps(tmp_path / "stop") == [1, 2, 3, 4, 5]
  # Nothing was within the bound before step 3, and step 0 lacks a checkpoint.
  metric.append(3)
  with pytest.raises(BoundError, match="no checkpoint precedes"):
    train(recipe(), tmp_path / "early")


def test_a_bound_is_checked_before_the_run(tmp_path):
  config = recipe()
  config.evals.retrieval.bound = dict(metric="x")
  with pytest.raises(ConfigError, match="evals.retrieval.bound has neither"):
    build_experiment(config, tmp_path)


@pytest.mark.slow
def test_a_misspelt_metric_is_found_before_the_first_update(tmp_path, metric):
  config = recipe()
  config.evals.retrieval.bound.metric = "y"
  with pytest.raises(ConfigError, match="retrieval has no 'y'. There are: x"):
    train(config, tmp_path / "misspelt")
  assert saved_steps(tmp_path / "misspelt") == []
  # The value at the start is an error only if the evaluation is `at_start`.
  metric.append(0)
  train(recipe(), tmp_path / "low")
  metric.append(0)
  config = recipe()
  config.evals.retrieval.at_start = True
  with pytest.raises(BoundError, match="the run starts beyond"):
    train(config, tmp_path / "start")


@pytest.mark.slow
def test_a_run_that_stops_at_its_last_step_is_not_complete(tmp_path, metric):
  metric += [9, 9]
  message = "x is 0.25 at step 9, below 0.5"
  for _ in range(2):
    with pytest.raises(BoundError, match=message):
      train(recipe("stop"), tmp_path)
  assert saved_steps(tmp_path)[-1] == 9
  # If the metric is within it on restart, the run completes.
  train(recipe("stop"), tmp_path)
