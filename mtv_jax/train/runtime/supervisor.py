"""Training processes: starts runs, and restarts a run until it succeeds.

For the supervisor, progress is a larger step in the run's liveness file (see
`sessions.py`), or, if the folder is unknown, a session longer than
`min_seconds`.
"""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from mtv_jax.train.runtime.sessions import read_alive
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError

log = logging.getLogger(__name__)

# Exit codes for which a restart fails again: usage and config errors, and the
# shell's for a command that can't be executed or is not found.
FINAL_CODES = (2, 126, 127)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass
class Supervisor:
  """Runs a command until it exits with 0.

  Signals are forwarded to the command; the supervisor then exits with the
  command's exit code. Ignored signals, such as SIGHUP under nohup, stay
  ignored. Processes of the command that outlive it, or its `grace` after a
  signal, are killed: they would hold files and memory that a restart needs.
  """

  command: Sequence[str]
  # The run's folder, which shows progress.
  workdir: str | os.PathLike | None = None
  max_failures: int = 5  # In a row, without progress.
  backoff: float = 10.0  # Seconds before the first restart; then doubles.
  max_backoff: float = 600.0
  min_seconds: float = 600.0
  grace: float = 600.0  # Seconds from a signal until the command is killed.

  def __post_init__(self):
    if self.workdir is None:
      self.workdir = find_workdir(self.command)
    self._child: subprocess.Popen | None = None
    self._signal: int | None = None

  def run(self) -> int:
    """Runs the command, restarts it on failure; returns the last exit code.

    A command killed by a signal has exit code 128 + signal, as in shells.
    """
    failures, max_step = 0, self._read_step()
    with self._forward_signals():
      while True:
        start = time.monotonic()
        code = self._run_once()
        seconds = time.monotonic() - start
        if code == 0 or self._signal is not None:
          return code
        if code in FINAL_CODES:
          log.error("Exit code %d: a restart would fail again.", code)
          return code
        step = self._read_step()
        is_long = self.workdir is None and seconds >= self.min_seconds
        failures = 1 if is_long or step > max_step else failures + 1
        max_step = max(max_step, step)
        if failures > self.max_failures:
          log.error(
            f"Exit code {code}. Giving up after {failures} failures without"
            " progress."
          )
          return code
        # Limits the exponent, to avoid float overflow.
        delay = self.backoff * 2.0 ** min(failures - 1, 100)
        delay = min(delay, self.max_backoff)
        where = f" at step {step}" if step else ""
        log.warning("Exit code %d%s. Restart in %.3g s.", code, where, delay)
        if not self._sleep(delay):
          return code

  def _run_once(self) -> int:
    try:
      # A new process group, since a terminal sends Ctrl-C to the whole group.
      self._child = subprocess.Popen(self.command, process_group=0)
    except OSError as error:
      if error.errno in (errno.EAGAIN, errno.ENOMEM):
        log.warning("%r can't be started now: %s", self.command[0], error)
        return os.EX_TEMPFAIL
      raise ConfigError(f"can't start {self.command[0]!r}: {error}") from error
    if self._signal is not None:  # Received before the command started.
      self._child.send_signal(self._signal)
    try:
      code = self._wait(self._child)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._child.pid, signal.SIGKILL)
      self._child = None
    return code if code >= 0 else 128 - code

  def _wait(self, child: subprocess.Popen) -> int:
    """Waits for the command; kills it after its grace period."""
    deadline = math.inf
    while True:
      with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(timeout=0.5)
      if self._signal is not None:
        deadline = min(deadline, time.monotonic() + self.grace)
      if time.monotonic() > deadline:
        log.error("The command did not end within %g s: killed.", self.grace)
        child.kill()
        deadline = math.inf

  def _read_step(self) -> int:
    """Reads the step from the liveness file; 0 if unknown."""
    alive = read_alive(self.workdir) if self.workdir is not None else None
    step = (alive or {}).get("step")
    return step if isinstance(step, int) else 0

  def _sleep(self, seconds: float) -> bool:
    """Sleeps; returns False as soon as a signal is received."""
    deadline = time.monotonic() + seconds
    while self._signal is None:
      remaining = deadline - time.monotonic()
      if remaining <= 0:
        return True
      time.sleep(min(remaining, 0.2))
    return False

  @contextlib.contextmanager
  def _forward_signals(self) -> Iterator[None]:
    def receive(number, _):
      self._signal = number
      child = self._child
      if child is not None:
        with contextlib.suppress(ProcessLookupError):
          child.send_signal(number)

    previous = {
      number: signal.signal(number, receive)
      for number in SIGNALS
      if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


def find_workdir(command: Sequence[str]) -> pathlib.PurePath | None:
  """The `--workdir` of a training command; None if absent."""
  for argument, following in zip(command, [*command[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name == "--workdir" and (equals or following):
      return path_lib.as_path(value if equals else following)
  return None


def launch(
  config: str,
  workdir: object,
  assignments: Sequence[str] = (),
  *,
  log: pathlib.Path,
  processes: int = 1,
  compile_cache: str | os.PathLike = "auto",
) -> list[subprocess.Popen]:
  """Starts `mtv-jax train` as one process or several distributed processes.

  `assignments` are overrides KEY=VALUE, and `compile_cache` is the command's
  option. The processes append their output to the file `log`.
  """
  command = [sys.executable, "-m", "mtv_jax.main"]
  command += [f"--config={config}", f"--workdir={workdir}"]
  command.append(f"--compile_cache={os.fspath(compile_cache)}")
  command += [f"--set={assignment}" for assignment in assignments]
  options = [[]]
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      flags = [f"--coordinator=localhost:{probe.getsockname()[1]}"]
    # Short, since all processes start together.
    flags += [f"--processes={processes}", "--connect_seconds=100"]
    options = [[*flags, f"--process={i}"] for i in range(processes)]
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("ab") as stream:
    output = dict(stdout=stream, stderr=subprocess.STDOUT)
    return [subprocess.Popen([*command, *flags], **output) for flags in options]
