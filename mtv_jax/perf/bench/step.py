"""How long a train step takes, and how much of it is waiting for data."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from mtv_jax.config import schema
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf.bench import floors, flops
from mtv_jax.train.experiment import Experiment, build_experiment, make_loader
from mtv_jax.train.loop import init_or_restore, prefetch_to_device
from mtv_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepSpeed:
  """What `bench_step` measured.

  Attributes:
    step_ms: median of a step that starts with its batch on the devices.
    loop_ms: median from one step to the next with the input pipeline running.
    wait: share of the loop's time spent waiting for data, 0 to 1.
    images_per_second: of the loop, over all devices.
    compile_seconds: of the first step, compilation included.
    batch_size: global.
    steps: timed in each of the two.
    devices: kind and number.
    dtype: of the computation.
    flops: that a step needs, without recomputation; see `flops.model_flops`.
    peak: FLOP a second of large matrix products in that dtype, in this run.
  """

  step_ms: float
  loop_ms: float
  wait: float
  images_per_second: float
  compile_seconds: float
  batch_size: int
  steps: int
  devices: str
  dtype: str
  flops: float
  peak: float

  @property
  def flops_per_second(self) -> float:
    """Of the step alone."""
    return self.flops / (self.step_ms / 1e3)

  @property
  def share(self) -> float:
    """Of the peak that the step alone reaches, 0 to 1."""
    return self.flops_per_second / self.peak

  def to_json(self) -> str:
    """As one line of JSON."""
    more = {"flops_per_second": self.flops_per_second, "share": self.share}
    return json.dumps({**dataclasses.asdict(self), **more})

  def __str__(self) -> str:
    rows = [
      ("step alone, median", f"{self.step_ms:.1f} ms"),
      ("  of it, useful", f"{self.flops_per_second / 1e9:.1f} GFLOP/s"),
      ("  matrix products alone", f"{self.peak / 1e9:.1f} GFLOP/s"),
      ("  share of that peak", f"{self.share:.1%}"),
      ("step in the loop, median", f"{self.loop_ms:.1f} ms"),
      ("  waiting for data", f"{self.wait:.1%}"),
      ("images a second", f"{self.images_per_second:.1f}"),
      ("first step, with compilation", f"{self.compile_seconds:.1f} s"),
    ]
    head = (
      f"batch {self.batch_size} on {self.devices}, {self.dtype},"
      f" {self.steps} steps"
    )
    return "\n".join([head, *(f"{a:30}{b:>16}" for a, b in rows)])


class Alone:
  """A config's step on one batch that lies on the devices.

  Attributes:
    experiment: of the config.
    state: after the steps so far.
    batch: on the devices.
    compile_seconds: of the first step.
  """

  def __init__(self, config: schema.Config):
    with tempfile.TemporaryDirectory() as workdir:
      self.experiment: Experiment = build_experiment(config, workdir)
    self.state: TrainState = init_or_restore(self.experiment, None)
    with make_loader(self.experiment, 0) as loader:
      self.batch = shard_batch(next(loader), self.experiment.mesh)
    self.compile_seconds = self.step()

  def step(self, batch: Any = None) -> float:
    """Seconds of one step, waited for."""
    begin = time.perf_counter()
    batch = self.batch if batch is None else batch
    self.state, values = self.experiment.program.update(self.state, batch)
    jax.block_until_ready((self.state, values))
    return time.perf_counter() - begin


def bench_step(config: schema.Config, *, steps: int = 20) -> StepSpeed:
  """Times the train step of a config, with and without its input pipeline.

  The step alone runs on one batch again and again: the floor that the loop
  would reach if data cost nothing. Every step is waited for, so nothing runs
  ahead. On several hosts, call it on all.

  Args:
    config: as `train` takes it; nothing is saved or evaluated.
    steps: to time, of each kind.
  """
  alone = Alone(config)
  experiment = alone.experiment
  times = [alone.step() for _ in range(steps)]
  looped, waits = [], []
  with make_loader(experiment, 0) as loader:
    batches = prefetch_to_device(loader, experiment.mesh)
    next(batches)
    for _ in range(steps):
      wait = _next(batches)
      waits.append(wait.seconds)
      looped.append(wait.seconds + alone.step(wait.batch))
  batch_size = experiment.config.batch_size
  dtype = str(experiment.step_spec.dtype)
  return StepSpeed(
    step_ms=1e3 * statistics.median(times),
    loop_ms=1e3 * statistics.median(looped),
    wait=sum(waits) / sum(looped),
    images_per_second=batch_size * steps / sum(looped),
    compile_seconds=alone.compile_seconds,
    batch_size=batch_size,
    steps=steps,
    devices=floors.devices(),
    dtype=dtype,
    flops=flops.model_flops(
      experiment.step_spec, experiment.optimizer.tx, alone.batch
    ),
    peak=floors.matmul_peak(dtype),
  )


@dataclasses.dataclass(frozen=True)
class _Wait:
  """A batch, and how long it took to come."""

  batch: Any
  seconds: float


def _next(batches: Iterator[Any]) -> _Wait:
  begin = time.perf_counter()
  batch = next(batches)
  return _Wait(batch, time.perf_counter() - begin)
