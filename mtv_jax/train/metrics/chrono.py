"""The clock of a run: training speed and goodput."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

# Kinds of wall time; they sum to the time since the run's first session began.
# `train` includes `wait`, which `goodput` separates.
KINDS = ("train", "compile", "save", "evaluate", "measure", "start", "lost")


@dataclasses.dataclass(frozen=True)
class Rates:
  """Training speed since the last reading, over all hosts."""

  images_per_second: float
  wait: float  # Share of the time spent waiting for data.
  step_seconds: float
  eta: float  # Seconds left at this session's mean pace; NaN if unknown.
  core_hours: float  # Device hours of training, over all sessions.
  # Shares of the wall time of all sessions, see `Chrono._compute_goodput`.
  goodput: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Chrono:
  """Measures training time without compilation, evaluation and checkpoints.

  Usage, once per step:

    with chrono.measure("wait"): batch = next(batches)
    state, metrics = update(state, batch)
    chrono.step()

  The first step of a session counts as compilation; block on it before `step`.
  Later steps are asynchronous; read metrics before `rates` to wait for them.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    batch_size: int,  # Over all hosts.
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
  ):
    self.total_steps = total_steps
    self.batch_size = batch_size
    self.devices = devices
    self.compiling = True  # Whether the next step counts as compilation.
    self._clock = clock
    self._wall_clock = wall_clock
    self._last = clock()
    self._steps = 0
    self.from_dict({})

  def expect_compilation(self) -> None:
    """Counts the next step as compilation."""
    self._lap()
    self.compiling = True

  def step(self) -> None:
    """Counts a dispatched step."""
    self._lap()
    self._steps += not self.compiling
    self.compiling = False

  @contextlib.contextmanager
  def measure(
    self, kind: Literal["wait", "save", "evaluate", "measure"]
  ) -> Iterator[None]:
    """Counts the context's time as `kind`; only `wait` is training time."""
    self._lap()
    self._is_starting = False
    try:
      yield
    finally:
      self._lap(kind)

  def _lap(self, kind: str = "train") -> None:
    now = self._clock()
    seconds, self._last = now - self._last, now
    if kind in ("train", "wait"):
      if self._is_starting:
        kind = "start"
      elif self.compiling:
        kind = "compile"
    self._seconds[kind] += seconds
    if kind == "wait":
      self._seconds["train"] += seconds
    if kind in ("train", "wait"):
      self._seconds["device"] += seconds * self.devices

  def _read_counters(self) -> np.ndarray:
    times = self._seconds
    return np.array([self._steps, times["train"], times["wait"]])

  def rates(self, step: int) -> Rates:
    """The rates since the last call; `step` updates are done."""
    self._lap()
    readings = self._read_counters()
    steps, train, wait = (readings - self._window).tolist()
    session_steps, session_train, _ = (readings - self._session).tolist()
    self._window = readings
    pace = session_train / session_steps if session_steps else math.nan
    return Rates(
      images_per_second=steps * self.batch_size / train if steps else 0.0,
      wait=wait / train if train > 0 else 0.0,
      step_seconds=train / steps if steps else math.nan,
      eta=pace * max(self.total_steps - step, 0),
      core_hours=self._seconds["device"] / 3600,
      goodput=self._compute_goodput(),
    )

  def _compute_goodput(self) -> dict[str, float]:
    """Shares of the wall time of all sessions and the time between them.

    `step` is update time, excluding `wait`. `lost` is the time from a
    checkpoint to its restore: repeated steps, time without a process, building
    and restoring.
    """
    shares = {kind: self._seconds[kind] for kind in KINDS}
    total = sum(shares.values())
    wait = self._seconds["wait"]
    shares = {"step": shares.pop("train") - wait, "wait": wait, **shares}
    if total <= 0:
      return {}
    return {kind: seconds / total for kind, seconds in shares.items()}

  def to_dict(self) -> dict[str, float]:
    """The times so far, to store in a checkpoint."""
    self._lap()
    return {**self._seconds, "wall": self._wall_clock()}

  def from_dict(self, times: Mapping[str, float]) -> None:
    """Continues from earlier times; the time since `to_dict` is `lost`."""
    seconds = {k: float(times.get(k, 0.0)) for k in (*KINDS, "wait", "device")}
    # Older checkpoints store evaluation and save time together.
    seconds["evaluate"] += float(times.get("pause", 0.0))
    if "wall" in times:
      # Clocks of two machines may differ.
      seconds["lost"] += max(self._wall_clock() - times["wall"], 0.0)
      self._last = self._clock()
    self._seconds = seconds
    # Until the first batch is requested: opening data, initialising the state.
    self._is_starting = True
    # Values at the start of the session and at the last call of `rates`.
    self._session = self._window = self._read_counters()
