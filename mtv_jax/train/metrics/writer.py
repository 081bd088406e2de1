"""Writes a run's metrics to trackers, tables and the console."""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mtv_jax.train.metrics import trackers as trackers_lib
from mtv_jax.train.metrics.chrono import Rates
from mtv_jax.train.metrics.console import console_line
from mtv_jax.train.metrics.jsonl import JsonlFile, RowPredicate
from mtv_jax.utils.errors import InputError, UserError

log = logging.getLogger(__name__)

# Consecutive failures that disable a tracker, unless it is a file.
MAX_FAILURES = 5
# Minimum interval between warnings about a file or tracker.
WARN_SECONDS = 600.0


class MetricWriter(contextlib.AbstractContextManager):
  """Writes a run's scalars to its trackers and the console.

  Non-scalar measurements go to separate files, TABLE.jsonl. Creates the run's
  folder if missing. Drops rows after `start_step`, from which the run resumes;
  0 drops all. Only process 0 writes.

  Logs write errors as warnings: a full disk or an unreachable server does not
  end a run.
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
    """Opens the trackers.

    Args:
      workdir: the run's folder.
      total_steps: the run's number of steps, for the console.
      start_step: number of steps of earlier sessions.
      process_index: index of this process.
      trackers: see `build_trackers`; defaults to metrics.jsonl and TensorBoard.
      config: the resolved config, for trackers that store it.
      keep_row: whether to keep a table's row after `start_step`.
    """
    self.total_steps = total_steps
    self._active = process_index == 0
    if not self._active:
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
    self._trackers = {}
    for name, tracker in trackers.items():
      if _open(name, tracker, run):
        self._trackers[name] = tracker

  def write_scalars(
    self, step: int, values: Mapping[str, Any], rates: Rates | None = None
  ) -> None:
    """Writes named numbers to the trackers, and as a line to the console.

    `values` are numbers or one-element arrays; '/' in names makes groups.
    """
    if not self._active:
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
    """Logs named numbers as a line, only on the console.

    Takes the arguments of `write_scalars`.
    """
    if not self._active:
      return
    numbers = _to_floats(values)
    log.info(console_line(step, self.total_steps, numbers, rates=rates))

  def write_row(self, table: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends a row of numbers, arrays and strings to TABLE.jsonl.

    Numbers have seven digits; non-finite ones are null.
    """
    if not self._active:
      return
    row = {"step": step, **{k: _to_json(v) for k, v in values.items()}}
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
        "%s is disabled until the run is resumed, after %d errors in a row.",
        name,
        failures.count,
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
      if now - failures.warned >= WARN_SECONDS:
        failures.warned = now
        log.warning(
          "Metrics can't be written to %s; training continues. %s: %s",
          what,
          type(error).__name__,
          error,
        )
    else:
      if failures.count:
        log.warning("Metrics are written to %s again.", what)
      failures.count, failures.warned = 0, -math.inf

  def close(self, *, failed: bool = False) -> None:
    """Ends the trackers' sessions."""
    if not self._active:
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
  warned: float = -math.inf  # Time of the last warning.


def _open(
  name: str, tracker: trackers_lib.Tracker, run: trackers_lib.TrackedRun
) -> bool:
  """Opens a tracker; returns False if it can't continue a run."""
  if tracker.is_file:
    tracker.open(run)
    return True
  try:
    tracker.open(run)
  except Exception as error:
    text = f"{type(error).__name__}: {error}"
    if not run.start_step:
      raise UserError(
        f"config.log.trackers: {name} can't start a run. Mend it, or leave"
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


def _to_json(value: Any) -> Any:
  """Converts strings, numbers and arrays to JSON types."""
  if isinstance(value, list | tuple):
    return [_to_json(v) for v in value]
  if isinstance(value, str | int):
    return value
  if np.ndim(value):
    return [_to_json(v) for v in value]
  return float(f"{value:.7g}") if math.isfinite(value) else None
