"""The watchdog: expiry of steps, its reaction, and stalled readers."""

import functools
import io
import os
import signal
import sys
import time

import pytest
import trainings

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.train import train as train_lib
from mtv_jax.train.metrics import MetricWriter
from mtv_jax.train.runtime.watchdog import EXIT_CODE, Watchdog, WatchdogConfig


def wait_for(condition, seconds=10.0):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)
  return condition()


@pytest.fixture
def exits():
  return []


@pytest.fixture
def watch(exits):
  watchdogs = []

  def start(**options):
    options = dict(factor=3.0, min_seconds=0.2, grace_seconds=0.2) | options
    watchdogs.append(Watchdog(WatchdogConfig(**options), exits.append))
    return watchdogs[-1]

  yield start
  for watchdog in watchdogs:
    watchdog.close()


def test_a_step_that_hangs_prints_stacks_and_exits(watch, exits, capfd):
  watchdog = watch()
  watchdog.step(6)
  assert wait_for(lambda: exits)
  assert watchdog.expired and exits == [EXIT_CODE]
  errors = capfd.readouterr().err
  assert "test_watchdog.py" in errors  # This thread's stack.
  assert "step 7 has stalled" in errors and "nothing could be saved" in errors


@pytest.mark.parametrize("closed", ["stream", "pipe"])
def test_a_step_that_hangs_exits_without_standard_error(
  watch, exits, monkeypatch, closed
):
  reader, writer = os.pipe()
  os.close(reader)
  # Unbuffered, so that closing it raises no second error.
  with open(writer, "wb", buffering=0) as raw:
    stderr = None
    if closed == "pipe":
      stderr = io.TextIOWrapper(raw, write_through=True)
    monkeypatch.setattr(sys, "__stderr__", stderr)
    monkeypatch.setattr(sys, "stderr", stderr)
    watch().step(6)
    assert wait_for(lambda: exits) == [EXIT_CODE]


def test_a_loop_that_stops_in_time_is_left_alone(watch, exits):
  watchdog = watch(min_seconds=0.5)
  watchdog.step(1)
  assert wait_for(lambda: watchdog.expired)
  watchdog.mark_stopping()
  watchdog.close()
  time.sleep(0.8)
  assert not exits


def test_a_save_that_hangs_ends_the_process(watch, exits, capfd):
  watchdog = watch()
  watchdog.step(1)
  assert wait_for(lambda: watchdog.expired)
  watchdog.mark_stopping()
  assert wait_for(lambda: exits)
  assert "not saved in time" in capfd.readouterr().err


def test_the_limit_follows_the_median(watch):
  watchdog = watch(min_seconds=0.05, factor=100.0)
  watchdog.step(0)
  for step in range(1, 6):
    time.sleep(0.02)
    watchdog.step(step)
  assert 2 <= watchdog.limit < 20


def test_pauses_and_compilation_do_not_count(watch):
  watchdog = watch()
  watchdog.step(1)
  with watchdog.pause():
    time.sleep(0.5)
  assert not watchdog.expired
  watchdog.restart()
  time.sleep(0.5)
  assert not watchdog.expired


@pytest.mark.slow
def test_a_slow_last_step_and_its_save_end_the_run(
  tmp_path, exits, monkeypatch
):
  write_scalars, wait = MetricWriter.write_scalars, Checkpointer.wait

  def write_slowly(self, step, *args):
    write_scalars(self, step, *args)
    time.sleep(2.5 if step == 3 else 0)

  def wait_slowly(self):
    time.sleep(5)
    wait(self)

  monkeypatch.setattr(MetricWriter, "write_scalars", write_slowly)
  monkeypatch.setattr(Checkpointer, "wait", wait_slowly)
  watchdog = functools.partial(Watchdog, exit_fn=exits.append)
  monkeypatch.setattr(train_lib, "Watchdog", watchdog)
  config = trainings.smallest("save=100", total_steps=3, evals={})
  config.watchdog = dict(factor=1, min_seconds=2.0, grace_seconds=4.0)
  train_lib.train(config, tmp_path / "run")
  assert not exits and saved_steps(tmp_path / "run") == [1, 3]


# A reader that stops answering holds up neither signals nor the watchdog.
STALLING = trainings.CONFIGS / "unreliable.py"


@pytest.fixture
def stalling(tmp_path, monkeypatch):
  """Starts a run whose reader stops before step 4."""
  monkeypatch.setenv("STALL_AT", "3")
  running = []

  def start(*args):
    running.append(
      trainings.launch(tmp_path / "run", *args, config=STALLING, arg="save=100")
    )
    return running[-1]

  yield start
  for process in running:
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
  "number",
  [
    signal.SIGTERM,
    *(
      pytest.param(n, marks=pytest.mark.long)
      for n in (signal.SIGHUP, signal.SIGINT)
    ),
  ],
)
def test_a_signal_to_a_stalled_reader_saves_and_exits(
  tmp_path, stalling, number
):
  workdir = tmp_path / "run"
  process = stalling()
  # Step 3's batch was transferred when step 2's was taken.
  trainings.wait_for_step(workdir, 2, [process])
  time.sleep(1)
  start = time.monotonic()
  process.send_signal(number)
  code = process.wait(timeout=60)
  seconds = time.monotonic() - start
  log = trainings.log(workdir)
  assert code == 128 + number, log
  last = max(trainings.losses(workdir))
  assert last in saved_steps(workdir)
  assert f"received {number.name}; saved step {last} of 12" in log
  assert "exits without its threads" in log
  assert seconds < 30, seconds
  assert "Traceback" not in log


@pytest.mark.slow
def test_the_watchdog_of_a_stalled_reader_saves_and_exits_with_75(
  tmp_path, stalling
):
  workdir = tmp_path / "run"
  process = stalling(
    "--config.watchdog.factor=2", "--config.watchdog.min_seconds=10"
  )
  assert process.wait(timeout=120) == 75, trainings.log(workdir)
  log, last = trainings.log(workdir), max(trainings.losses(workdir))
  assert f"saved step {last} of 12" in log
  assert last in saved_steps(workdir)
  assert "threading.py" in log  # The stacks of all threads.
