"""Exit of the command lines on errors."""

import contextlib
import dis
import sys
from collections.abc import Iterator

from mtv_jax.train import preemption
from mtv_jax.utils.errors import UserError


@contextlib.contextmanager
def readable_errors(program: str, *, debug: bool = False) -> Iterator[None]:
  """Exits with the message of an error that the user can act on.

  These are `UserError` and the system's errors about a named file. Any other
  error is a defect, here or in a library, and keeps its traceback.

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
  except Exception as error:
    names_file = getattr(error, "filename", None) is not None
    user = isinstance(error, UserError) or names_file or _raised_here(error)
    if debug or not user:
      raise
    raise SystemExit(f"{program}: {message(error)}") from error


def message(error: BaseException) -> str:
  """An error's text with its notes, without JAX's note on tracebacks."""
  notes = [
    note
    for note in getattr(error, "__notes__", ())
    if "JAX_TRACEBACK_FILTERING" not in note
  ]
  quoted = isinstance(error, KeyError) and len(error.args) == 1
  text = str(error.args[0]) if quoted else str(error)
  return "\n".join([text, *notes])


def _raised_here(error: Exception) -> bool:
  last = error.__traceback__
  while last.tb_next is not None:
    last = last.tb_next
  module = last.tb_frame.f_globals.get("__name__", "")
  operation = last.tb_frame.f_code.co_code[last.tb_lasti]
  raised = dis.opname[operation] == "RAISE_VARARGS"
  return raised and module.partition(".")[0] == "mtv_jax"
