"""Writers of a run's metrics: console, trackers and tables."""

import atexit
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mtv_jax.train.metrics import trackers as trackers_lib
from mtv_jax.train.metrics.chrono import Rates
from mtv_jax.train.metrics.trackers import JsonlFile, RowPredicate
from mtv_jax.utils import progress
from mtv_jax.utils.errors import InputError, UserError
from mtv_jax.utils.text import format_duration, format_number

log = logging.getLogger(__name__)

WIDTH = 120  # Characters of a console line.
# Consecutive failures that disable a tracker, unless it is a file.
MAX_FAILURES = 5
# Minimum interval between warnings about a file or tracker.
WARN_SECONDS = 600.0


class _Console(logging.Handler):
  """Writes to the current `sys.stdout`, which tests replace.

  Drops lines that can't be written, so that a full disk, a closed terminal or
  pipe does not end a run.
  """

  def emit(self, record: logging.LogRecord) -> None:
    line = self.format(record)
    progress.note_output()
    with contextlib.suppress(OSError):
      try:
        print(line, file=sys.stdout, flush=True)
      except UnicodeEncodeError:  # Lone surrogates, or a limited encoding.
        line = line.encode("ascii", "backslashreplace").decode()
        print(line, file=sys.stdout, flush=True)


def _redirect_streams() -> None:
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
  atexit.unregister(_redirect_streams)  # Registered by an earlier call.
  atexit.register(_redirect_streams)
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


class MetricWriter(contextlib.AbstractContextManager):
  """Writes a run's scalars to its trackers and the console.

  Non-scalar measurements go to separate files, TABLE.jsonl. Creates the run's
  folder if missing. The run resumes at `start_step`: later rows are dropped,
  except rows of tables for which `keep_row` is True; 0 drops all rows. Only
  process 0 writes. `config` is for trackers that store it.

  Write errors are logged as warnings: a full disk or an unreachable server does
  not end a run.
  """

  TABLES = ("interference", "nonfinite")

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    start_step: int = 0,
    process_index: int = 0,
    trackers: Mapping[str, trackers_lib.Tracker] | None = None,
    config: Mapping[str, Any] | None = None,
    keep_row: RowPredicate = lambda row: False,
  ):
    self.total_steps = total_steps
    self._is_active = process_index == 0
    if not self._is_active:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if trackers is None:
      trackers = trackers_lib.build_trackers(("jsonl", "tensorboard"))
    self._tables = {
      name: JsonlFile(
        folder / f"{name}.jsonl", start_step=start_step, keep_row=keep_row
      )
      for name in self.TABLES
    }
    run = trackers_lib.TrackedRun(
      folder, folder.absolute().name, start_step, config=config or {}
    )
    self._failures: dict[str, _Failures] = {}
    self._trackers = {n: t for n, t in trackers.items() if _try_open(n, t, run)}

  def write_scalars(
    self, step: int, values: Mapping[str, Any], rates: Rates | None = None
  ) -> None:
    """Writes named numbers to the trackers, and as a line to the console.

    `values` are numbers or one-element arrays; '/' in a name separates groups.
    """
    if not self._is_active:
      return
    numbers = _to_floats(values)
    if rates is not None:
      speed = dataclasses.asdict(rates)
      goodput = speed.pop("goodput")
      numbers |= {f"speed/{name}": value for name, value in speed.items()}
      numbers |= {f"goodput/{name}": value for name, value in goodput.items()}
    for name, tracker in [*self._trackers.items()]:
      with self._tolerate_tracker(name, tracker):
        tracker.write_scalars(step, numbers)
    # Last, so that the files include all metrics on the console.
    self.log_scalars(step, values, rates)

  def log_scalars(
    self, step: int, values: Mapping[str, Any], rates: Rates | None = None
  ) -> None:
    """Logs named numbers as a line, only on the console."""
    if self._is_active:
      numbers = _to_floats(values)
      log.info(console_line(step, self.total_steps, numbers, rates=rates))

  def write_row(self, table: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends a row of numbers, arrays and strings to TABLE.jsonl.

    Numbers have seven significant digits; non-finite ones are null.
    """
    if not self._is_active:
      return
    row = {"step": step, **{k: _to_json_value(v) for k, v in values.items()}}
    with self.tolerate_errors(f"{table}.jsonl"):
      self._tables[table].append(row)

  def tolerate_errors(self, what: str) -> contextlib.AbstractContextManager:
    """Turns file system errors inside the context into warnings."""
    return self._tolerate(what, OSError)

  @contextlib.contextmanager
  def _tolerate_tracker(
    self, name: str, tracker: trackers_lib.Tracker
  ) -> Iterator[None]:
    if tracker.is_file:
      with self._tolerate(name, OSError):
        yield
      return
    with self._tolerate(name, Exception) as failures:
      yield
    if failures.count >= MAX_FAILURES:
      log.warning(
        f"{name} is disabled until the run is resumed, after {failures.count}"
        " errors in a row."
      )
      del self._trackers[name]

  @contextlib.contextmanager
  def _tolerate(
    self, what: str, errors: type[Exception]
  ) -> Iterator["_Failures"]:
    """Warns of errors inside the context, at most every `WARN_SECONDS`."""
    failures = self._failures.setdefault(what, _Failures())
    try:
      yield failures
    except errors as error:
      failures.count += 1
      now = time.monotonic()
      if now - failures.last_warning >= WARN_SECONDS:
        failures.last_warning = now
        log.warning(
          f"Metrics can't be written to {what}; training continues."
          f" {type(error).__name__}: {error}"
        )
    else:
      if failures.count:
        log.warning("Metrics are written to %s again.", what)
      failures.count, failures.last_warning = 0, -math.inf

  def close(self, *, failed: bool = False) -> None:
    if not self._is_active:
      return
    for name, tracker in [*self._trackers.items()]:
      with self._tolerate_tracker(name, tracker):
        tracker.close(failed=failed)
    self._trackers = {}

  def __exit__(self, error_type: Any, *error: Any) -> None:
    self.close(failed=error_type is not None)


@dataclasses.dataclass
class _Failures:
  """Consecutive errors of a file or a tracker."""

  count: int = 0
  last_warning: float = -math.inf  # Time of the last warning.


def _try_open(
  name: str, tracker: trackers_lib.Tracker, run: trackers_lib.TrackedRun
) -> bool:
  """Opens a tracker; returns False if it can't continue a run."""
  try:
    tracker.open(run)
  except Exception as error:
    if tracker.is_file:
      raise
    text = f"{type(error).__name__}: {error}"
    if not run.start_step:
      raise UserError(
        f"config.log.trackers: {name} can't start a run. Fix it, or leave"
        f" {name} out. {text}"
      ) from error
    log.warning("%s can't continue the run; training continues. %s", name, text)
    return False
  return True


def _to_floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Converts numbers and one-element arrays to floats, else InputError."""
  numbers = {}
  for name, value in values.items():
    if np.size(value) != 1:
      raise InputError(
        f"metric {name!r} has shape {np.shape(value)}, expected one number."
      )
    numbers[name] = float(np.asarray(value).item())
  return numbers


def _to_json_value(value: Any) -> Any:
  """Converts strings, numbers and arrays to JSON types."""
  if isinstance(value, str | int):
    return value
  if isinstance(value, list | tuple) or np.ndim(value):
    return [_to_json_value(v) for v in value]
  return float(f"{value:.7g}") if math.isfinite(value) else None
