"""How the command lines end where something can't be done."""

import contextlib
import dis
import sys
from collections.abc import Iterator

from mtv_jax.train import preemption

_PACKAGE = __name__.partition(".")[0]


@contextlib.contextmanager
def readable_errors(program: str) -> Iterator[None]:
  """Ends a program with an error's message where that says all there is.

  Those are the errors that a `raise` of this package made, and the system's
  about a file that they name. Any other is a defect, here or in a library, and
  keeps its traceback.

  Args:
    program: what the message begins with.
  """
  try:
    yield
  except KeyboardInterrupt:
    # 128 + SIGINT, as shells have it; who pressed the keys knows where.
    print(f"\n{program}: interrupted.", file=sys.stderr)
    raise SystemExit(130) from None
  except preemption.Preempted as error:
    print(f"{program}: {message(error)}", file=sys.stderr)
    raise SystemExit(preemption.EXIT_CODE) from None
  except Exception as error:
    if not _on_purpose(error):
      raise
    raise SystemExit(f"{program}: {message(error)}") from error


def message(error: BaseException) -> str:
  """What an error says, with its notes, but for JAX's on tracebacks."""
  # A KeyError shows the repr of what it was given.
  quoted = isinstance(error, KeyError) and len(error.args) == 1
  text = str(error.args[0]) if quoted else str(error)
  notes = [
    note
    for note in getattr(error, "__notes__", ())
    if "JAX_TRACEBACK_FILTERING" not in note
  ]
  return "\n".join([text, *notes])


def _on_purpose(error: Exception) -> bool:
  if isinstance(error, OSError) and error.filename is not None:
    return True
  last = error.__traceback__
  while last.tb_next is not None:
    last = last.tb_next
  module = last.tb_frame.f_globals.get("__name__", "")
  operation = last.tb_frame.f_code.co_code[last.tb_lasti]
  # An operation that fails, such as zip(strict=True), is no `raise`.
  raised = dis.opname[operation] == "RAISE_VARARGS"
  return raised and module.partition(".")[0] == _PACKAGE
