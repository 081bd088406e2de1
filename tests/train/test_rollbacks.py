"""Non-finite updates: skips, rollbacks, stops."""

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
from mtv_jax.cli.train import train
from mtv_jax.data.stats import Stats
from mtv_jax.models import layers
from mtv_jax.train import gradients, measurements, rollback
from mtv_jax.train import step as step_lib
from mtv_jax.train import train as train_lib
from mtv_jax.train.metrics import Chrono
from mtv_jax.train.rollback import (
  NonFiniteConfig,
  NonFiniteError,
  RollbackError,
  UpdateMonitor,
)
from mtv_jax.train.run import Run, make_loader, open_run
from mtv_jax.train.runtime import preemption
from mtv_jax.train.runtime.sessions import read_sessions
from mtv_jax.train.runtime.watchdog import Watchdog, WatchdogConfig
from mtv_jax.train.train_loop import Trainer
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
  with make_loader(open_run(config, workdir), 0) as loader:
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
  monkeypatch.setattr(rollback, "_MIN_NORMS", 2)
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
  assert "more memory than available. RESOURCE_EXHAUSTED: 9 GiB" in caplog.text
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
      run=types.SimpleNamespace(total_steps=9, source_descriptions=[]),
      state=state,
      start_step=2,
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

  def damage_files(run, checkpoints, *args, **kwargs):
    checkpoints.wait()  # The save of step 4 may be in progress.
    shutil.rmtree(workdir / "checkpoints" / "4" / "timing")
    return restore_before(run, checkpoints, *args, **kwargs)

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
  """A run, and checkpoints of three steps."""
  run = mock.Mock(spec=Run, train_step=mock.Mock())
  config = types.SimpleNamespace(nonfinite=NonFiniteConfig(**options))
  run.config = config
  checkpoints = mock.Mock(spec=Checkpointer)
  checkpoints.steps.return_value = [1, 5, 6]
  return (run, checkpoints), checkpoints


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
