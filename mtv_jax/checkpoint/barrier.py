"""Barrier for Orbax's save threads that releases all processes if one fails.

The threads of a save wait for each other after the writes, after the commit and
at the end. With Orbax's barrier, a thread that fails skips to the end, while
the others wait for it after the writes, for up to 20 minutes.
"""

import itertools
import re
import sys
import threading

import jax
import orbax.checkpoint as ocp
from etils import epath

from mtv_jax.parallel.distributed import gather_results, name_processes
from mtv_jax.utils.errors import UserError, printable

# Start of the details that end a TensorStore message.
_DETAILS = re.compile(r" \[(?:source locations|tensorstore_spec)=")
_manager_ids = itertools.count()


class PeerSaveError(OSError):
  """Raised in a process's save threads if another process can't save."""


def describe_error(error: BaseException) -> str:
  """Type and message of a save's error, without TensorStore's details."""
  text = printable(_DETAILS.split(str(error))[0])
  is_peer_error = isinstance(error, PeerSaveError)
  return text if is_peer_error else f"{type(error).__name__}: {text}"


def check_writable(folder: epath.Path) -> None:
  """Raises on all processes if process 0 can't create folders in `folder`.

  Otherwise the others would wait over 5 minutes for a checkpoint's folders.
  """

  def create() -> None:
    if jax.process_index() == 0:
      probe = folder / ".probe"
      probe.mkdir(parents=True, exist_ok=True)
      probe.rmdir()

  if jax.process_count() > 1 and "://" not in str(folder):
    try:
      gather_results(create)
    except UserError as error:  # Another process failed.
      raise PeerSaveError(str(error)) from None


class SaveBarrier:
  """Orbax's `barrier_sync_fn`, for one checkpoint manager.

  All processes wait at one barrier, whatever the key. Threads that fail before
  the commit announce it on arrival; the others then raise PeerSaveError, and
  all wait again at the end of the save. After the commit no process waits
  elsewhere, so errors are not announced.
  """

  def __init__(self):
    # Equal on all processes, which create their managers together.
    self._name = f"mtv_jax/save/{next(_manager_ids)}"
    self._count = 0  # Barriers that all processes have passed.
    self._lock = threading.Lock()
    # State of the current save.
    self._is_committed, self._cause = False, ""

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    """Waits for all processes; raises PeerSaveError if one has failed."""
    # Orbax ends a save in a `finally`, in a thread.
    error = sys.exc_info()[1]
    with self._lock:
      if threading.current_thread() is threading.main_thread():
        # The start of a save, perhaps while another error is handled.
        error, self._is_committed, self._cause = None, False, ""
      if self._is_committed:
        error = None
      elif self._cause and error is None:  # No peer will arrive.
        raise PeerSaveError(self._cause)
      while failures := self._gather_failures(error, timeout_ms):
        names = name_processes(sorted(failures))
        self._cause = f"{names} failed: {failures[min(failures)]}"
        if len(failures) == jax.process_count():
          break
        if error is None:
          raise PeerSaveError(self._cause)
      self._is_committed = self._is_committed or "commit_complete" in key

  def _gather_failures(
    self, error: BaseException | None, timeout_ms: int
  ) -> dict[int, str]:
    """Waits for all processes; returns the announced failures by process."""
    client = ocp.multihost.get_jax_distributed_client()
    folder = f"{self._name}/{self._count}/"
    if error is not None:
      name = f"{folder}{jax.process_index()}"
      client.key_value_set(name, describe_error(error), allow_overwrite=True)
    client.wait_at_barrier(self._name, timeout_ms)
    self._count += 1
    entries = client.key_value_dir_get(folder)
    return {int(name.rpartition("/")[2]): cause for name, cause in entries}
