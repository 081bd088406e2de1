"""Signals that stop a run: save a checkpoint, then exit.

Schedulers and clouds send SIGTERM before preempting a machine, a closed
terminal sends SIGHUP, Ctrl-C sends SIGINT. `train_loop.py` polls the notice
after each step and while it waits for data; hosts agree on a step through
`Checkpointer.preempted`. `cli/errors.py` exits with the error's `exit_code`.

Python runs signal handlers in the main thread only, which may compile for
minutes. A thread reads the signals from a pipe: if the main thread does not
handle one and there is nothing to save, the process exits. In a run of several
processes, all of them do: JAX's coordination service tells them of a SIGTERM.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Container, Iterator
from typing import Any, NoReturn

from mtv_jax.utils import progress
from mtv_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# 128 + SIGTERM, as shells report it, so that the run does not look finished.
EXIT_CODE = 143
# Time for the main thread to handle a signal.
_GRACE_SECONDS = 3.0
# Set by JAX's coordination service once a process has received SIGTERM.
_PREEMPTION_KEY = "RECEIVED_PREEMPTION_NOTICE"

# Signals, and the handlers that `catch_signals` replaces.
_HANDLERS = {
  signal.SIGTERM: signal.SIG_DFL,
  signal.SIGHUP: signal.SIG_DFL,
  signal.SIGINT: signal.default_int_handler,
}


class RunStoppedError(UserError, RuntimeError):
  """The run stopped before its last step; a restart resumes it."""

  exit_code = 1


class Preempted(RunStoppedError):
  """Raised after a signal, once a checkpoint is saved."""

  def __init__(self, message: str, signal_number: int = signal.SIGTERM):
    super().__init__(message)
    self.exit_code = 128 + signal_number


@dataclasses.dataclass
class Notice:
  """The first signal that asked the run to stop, if any."""

  signal_number: int | None = None
  # Says what follows once the devices answer. Empty before the session's first
  # step: there is nothing to save, and the process exits.
  exit_message: str = ""
  # Set once the main thread saves and exits.
  handled: threading.Event = dataclasses.field(default_factory=threading.Event)
  # Called with the error before an exit from another thread.
  before_exit: Callable[[RunStoppedError], object] = lambda error: None

  @property
  def received(self) -> bool:
    """Whether to save and exit."""
    return self.signal_number is not None

  @property
  def name(self) -> str:
    return signal.Signals(self.signal_number or signal.SIGTERM).name


@contextlib.contextmanager
def catch_signals() -> Iterator[Notice]:
  """Records SIGTERM, SIGHUP and SIGINT inside the context instead of exiting.

  Repeated signals are ignored, since some programs signal both a process and
  its group; a second SIGINT interrupts. Does not replace custom handlers, and
  does nothing outside the main thread. Under `jax.distributed`, forwards SIGHUP
  and SIGINT as SIGTERM, after which JAX makes the hosts agree on a step; the
  notice stays empty.
  """
  import jax  # Imported late: cli/errors.py needs this module without it.

  notice, interrupts = Notice(), []
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return

  def receive(number, frame):
    # Not an Event: a second signal could deadlock on its lock.
    if number == signal.SIGINT:
      if interrupts:
        signal.default_int_handler(number, frame)
      interrupts.append(number)
    if is_distributed:
      _send_sigterm(number)
    else:
      notice.signal_number = notice.signal_number or number

  is_distributed = jax.distributed.is_initialized()
  signals = _HANDLERS.keys() - ({signal.SIGTERM} if is_distributed else set())
  previous = {number: signal.getsignal(number) for number in signals}
  numbers = [
    n for n, old in previous.items() if old in (_HANDLERS[n], _interrupt)
  ]
  for number in numbers:
    signal.signal(number, receive)
  with contextlib.ExitStack() as stack:
    for number in numbers:
      stack.callback(signal.signal, number, previous[number])
    on_unhandled = functools.partial(_exit_or_report, notice)
    if is_distributed:
      _watch_preemption(notice)
      on_unhandled = _send_sigterm
    stack.enter_context(_watch_signals(numbers, notice.handled, on_unhandled))
    yield notice


def _send_sigterm(number: int) -> None:
  del number
  os.kill(os.getpid(), signal.SIGTERM)


_interrupted = threading.Event()


def _interrupt(number: int, frame: Any) -> None:
  _interrupted.set()
  signal.default_int_handler(number, frame)


@contextlib.contextmanager
def exit_on_interrupt(program: str) -> Iterator[None]:
  """Exits after SIGINT while the main thread compiles, which ignores it.

  Acts in a `progress.activity` with `can_exit`; elsewhere the signal waits, so
  that files and leases are cleaned up. Does nothing outside the main thread, or
  if SIGINT is handled otherwise.
  """
  previous = signal.getsignal(signal.SIGINT)
  if (
    threading.current_thread() is not threading.main_thread()
    or previous not in (signal.SIG_DFL, signal.default_int_handler)
  ):
    yield
    return

  def on_unhandled(number: int) -> None:
    if progress.can_exit() and signal.getsignal(number) is _interrupt:
      print_error(f"{program}: interrupted.")
      exit_now(128 + number)

  signal.signal(signal.SIGINT, _interrupt)
  try:
    with _watch_signals([signal.SIGINT], _interrupted, on_unhandled):
      yield
  finally:
    signal.signal(signal.SIGINT, previous)
    _interrupted.clear()


@contextlib.contextmanager
def _watch_signals(
  numbers: Container[int],
  handled: threading.Event,
  on_unhandled: Callable[[int], object],
) -> Iterator[None]:
  """Calls `on_unhandled` in a thread if the main one ignores a signal."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def read_signals() -> None:
    with os.fdopen(reader, "rb", buffering=0) as pipe:
      is_first = True
      while byte := pipe.read(1):  # To the end: Python reports failed writes.
        if is_first and byte[0] in numbers:
          is_first = False
          if not handled.wait(_GRACE_SECONDS):
            on_unhandled(byte[0])

  threading.Thread(target=read_signals, daemon=True).start()
  try:
    yield
  finally:
    handled.set()
    signal.set_wakeup_fd(previous)
    os.close(writer)  # Ends the thread.


def _watch_preemption(notice: Notice) -> None:
  """Starts a thread that exits if a process gets SIGTERM before the first step.

  It ends after that step, or with the context of the notice.
  """
  # The key-value store lacks a public API, see peers.py.
  from jax._src import distributed

  state = distributed.global_state

  def watch() -> None:
    while not notice.handled.wait(1.0) and not notice.exit_message:
      try:
        state.client.key_value_try_get(_PREEMPTION_KEY)
      except Exception:  # The key is missing.
        continue
      # Process 0, which runs the service, outlives the others.
      delay = 2.0 if state.process_id == 0 else 0.0
      if not notice.handled.wait(_GRACE_SECONDS + delay):
        _exit_or_report(notice, signal.SIGTERM)
      return

  threading.Thread(target=watch, daemon=True).start()


def _exit_or_report(notice: Notice, number: int) -> None:
  name = signal.Signals(number).name
  if notice.exit_message:
    print_error(f"train: received {name}; {notice.exit_message}")
    return
  error = Preempted(
    f"received {name} before the first step of this session: nothing to save."
    " Rerun the command to resume.",
    number,
  )
  print_error(f"train: {error}")
  with contextlib.suppress(Exception):
    notice.before_exit(error)
  exit_now(error.exit_code)


# Why threads that don't end were abandoned: readers of unresponsive storage.
_abandon_reasons: list[str] = []


def abandon_threads(reason: str) -> None:
  """Makes `exit_without_threads` exit without joining threads."""
  log.warning("The process exits without its threads: %s.", reason)
  _abandon_reasons.append(reason)


def exit_without_threads(error: BaseException | None = None) -> None:
  """Exits immediately if threads were abandoned, since Python would join them.

  Prints `error` and sets the exit code as Python does.
  """
  if not _abandon_reasons:
    return
  code = 0 if error is None else 1
  if isinstance(error, SystemExit):
    code = error.code or 0
    if not isinstance(code, int):
      print(code, file=sys.stderr)
      code = 1
  elif error is not None:
    traceback.print_exception(error)
  exit_now(code)


def print_error(text: str) -> None:
  """Prints to standard error; ignores write errors.

  In a thread, such an error would prevent the exit that follows.
  """
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.__stderr__, flush=True)


def exit_now(code: int) -> NoReturn:
  """Kills the data workers, flushes the standard streams and exits.

  Workers that read unresponsive storage would otherwise survive.
  """
  for child in multiprocessing.active_children():
    child.kill()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(code)
