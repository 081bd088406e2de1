"""Logging, metric writers (console, metrics.jsonl, TensorBoard) and the clock.

Nothing here imports JAX; values may be JAX arrays.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorboardX

from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

WIDTH = 120


class _Console(logging.Handler):
  """Writes to the current `sys.stdout`, which tests replace."""

  def emit(self, record: logging.LogRecord) -> None:
    print(self.format(record), file=sys.stdout, flush=True)


def setup_logging(*, process_index: int = 0) -> None:
  """Sends the package's lines to standard output, from process 0 only.

  Lines carry the time, the host and the process. Of libraries only warnings
  are shown (Orbax and Grain log about 20 lines a checkpoint through absl).
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
  for name in ("absl", "jax", "orbax", "grain", "tensorboardX"):
    logging.getLogger(name).setLevel(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Rates:
  """Training speed since the last reading, over all hosts."""

  images_per_second: float
  wait: float  # Share of the time spent waiting for data.
  step_seconds: float
  eta: float  # Seconds left at this session's mean pace; NaN where unknown.
  core_hours: float  # Device hours of training, all sessions together.


class Chrono:
  """Measures training time without compilation, evaluation and checkpoints.

  Once a step:

    with chrono.waiting(): batch = next(batches)
    state, metrics = update(state, batch)
    chrono.step()

  The first step of a session counts as compilation; wait for it before `step`.
  Later steps may run ahead: reading metrics before `rates` waits for them.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    batch_size: int,  # Over all hosts.
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self.total_steps = total_steps
    self.batch_size = batch_size
    self.devices = devices
    self.compiling = True  # Whether the next step counts as compilation.
    self._clock = clock
    self._last = clock()
    self._steps = 0
    self.from_dict({})

  def expect_compilation(self) -> None:
    """Counts the next step as compilation, too."""
    self._lap()
    self.compiling = True

  def step(self) -> None:
    """Counts a dispatched step."""
    self._lap()
    self._steps += not self.compiling
    self.compiling = False

  def waiting(self) -> contextlib.AbstractContextManager[None]:
    """Counts the time inside as training and as waiting for data."""
    return self._measure("wait")

  def pause(self) -> contextlib.AbstractContextManager[None]:
    """Excludes the time inside: an evaluation, a checkpoint."""
    return self._measure("pause")

  @contextlib.contextmanager
  def _measure(self, kind: str) -> Iterator[None]:
    self._lap()
    try:
      yield
    finally:
      self._lap(kind)

  def _lap(self, kind: str = "train") -> None:
    now = self._clock()
    seconds, self._last = now - self._last, now
    if kind != "pause" and self.compiling:
      kind = "compile"
    self._seconds[kind] += seconds
    if kind == "wait":
      self._seconds["train"] += seconds
    if kind in ("train", "wait"):
      self._seconds["device"] += seconds * self.devices

  def _read(self) -> np.ndarray:
    times = self._seconds
    return np.array([self._steps, times["train"], times["wait"]])

  def rates(self, step: int) -> Rates:
    """The rates since the last call; `step` updates are done, for the ETA."""
    self._lap()
    now = self._read()
    steps, train, wait = (now - self._window).tolist()
    all_steps, all_train, _ = (now - self._session).tolist()
    self._window = now
    pace = all_train / all_steps if all_steps else math.nan
    return Rates(
      images_per_second=steps * self.batch_size / train if steps else 0.0,
      wait=wait / train if train > 0 else 0.0,
      step_seconds=train / steps if steps else math.nan,
      eta=pace * max(self.total_steps - step, 0),
      core_hours=self._seconds["device"] / 3600,
    )

  def to_dict(self) -> dict[str, float]:
    """The times so far, for the checkpoint."""
    self._lap()
    return dict(self._seconds)

  def from_dict(self, times: Mapping[str, float]) -> None:
    """Continues from the times of an earlier session."""
    kinds = ("train", "wait", "compile", "pause", "device")
    self._seconds = {kind: float(times.get(kind, 0.0)) for kind in kinds}
    # Readings at the start of the session, and at the last call of `rates`.
    self._session = self._window = self._read()


class MetricWriter(contextlib.AbstractContextManager):
  """Writes scalars of a run to metrics.jsonl, TensorBoard and the console.

  Measurements that are not scalars go to a file of their own, TABLE.jsonl.
  Creates the run's folder if it is missing. Drops the rows after `start_step`,
  from which the run resumes; 0 drops all. Only process 0 writes.
  """

  TABLES = ("interference",)

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    start_step: int = 0,
    process_index: int = 0,
  ):
    self.total_steps = total_steps
    self._active = process_index == 0
    if not self._active:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    _drop_after(path, start_step)
    self._jsonl = path.open("a", encoding="utf-8")
    self._tables = {name: folder / f"{name}.jsonl" for name in self.TABLES}
    for table in self._tables.values():
      _drop_after(table, start_step)
    self._board = tensorboardX.SummaryWriter(
      str(folder),
      # TensorBoard hides what an earlier session wrote from here on.
      purge_step=start_step + 1 if start_step else 0,
      flush_secs=30,
    )

  def write_scalars(
    self, step: int, values: Mapping[str, Any], rates: Rates | None = None
  ) -> None:
    """Writes named numbers, to the files and as a line on the console.

    `values` are numbers or arrays of one element; '/' in names makes groups.

    Raises:
      InputError: a value is not a scalar.
    """
    if not self._active:
      return
    numbers = self.log_scalars(step, values, rates)
    if rates is not None:
      speed = dataclasses.asdict(rates)
      numbers |= {f"speed/{name}": value for name, value in speed.items()}
    # NaN is not valid JSON.
    row = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
    self._jsonl.flush()
    for name, value in numbers.items():
      if math.isfinite(value):
        self._board.add_scalar(name, value, step)

  def log_scalars(
    self, step: int, values: Mapping[str, Any], rates: Rates | None = None
  ) -> dict[str, float]:
    """Logs named numbers as a line on the console alone, and returns them.

    Arguments and errors are those of `write_scalars`.
    """
    if not self._active:
      return {}
    numbers = {}
    for name, value in values.items():
      if np.size(value) != 1:
        raise InputError(
          f"metric {name!r} has shape {np.shape(value)}, expected one number."
        )
      numbers[name] = float(np.asarray(value).item())
    log.info(console_line(step, self.total_steps, numbers, rates=rates))
    return numbers

  def write_row(self, table: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends a line of numbers, arrays and strings to TABLE.jsonl.

    Numbers have seven digits; one that is not finite is null.
    """
    if not self._active:
      return
    row = {"step": step, **{k: _to_json(v) for k, v in values.items()}}
    with self._tables[table].open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._jsonl.close()
      self._board.close()

  def __exit__(self, *error: Any) -> None:
    self.close()


def _to_json(value: Any) -> Any:
  """Strings, numbers and arrays as JSON's types."""
  if isinstance(value, list | tuple):
    return [_to_json(v) for v in value]
  if isinstance(value, str):
    return value
  if np.ndim(value):
    return [_to_json(v) for v in value]
  return float(f"{value:.7g}") if math.isfinite(value) else None


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Drops the rows after a step, and a last line that a crash truncated."""
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8")
  lines = text.splitlines() if step else []
  new = "".join(f"{line}\n" for line in lines if _step_of(line) <= step)
  if new != text:
    atomic.write(path, new.encode())


def _step_of(line: str) -> float:
  try:
    return float(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return math.inf


def console_line(
  step: int,
  total_steps: int,
  numbers: Mapping[str, float],
  *,
  rates: Rates | None = None,
) -> str:
  """One line, such as

    step 120/2000  6.0%  loss 3.412  lr 8.1e-04  812 img/s  wait 1%  eta 3m12s

  Metrics that don't fit in `WIDTH` are collapsed to "+N more".
  """
  # Rounded down, so that only the last step is at 100 %.
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


def format_number(value: float) -> str:
  """A short form of a number: 3.412, 0.431, 1234.5, 96, 8.1e-04, nan."""
  if not math.isfinite(value):
    return str(value)
  if value == int(value) and abs(value) < 1e6:
    return str(int(value))
  if not 0.01 <= abs(value) < 1e5:
    return f"{value:.1e}"
  return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def format_duration(seconds: float) -> str:
  """Two units: 42s, 3m12s, 5h07m, 2d03h; '?' where unknown."""
  if not math.isfinite(seconds):
    return "?"
  left, units = round(seconds), [(86400, "d"), (3600, "h"), (60, "m"), (1, "s")]
  for (size, unit), (smaller, lower) in itertools.pairwise(units):
    if left >= size:
      return f"{left // size}{unit}{left % size // smaller:02d}{lower}"
  return f"{left}s"
