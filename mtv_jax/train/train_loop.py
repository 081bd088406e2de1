"""The loop over the steps of a session: update, log, evaluate, save."""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.data import order
from mtv_jax.train import rollback
from mtv_jax.train.gradients import compute_gradients
from mtv_jax.train.hooks import Hook
from mtv_jax.train.metrics import Chrono, MetricWriter
from mtv_jax.train.rollback import NonFiniteError, RollbackError, UpdateMonitor
from mtv_jax.train.run import Run
from mtv_jax.train.runtime import preemption, sessions
from mtv_jax.train.runtime.prefetch import (
  BackgroundLoader,
  Interrupted,
  prefetch_to_device,
)
from mtv_jax.train.runtime.profiler import StepProfiler
from mtv_jax.train.runtime.watchdog import StalledError, Watchdog
from mtv_jax.train.spec import TrainState
from mtv_jax.utils import progress, xla_flags
from mtv_jax.utils.text import format_duration, list_first

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Trainer:
  """Runs the steps of a session, after `start_step` completed steps."""

  run: Run
  state: TrainState
  start_step: int  # Number of updates of earlier sessions.
  batches: BackgroundLoader
  skipped: order.SkippedBatches
  checkpoints: Checkpointer
  writer: MetricWriter
  chrono: Chrono
  notice: preemption.Notice
  watchdog: Watchdog
  monitor: UpdateMonitor
  session: sessions.Session
  profiler: StepProfiler
  hooks: Sequence[Hook] = ()
  debug_nans: bool = False

  def __post_init__(self):
    # Metrics (on device or host) and objectives of the last update.
    self.values: dict[str, Any] = {}
    self.active: tuple[str, ...] = ()
    # Step, metrics and batch of the updates in flight.
    self.in_flight = collections.deque()
    self.is_save_postponed = False
    self.eta = math.nan  # Seconds left at the last log line.

  def train(self) -> TrainState:
    """Runs the remaining steps; returns the last state."""
    with progress.activity(self.describe_progress):
      return self._train()

  def describe_progress(self) -> str:
    """The step and the time left, for lines between log lines."""
    total = self.run.total_steps
    text = f"step {min(self.session.step + 1, total)} of {total}"
    eta = "" if math.isnan(self.eta) else f", {format_duration(self.eta)} left"
    return text + eta

  def _train(self) -> TrainState:
    run, config = self.run, self.run.config
    last_step = run.total_steps
    batches = prefetch_to_device(self.iterate_batches(), run.mesh)
    for hook in self.hooks:
      hook.before_first_step(self)
    if self.start_step >= last_step:
      log.info("The run is complete at step %d.", self.start_step)
    for step in range(self.start_step + 1, last_step + 1):
      if self.notice.received:
        self.save_and_exit(step - 1)
      self.profiler.start(step)
      batch = self.next_batch(step, batches)
      metrics = self.update(step, batch)
      self.profiler.stop(step, self.values)
      self.session.report(step)
      is_due = run.is_due(config.log.every, step)
      is_due = is_due or bool(metrics) or step in (1, last_step)
      if is_due or step == self.start_step + 1:
        self.log_metrics(step, metrics, to_files=is_due)
      # Before the hooks, which may take too long after a signal.
      if self.should_stop(step) and step < last_step:
        self.save_and_exit(step)
      if step == last_step:
        self.watchdog.close()  # The last save may take long.
        self.notice.exit_message = "completes the last evaluations, then exits."
        self.save(step)
      for hook in self.hooks:
        hook.after_step(self, step)
      if step < last_step:  # After the last step, `wait` raises save errors.
        self.save_if_due(step)
        with self.pause_timers("save"):  # The last retry waits for the save.
          self.checkpoints.poll(step)
      self.watchdog.step(step)
    with self.pause_timers("save"):
      self.checkpoints.wait()
    return self.state

  def iterate_batches(self) -> Iterator[Any]:
    """Yields this host's batches, shown to the hooks."""
    for batch in self.batches:
      for hook in self.hooks:
        hook.on_batch(self.run, batch)
      yield batch

  def should_stop(self, step: int) -> bool:
    """Whether to save and exit after a step; equal on all processes."""
    stalled = self.watchdog.expired
    if stalled and jax.process_count() > 1:
      # JAX's preemption service makes all processes agree on a step.
      os.kill(os.getpid(), signal.SIGTERM)
      stalled = False
    return self.checkpoints.preempted(step) or self.notice.received or stalled

  @contextlib.contextmanager
  def pause_timers(self, kind: str) -> Iterator[None]:
    """Excludes the context from training time and from the watchdog."""
    with self.chrono.measure(kind), self.watchdog.pause():
      yield

  def next_batch(self, step: int, batches: Iterator[Any]) -> Any:
    """Returns a step's batch; saves and exits if interrupted."""
    with self.chrono.measure("wait"):
      try:
        return next(batches)
      except Interrupted:
        log.warning("Step %d: no longer waiting for a batch.", step)
      except Exception as error:
        # A signal to the process group also ends the data workers. With several
        # hosts the notice is empty, since none may exit alone.
        if not self.notice.received:
          raise
        log.warning("No further batch, after %s: %s", self.notice.name, error)
    return self.save_and_exit(step - 1)

  def update(self, step: int, batch: Any) -> dict[str, Any]:
    """Runs one update; returns the metrics of the hooks."""
    train_step = self.run.train_step
    self.select_objectives(step)
    self.state = train_step.copy_teachers(self.state, step - 1)
    metrics = {}
    for hook in self.hooks:
      metrics |= hook.before_update(self, step, batch)
    with self.record_compilation():
      self.state, self.values = train_step.update(
        self.state, batch, self.active
      )
      self.in_flight.append((step, self.values, batch))
      # Two steps in flight keep the devices busy; more only take memory.
      self.observe(0 if self.chrono.compiling or self.debug_nans else 2)
    self.notice.exit_message = "saves a checkpoint and exits."
    self.chrono.step()
    return metrics

  def select_objectives(self, step: int) -> None:
    """Sets the objectives that a step computes; logs a change."""
    active = self.run.spec.active_objectives(step - 1)
    if active != self.active:
      self.active = active
      log.info("From step %d: %s.", step, ", ".join(active))
      expected = self.session.estimate_compilation(active)
      hint = f" (expect {format_duration(expected)})" if expected else ""
      log.info("Compiling the step%s.", hint)
      self.chrono.expect_compilation()
    if self.chrono.compiling:
      self.watchdog.restart()

  @contextlib.contextmanager
  def record_compilation(self) -> Iterator[None]:
    """Times the context if it compiles the step."""
    if not self.chrono.compiling:
      with progress.activity(self.describe_progress):
        yield
      return
    start, activity = time.perf_counter(), "compiling the step"
    with xla_flags.silence_slow_compile_alarm(), progress.activity(activity):
      yield
    seconds = time.perf_counter() - start
    self.session.record_compilation(self.active, seconds)

  def observe(self, keep: int = 0) -> None:
    """Checks updates for NaN and spikes until only `keep` are in flight."""
    while len(self.in_flight) > keep:
      step, values, batch = self.in_flight.popleft()
      skipped, norm = jax.device_get((values["skipped"], values["grad_norm"]))
      if skipped:
        self.report_skipped_update(step, values, batch)
      factor = self.monitor.observe(step, bool(skipped), float(norm))
      if factor is not None:
        norms = self.measure_norms(batch).items()
        log.warning(
          f"Step {step}: the gradient's norm is {norm:.3g}, {factor:.0f} times"
          " the median of the previous steps. Norms on the encoder: "
          f"{', '.join(f'{n} {v:.3g}' for n, v in norms) or 'unknown'}."
        )

  def report_skipped_update(self, step: int, values: Any, batch: Any) -> None:
    """Logs a skipped update with its non-finite metrics and its rows."""
    values = jax.device_get(values)
    names = rollback.list_non_finite(values)
    if not any(name.endswith("/loss") for name in names):
      # The losses are finite: find the non-finite gradient.
      names += rollback.list_non_finite(self.measure_norms(batch))
    try:
      keys = self.batches.loader.batches.read_keys(step - 1)
    except Exception as error:
      keys = [f"unknown: {error}"]
    log.warning(
      f"Step {step}: not finite: {', '.join(names)}. The update is skipped."
      f" Rows: {list_first(keys, 16)}."
    )
    row = {"batch": order.batch_of_step(step - 1, self.skipped)}
    row |= {"metrics": names, "keys": keys}
    self.writer.write_row("nonfinite", step, row)
    if self.debug_nans:
      run = self.run
      spec = run.spec.select_objectives(self.active)
      # Restores the step number, on which random numbers depend.
      state = self.state.replace(step=self.state.step - 1)
      with self.pause_timers("measure"):
        location = rollback.locate_nan(
          compute_gradients, spec, state, batch, run.mesh
        )
      raise NonFiniteError(f"at step {step}: {location}")

  def measure_norms(self, batch: Any) -> dict[str, float]:
    """Each objective's gradient norm on the encoder, for a batch."""
    with self.pause_timers("measure"):
      return self.measurements.measure_norms(self.state, batch, self.active)

  @functools.cached_property
  def measurements(self) -> Any:
    """The compiled `GradientMeasurements`, imported when first needed."""
    from mtv_jax.train.measurements import GradientMeasurements

    return GradientMeasurements(self.run.train_step)

  def log_metrics(
    self, step: int, metrics: Mapping[str, Any], *, to_files: bool
  ) -> None:
    """Writes the metrics of a step.

    The first step of a resumed run is logged only to the console, so that the
    files equal an uninterrupted run's.
    """
    self.observe()
    self.values = jax.device_get(self.values)
    stats = self.batches.loader.stats_at(step)
    values = {k: v for k, v in self.values.items() if k != "skipped"} | {
      "skipped_updates": self.monitor.skipped_updates,
      **self.run.optimizer.hyperparameters(step - 1),
      "data/corrupt": stats.corrupt,
      "data/dropped": sum(stats.dropped.values()),
      **{f"data/{kind}_cut": v for kind, v in stats.fraction("cut").items()},
      **{f"data/{k}_unknown": v for k, v in stats.fraction("unknown").items()},
      **metrics,
    }
    losses = [name for name in values if name.endswith("/loss")]
    names = ("loss", *losses, "lr", "grad_norm", *values)
    write = self.writer.write_scalars if to_files else self.writer.log_scalars
    rates = self.chrono.rates(step)
    self.eta = rates.eta
    write(step, {name: values[name] for name in names}, rates)

  def save_if_due(self, step: int) -> None:
    """Starts saving a checkpoint if one is due and the last update is finite.

    While updates are non-finite, a save could replace the rollback target, so
    it is postponed to the next finite update.
    """
    if not (self.checkpoints.due(step) or self.is_save_postponed):
      return
    self.observe()
    is_finite = self.monitor.nonfinite_since is None
    self.is_save_postponed = not is_finite and step > 1
    if not self.is_save_postponed:
      self.save(step)

  def save(self, step: int) -> None:
    self.observe()
    with self.pause_timers("save"):
      timing = self.chrono.to_dict() | self.monitor.to_dict()
      timing["skipped_batches"] = self.skipped
      timing["data"] = self.batches.loader.stats_at(step).to_dict()
      timing["sources"] = self.run.source_descriptions
      self.checkpoints.save(step, self.state, timing=timing)

  def save_deletes_rollback_target(self) -> bool:
    """Whether saving deletes the last checkpoint before non-finite updates."""
    since = self.monitor.nonfinite_since
    if since is None:
      return False
    before = [s for s in self.checkpoints.steps() if s < since]
    return bool(before) and not self.checkpoints.survives_save(before[-1])

  def save_and_exit(self, step: int) -> NoReturn:
    """Saves a checkpoint unless the step has one, then raises RunStoppedError.

    All processes call it after the same step, since they save together.
    """
    self.watchdog.mark_stopping()
    self.notice.handled.set()
    outcome = f"saved step {step}" if step else "completed no step"
    outcome += f" of {self.run.total_steps}"
    try:
      self.observe()
      if step > self.start_step and self.save_deletes_rollback_target():
        outcome = (
          "saved nothing, as the updates since step"
          f" {self.monitor.nonfinite_since} are not finite and the checkpoint"
          " before them would be deleted (config.checkpoint.keep),"
        )
      elif step > self.start_step:
        self.save(step)
        with self.pause_timers("save"):
          self.checkpoints.wait()
    except RollbackError as error:
      # The resumed run handles the rollback.
      outcome = f"saved nothing, as {error}"
    self.watchdog.close()
    folder = self.checkpoints.folder.parent
    message = f"{outcome} in {folder}. Rerun the command to resume."
    if self.notice.received:
      raise preemption.Preempted(
        f"received {self.notice.name}; {message}", self.notice.signal_number
      )
    if self.watchdog.expired:
      raise StalledError(
        f"a step took more than {self.watchdog.limit:.0f} s; {message}"
      )
    raise preemption.Preempted(f"received SIGTERM; {message}")
