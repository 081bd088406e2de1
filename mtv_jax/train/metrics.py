"""Logging, metric writers (console, metrics.jsonl, TensorBoard) and the clock.

Nothing here imports JAX. Values may be JAX arrays, which are fetched when they
are written.
"""

import contextlib
import dataclasses
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

from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

WIDTH = 120


class _Console(logging.Handler):
  """Writes to the current `sys.stdout`, which tests replace."""

  def emit(self, record: logging.LogRecord) -> None:
    """Prints a line."""
    print(self.format(record), file=sys.stdout, flush=True)


def setup_logging(*, process_index: int = 0) -> None:
  """Sends the package's lines to standard output, from process 0 only.

  Lines carry the time, the host and the process. Information from libraries
  (Orbax and Grain write about 20 lines a checkpoint through absl) is left out;
  their warnings stay.
  """
  package = logging.getLogger("mtv_jax")
  package.setLevel(logging.INFO if process_index == 0 else logging.WARNING)
  package.propagate = False
  for handler in list(package.handlers):
    package.removeHandler(handler)
  handler = _Console()
  host = f"{socket.gethostname()}:{process_index}".replace("%", "%%")
  handler.setFormatter(
    logging.Formatter(
      f"%(levelname).1s %(asctime)s {host}] %(message)s", "%m%d %H:%M:%S"
    )
  )
  package.addHandler(handler)
  for name in ("absl", "jax", "orbax", "grain", "tensorboardX"):
    logging.getLogger(name).setLevel(logging.WARNING)


# ---------------------------------------------------------------------------
# The clock.


@dataclasses.dataclass(frozen=True)
class Rates:
  """Training speed.

  Attributes:
    images_per_second: over all hosts, since the last reading.
    wait: share of that time spent waiting for data, 0 to 1.
    step_seconds: mean time of a step since the last reading.
    eta: seconds left, at this session's mean pace; NaN before it is known.
    core_hours: device hours of training so far, all sessions together.
  """

  images_per_second: float
  wait: float
  step_seconds: float
  eta: float
  core_hours: float


class Chrono:
  """Measures training time without compilation, evaluation and checkpoints.

  Once a step:

    with chrono.waiting(): batch = next(batches)
    state, metrics = update(state, batch)
    chrono.step()

  The first step of a session counts as compilation; wait for it
  (`jax.block_until_ready`) before `step`. Later steps may run ahead: reading
  metrics before `rates` waits for them.

  Args:
    total_steps: of the run.
    batch_size: examples a step, over all hosts.
    devices: for the core-hours.
    clock: gives seconds.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    batch_size: int,
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self.total_steps = total_steps
    self.batch_size = batch_size
    self.devices = devices
    self._clock = clock
    self._last = clock()
    self._compiled = False
    # Seconds by kind: of all sessions, and since the last `rates`.
    self._total = {"train": 0.0, "wait": 0.0, "compile": 0.0, "pause": 0.0}
    self._device_seconds = 0.0
    self._window = {"train": 0.0, "wait": 0.0, "steps": 0}
    self._session = {"train": 0.0, "steps": 0}

  def compiles(self) -> None:
    """Counts the next step as compilation, too."""
    self._lap()
    self._compiled = False

  @property
  def compiling(self) -> bool:
    """Whether the next step counts as compilation."""
    return not self._compiled

  def step(self) -> None:
    """Counts a dispatched step."""
    self._lap()
    if self._compiled:
      self._window["steps"] += 1
      self._session["steps"] += 1
    self._compiled = True

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as training and as waiting for data."""
    self._lap()
    try:
      yield
    finally:
      self._lap("wait")

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the time inside: an evaluation, a checkpoint."""
    self._lap()
    try:
      yield
    finally:
      self._lap("pause")

  def _lap(self, kind: str = "train") -> None:
    now = self._clock()
    seconds, self._last = now - self._last, now
    if kind == "pause":
      self._total["pause"] += seconds
      return
    if not self._compiled:
      self._total["compile"] += seconds
      return
    self._total["train"] += seconds
    self._session["train"] += seconds
    self._window["train"] += seconds
    self._device_seconds += seconds * self.devices
    if kind == "wait":
      self._total["wait"] += seconds
      self._window["wait"] += seconds

  def rates(self, step: int) -> Rates:
    """The rates since the last call.

    Args:
      step: the number of updates done, for the ETA.
    """
    self._lap()
    window = self._window
    self._window = {"train": 0.0, "wait": 0.0, "steps": 0}
    count, seconds = window["steps"], window["train"]
    known = self._session["steps"] > 0
    pace = self._session["train"] / self._session["steps"] if known else None
    return Rates(
      images_per_second=count * self.batch_size / seconds if count else 0.0,
      wait=window["wait"] / seconds if seconds > 0 else 0.0,
      step_seconds=seconds / count if count else math.nan,
      eta=pace * max(self.total_steps - step, 0) if known else math.nan,
      core_hours=self._device_seconds / 3600,
    )

  def to_dict(self) -> dict[str, float]:
    """The times so far, for the checkpoint."""
    self._lap()
    return {**self._total, "device": self._device_seconds}

  def from_dict(self, times: Mapping[str, float]) -> None:
    """Continues from the times of an earlier session."""
    for kind in self._total:
      self._total[kind] = float(times.get(kind, 0.0))
    self._device_seconds = float(times.get("device", 0.0))


# ---------------------------------------------------------------------------
# The writers.


class MetricWriter:
  """Writes scalars of a run to metrics.jsonl, TensorBoard and the console.

  Args:
    workdir: the run's folder, created if missing.
    total_steps: for the progress on the console.
    start_step: the step that the run resumes from. Rows of later steps, which
      an earlier session wrote, are dropped; 0 drops all.
    process_index: processes other than 0 write nothing.
  """

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
    self._board = tensorboardX.SummaryWriter(
      str(folder),
      # TensorBoard hides what an earlier session wrote from here on.
      purge_step=start_step + 1 if start_step else 0,
      flush_secs=30,
    )

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes named numbers, to the files and as a line on the console.

    Args:
      step: the number of updates done.
      values: numbers or arrays of one element; '/' in names makes groups.

    Raises:
      InputError: a value that is not a scalar; names it.
    """
    if self._active:
      numbers = _numbers(values)
      self._write(step, numbers)
      log.info(console_line(step, self.total_steps, numbers))

  def progress(
    self, step: int, values: Mapping[str, Any], rates: Rates
  ) -> None:
    """As `scalars`, with the rates of training."""
    if self._active:
      numbers = _numbers(values)
      speed = {
        f"speed/{name}": float(value)
        for name, value in dataclasses.asdict(rates).items()
      }
      self._write(step, numbers | speed)
      log.info(console_line(step, self.total_steps, numbers, rates=rates))

  def _write(self, step: int, numbers: Mapping[str, float]) -> None:
    # NaN is not JSON; null keeps the file readable by everything.
    row = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
    self._jsonl.flush()
    for name, value in numbers.items():
      if math.isfinite(value):
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._jsonl.close()
      self._board.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  out = {}
  for name, value in values.items():
    array = np.asarray(value)
    if array.size != 1:
      raise InputError(
        f"metric {name!r} has shape {array.shape}, expected one number."
      )
    out[name] = float(array.reshape(()))
  return out


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Drops the rows after a step, and a last line that a crash truncated."""
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8")
  lines = text.splitlines() if step else []
  rows = [line for line in lines if _step_of(line) <= step]
  new = "".join(line + "\n" for line in rows)
  if new != text:
    # Replaced by a rename, so that a crash does not lose the history.
    aside = path.with_name(path.name + ".new")
    aside.write_text(new, encoding="utf-8")
    aside.replace(path)


def _step_of(line: str) -> float:
  try:
    return float(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return math.inf


# ---------------------------------------------------------------------------
# The console.


def console_line(
  step: int,
  total_steps: int,
  numbers: Mapping[str, float],
  *,
  rates: Rates | None = None,
) -> str:
  """One line, such as

    step 120/2000  6.0%  loss 3.412  lr 8.1e-04  812 img/s  wait 1%  eta 3m12s

  Numbers that would make it longer than `WIDTH` are counted instead; the files
  have them all.
  """
  done = f"step {step:>{len(str(total_steps))}}/{total_steps}"
  # Rounded down, so that only the last step is at 100 %.
  head = f"{done} {1000 * step // max(total_steps, 1) / 10:5.1f}%"
  tail = []
  if rates is not None:
    tail = [
      f"{rates.images_per_second:,.0f} img/s",
      f"wait {100 * rates.wait:.0f}%",
      f"eta {format_duration(rates.eta)}",
    ]
  parts, room = [], WIDTH - len("  ".join([head, *tail])) - len("  +00 more")
  for name, value in numbers.items():
    part = f"{name} {format_number(value)}"
    room -= len(part) + 2
    if room < 0:
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
  left = round(seconds)
  for unit, size, lower, smaller in [
    ("d", 86400, "h", 3600),
    ("h", 3600, "m", 60),
    ("m", 60, "s", 1),
  ]:
    if left >= size:
      return f"{left // size}{unit}{left % size // smaller:02d}{lower}"
  return f"{left}s"
