"""SIGTERM: a run saves a checkpoint, exits and resumes bit-exactly."""

import concurrent.futures
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import trainings

from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.cli import errors
from mtv_jax.cli.train import train
from mtv_jax.hooks import evaluation
from mtv_jax.train import train as train_lib
from mtv_jax.train import train_loop
from mtv_jax.train.metrics import MetricWriter
from mtv_jax.train.runtime import preemption
from mtv_jax.train.runtime.prefetch import prefetch_to_device

smallest = functools.partial(trainings.smallest, "steps=4,save=100")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train(smallest(evals={}), workdir)
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


@pytest.mark.long
@pytest.mark.slow
def test_resume_after_sigterm_is_bit_exact(
  uninterrupted, tmp_path, sigterm_at, caplog
):
  workdir = tmp_path / "run"
  sigterm_at(2)
  with pytest.raises(preemption.Preempted, match="saved step 2 of 4"):
    train(smallest(evals={}), workdir)
  assert saved_steps(workdir) == [1, 2]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  train(smallest(evals={}), workdir)
  assert "training data has changed" not in caplog.text
  assert trainings.losses(workdir) == trainings.losses(uninterrupted)
  expected = trainings.params(uninterrupted)
  for name, actual in trainings.params(workdir).items():
    np.testing.assert_array_equal(actual, expected[name], err_msg=name)


@pytest.mark.slow
def test_sigterm_at_the_last_step_completes_the_run(tmp_path, sigterm_at):
  sigterm_at(4)
  state = train(smallest(), tmp_path / "run")
  assert int(state.step) == 4
  assert list((tmp_path / "run" / "evals").iterdir())


@pytest.mark.slow
def test_the_resumed_run_evaluates_what_an_exit_left_out(
  tmp_path, sigterm_at, monkeypatch
):
  workdir, evals = tmp_path / "run", tmp_path / "run" / "evals"
  config = smallest()
  config.evals.retrieval.every_steps = 2
  sigterm_at(2)
  with pytest.raises(preemption.Preempted, match="saved step 2 of 4"):
    train(config, workdir)
  assert not evals.exists()
  monkeypatch.undo()
  evaluate = evaluation.evals_lib.evaluate

  def fail_at_the_end(encoder, evaluators):
    if "step 4" in encoder.source:
      raise KeyboardInterrupt
    return evaluate(encoder, evaluators)

  monkeypatch.setattr(evaluation.evals_lib, "evaluate", fail_at_the_end)
  with pytest.raises(KeyboardInterrupt):
    train(config, workdir)
  assert {p.name for p in evals.glob("*.json")} == {"retrieval_2.json"}
  # The last step is saved before its evaluations.
  assert saved_steps(workdir) == [1, 2, 4]
  monkeypatch.undo()
  train(config, workdir)
  names = {p.name for p in evals.glob("*.json")}
  assert names == {"retrieval_2.json", "retrieval_4.json"}
  rows = [(r["step"], "loss" in r) for r in trainings.rows(workdir)]
  both = [(2, True), (2, False), (3, True), (4, True), (4, False)]
  assert rows == [(1, True), *both]


@pytest.mark.slow
def test_a_signal_before_the_first_step_does_not_wait_for_it(
  tmp_path, monkeypatch
):
  initialize = train_lib.initialize_state

  def kill(run):
    os.kill(os.getpid(), signal.SIGTERM)
    return initialize(run)

  monkeypatch.setattr(train_lib, "initialize_state", kill)
  # Initialisation may take longer here, after which the process would exit.
  monkeypatch.setattr(preemption, "_GRACE_SECONDS", 1000.0)
  with pytest.raises(preemption.Preempted, match="completed no step of 4"):
    train(smallest(), tmp_path / "run")
  assert saved_steps(tmp_path / "run") == []


def test_only_the_default_sigterm_handler_is_replaced():
  def mine(*_):
    pass

  signal.signal(signal.SIGTERM, mine)
  try:
    with preemption.catch_signals():
      assert signal.getsignal(signal.SIGTERM) is mine
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  received = []

  def in_thread():
    with preemption.catch_signals() as notice:
      received.append(notice.received)

  thread = threading.Thread(target=in_thread)
  thread.start()
  thread.join()
  assert received == [False]


def run_python(code):
  """The completed process of some code."""
  command = [sys.executable, "-c", code]
  return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_signals_during_the_handler_do_not_block():
  done = run_python("""
import os, subprocess, sys, time
from mtv_jax.train.runtime import preemption
kill = "import os\\nfor _ in range(100_000): os.kill(%d, 15)"
with preemption.catch_signals() as notice:
  child = subprocess.Popen([sys.executable, "-c", kill % os.getpid()])
  while child.poll() is None:
    time.sleep(0.01)
print(notice.received)
""")
  assert done.stdout == "True\n", done.stderr


def test_an_exit_without_threads_leaves_no_worker_process():
  done = run_python("""
import multiprocessing, os, signal, time
from mtv_jax.train.runtime import preemption
child = multiprocessing.get_context("fork").Process(
  target=time.sleep, args=(600,), daemon=True
)
child.start()
print(child.pid, flush=True)
os.kill(child.pid, signal.SIGSTOP)
preemption.exit_now(3)
""")
  assert done.returncode == 3
  status = pathlib.Path(f"/proc/{int(done.stdout)}/status")
  deadline = time.monotonic() + 10
  while status.exists() and "zombie" not in status.read_text():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_the_command_prints_one_line_and_exits_with_143(capsys):
  with pytest.raises(SystemExit) as ending, errors.readable_errors("train"):
    raise preemption.Preempted("saved")
  assert ending.value.code == 128 + signal.SIGTERM
  assert capsys.readouterr().err == "train: saved\n"


@pytest.mark.parametrize(
  ("raised", "code", "message"),
  [
    ("UserError('the disk is full')", 1, "\ntrain: the disk is full\n"),
    ("ConfigError('no such key')", 2, "\ntrain: no such key\n"),
    ("ZeroDivisionError('defect')", 1, "\nZeroDivisionError: defect\n"),
    ("KeyboardInterrupt", 130, "\ntrain: interrupted.\n"),
  ],
)
def test_no_error_waits_for_abandoned_threads(raised, code, message):
  done = run_python(f"""
import threading
from mtv_jax.cli import errors
from mtv_jax.train.runtime import preemption
from mtv_jax.utils.errors import ConfigError, UserError
threading.Thread(target=threading.Event().wait).start()
with errors.readable_errors("train"):
  preemption.abandon_threads("a reader does not answer")
  raise {raised}
""")
  assert done.returncode == code and done.stderr.endswith(message), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "number"),
  [
    (2, signal.SIGTERM),
    pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
    pytest.param(2, signal.SIGINT, marks=pytest.mark.long),
  ],
)
def test_all_processes_save_the_same_step_after_a_signal_to_one(
  tmp_path, count, number
):
  workdir = tmp_path / "run"
  endless = "steps=100000,save=100000"
  with trainings.together(workdir, count, arg=endless) as running:
    trainings.wait_for_step(workdir, 3, running)
    running[-1].send_signal(number)
    codes = [p.wait(timeout=200) for p in running]
  assert codes == [preemption.EXIT_CODE] * count, trainings.log(workdir)
  first, step = saved_steps(workdir)
  assert first == 1 and step == max(trainings.losses(workdir))
  assert f"saved step {step} of" in trainings.log(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("after", "saved", "message"),
  [(2, [1, 2], "saved step 2 of 4"), (0, [], "completed no step of 4")],
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

  monkeypatch.setattr(train_loop, "prefetch_to_device", ended)
  config = smallest(evals={})
  with pytest.raises(preemption.Preempted, match=message):
    train(config, tmp_path / "run")
  assert saved_steps(tmp_path / "run") == saved


_COMPILATION = """
import hashlib, signal, sys
from mtv_jax.train.runtime import preemption
# Ignored if the tests run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
with preemption.catch_signals() as notice:
  notice.exit_message = sys.argv[1]
  notice.before_exit = lambda error: print("recorded", flush=True)
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**29)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "exit_message"),
  [(signal.SIGTERM, ""), (signal.SIGINT, ""), (signal.SIGTERM, "saves.")],
)
def test_signals_are_answered_while_the_main_thread_is_in_c_code(
  number, exit_message
):
  """Like XLA's compilation, the call runs no Python handler for minutes."""
  with start(_COMPILATION, exit_message) as process:
    process.send_signal(number)
    begin = time.monotonic()
    line = process.stderr.readline()
    assert time.monotonic() - begin < 5
    name = signal.Signals(number).name
    if exit_message:
      assert line == f"train: received {name}; saves.\n"
      process.kill()
      return
    assert line.startswith(f"train: received {name} before the first step")
    assert process.stdout.readline() == "recorded\n"
    assert process.wait(timeout=5) == 128 + number


def start(code, *arguments):
  """Starts a process of some code, and waits for its line "ready"."""
  command = [sys.executable, "-c", code, *arguments]
  options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process = subprocess.Popen(command, **options)
  assert process.stdout.readline() == "ready\n"
  return process


_COMMAND = """
import hashlib, signal, sys, threading, types
from mtv_jax.cli.main import run_module
from mtv_jax.train.runtime import preemption
from mtv_jax.utils import progress
signal.signal(signal.SIGINT, signal.SIG_DFL)  # As in `main`.
preemption._GRACE_SECONDS = 0.1
can_exit = sys.argv[1] == "compiling"
def run():
  try:
    with progress.activity(sys.argv[1], can_exit=can_exit):
      # Printed while the main thread is in a call that ignores signals.
      options = dict(args=["ready"], kwargs=dict(flush=True))
      threading.Timer(0.3, print, **options).start()
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2**29 if can_exit else 2**22)
  finally:
    print("cleaned up")
command = types.ModuleType("command")
command.run = run
run_module("preflight", command, [])
"""


@pytest.mark.parametrize("activity", ["compiling", "labelling"])
def test_a_command_ends_at_once_only_while_it_compiles(activity):
  """Elsewhere it cleans up, once the main thread runs Python."""
  with start(_COMMAND, activity) as process:
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    cleaned = "" if activity == "compiling" else "cleaned up\n"
    assert process.stdout.read() == cleaned
    assert process.stderr.read().endswith("preflight: interrupted.\n")


_PROCESS = """
import hashlib, signal, sys, jax
from mtv_jax.train.runtime import preemption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it.
index, port = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 2, index)
with preemption.catch_signals() as notice:
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**29)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)],
)
def test_all_processes_exit_while_they_compile(number):
  """One of them receives the signal."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  with concurrent.futures.ThreadPoolExecutor() as pool:
    starts = [pool.submit(start, _PROCESS, str(i), port) for i in range(2)]
    first, second = (future.result() for future in starts)
  with first, second:
    second.send_signal(number)
    for process in (second, first):
      assert process.wait(timeout=15) == preemption.EXIT_CODE
      assert "SIGTERM before the first step" in process.stderr.read()
