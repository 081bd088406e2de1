"""The training loop: build, restore, step, log, evaluate, save."""

import collections
import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.config import schema
from mtv_jax.data import pipeline
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import results as results_lib
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train import interference, preemption
from mtv_jax.train.experiment import (
  Experiment,
  build_experiment,
  log_experiment,
  make_loader,
  save_config,
)
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.metrics import Chrono, MetricWriter
from mtv_jax.train.state import TrainState
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils.errors import ConfigError, UserError

log = logging.getLogger(__name__)


class NonFiniteError(UserError, FloatingPointError):
  """A loss or a gradient that is not finite."""


def prefetch_to_device(
  loader: pipeline.Loader, mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
  """Batches on the devices, transferred one step ahead."""
  ahead = collections.deque()
  for batch in loader:
    ahead.append(shard_batch(batch, mesh))
    if len(ahead) > 1:
      yield ahead.popleft()


def check_finite(step: int, values: Mapping[str, Any]) -> None:
  """Raises NonFiniteError if the loss or a gradient is not finite."""
  watched = ("loss", "grad_norm", "update_norm")
  if not all(math.isfinite(values[name]) for name in watched):
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    raise NonFiniteError(
      f"at step {step} these are not finite: {bad}. Resume from the last "
      "checkpoint with a lower learning rate, a longer warm-up, clipping or "
      "b2=0.95."
    )


def check_balance_unchanged(
  config: schema.Config, workdir: str | os.PathLike
) -> None:
  """Raises ConfigError if a run was trained with another balancing method.

  Some methods have no state, so that their checkpoints fit others too.
  """

  def method(section):
    # Earlier configs have no `method`, and no weights are fixed ones.
    return section.get("method", "grad_norm_mean") if section else "fixed"

  recorded = read_recorded_config(workdir)
  if not recorded:
    return
  old, new = method(recorded.get("balance")), method(config.balance)
  if old != new:
    raise ConfigError(
      f"config.balance.method is {new!r}, but {workdir} was trained by {old!r} "
      "so far. Resume with the config.balance of its config.json "
      "(--config.balance=None for fixed weights), or take another workdir."
    )


def train(
  config: schema.Config, workdir: str | os.PathLike, *, command: str = ""
) -> TrainState:
  """Trains a config in a folder, from the start or the last checkpoint.

  The folder is the same on every host, and keeps the `command` for reports.
  Returns the state after the last step.

  Raises:
    ConfigError: for anything in the config that can't be used.
    NonFiniteError: a loss or a gradient is not finite.
    data.pipeline.CorruptDataError: too many records are unusable.
    preemption.Preempted: after SIGTERM, once a checkpoint is saved.
  """
  experiment = build_experiment(config, workdir)
  config = experiment.config
  log_experiment(experiment)
  chrono = Chrono(
    total_steps=experiment.total_steps,
    batch_size=config.batch_size,
    devices=experiment.mesh.size,
  )
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      Checkpointer(
        experiment.workdir / "checkpoints",
        every_steps=experiment.duration("every", config.checkpoint),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
      )
    )
    if checkpoints.steps():
      check_balance_unchanged(config, workdir)
    saved = checkpoints.restore(experiment.program.abstract)
    first = 0
    if saved is not None:
      first = saved.step
      chrono.from_dict(saved.timing)
      log.info("Resumed %s at step %d.", workdir, first)
    loader = stack.enter_context(make_loader(experiment, first))
    writer = stack.enter_context(
      MetricWriter(
        experiment.workdir,
        total_steps=experiment.total_steps,
        start_step=first,
        process_index=jax.process_index(),
      )
    )
    sigterm = stack.enter_context(preemption.catch_sigterm())
    # Not before, so that a config that is rejected replaces nothing.
    save_config(experiment, command)
    state = initialize_state(experiment) if saved is None else saved.state
    return _Trainer(
      experiment, state, first, loader, checkpoints, writer, chrono, sigterm
    ).run()


@dataclasses.dataclass
class _Trainer:
  """The loop over the steps of `train`."""

  experiment: Experiment
  state: TrainState
  first: int  # Number of updates of earlier sessions.
  loader: pipeline.Loader
  checkpoints: Checkpointer
  writer: MetricWriter
  chrono: Chrono
  sigterm: preemption.Notice

  def __post_init__(self):
    # Metrics of the last update, on the devices or fetched, and its objectives.
    self.values: dict[str, Any] = {}
    self.active: tuple[str, ...] = ()
    self.losses = collections.deque()  # Losses of the updates in flight.

  def run(self) -> TrainState:
    """Trains to the last step."""
    config, last = self.experiment.config, self.experiment.total_steps
    duration = self.experiment.duration
    log_every = duration("every", config.log)
    evals_every = {n: duration("every", e) for n, e in config.evals.items()}
    batches = prefetch_to_device(self.loader, self.experiment.mesh)
    if self.first >= last:
      log.info("The run is complete at step %d.", self.first)
    if self.first == 0:
      at_start = [n for n, e in config.evals.items() if e.get("at_start")]
      self.evaluate(0, at_start)
    for step in range(self.first + 1, last + 1):
      batch = self.next_batch(step, batches)
      measured = self.update(step, batch)
      is_due = step % log_every == 0 or bool(measured) or step in (1, last)
      if is_due or step == self.first + 1:
        self.log(step, measured, to_files=is_due)
      preempted = self.checkpoints.preempted(step) or self.sigterm.received
      if preempted and step < last:
        # Before the evaluations, for which there may be no time.
        self.save_and_exit(step)
      due = [n for n, e in evals_every.items() if e and step % e == 0]
      self.evaluate(step, due if step < last else evals_every)
      if self.checkpoints.due(step) or step == last:
        self.save(step)
    return self.state

  def next_batch(self, step: int, batches: Iterator[Any]) -> Any:
    """Returns a step's batch; exits after SIGTERM if there is none."""
    with self.chrono.waiting():
      try:
        return next(batches)
      except Exception as error:
        # A signal to a process group also ends the data workers. On several
        # hosts `sigterm` is not set: none may exit alone.
        if not self.sigterm.received:
          raise
        log.warning("No further batch, after SIGTERM: %s", error)
        self.save_and_exit(step - 1)

  def update(self, step: int, batch: Any) -> dict[str, Any]:
    """One update; returns what `measure_gradients` does."""
    spec, program = self.experiment.step_spec, self.experiment.program
    if spec.active_objectives(step - 1) != self.active:
      self.active = spec.active_objectives(step - 1)
      log.info("From step %d: %s. Compiling.", step, ", ".join(self.active))
      self.chrono.expect_compilation()
    if spec.teacher_starts(step - 1):
      self.state = program.restart_teacher(self.state)
    if due := spec.teachers_due(step - 1):
      log.info("Step %d copies the EMA teacher to %s.", step, ", ".join(due))
      self.state = program.update_teachers(self.state, due)
    measured = self.measure_gradients(step, batch)
    self.state, self.values = program.update(self.state, batch, self.active)
    # Two steps in flight keep the devices busy; more would only take memory.
    self.losses.append(self.values["loss"])
    if self.chrono.compiling or len(self.losses) > 2:
      jax.block_until_ready(self.losses.popleft())
    self.chrono.step()
    return measured

  def measure_gradients(self, step: int, batch: Any) -> dict[str, Any]:
    """Gradient norms and interference, as metrics, if they are due.

    Updates the balance, and writes the interference of each pair.
    """
    experiment, program = self.experiment, self.experiment.program

    def is_due(section, name):
      every = section and experiment.duration(name, section)
      return bool(every) and step % every == 0

    config, active = experiment.config, self.active
    balances = experiment.step_spec.measures_balance(step - 1)
    compares = is_due(config.interference, "every")
    if not (balances or compares or is_due(config.log, "gradients")):
      return {}
    values = {}
    with self.chrono.pause():
      if compares:
        lr = None
        if config.interference.transfer:
          lr = np.float32(experiment.optimizer.schedule(step - 1))
        measured = jax.device_get(
          program.interference(self.state, batch, active, lr)
        )
        row = interference.interference_row(active, measured)
        self.writer.write_row("interference", step, row)
        values = interference.interference_scalars(measured)
        norms = np.linalg.norm(measured["norms"], axis=1)
        norms = dict(zip(active, norms, strict=True))
      else:
        norms = program.encoder_grad_norms(self.state, batch, active)
      if balances:
        self.state = program.update_balance(self.state, norms)
      norms = jax.device_get(norms)
    return {**{f"{n}/encoder_grad_norm": v for n, v in norms.items()}, **values}

  def log(
    self, step: int, measured: Mapping[str, Any], *, to_files: bool
  ) -> None:
    """Writes the metrics of a step.

    The first step of a resumed run is a line on the console, and not in the
    files: they are those of a run that was not interrupted.
    """
    self.values = jax.device_get(self.values)
    check_finite(step, self.values)
    stats = self.loader.stats
    values = self.values | {
      **self.experiment.optimizer.hyperparameters(step - 1),
      "data/corrupt": stats.corrupt,
      "data/dropped": sum(stats.dropped.values()),
      **{f"data/{kind}_cut": v for kind, v in stats.cut_shares.items()},
      **measured,
    }
    losses = [name for name in values if name.endswith("/loss")]
    names = ("loss", *losses, "lr", "grad_norm", *values)
    write = self.writer.write_scalars if to_files else self.writer.log_scalars
    write(step, {name: values[name] for name in names}, self.chrono.rates(step))

  def evaluate(self, step: int, names: Iterable[str]) -> None:
    """Evaluates the current parameters.

    Writes the metrics, and with their protocol `evals/NAME_STEP.json`. After
    the last step also the sheets of images, `evals/NAME_STEP/SHEET.png`, and
    the metrics of resamples of the items, `evals/NAME_STEP.npz`.
    """
    experiment, config = self.experiment, self.experiment.config
    for name in names:
      with self.chrono.pause():
        weights = config.evals[name].get("weights", config.weights)
        encoder = self.build_encoder(step, weights)
        evaluators = {name: experiment.evaluators[name]}
        results = evals_lib.evaluate(encoder, evaluators)
        if jax.process_index() == 0:
          path = experiment.workdir / "evals" / f"{name}_{step}.json"
          if step >= experiment.total_steps:
            results_lib.write_arrays(path.with_suffix(""), results[name])
          results_lib.write_json(path, encoder, results)
        metrics = results[name].metrics.items()
        self.writer.write_scalars(step, {f"{name}/{k}": v for k, v in metrics})

  def build_encoder(self, step: int, weights: str) -> Encoder:
    """An encoder of the current parameters; see `TrainState.weights`."""
    experiment, spec = self.experiment, self.experiment.step_spec
    config = experiment.config
    return Encoder(
      spec.model,
      self.state.weights(weights),
      preprocess_from_config(config),
      experiment.tokenizer,
      experiment.mesh,
      dtype=str(spec.dtype),
      weights=weights,
      source=f"{experiment.workdir.name} at step {step}",
      prediction_heads=loading.prediction_heads(config, spec.model),
    )

  def save(self, step: int) -> None:
    """Starts saving a checkpoint, if all metrics are finite."""
    check_finite(step, jax.device_get(self.values))
    with self.chrono.pause():
      self.checkpoints.save(step, self.state, timing=self.chrono.to_dict())

  def save_and_exit(self, step: int) -> NoReturn:
    """Saves a checkpoint, unless the step has one, and raises Preempted."""
    done = f"saved step {step}" if step else "completed no step"
    if step > self.first:
      self.save(step)
      self.checkpoints.wait()
    raise preemption.Preempted(
      f"received SIGTERM; {done} of {self.experiment.total_steps} in "
      f"{self.experiment.workdir}. The same command resumes from there."
    )
