"""Console logging: line format, and a step's metrics as one line."""

import atexit
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping

from mtv_jax.train.metrics.chrono import Rates
from mtv_jax.utils.text import format_duration, format_number

WIDTH = 120


class _Console(logging.Handler):
  """Writes to the current `sys.stdout`, which tests replace.

  Drops lines that can't be written, so that a full disk, a closed terminal or
  pipe does not end a run.
  """

  def emit(self, record: logging.LogRecord) -> None:
    line = self.format(record)
    with contextlib.suppress(OSError):
      try:
        print(line, file=sys.stdout, flush=True)
      except UnicodeEncodeError:  # Lone surrogates, or a limited encoding.
        line = line.encode("ascii", "backslashreplace").decode()
        print(line, file=sys.stdout, flush=True)


def _drop_unwritable() -> None:
  """Redirects unwritable standard streams to the null device.

  Otherwise Python, which flushes them at exit, sets the exit code to 120.
  """
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, stream.fileno())
      os.close(null)


def setup_logging(*, process_index: int = 0) -> None:
  """Logs the package's messages to standard output, info only in process 0.

  Lines show time, host and process. Libraries log only warnings (Orbax and
  Grain log about 20 lines per checkpoint through absl).
  """
  package = logging.getLogger("mtv_jax")
  package.setLevel(logging.INFO if process_index == 0 else logging.WARNING)
  package.propagate = False
  handler = _Console()
  host = f"{socket.gethostname()}:{process_index}".replace("%", "%%")
  handler.setFormatter(
    logging.Formatter(
      f"%(levelname).1s %(asctime)s {host}] %(message)s", "%m%d %H:%M:%S"
    )
  )
  package.handlers[:] = [handler]
  atexit.unregister(_drop_unwritable)  # Registered by an earlier call.
  atexit.register(_drop_unwritable)
  for name in ("absl", "jax", "orbax", "grain", "tensorboardX"):
    logging.getLogger(name).setLevel(logging.WARNING)


def console_line(
  step: int,
  total_steps: int,
  numbers: Mapping[str, float],
  *,
  rates: Rates | None = None,
) -> str:
  """Formats one line, such as

    step 120/2000  6.0%  loss 3.412  lr 8.1e-04  812 img/s  wait 1%  eta 3m12s

  Metrics that don't fit in `WIDTH` are collapsed to "+N more".
  """
  # Rounded down, so that only the last step shows 100 %.
  percent = 1000 * step // max(total_steps, 1) / 10
  width = len(str(total_steps))
  head = f"step {step:>{width}}/{total_steps} {percent:5.1f}%"
  tail = []
  if rates is not None:
    tail.append(f"{rates.images_per_second:,.0f} img/s")
    tail.append(f"wait {100 * rates.wait:.0f}%")
    tail.append(f"eta {format_duration(rates.eta)}")
  parts, space = [], WIDTH - len("  ".join([head, *tail])) - len("  +00 more")
  for name, value in numbers.items():
    part = f"{name} {format_number(value)}"
    space -= len(part) + 2
    if space < 0:
      parts.append(f"+{len(numbers) - len(parts)} more")
      break
    parts.append(part)
  return "  ".join([head, *parts, *tail])
