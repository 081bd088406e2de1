"""SIGTERM handling: save a checkpoint, then exit.

Schedulers and clouds send SIGTERM some time before they take a machine away.
`loop.py` polls the flag after each step; several hosts agree on a step through
`Checkpointer.preempted`; `cli/errors.py` exits with `EXIT_CODE`.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

from mtv_jax.utils.errors import UserError

# 128 + SIGTERM, as shells report it, so that the run does not look finished.
EXIT_CODE = 143


class Preempted(UserError, RuntimeError):
  """Raised after SIGTERM, once a checkpoint is saved."""


@dataclasses.dataclass
class Notice:
  """Whether SIGTERM was received."""

  received: bool = False


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Notice]:
  """Sets a flag at SIGTERM inside the context instead of exiting.

  Repeated signals change nothing: some programs send one to a process and one
  to its group. Does nothing under `jax.distributed`, whose service makes hosts
  agree on a step, where the signal has a handler, or outside the main thread.
  """
  import jax  # Imported late: cli/errors.py needs this module without it.

  notice = Notice()
  if (
    threading.current_thread() is not threading.main_thread()
    or jax.distributed.is_initialized()
    or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
  ):
    yield notice
    return

  def receive(*_):
    # Not an Event: a second signal would wait for its lock, held by the first.
    notice.received = True

  signal.signal(signal.SIGTERM, receive)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
