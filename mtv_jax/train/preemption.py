"""Being told to end: a signal that comes some time before the plug is pulled.

Schedulers and clouds that take a machine away send SIGTERM first, which would
end a program at once. A run saves instead, and ends.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from mtv_jax.utils.errors import UserError

# 128 + SIGTERM, as shells have it: such a run does not look finished.
EXIT_CODE = 143


class Preempted(UserError, RuntimeError):
  """A run was told to end, and has saved where it was."""


class Notice:
  """Whether this process was told to end."""

  received = False

  def _note(self, *_: object) -> None:
    self.received = True


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Notice]:
  """Notes a SIGTERM while it lasts, instead of ending at once.

  Further ones change nothing: some programs send it to a process and to its
  group. SIGINT and SIGKILL still end it at once.

  Processes joined by `jax.distributed` have to agree on a step, which JAX's own
  service sees to (`Checkpointer.preempted`); and a signal that somebody else
  takes care of, or that can't be taken in this thread, stays as it is.
  """
  import jax  # Here, so that commands end with readable errors without it.

  notice = Notice()
  ours = (
    threading.current_thread() is threading.main_thread()
    and not jax.distributed.is_initialized()
    and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  )
  if not ours:
    yield notice
    return
  signal.signal(signal.SIGTERM, notice._note)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
