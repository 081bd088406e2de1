"""The loop over the steps of a session: update, log, evaluate, save."""

import collections
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.data import order
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import results as results_lib
from mtv_jax.evals.core.base import Result
from mtv_jax.parallel.distributed import any_process, gather_results
from mtv_jax.train import rollback
from mtv_jax.train.gradients import compute_gradients
from mtv_jax.train.measurements import (
  GradientMeasurements,
  is_balance_due,
  norm_metrics,
)
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
from mtv_jax.train.samples import write_samples
from mtv_jax.train.spec import TrainState
from mtv_jax.utils import progress, xla_flags
from mtv_jax.utils.errors import ConfigError
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
  debug_nans: bool = False

  def __post_init__(self):
    # Metrics (on device or host) and objectives of the last update.
    self.values: dict[str, Any] = {}
    self.active: tuple[str, ...] = ()
    # Step, metrics and batch of the updates in flight.
    self.in_flight = collections.deque()
    self.is_save_postponed = False
    self.eta = math.nan  # Seconds left at the last log line.
    self.measurements = GradientMeasurements(self.run.train_step)

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
    if self.start_step == 0:
      # Includes evaluations with a bound, so a misspelt metric fails early.
      evals = {n: config.evals[n] for n in run.evaluators}
      self.evaluate(0, [n for n, e in evals.items() if e.at_start or e.bound])
    else:
      # The previous session may have exited between save and evaluation.
      self.evaluate(self.start_step, self.missing_evaluations(self.start_step))
    if self.start_step >= last_step:
      log.info("The run is complete at step %d.", self.start_step)
    for step in range(self.start_step + 1, last_step + 1):
      if self.notice.received:
        self.save_and_exit(step - 1)
      self.profiler.start(step)
      batch = self.next_batch(step, batches)
      grad_metrics = self.update(step, batch)
      self.profiler.stop(step, self.values)
      self.session.report(step)
      is_due = run.is_due(config.log.every, step)
      is_due = is_due or bool(grad_metrics) or step in (1, last_step)
      if is_due or step == self.start_step + 1:
        self.log_metrics(step, grad_metrics, to_files=is_due)
      # Before the evaluations, which may take too long after a signal.
      if self.should_stop(step) and step < last_step:
        self.save_and_exit(step)
      if step == last_step:
        self.watchdog.close()  # The last save may take long.
        self.notice.exit_message = "completes the last evaluations, then exits."
        self.save(step)
      self.evaluate(step, self.due_evaluations(step))
      if step < last_step:  # After the last step, `wait` raises save errors.
        self.save_if_due(step)
        with self.pause_timers("save"):  # The last retry waits for the save.
          self.checkpoints.poll(step)
      self.watchdog.step(step)
    with self.pause_timers("save"):
      self.checkpoints.wait()
    return self.state

  def iterate_batches(self) -> Iterator[Any]:
    """Yields this host's batches; writes samples of a run's first batch."""
    folder = self.run.workdir / "samples"
    is_due = jax.process_index() == 0 and not (folder / "samples.json").exists()
    for batch in self.batches:
      if is_due and "image" in batch:
        try:
          write_samples(folder, batch, self.run.tokenizer)
        except Exception as error:  # The run does not need them.
          log.warning("Could not write samples to %s: %r", folder, error)
      is_due = False
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
    """Runs one update; returns the metrics of `measure_gradients`."""
    spec, train_step = self.run.spec, self.run.train_step
    if spec.active_objectives(step - 1) != self.active:
      self.active = spec.active_objectives(step - 1)
      log.info("From step %d: %s.", step, ", ".join(self.active))
      expected = self.session.estimate_compilation(self.active)
      hint = f" (expect {format_duration(expected)})" if expected else ""
      log.info("Compiling the step%s.", hint)
      self.chrono.expect_compilation()
    if self.chrono.compiling:
      self.watchdog.restart()
    self.state = train_step.copy_teachers(self.state, step - 1)
    grad_metrics = self.measure_gradients(step, batch)
    start = time.perf_counter()
    alarm_context, activity = contextlib.nullcontext(), self.describe_progress
    if self.chrono.compiling:
      alarm_context = xla_flags.silence_slow_compile_alarm()
      activity = "compiling the step"
    with alarm_context, progress.activity(activity):
      self.state, self.values = train_step.update(
        self.state, batch, self.active
      )
      self.in_flight.append((step, self.values, batch))
      # Two steps in flight keep the devices busy; more only take memory.
      self.observe(0 if self.chrono.compiling or self.debug_nans else 2)
    self.notice.exit_message = "saves a checkpoint and exits."
    if self.chrono.compiling:
      seconds = time.perf_counter() - start
      self.session.record_compilation(self.active, seconds)
    self.chrono.step()
    return grad_metrics

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

  def measure_gradients(self, step: int, batch: Any) -> dict[str, Any]:
    """Measures gradient norms and interference if due; returns metrics.

    Updates the balance and writes `interference.jsonl`.
    """
    run, config = self.run, self.run.config
    balances = is_balance_due(run.spec, step - 1)
    every = config.interference and config.interference.every
    compares = run.is_due(every, step)
    if not (balances or compares or run.is_due(config.log.gradients, step)):
      return {}
    values, args = {}, (self.state, batch, self.active)
    with self.pause_timers("measure"):
      if compares:
        lr = None
        if config.interference.transfer:
          lr = np.float32(run.optimizer.schedule(step - 1))
        row, values, norms = self.measurements.measure_interference(*args, lr)
        self.writer.write_row("interference", step, row)
      else:
        norms = self.measurements.encoder_grad_norms(*args)
      if balances:
        self.state = self.measurements.update_balance(self.state, norms)
      return {**norm_metrics(norms), **values}

  def log_metrics(
    self, step: int, grad_metrics: Mapping[str, Any], *, to_files: bool
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
      **grad_metrics,
    }
    losses = [name for name in values if name.endswith("/loss")]
    names = ("loss", *losses, "lr", "grad_norm", *values)
    write = self.writer.write_scalars if to_files else self.writer.log_scalars
    rates = self.chrono.rates(step)
    self.eta = rates.eta
    write(step, {name: values[name] for name in names}, rates)

  def due_evaluations(self, step: int) -> list[str]:
    """The evaluations due after a step; all after the last step."""
    run, evals = self.run, self.run.config.evals
    is_last = step >= run.total_steps
    return [
      name
      for name in run.evaluators
      if is_last or run.is_due(evals[name].every, step)
    ]

  def missing_evaluations(self, step: int) -> list[str]:
    """The `due_evaluations` that lack a file or have a metric out of bounds.

    The last step is saved before it is evaluated, so a run that a bound stopped
    there evaluates again when it is restarted.
    """

    def is_missing(name):  # Process 0 decides.
      return jax.process_index() == 0 and not self.is_evaluated(name, step)

    due = self.due_evaluations(step)
    return [name for name in due if any_process(is_missing(name))]

  def is_evaluated(self, name: str, step: int) -> bool:
    """Whether an evaluation has a file and its metric is within bounds."""
    path = self.evals_path(name, step)
    bound = self.run.config.evals[name].bound
    try:
      if not path.exists() or bound is None:
        return path.exists()
      result = self.read_result(name, step)
      return bound.metric in result.metrics and self.is_within(name, result)
    except Exception as error:  # Other hosts wait for the answer.
      log.warning("%s can't be read (%r): evaluating again.", path, error)
      return False

  def read_result(self, name: str, step: int) -> Result:
    """Reads an evaluation's result from its files."""
    (outcome,) = results_lib.read(path := self.evals_path(name, step))
    resamples = results_lib.read_resamples(path)
    return dataclasses.replace(outcome.results[name], resamples=resamples)

  def is_within(self, name: str, result: Result) -> bool:
    """Whether a result is within its bound; always True except on process 0."""
    if jax.process_index():
      return True
    bound, initial_result = self.run.config.evals[name].bound, None
    if bound.drop:
      path = self.evals_path(name, 0)
      initial_result = self.read_result(name, 0) if path.exists() else None
      if initial_result is None or bound.metric not in initial_result.metrics:
        raise ConfigError(
          f"config.evals.{name}.bound.drop compares with {path}, which lacks "
          f"{bound.metric!r}: restore it, or set min instead."
        )
    return bound.is_met(result, initial_result)

  def evals_path(self, name: str, step: int) -> pathlib.Path:
    return self.run.workdir / "evals" / f"{name}_{step}.json"

  def evaluate(self, step: int, names: Iterable[str]) -> None:
    """Evaluates the current parameters; after a signal only at the last step.

    Writes metrics and protocol to `evals/NAME_STEP.json`, and metrics of
    resamples to `evals/NAME_STEP.npz`; after the last step also image sheets,
    `evals/NAME_STEP/SHEET.png`.
    """
    run, config = self.run, self.run.config
    for name in names:
      if self.notice.received and step < run.total_steps:
        return  # The resumed run evaluates it.
      self.session.report(step, f"evaluate {name}")
      with self.pause_timers("evaluate"):
        weights = config.evals[name].weights or config.weights
        encoder = self.build_encoder(step, weights)
        evaluators = {name: run.evaluators[name]}
        results = evals_lib.evaluate(encoder, evaluators)
        if jax.process_index() == 0:
          path = self.evals_path(name, step)
          with self.writer.tolerate_errors(str(path.parent)):
            is_last = step >= run.total_steps
            stem = path.with_suffix("")
            results_lib.write_arrays(stem, results[name], sheets=is_last)
            results_lib.write_json(path, encoder, results)
        result = results[name]
        scalars = {f"{name}/{k}": v for k, v in result.metrics.items()}
        self.writer.write_scalars(step, scalars)
      if (bound := config.evals[name].bound) is None:
        continue
      bound.value(name, result)
      if step or config.evals[name].at_start:
        is_met = gather_results(lambda a=(name, result): self.is_within(*a))[0]
        last_within = self.previous_evaluation(name, step)
        bound.check(name, result, step, last_within, is_met=is_met)

  def previous_evaluation(self, name: str, step: int) -> int:
    """The step of an evaluation's previous run; 0 if this is the first."""
    entry = self.run.config.evals[name]
    every = self.run.length.steps(entry.every)
    return (step - 1) // every * every if every and step else 0

  def build_encoder(self, step: int, weights: str) -> Encoder:
    """Builds an encoder of the current parameters; see `TrainState.weights`."""
    run, spec = self.run, self.run.spec
    config = run.config
    return Encoder(
      spec.model,
      spec.merge_adapters(self.state.weights(weights)),
      preprocess_from_config(config.model, config.views),
      run.tokenizer,
      run.mesh,
      dtype=str(spec.dtype),
      weights=weights,
      source=f"{run.workdir.name} at step {step}",
      prediction_heads=run.prediction_heads,
    )

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
