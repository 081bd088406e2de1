"""The supervisor, with real processes and real signals."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import trainings
from xla_options import xla_flags

from mtv_jax.cli.main import run_command
from mtv_jax.train.runtime.sessions import read_alive, read_sessions
from mtv_jax.train.runtime.supervisor import Supervisor, find_workdir
from mtv_jax.utils.errors import ConfigError

# A run that takes an action of `actions` each time it starts: a step to reach,
# and a code to exit with (negative: a signal that kills it).
CHILD = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1].partition("=")[2])
starts = folder / "starts"
with starts.open("a") as file:
  file.write("x")
step, code = json.loads(sys.argv[2])[starts.stat().st_size - 1]
if step is not None:
  (folder / "alive").write_text(json.dumps({"step": step}))
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""

PYTHON = (sys.executable, "-S", "-c")

# `mtv-jax supervise`, without ignored signals, see `trainings`.
MAIN = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from mtv_jax.cli.main import run_command
sys.exit(run_command("supervise"))
"""


def supervise(folder, actions, **options):
  """The supervisor's exit code, and how often it started the command."""
  command = [*PYTHON, CHILD, f"--workdir={folder}", json.dumps(actions)]
  options = dict(backoff=0.0, max_failures=2) | options
  code = Supervisor(command, **options).run()
  return code, (folder / "starts").stat().st_size


@pytest.mark.parametrize(
  ("actions", "expected"),
  [
    ([(5, 0)], (0, 1)),
    # Each failure after progress counts as the first.
    ([(s, 1) for s in range(1, 6)] + [(6, 0)], (0, 6)),
    ([(5, -signal.SIGKILL), (5, 143), (9, 0)], (0, 3)),
    # A repeated or earlier step does not count as progress.
    ([(5, 1), (4, 1), (5, 1), (5, 1)], (1, 3)),
    ([(None, -signal.SIGKILL)] * 3, (137, 3)),
    # A restart fails again.
    ([(5, 1), (5, 2)], (2, 2)),
  ],
)
def test_a_command_is_restarted_while_it_makes_progress(
  tmp_path, actions, expected
):
  assert supervise(tmp_path, actions) == expected


def test_pauses_double_without_progress(tmp_path, caplog):
  actions = [(1, 1), (1, 1), (1, 1), (2, 1), (2, 1), (2, 0)]
  options = dict(backoff=0.02, max_backoff=0.05, max_failures=3)
  assert supervise(tmp_path, actions, **options) == (0, 6)
  pauses = [float(r.getMessage().split()[-2]) for r in caplog.records]
  assert pauses == [0.02, 0.04, 0.05, 0.02, 0.04]


def test_pauses_have_a_limit_after_any_number_of_failures(monkeypatch):
  pauses = []
  monkeypatch.setattr(Supervisor, "_run_once", lambda self: 9)
  monkeypatch.setattr(
    Supervisor, "_sleep", lambda self, s: pauses.append(s) or True
  )
  assert Supervisor(["a"], max_failures=3000, max_backoff=60.0).run() == 9
  assert len(pauses) == 3000 and pauses[:4] == [10.0, 20.0, 40.0, 60.0]
  assert set(pauses[3:]) == {60.0}


@pytest.mark.parametrize("option", ["backoff=nan", "max_backoff=-1"])
def test_times_that_are_none_are_rejected(option):
  with pytest.raises(SystemExit) as raised:
    run_command("supervise", [f"--{option}", "--", "true"])
  assert raised.value.code == 2


def test_without_a_folder_a_long_session_is_progress(tmp_path):
  file = tmp_path / "starts"
  code = f"open({str(file)!r}, 'a').write('x'); raise SystemExit(7)"
  options = dict(backoff=0.0, max_failures=1)
  assert Supervisor([*PYTHON, code], min_seconds=100.0, **options).run() == 7
  assert file.read_text() == "xx"
  code = f"""
with open({str(file)!r}, "a") as file:
  file.write("x")
  raise SystemExit(file.tell() < 6)
"""
  assert Supervisor([*PYTHON, code], min_seconds=0.0, **options).run() == 0
  assert len(file.read_text()) == 6


def test_a_command_that_cannot_be_started_is_an_error(tmp_path):
  with pytest.raises(ConfigError, match="can't start '/no/such'"):
    Supervisor(["/no/such"]).run()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_machine_without_memory_is_waited_for(tmp_path, monkeypatch, number):
  popen, left = subprocess.Popen, [number] * 2

  def start(*args, **kwargs):
    if left:
      raise OSError(left.pop(), "no memory")
    return popen(*args, **kwargs)

  monkeypatch.setattr(subprocess, "Popen", start)
  assert supervise(tmp_path, [(1, 0)]) == (0, 1)


def test_the_folder_is_read_from_the_command():
  assert find_workdir(["train", "--workdir=a/b"]) == pathlib.Path("a/b")
  assert find_workdir(["train", "--workdir", "a"]) == pathlib.Path("a")
  assert find_workdir(["train", "--workdir"]) is None
  assert find_workdir(["train", "--work=a"]) is None


def launch(repo_root, *arguments):
  return subprocess.Popen(
    [sys.executable, "-c", MAIN, *arguments],
    env={
      **os.environ,
      "PYTHONPATH": str(repo_root),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(devices=1),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(condition):
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_end_it(tmp_path, repo_root, number):
  # Saves, and exits with the code of a run after a signal.
  code = f"""
import pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
def save(number, _):
  time.sleep(0.3)
  (folder / "saved").write_text(" ".join(sys.argv[1:]))
  sys.exit(128 + number)
signal.signal({int(number)}, save)
(folder / "ready").touch()
time.sleep(60)
"""
  child = ("--", *PYTHON, code, "--debug", "--config.a=1")
  with launch(repo_root, *child) as process:
    wait_for((tmp_path / "ready").exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + number, output
  # The command's own options are passed on as they are.
  assert (tmp_path / "saved").read_text() == "--debug --config.a=1"


def test_processes_that_ignore_a_signal_are_killed(tmp_path, repo_root):
  code = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
file = pathlib.Path({str(tmp_path)!r}, "ready")
file.with_suffix(".new").write_text(str(other.pid))
file.with_suffix(".new").rename(file)
time.sleep(60)
"""
  child = ("--", *PYTHON, code)
  with launch(repo_root, "--grace=0.5", *child) as process:
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGKILL, output
  assert "did not end within 0.5 s" in output
  other = pathlib.Path("/proc", (tmp_path / "ready").read_text(), "stat")
  wait_for(lambda: not other.exists() or other.read_text().split()[2] == "Z")


def test_an_ignored_signal_ends_nothing(tmp_path):
  """A command under nohup is restarted after its terminal was closed."""
  file = tmp_path / "starts"
  code = f"""
import os, signal
with open({str(file)!r}, "a") as file:
  file.write("x")
os.kill(os.getppid(), signal.SIGHUP)
raise SystemExit(os.path.getsize(file.name) < 2)
"""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    assert Supervisor([*PYTHON, code], backoff=0.0).run() == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)
  assert file.read_text() == "xx"


def test_a_signal_ends_a_pause(tmp_path, repo_root):
  child = ("--", *PYTHON, "raise SystemExit(5)")
  with launch(repo_root, "--backoff=100", *child) as process:
    restart = "Exit code 5. Restart in 100 s."
    assert any(restart in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
  "saves", [(5,), pytest.param((5, 15), marks=pytest.mark.long)]
)
def test_a_run_that_is_killed_completes(tmp_path, repo_root, saves):
  """Every step is logged once, and goodput counts the loss.

  Bit-exact resumes are in test_processes.py and test_workdir.py.
  """
  killed, options = tmp_path / "killed", "steps=40,save=5"
  command = (sys.executable, "-m", "mtv_jax.main", f"--workdir={killed}")
  command += (trainings.NO_EVALS,)
  child = ("--", *command, f"--config={trainings.CONFIG}:{options}")
  with launch(repo_root, "--backoff=0.1", *child) as process:
    for saved in saves:
      wait_for((killed / "checkpoints" / str(saved)).exists)
      os.kill(read_alive(killed)["process"], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
  assert process.returncode == 0, output
  assert output.count("Exit code 137") == len(saves)
  steps = [row["step"] for row in trainings.rows(killed) if "loss" in row]
  assert steps == [*range(1, 41)]
  sessions = read_sessions(killed)
  exits = [session["exit"] for session in sessions]
  assert exits == ["without a report"] * len(saves) + ["finished"]
  for session, saved in zip(sessions[1:], saves, strict=True):
    assert session["start_step"] >= saved
  last = [r for r in trainings.rows(killed) if "goodput/lost" in r][-1]
  shares = [v for k, v in last.items() if k.startswith("goodput/")]
  assert sum(shares) == pytest.approx(1.0) and last["goodput/lost"] > 0.05
