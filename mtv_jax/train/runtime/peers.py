"""Detection of lost processes: the remaining ones exit with a message.

JAX's own coordination service aborts them after 100 s. If process 0, which runs
that service, dies and its connections close, JAX's client aborts immediately
(`PollForError`). No option of JAX 0.10 or 0.12 changes that, neither
`jax_enable_recoverability` nor the timeouts of `jax.distributed.initialize`.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from mtv_jax.train.runtime import preemption
from mtv_jax.train.runtime.watchdog import EXIT_CODE
from mtv_jax.utils.errors import UserError

# In errors of collectives and of the service, not of compilation or memory.
_SIGNS = ("Gloo", "UNAVAILABLE", "heartbeat", "Connection", "coordination")
_PREFIX = "mtv_jax/alive"
_LOST = "mtv_jax/lost"
_CHECKS_PER_TIMEOUT = 6  # Number of checks within the timeout.


def exit_now(reason: str) -> NoReturn:
  """Prints one line and exits, without shutdown barriers."""
  preemption.print_error(
    f"train: {reason}. Rerun the command on all hosts to resume from the last"
    " checkpoint."
  )
  preemption.exit_now(EXIT_CODE)


@contextlib.contextmanager
def limit_connecting(seconds: float | int) -> Iterator[None]:
  """Exits with a message if connecting (the context) takes `seconds`."""

  def exit_on_timeout():
    preemption.print_error(
      f"Not all processes have connected within {seconds:.0f} s: one has not "
      "started, has ended, or can't reach process 0 (--coordinator)."
    )
    preemption.exit_now(EXIT_CODE)

  timer = threading.Timer(seconds, exit_on_timeout)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
  """Exits on JAX errors that mean a lost process."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    exit_if_lost(error)
    raise


def exit_if_lost(error: Exception) -> None:
  """Exits if a JAX error means that another process is lost."""
  text = str(error)
  if isinstance(error, UserError):
    return
  if jax.process_count() > 1 and any(sign in text for sign in _SIGNS):
    exit_now(
      "another process of the run is lost or unreachable"
      f" ({text.splitlines()[0][:200]})"
    )


@dataclasses.dataclass
class _PollState:
  """State shared by the request thread and the thread that awaits answers."""

  closed: threading.Event = dataclasses.field(default_factory=threading.Event)
  answered: threading.Event = dataclasses.field(default_factory=threading.Event)
  joined: threading.Event = dataclasses.field(default_factory=threading.Event)
  error: Exception | None = None  # None if the last request succeeded.


@contextlib.contextmanager
def watch_peers(
  seconds: float | int, *, when_alone: Callable[[], None] = lambda: None
) -> Iterator[None]:
  """Exits if another process has not answered for `seconds`; 0 disables it.

  Process 0 watches all processes; the others watch process 0, which tells them
  of lost processes. If a process leaves the context by an error, the rest exit,
  too. Unless all processes fail together, the failing one calls `when_alone`
  and exits without shutdown barriers.
  """
  if not seconds or jax.process_count() == 1:
    yield
    return
  # The key-value store lacks a public API; Orbax imports it here, too.
  from jax._src import distributed

  client, index = distributed.global_state.client, jax.process_index()
  state = _PollState()
  thread = _start_thread("peers", _poll_peers, client, index, seconds, state)
  _start_thread("peers_service", _watch_service, seconds, state)
  own_key = f"{_PREFIX}/{index}"
  try:
    yield
  except preemption.RunStoppedError:
    raise
  except BaseException as error:
    reason = f"process {index} failed: {error!r}"[:300]
    with contextlib.suppress(Exception):
      client.key_value_set(f"{_LOST}/reason", reason, allow_overwrite=True)
    state.closed.set()  # Else its own report ends this process.
    # The others exit within two checks. Process 0, which runs the service, has
    # to outlive them; the rest have to exit before it.
    checks = 2.5 if index == 0 else 0.5
    if not _all_fail(client, checks * seconds / _CHECKS_PER_TIMEOUT):
      preemption.abandon_threads("the other processes have not failed")
      when_alone()
    raise
  finally:
    state.closed.set()
    thread.join()
    state.joined.set()
    state.answered.set()
    with contextlib.suppress(Exception):
      client.key_value_set(own_key, "done", allow_overwrite=True)


def _start_thread(name: str, target: Any, *args: Any) -> threading.Thread:
  thread = threading.Thread(target=target, args=args, name=name, daemon=True)
  thread.start()
  return thread


def _all_fail(client: Any, seconds: float) -> bool:
  """Whether every process calls this function within `seconds`."""
  try:
    client.wait_at_barrier(f"{_LOST}/barrier", int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _watch_service(seconds: float | int, state: _PollState) -> None:
  """Exits if `_poll_peers`, which may block, gets no answer for `seconds`."""
  while not state.joined.is_set():
    if not state.answered.wait(seconds):
      exit_now(_describe_silence(seconds, state.error))
    state.answered.clear()


def _describe_silence(seconds: float | int, error: Exception | None) -> str:
  if error is None:
    return f"process 0 has not answered for {seconds:.0f} s"
  line = (str(error).splitlines() or [""])[0][:200]
  return (
    f"requests to process 0 have failed for {seconds:.0f} s"
    f" ({type(error).__name__}: {line})"
  )


def _poll_peers(
  client: Any, index: int, seconds: float | int, state: _PollState
) -> None:
  period = seconds / _CHECKS_PER_TIMEOUT
  count, counters = 0, {}
  while not state.closed.wait(period):
    count += 1
    try:
      own_key = f"{_PREFIX}/{index}"
      client.key_value_set(own_key, str(count), allow_overwrite=True)
      reason = next((v for _, v in client.key_value_dir_get(_LOST)), None)
      if reason is None and index == 0:
        reason = _describe_silent_process(client, seconds, counters)
        if reason is not None:
          client.key_value_set(f"{_LOST}/reason", reason, allow_overwrite=True)
    # Catches any error: if this thread died, process 0 would seem silent.
    except Exception as error:
      state.error = error
      if not state.closed.is_set():
        exit_if_lost(error)
      continue
    state.error = None
    state.answered.set()
    if reason is not None and not state.closed.wait(period):
      # The wait lets this process's own error surface first.
      exit_now(reason)


def _describe_silent_process(
  client: Any, seconds: float | int, counters: dict[str, tuple[str, float]]
) -> str | None:
  """Describes a process whose counter has not changed for `seconds`, if any."""
  now = time.monotonic()
  for name, value in client.key_value_dir_get(_PREFIX):
    if counters.get(name, ("", 0.0))[0] != value:
      counters[name] = value, now
    elif value != "done" and now - counters[name][1] > seconds:
      number = name.rpartition("/")[2]
      return f"process {number} has not answered for {seconds:.0f} s"
  return None
