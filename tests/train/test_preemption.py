"""SIGTERM: a run saves a checkpoint, exits and resumes bit-exactly."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import trainings

from mtv_jax.cli import errors
from mtv_jax.config import schema
from mtv_jax.train import loop, preemption
from mtv_jax.train.loop import prefetch_to_device, train
from mtv_jax.train.metrics import MetricWriter


def smallest(**changes):
  config = schema.read_config(f"{trainings.CONFIG}:save=100")
  config.update(changes)
  return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train(smallest(), workdir)
  return workdir


@pytest.fixture
def sigterm_at(monkeypatch):
  """Sends SIGTERM to this process once a step was logged."""

  def patch(signal_step):
    write_scalars = MetricWriter.write_scalars

    def log_and_kill(self, step, *args):
      write_scalars(self, step, *args)
      if step == signal_step:
        # With the default handler the signal would end the tests.
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write_scalars", log_and_kill)

  return patch


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits(tmp_path, sigterm_at):
  sigterm_at(2)
  config = smallest(total_steps=4, evals={})
  with pytest.raises(preemption.Preempted, match="saved step 2 of 4"):
    train(config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_resume_after_sigterm_is_bit_exact(uninterrupted, tmp_path, sigterm_at):
  workdir = tmp_path / "run"
  sigterm_at(5)
  with pytest.raises(preemption.Preempted, match="saved step 5 of 12"):
    train(smallest(), workdir)
  train(smallest(), workdir)
  assert trainings.losses(workdir) == trainings.losses(uninterrupted)
  expected = trainings.params(uninterrupted)
  for name, actual in trainings.params(workdir).items():
    np.testing.assert_array_equal(actual, expected[name], err_msg=name)


@pytest.mark.slow
def test_sigterm_at_the_last_step_completes_the_run(tmp_path, sigterm_at):
  sigterm_at(12)
  state = train(smallest(), tmp_path / "run")
  assert int(state.step) == 12
  assert list((tmp_path / "run" / "evals").iterdir())


def test_only_the_default_sigterm_handler_is_replaced():
  def mine(*_):
    pass

  signal.signal(signal.SIGTERM, mine)
  try:
    with preemption.catch_sigterm():
      assert signal.getsignal(signal.SIGTERM) is mine
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  received = []

  def in_thread():
    with preemption.catch_sigterm() as notice:
      received.append(notice.received)

  thread = threading.Thread(target=in_thread)
  thread.start()
  thread.join()
  assert received == [False]


def test_signals_during_the_handler_do_not_block():
  code = """
import os, subprocess, sys, time
from mtv_jax.train import preemption
kill = "import os\\nfor _ in range(100_000): os.kill(%d, 15)"
with preemption.catch_sigterm() as notice:
  child = subprocess.Popen([sys.executable, "-c", kill % os.getpid()])
  while child.poll() is None:
    time.sleep(0.01)
print(notice.received)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
  )
  assert done.stdout == "True\n", done.stderr


def test_the_command_prints_one_line_and_exits_with_143(capsys):
  with pytest.raises(SystemExit) as ending, errors.readable_errors("train"):
    raise preemption.Preempted("saved")
  assert ending.value.code == 128 + signal.SIGTERM
  assert capsys.readouterr().err == "train: saved\n"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_all_processes_save_the_same_step_after_sigterm_to_one(tmp_path, count):
  workdir = tmp_path / "run"
  long = "steps=100000,save=100000"
  with trainings.together(workdir, count, arg=long) as running:
    trainings.wait_for_step(workdir, 3, running)
    running[-1].send_signal(signal.SIGTERM)
    codes = [p.wait(timeout=200) for p in running]
  assert codes == [preemption.EXIT_CODE] * count, trainings.log(workdir)
  (step,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert step == max(trainings.losses(workdir))
  assert f"saved step {step} of" in trainings.log(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("after", "saved", "message"),
  [(2, ["2"], "saved step 2 of 4"), (0, [], "completed no step of 4")],
)
def test_sigterm_to_the_data_workers_too_saves_a_checkpoint(
  tmp_path, monkeypatch, after, saved, message
):
  """A scheduler signals the whole job, so the data ends before a step."""
  original = prefetch_to_device

  def ended(*args):
    for i, batch in enumerate(original(*args)):
      if i == after:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a worker process was terminated")
      yield batch

  monkeypatch.setattr(loop, "prefetch_to_device", ended)
  config = smallest(total_steps=4, evals={})
  with pytest.raises(preemption.Preempted, match=message):
    train(config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == saved
