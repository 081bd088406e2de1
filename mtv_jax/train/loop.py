"""The training loop: build, restore, step, log, evaluate, save."""

from __future__ import annotations

import collections
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtv_jax.checkpoint.checkpointer import Checkpointer, Restored
from mtv_jax.checkpoint.partial_restore import merge_params
from mtv_jax.config import schema
from mtv_jax.data import pipeline
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import preprocess_of
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import results as results_lib
from mtv_jax.models import heads as heads_lib
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train import preemption
from mtv_jax.train.experiment import (
  Experiment,
  build_experiment,
  log_experiment,
  make_loader,
  save_config,
)
from mtv_jax.train.metrics import Chrono, MetricWriter
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import init_params
from mtv_jax.utils.errors import UserError

log = logging.getLogger(__name__)


class NonFiniteError(UserError, FloatingPointError):
  """A loss or a gradient that is not finite."""


def init_or_restore(
  experiment: Experiment, saved: Restored | None
) -> TrainState:
  """The initial state: the last checkpoint, `config.init`, or random."""
  if saved is not None:
    log.info("Resumed %s at step %d.", experiment.workdir, saved.step)
    return saved.state
  rng = jax.random.key(experiment.config.seed)
  place = jax.tree.map(
    lambda leaf: leaf.sharding, experiment.program.abstract.params
  )
  params = jax.jit(
    lambda key: init_params(experiment.step_spec, key),
    out_shardings=place,
  )(rng)
  if init := experiment.config.init:
    source = loading.read_params(
      init.path,
      weights=init.weights,
      step=init.step,
      spec=experiment.step_spec.model,
    )
    merged = merge_params(
      params,
      source,
      include=init.include or ("",),
      rename=init.rename,
      min_coverage=init.min_coverage,
    )
    log.info("Initialised from %s:\n%s", init.path, merged.report)
    params = merged.params
  return experiment.program.init(params)


def prefetch_to_device(
  loader: pipeline.Loader, mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
  """Batches on the devices, transferred one step ahead."""
  ahead = collections.deque()
  for batch in loader:
    ahead.append(shard_batch(batch, mesh))
    if len(ahead) > 1:
      yield ahead.popleft()


def evaluate(
  experiment: Experiment, state: TrainState, step: int, name: str
) -> dict[str, float]:
  """Runs an evaluation on the current parameters.

  Returns the metrics by name, and writes them with their protocol to
  `evals/NAME_STEP.json`.
  """
  weights = experiment.config.evals[name].get("weights", "student")
  encoder = Encoder(
    experiment.step_spec.model,
    state.weights(weights),
    preprocess_of(experiment.config),
    experiment.tokenizer,
    experiment.mesh,
    dtype=str(experiment.step_spec.dtype),
    weights=weights,
    source=f"{experiment.workdir.name} at step {step}",
    prediction_heads=heads_lib.heads_of_config(
      experiment.config.objectives, experiment.step_spec.model
    ),
  )
  results = evals_lib.evaluate(encoder, {name: experiment.evaluators[name]})
  if jax.process_index() == 0:
    path = experiment.workdir / "evals" / f"{name}_{step}.json"
    results_lib.write_json(path, encoder, results)
  return {f"{name}/{k}": v for k, v in results[name].metrics.items()}


def sort_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
  """Sorts metrics for the log: losses, learning rate, gradient norm, others."""
  losses = [name for name in values if name.endswith("/loss")]
  first = ["loss", *losses, "lr", "grad_norm"]
  return {name: values[name] for name in (*first, *values)}


def check_finite(step: int, values: Mapping[str, Any]) -> None:
  """Stops a run whose loss or gradient is not finite, before it is saved.

  Raises:
    NonFiniteError: names the step and the metrics.
  """
  watched = ("loss", "grad_norm", "update_norm")
  if all(math.isfinite(float(values[name])) for name in watched):
    return
  bad = [k for k, v in values.items() if not np.isfinite(np.asarray(v))]
  raise NonFiniteError(
    f"at step {step} these are not finite: {bad}. The last checkpoint is from "
    "before it. A lower learning rate, a longer warm-up, clipping, or b2=0.95 "
    "usually help."
  )


def train(config: schema.Config, workdir: str | os.PathLike) -> TrainState:
  """Trains a config in a folder, from the start or the last checkpoint.

  Args:
    config: as `schema.check_config` takes it.
    workdir: the run's folder, the same on every host.

  Returns:
    The state after the last step.

  Raises:
    ConfigError: for anything in the config that can't be used.
    NonFiniteError: if the loss is not finite.
    data.pipeline.CorruptDataError: if too many records are unusable.
    preemption.Preempted: after SIGTERM, once a checkpoint is saved.
  """
  experiment = build_experiment(config, workdir)
  config = experiment.config
  log_experiment(experiment)
  process = jax.process_index()
  chrono = Chrono(
    total_steps=experiment.total_steps,
    batch_size=config.batch_size,
    devices=experiment.mesh.size,
  )
  with Checkpointer(
    experiment.workdir / "checkpoints",
    every_steps=experiment.every("every", config.checkpoint),
    keep=config.checkpoint.keep,
    keep_every=config.checkpoint.keep_every,
  ) as checkpoints:
    saved = checkpoints.restore(experiment.program.abstract)
    if saved is not None:
      chrono.from_dict(saved.timing)
    first = saved.step if saved is not None else 0
    with (
      make_loader(experiment, first) as loader,
      MetricWriter(
        experiment.workdir,
        total_steps=experiment.total_steps,
        start_step=first,
        process_index=process,
      ) as writers,
      preemption.catch_sigterm() as notice,
    ):
      # Not before, so that a config that is refused replaces nothing.
      save_config(experiment)
      state = init_or_restore(experiment, saved)
      return _loop(
        experiment, state, first, loader, checkpoints, writers, chrono, notice
      )


def _loop(
  experiment, state, first, loader, checkpoints, writers, chrono, notice
):
  """The steps themselves; see `train`."""
  log_every = experiment.every("every", experiment.config.log)
  eval_every = {
    name: experiment.every("every", entry)
    for name, entry in experiment.config.evals.items()
  }
  norms_every = experiment.every("gradients", experiment.config.log)
  batches = prefetch_to_device(loader, experiment.mesh)
  in_flight = collections.deque()
  spec, program = experiment.step_spec, experiment.program
  active = ()
  if first >= experiment.total_steps:
    log.info("The run is complete at step %d.", first)
  for name, entry in experiment.config.evals.items():
    if first == 0 and entry.get("at_start", False):
      with chrono.pause():
        writers.scalars(0, evaluate(experiment, state, 0, name))

  def save_and_end(step):
    done = f"saved step {step}"
    if step > first:
      check_finite(step, jax.device_get(values))
      checkpoints.save(step, state, timing=chrono.to_dict())
      checkpoints.wait()
    elif not step:
      done = "completed no step"
    raise preemption.Preempted(
      f"received SIGTERM; {done} of {experiment.total_steps} in "
      f"{experiment.workdir}. The same command resumes from there."
    )

  for step in range(first + 1, experiment.total_steps + 1):
    with chrono.waiting():
      try:
        batch = next(batches)
      except Exception as error:
        # A signal to a process group also ends the data workers. (With several
        # hosts none may exit by itself, and `received` is False.)
        if not notice.received:
          raise
        log.warning("No further batch, after SIGTERM: %s", error)
        save_and_end(step - 1)
    if spec.active(step - 1) != active:
      active = spec.active(step - 1)
      log.info("From step %d: %s. Compiling.", step, ", ".join(active))
      chrono.compiles()
    if spec.teacher_starts(step - 1):
      state = program.restart_teacher(state)
    norms = {}
    if norms_every and step % norms_every == 0:
      with chrono.pause():
        norms = jax.device_get(program.encoder_norms(state, batch, active))
    state, values = program.update(state, batch, active)
    # Two steps in flight keep the devices busy; more would only take memory.
    in_flight.append(values["loss"])
    if chrono.compiling or len(in_flight) > 2:
      jax.block_until_ready(in_flight.popleft())
    chrono.step()

    last = step == experiment.total_steps
    if step % log_every == 0 or last or norms or step == first + 1:
      values = jax.device_get(values)
      check_finite(step, values)
      values |= {
        "lr": experiment.optimizer.schedule(step - 1),
        "data/corrupt": loader.stats.corrupt,
        "data/dropped": sum(loader.stats.dropped.values()),
        **{f"{name}/encoder_grad_norm": v for name, v in norms.items()},
      }
      writers.progress(step, sort_metrics(values), chrono.rates(step))
    if (checkpoints.preempted(step) or notice.received) and not last:
      # Before the evaluations, for which there may be no time.
      save_and_end(step)
    due = [n for n, every in eval_every.items() if every and step % every == 0]
    due = list(eval_every) if last else due
    for name in due:
      with chrono.pause():
        writers.scalars(step, evaluate(experiment, state, step, name))
    if checkpoints.due(step) or last:
      check_finite(step, jax.device_get(values))
      with chrono.pause():
        checkpoints.save(step, state, timing=chrono.to_dict())
  return state
