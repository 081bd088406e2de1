"""Exit of the command lines on errors."""

import contextlib
import sys
from collections.abc import Iterator

from mtv_jax.train import preemption
from mtv_jax.utils.errors import UserError


@contextlib.contextmanager
def readable_errors(program: str, *, debug: bool = False) -> Iterator[None]:
  """Exits with the message of an error that the user can act on.

  These are `UserError`, the system's errors about a file, and packages that
  are not installed. Any other error is a defect, here or in a library, and
  keeps its traceback.

  Args:
    program: the first word of the message.
    debug: show the traceback of every error.
  """
  try:
    yield
  except KeyboardInterrupt:
    if debug:
      raise
    print(f"\n{program}: interrupted.", file=sys.stderr)
    raise SystemExit(130) from None  # 128 + SIGINT, as shells have it.
  except preemption.Preempted as error:
    print(f"{program}: {message(error)}", file=sys.stderr)
    raise SystemExit(preemption.EXIT_CODE) from None
  except (UserError, OSError, ImportError) as error:
    # A system error without a file is a defect, one of this package's is not.
    unnamed = isinstance(error, OSError) and error.errno and not error.filename
    if debug or (unnamed and not isinstance(error, UserError)):
      raise
    raise SystemExit(f"{program}: {message(error)}") from error


def message(error: BaseException) -> str:
  """An error's text with its notes, without JAX's note on tracebacks."""
  notes = [
    note
    for note in getattr(error, "__notes__", ())
    if "JAX_TRACEBACK_FILTERING" not in note
  ]
  return "\n".join([str(error), *notes])
