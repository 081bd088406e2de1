"""Exit of the command lines on errors."""

import contextlib
import errno
import sys
from collections.abc import Iterator

from mtv_jax.train.runtime import preemption
from mtv_jax.utils.errors import UserError

# In notes of JAX and Grain about frames that they remove.
_TRACEBACK_FLAGS = ("JAX_TRACEBACK_FILTERING", "grain_py_traceback_filtering")


@contextlib.contextmanager
def readable_errors(program: str, *, debug: bool = False) -> Iterator[None]:
  """Exits with the message of an error that the user can act on.

  These are `UserError`, the system's errors about a file, and packages that
  are not installed. Any other error is a defect, here or in a library, and
  keeps its traceback. A process with abandoned threads exits without them.

  Args:
    program: the first word of the message.
    debug: show the traceback of every error.
  """
  try:
    with _exit_with_message(program, debug=debug):
      yield
  except BaseException as error:
    preemption.exit_without_threads(error)
    raise
  preemption.exit_without_threads()


@contextlib.contextmanager
def _exit_with_message(program: str, *, debug: bool) -> Iterator[None]:
  try:
    yield
  except KeyboardInterrupt:
    with contextlib.suppress(OSError):  # A closed terminal.
      print(f"\n{program}: interrupted.", file=sys.stderr)
    if debug:
      raise
    raise SystemExit(130) from None  # 128 + SIGINT, as shells have it.
  except (UserError, OSError, ImportError) as error:
    # A system error without a file is a defect, unless the disk is full; one of
    # this package's is not.
    unnamed = (
      isinstance(error, OSError)
      and error.errno not in (None, errno.ENOSPC, errno.EDQUOT)
      and not error.filename
    )
    is_defect = unnamed and not isinstance(error, UserError)
    # A run that stopped has an exit code that a traceback would hide.
    is_stop = isinstance(error, preemption.RunStoppedError)
    if is_defect or (debug and not is_stop):
      raise
    ending = SystemExit(f"{program}: {message(error)}")
    if (code := getattr(error, "exit_code", 1)) != 1:
      # Python prints a message as the code alone, and exits with 1.
      with contextlib.suppress(OSError):  # A closed terminal.
        print(ending, file=sys.stderr)
      ending.code = code
    raise ending from error


def message(error: BaseException) -> str:
  """An error's text with its notes, without those on shortened tracebacks."""
  notes = [
    note
    for note in getattr(error, "__notes__", ())
    if not any(flag in note for flag in _TRACEBACK_FLAGS)
  ]
  return "\n".join([str(error), *notes])
