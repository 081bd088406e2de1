"""Non-finite updates and bounds of evaluations: skips, rollbacks, stops."""

import json
import re
import shutil
import signal
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainings

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.checkpoint.reading import (
  DamagedCheckpointError,
  load_tree,
  saved_steps,
)
from mtv_jax.data.stats import Stats
from mtv_jax.evals.core import results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.models import layers
from mtv_jax.train import gradients, measurements, rollback
from mtv_jax.train import step as step_lib
from mtv_jax.train import train as train_lib
from mtv_jax.train.experiment import Experiment, build_experiment, make_loader
from mtv_jax.train.metrics import Chrono
from mtv_jax.train.rollback import (
  Bound,
  BoundError,
  NonFiniteConfig,
  NonFiniteError,
  RollbackError,
  UpdateMonitor,
)
from mtv_jax.train.run import EvalConfig
from mtv_jax.train.runtime import preemption
from mtv_jax.train.runtime.sessions import read_sessions
from mtv_jax.train.runtime.watchdog import Watchdog, WatchdogConfig
from mtv_jax.train.train import dry_run, train
from mtv_jax.train.train_loop import Trainer
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names


def smallest(**changes):
  config = trainings.smallest("save=1", evals={}, **changes)
  config.checkpoint.keep = 20
  return config


@pytest.fixture
def damage(monkeypatch):
  """Makes the loss NaN at steps whose batch, or number, is among some."""
  original = gradients.compute_gradients
  bad_steps, bad_batches = set(), []

  def compute_gradients(spec, state, batch, mesh=None):
    (loss, terms), grads = original(spec, state, batch, mesh)
    total = batch["image"].astype(jnp.float32).sum()
    bad = jnp.isin(state.step, jnp.array([-1, *bad_steps]))
    bad |= jnp.isin(total, jnp.array([-1.0, *bad_batches]))
    poison = jnp.where(bad, jnp.nan, 1.0)
    grads = jax.tree.map(lambda g: g * poison, grads)
    return (loss, terms), grads

  monkeypatch.setattr(step_lib, "compute_gradients", compute_gradients)
  return bad_steps, bad_batches


def nonfinite_rows(workdir):
  text = (workdir / "nonfinite.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def params(workdir, step):
  return dict(flatten_with_names(load_tree(workdir, step=step)))


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(value, actual[name], err_msg=name)


def batch_sums(config, workdir, count):
  """The sums over the images of the first batches."""
  with make_loader(build_experiment(config, workdir), 0) as loader:
    return [float(next(loader)["image"].sum()) for _ in range(count)]


@pytest.mark.slow
def test_a_skipped_update_changes_nothing_and_is_counted(
  tmp_path, damage, monkeypatch, caplog
):
  """A spike before it is logged with the norms of all objectives.

  Later there is no memory to measure them.
  """
  norm_metrics, measured = measurements.norm_metrics, []

  def measure_once(norms):
    if measured:
      text = "RESOURCE_EXHAUSTED: 9 GiB\nBuffers: ..."
      raise jax.errors.JaxRuntimeError(text)
    measured.append(norms)
    return norm_metrics(norms)

  monkeypatch.setattr(measurements, "norm_metrics", measure_once)
  monkeypatch.setattr(rollback, "_FEWEST", 2)
  damage[0].add(5)
  workdir = tmp_path / "run"
  config = smallest(total_steps=6, log=dict(spikes=1e-3))
  state = train(config, workdir)
  assert int(state.step) == 6
  assert_equal(params(workdir, 6), params(workdir, 5))
  counts = {r["step"]: r["skipped_updates"] for r in trainings.rows(workdir)}
  assert counts == {s: float(s >= 6) for s in range(1, 7)}
  (row,) = nonfinite_rows(workdir)
  assert row["step"] == 6 and "grad_norm" in row["metrics"]
  assert len(row["keys"]) == 16 and "scenes" in row["keys"][0]
  assert "more memory than there is. RESOURCE_EXHAUSTED: 9 GiB" in caplog.text
  (text,) = (
    r.getMessage() for r in caplog.records if "the median" in r.getMessage()
  )
  assert text.startswith("Step 3: the gradient's norm is ")
  norms = re.findall(r"(\w+)/encoder_grad_norm ([0-9.e+-]+)", text.rstrip("."))
  assert {name for name, _ in norms} == {*config.objectives}
  assert all(float(norm) > 0 for _, norm in norms)


@pytest.mark.slow
def test_a_run_returns_to_the_checkpoint_before_the_damage(tmp_path, damage):
  """Batches 4 to 6 are left out, also by a run that resumes afterwards."""
  workdir = tmp_path / "run"
  config = smallest(total_steps=8, nonfinite=dict(max_consecutive=2))
  damage[1].extend(batch_sums(config, workdir, 7)[4:7])
  train(config, workdir)
  final = params(workdir, 8)
  timing = next((workdir / "checkpoints" / "8" / "timing").iterdir())
  assert json.loads(timing.read_text())["skipped_batches"] == [[4, 3]]
  rows = trainings.rows(workdir)
  assert [r["step"] for r in rows] == list(range(1, 9))
  assert {r["skipped_updates"] for r in rows} == {0.0}
  damaged = nonfinite_rows(workdir)
  assert [(r["step"], r["batch"]) for r in damaged] == [(5, 4), (6, 5), (7, 6)]
  for step in range(6, 9):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  train(config, workdir)
  assert_equal(params(workdir, 8), final)
  assert nonfinite_rows(workdir) == damaged


@pytest.mark.long
@pytest.mark.slow
def test_no_checkpoint_amid_the_damage_replaces_the_one_before(
  tmp_path, damage
):
  config = smallest(total_steps=8, nonfinite=dict(max_consecutive=2))
  config.checkpoint.keep = 1
  sums = batch_sums(config, tmp_path / "run", 6)
  damage[1].extend(sums[3:6])
  train(config, tmp_path / "run")
  rows = trainings.rows(tmp_path / "run")
  assert [r["step"] for r in rows] == list(range(1, 9))
  assert {r["skipped_updates"] for r in rows} == {0.0}
  _, session = read_sessions(tmp_path / "run")
  assert session["start_step"] == 3


@pytest.mark.parametrize(
  ("keep", "since", "saved", "message"),
  [
    (2, 3, [2, 4], "saved step 4 of 9 in"),
    (1, None, [4], "saved step 4 of 9 in"),
    (1, 1, [4], "saved step 4 of 9 in"),  # No checkpoint precedes them.
    (1, 3, [2], "saved nothing, as the updates since step 3 are not finite"),
  ],
)
def test_a_signal_amid_the_damage_leaves_the_checkpoint_to_return_to(
  tmp_path, keep, since, saved, message
):
  state = {"x": jnp.zeros(2)}
  with Checkpointer(tmp_path, every_steps=1, keep=keep) as checkpoints:
    checkpoints.save(2, state)
    checkpoints.wait()
    trainer = Trainer.__new__(Trainer)  # With the fields that an exit reads.
    vars(trainer).update(
      experiment=types.SimpleNamespace(total_steps=9, source_descriptions=[]),
      state=state,
      first=2,
      batches=mock.Mock(**{"loader.stats_at.return_value": Stats()}),
      skipped=(),
      checkpoints=checkpoints,
      chrono=Chrono(total_steps=9, batch_size=1),
      notice=preemption.Notice(signal.SIGTERM),
      watchdog=Watchdog(WatchdogConfig(factor=0.0)),
      monitor=UpdateMonitor(5, 0.0, nonfinite_since=since),
      in_flight=(),
    )
    with pytest.raises(preemption.Preempted, match=message):
      trainer.save_and_exit(4)
    assert checkpoints.steps() == saved


@pytest.mark.slow
def test_a_save_that_is_due_amid_the_damage_is_postponed(tmp_path, damage):
  damage[0].update((3, 4))
  config = smallest(total_steps=8)
  config.checkpoint.every_steps = 4
  train(config, tmp_path / "run")
  assert saved_steps(tmp_path / "run") == [1, 6, 8]


@pytest.mark.long
@pytest.mark.slow
def test_a_return_skips_a_damaged_checkpoint(tmp_path, damage, monkeypatch):
  workdir = tmp_path / "run"
  config = smallest(total_steps=8, nonfinite=dict(max_consecutive=2))
  config.checkpoint.keep = 3
  damage[1].extend(batch_sums(config, workdir, 7)[4:7])
  restore_before = train_lib._restore_before

  def damage_files(experiment, checkpoints, *args, **kwargs):
    checkpoints.wait()  # The save of step 4 may be in progress.
    shutil.rmtree(workdir / "checkpoints" / "4" / "timing")
    return restore_before(experiment, checkpoints, *args, **kwargs)

  monkeypatch.setattr(train_lib, "_restore_before", damage_files)
  train(config, workdir, restore="latest_good")
  assert saved_steps(workdir) == [6, 7, 8]
  assert (workdir / "checkpoints" / "4.damaged").exists()
  steps = [r["step"] for r in trainings.rows(workdir)]
  assert steps == list(range(1, 9))


@pytest.mark.parametrize(
  ("first", "rollbacks", "options", "message"),
  [
    (1, 1, {}, "steps 1 to 8 .* no checkpoint precedes"),
    (6, 1, dict(then="stop"), "6 to 8 .*then is 'stop'.*steps: 1, 5, 6\\."),
    (6, 3, dict(max_rollbacks=2), "returned to a checkpoint 2 times"),
  ],
)
def test_when_a_run_does_not_return(first, rollbacks, options, message):
  args, checkpoints = arguments_of_a_return(**options)
  with pytest.raises(NonFiniteError, match=message):
    train_lib._restore_before(
      *args, RollbackError(first, 8), rollbacks, latest_good=False
    )
  checkpoints.restore.assert_not_called()


def arguments_of_a_return(**options):
  """An experiment, and checkpoints of three steps."""
  experiment = mock.Mock(spec=Experiment, program=mock.Mock())
  config = types.SimpleNamespace(nonfinite=NonFiniteConfig(**options))
  experiment.config = config
  checkpoints = mock.Mock(spec=Checkpointer)
  checkpoints.steps.return_value = [1, 5, 6]
  return (experiment, checkpoints), checkpoints


def test_a_return_to_a_damaged_checkpoint_deletes_no_later_one():
  args, checkpoints = arguments_of_a_return()
  checkpoints.restore.side_effect = DamagedCheckpointError("5 is damaged")
  with pytest.raises(DamagedCheckpointError):
    train_lib._restore_before(*args, RollbackError(6, 8), 1, latest_good=False)
  checkpoints.delete_after.assert_not_called()


@pytest.mark.slow
def test_a_run_that_does_not_recover_stops(tmp_path, damage):
  damage[0].update(range(2, 12))
  config = smallest(nonfinite=dict(max_consecutive=1, max_rollbacks=1))
  with pytest.raises(NonFiniteError, match="returned to a checkpoint 1 times"):
    train(config, tmp_path / "run")


@pytest.mark.slow
def test_debug_nans_names_the_layer(tmp_path, monkeypatch):
  call = layers.Mlp.__call__

  def divide_by_zero(self, x, *args, **kwargs):
    return call(self, x, *args, **kwargs) / (x.sum() - x.sum())

  monkeypatch.setattr(layers.Mlp, "__call__", divide_by_zero)
  message = r"at step 1: .* > models/layers.py:\d+ "
  with pytest.raises(NonFiniteError, match=message):
    train(smallest(), tmp_path / "run", debug_nans=True)


def test_too_many_in_a_row():
  monitor = UpdateMonitor(max_consecutive=2, spike_factor=0.0)
  for step, skipped in enumerate([0, 1, 1, 0, 1, 1], 1):
    monitor.observe(step, bool(skipped), 1.0)
  assert monitor.to_dict() == {"skipped_updates": 4, "nonfinite_since": 5}
  # As after a resume.
  resumed = UpdateMonitor(
    max_consecutive=2, spike_factor=0.0, **monitor.to_dict()
  )
  with pytest.raises(RollbackError) as error:
    resumed.observe(7, True, np.nan)
  assert (error.value.first, error.value.last) == (5, 7)


def test_spikes_are_multiples_of_the_median():
  monitor = UpdateMonitor(max_consecutive=0, spike_factor=10.0)
  norms = [2.0] * 60 + [19.0, 50.0, 50.0, 2.0]
  factors = [monitor.observe(s, False, n) for s, n in enumerate(norms)]
  # The second of them is too near the first.
  assert [f for f in factors if f is not None] == [25.0]


LEAST = Bound("x", min=0.5)


@pytest.mark.parametrize(
  ("bound", "metrics", "step", "error", "message"),
  [
    (LEAST, {"x": 0.5}, 8, None, None),
    (LEAST, {"x": 0.4}, 8, RollbackError, "drift/x is 0.4 at .* 8, below 0.5"),
    (LEAST, {"x": float("nan")}, 8, RollbackError, "below 0.5"),
    (Bound("x", max=1.0), {"x": 1.5}, 8, RollbackError, "above 1"),
    (LEAST, {"x": 0.4}, 0, BoundError, "beyond config.evals.drift.bound"),
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
  trainer = object.__new__(Trainer)
  trainer.experiment = types.SimpleNamespace(
    workdir=tmp_path,
    total_steps=9,
    evaluators={"drift": None},
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
    build_experiment(config, tmp_path)


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
  with pytest.raises(BoundError, match="the run starts beyond"):
    train(config, tmp_path / "start")
  for name in ("misspelt", "start"):
    assert saved_steps(tmp_path / name) == []
