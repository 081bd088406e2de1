"""Signals that stop a run: save a checkpoint, then exit.

Schedulers and clouds send SIGTERM before preempting a machine, a closed
terminal sends SIGHUP, Ctrl-C sends SIGINT. `train_loop.py` polls the notice
after each step and while it waits for data; hosts agree on a step through
`Checkpointer.preempted`. `cli/errors.py` exits with the error's `exit_code`.

Python runs signal handlers in the main thread only, which may compile for
minutes. A thread reads the signals from a pipe: if the main thread does not
handle one and there is nothing to save, the process exits.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Container, Iterator
from typing import NoReturn

from mtv_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# 128 + SIGTERM, as shells report it, so that the run does not look finished.
EXIT_CODE = 143
# Time for the main thread to handle a signal.
_GRACE_SECONDS = 3.0

# Signals, and the handlers that `catch_signals` replaces.
_HANDLED = {
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
  # Whether this session has completed a step, which a checkpoint would save.
  has_progress: bool = False
  # Set once the main thread saves and exits.
  handled: threading.Event = dataclasses.field(default_factory=threading.Event)
  # Called with the error before an exit without the main thread.
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
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      notice.signal_number = notice.signal_number or number

  is_distributed = jax.distributed.is_initialized()
  handled = _HANDLED.keys() - ({signal.SIGTERM} if is_distributed else set())
  numbers = [n for n in handled if signal.getsignal(n) == _HANDLED[n]]
  for number in numbers:
    signal.signal(number, receive)
  with contextlib.ExitStack() as stack:
    for number in numbers:
      stack.callback(signal.signal, number, _HANDLED[number])
    if not is_distributed:  # There, no process may exit alone.
      stack.enter_context(_watch(notice, numbers))
    yield notice


@contextlib.contextmanager
def _watch(notice: Notice, numbers: Container[int]) -> Iterator[None]:
  """Exits on signals that the main thread does not handle, in a thread."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  args = notice, numbers, reader
  threading.Thread(target=_exit_if_unhandled, args=args, daemon=True).start()
  try:
    yield
  finally:
    notice.handled.set()
    signal.set_wakeup_fd(previous)
    os.close(writer)  # Ends the thread.


def _exit_if_unhandled(
  notice: Notice, numbers: Container[int], reader: int
) -> None:
  """Reads signal numbers from a pipe; exits if there is nothing to save."""
  with os.fdopen(reader, "rb", buffering=0) as pipe:
    is_first = True
    while byte := pipe.read(1):  # To the end: Python reports failed writes.
      if is_first and byte[0] in numbers:
        is_first = False
        if not notice.handled.wait(_GRACE_SECONDS):
          _answer(notice, byte[0])


def _answer(notice: Notice, number: int) -> None:
  name = signal.Signals(number).name
  if notice.has_progress:
    text = "saves a checkpoint and exits once the devices answer."
    print_error(f"train: received {name}; {text}")
    return
  error = Preempted(
    f"received {name} before the first step of this session: nothing to save."
    " The same command resumes.",
    number,
  )
  print_error(f"train: {error}")
  with contextlib.suppress(Exception):
    notice.before_exit(error)
  exit_now(error.exit_code)


# Reasons to leave threads that don't end: readers of unresponsive storage.
_abandoned: list[str] = []


def abandon_threads(reason: str) -> None:
  """Makes `exit_without_threads` exit without joining threads."""
  log.warning("The process exits without its threads: %s.", reason)
  _abandoned.append(reason)


def exit_without_threads(error: BaseException | None = None) -> None:
  """Exits immediately if threads were abandoned, since Python would join them.

  Prints `error` and sets the exit code as Python does.
  """
  if not _abandoned:
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
