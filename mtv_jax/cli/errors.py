"""Error messages and exit codes of the commands."""

import contextlib
import errno
import sys
from collections.abc import Iterator

from mtv_jax.train.runtime import preemption
from mtv_jax.utils.errors import UserError

# JAX's and Grain's notes about shortened tracebacks contain these.
_TRACEBACK_FLAGS = ("JAX_TRACEBACK_FILTERING", "grain_py_traceback_filtering")


@contextlib.contextmanager
def readable_errors(program: str, *, debug: bool = False) -> Iterator[None]:
  """Replaces the traceback of a user error with its message, and exits.

  User errors are `UserError`, system errors about a file, and missing packages.
  All other errors are bugs and keep their traceback; with `debug`, user errors
  do too. `program` is the first word of the message. Abandoned threads do not
  delay the exit.
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
    raise SystemExit(130) from None  # 128 + SIGINT, as in shells.
  except (UserError, OSError, ImportError) as error:
    # An OSError without a file name is a bug, unless the disk is full or this
    # package raised it.
    is_bug = (
      isinstance(error, OSError)
      and not isinstance(error, UserError)
      and error.errno not in (None, errno.ENOSPC, errno.EDQUOT)
      and not error.filename
    )
    # A traceback would hide the exit code of a stopped run.
    is_stop = isinstance(error, preemption.RunStoppedError)
    if is_bug or (debug and not is_stop):
      raise
    exit_error = SystemExit(f"{program}: {format_error(error)}")
    if (code := getattr(error, "exit_code", 1)) != 1:
      # SystemExit carries either a message (code 1) or a code.
      with contextlib.suppress(OSError):  # A closed terminal.
        print(exit_error, file=sys.stderr)
      exit_error.code = code
    raise exit_error from error


def format_error(error: BaseException) -> str:
  """Formats an error's text and notes, except on shortened tracebacks."""
  notes = getattr(error, "__notes__", ())
  for flag in _TRACEBACK_FLAGS:
    notes = [note for note in notes if flag not in note]
  return "\n".join([str(error), *notes])
