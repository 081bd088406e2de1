"""Barrier of Orbax's save threads that ends if a save fails on one process.

The threads of a save meet after the writes, after the commit, and at the end of
the save. One that fails goes to the end at once, while the others wait for it
after the writes, up to Orbax's timeout of 20 minutes.
"""

import itertools
import re
import sys
import threading

import jax
import orbax.checkpoint as ocp
from etils import epath

from mtv_jax.parallel.distributed import gather_results, name_processes
from mtv_jax.utils.errors import printable

# End of a TensorStore message.
_DETAILS = re.compile(r" \[(?:source locations|tensorstore_spec)=")
_managers = itertools.count()


class PeerSaveError(OSError):
  """Raised in a process's save threads if another process can't save."""


def describe(error: BaseException) -> str:
  """Type and message of a save's error, without TensorStore's details."""
  text = printable(_DETAILS.split(str(error))[0])
  is_peer = isinstance(error, PeerSaveError)
  return text if is_peer else f"{type(error).__name__}: {text}"


def check_writable(folder: epath.Path) -> None:
  """Raises on all processes if process 0 can't create folders in `folder`.

  The others would wait for a checkpoint's folders for over 5 minutes.
  """

  def create() -> None:
    if jax.process_index() == 0:
      probe = folder / ".probe"
      probe.mkdir(parents=True, exist_ok=True)
      probe.rmdir()

  if jax.process_count() > 1 and "://" not in str(folder):
    gather_results(create)


class SaveBarrier:
  """Orbax's `barrier_sync_fn`, for one checkpoint manager.

  All processes arrive at one barrier whatever the key. The threads that fail
  announce it before they arrive; the others then raise PeerSaveError, and all
  meet again at the end of the save.
  """

  def __init__(self):
    # Equal on all processes, which create their managers together.
    self._name = f"mtv_jax/save/{next(_managers)}"
    self._count, self._passed = 0, ""

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    client = ocp.multihost.get_jax_distributed_client()
    # Orbax ends a save in a `finally`, in a thread; the start of a save, in the
    # main thread, may handle another error.
    error = sys.exc_info()[1]
    in_thread = threading.current_thread() is not threading.main_thread()
    # After the commit no process waits elsewhere.
    is_failed = error and in_thread and "commit_complete" not in self._passed
    while True:
      self._count += 1
      folder = f"{self._name}/{self._count}/"
      if is_failed:
        client.key_value_set(f"{folder}{jax.process_index()}", describe(error))
      client.wait_at_barrier(self._name, timeout_ms)
      failures = dict(client.key_value_dir_get(folder))
      if len(failures) in (0, jax.process_count()):
        break
      if not is_failed:
        numbers = sorted(int(k.rpartition("/")[2]) for k in failures)
        cause = failures[f"{folder}{numbers[0]}"]
        raise PeerSaveError(f"{name_processes(numbers)} failed: {cause}")
    self._passed = key
