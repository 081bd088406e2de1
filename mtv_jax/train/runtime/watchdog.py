"""Watchdog: ends a run if a step stalls.

Unresponsive storage, a collective that waits for a dead host, or a hanging
device would otherwise occupy the machines until someone notices.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mtv_jax.config.options import NonNegativeFloat, PositiveFloat
from mtv_jax.train.runtime import preemption

log = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: a restart may succeed.
EXIT_CODE = 75

_WINDOW = 100  # Steps in the median.


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
  """`config.watchdog`; see `Watchdog`, and `peers.watch_peers`."""

  factor: NonNegativeFloat = 20.0  # 0 disables the watchdog.
  min_seconds: PositiveFloat = 300.0  # Minimum limit of a step.
  grace_seconds: PositiveFloat = 60.0
  # Timeout for an unresponsive process, which ends the run; 0 disables it.
  peer_seconds: NonNegativeFloat = 60.0


class StalledError(preemption.RunStoppedError):
  """A step took too long, or another process of the run is lost."""

  exit_code = EXIT_CODE


class Watchdog(contextlib.AbstractContextManager):
  """Expires if a step takes `factor` times the median of the last 100 steps.

  A thread then prints the stacks of all threads and sets `expired`; the loop
  then calls `mark_stopping`, saves and stops within `min_seconds`. If the loop
  waits for a device and does not call `mark_stopping` within `grace_seconds`,
  the process exits.
  """

  def __init__(
    self,
    config: WatchdogConfig,
    exit_fn: Callable[[int], Any] = preemption.exit_now,
  ):
    self.expired = False
    self._factor, self._min_seconds = config.factor, config.min_seconds
    self._grace_seconds, self._exit_fn = config.grace_seconds, exit_fn
    self._durations = collections.deque(maxlen=_WINDOW)
    self._started: float | None = None  # None while nothing is timed.
    self._step = 0
    self._stopping, self._closed = threading.Event(), threading.Event()
    if self._factor:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def step(self, number: int) -> None:
    """Marks step `number` as complete and starts timing the next one."""
    now = time.monotonic()
    if self._started is not None:
      self._durations.append(now - self._started)
    self._step, self._started = number, now

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the context, whose duration is irregular."""
    started, paused_at = self._started, time.monotonic()
    self._started = None
    try:
      yield
    finally:
      if started is not None:
        self._started = started + time.monotonic() - paused_at

  def restart(self) -> None:
    """Stops timing the current step, which compiles."""
    self._started = None

  def mark_stopping(self) -> None:
    """Tells the watchdog that the loop saves and stops."""
    self._stopping.set()

  @property
  def limit(self) -> float:
    """Seconds after which a step expires."""
    # A copy: the loop's thread appends.
    durations = list(self._durations)
    median = statistics.median(durations) if durations else 0.0
    return max(self._min_seconds, self._factor * median)

  def _watch(self) -> None:
    period = min(1.0, self._min_seconds / 10)
    while not self._closed.wait(period):
      started = self._started
      if started is not None and time.monotonic() - started > self.limit:
        self._expire()
        return

  def _expire(self) -> None:
    log.error(
      "Step %d is not complete after %.0f s. The stacks of all threads follow.",
      self._step + 1,
      self.limit,
    )
    with contextlib.suppress(Exception):  # Standard error may be closed.
      faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    self.expired = True
    if self._stopping.wait(self._grace_seconds):
      is_closed = self._closed.wait(self._min_seconds)
      outcome = "the checkpoint was not saved in time"
    else:
      is_closed = self._closed.is_set()
      outcome = "the step did not end, and nothing could be saved"
    if not is_closed:
      preemption.print_error(
        f"train: step {self._step + 1} has stalled; {outcome}. A device or"
        " another process of the run does not answer. Rerun the command to"
        " resume from the last checkpoint."
      )
      self._exit_fn(EXIT_CODE)

  def close(self) -> None:
    self._closed.set()

  def __exit__(self, *error: object) -> None:
    self.close()
