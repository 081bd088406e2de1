"""How long a train step takes, and how much of it is waiting for data."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time

import jax

from mtv_jax import config as config_lib
from mtv_jax import experiment as experiment_lib
from mtv_jax import sharding, train


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
  """

  step_ms: float
  loop_ms: float
  wait: float
  images_per_second: float
  compile_seconds: float
  batch_size: int
  steps: int
  devices: str

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    rows = [
      ("step alone, median", f"{self.step_ms:.1f} ms"),
      ("step in the loop, median", f"{self.loop_ms:.1f} ms"),
      ("waiting for data", f"{self.wait:.1%}"),
      ("images a second", f"{self.images_per_second:.1f}"),
      ("first step, with compilation", f"{self.compile_seconds:.1f} s"),
    ]
    head = f"batch {self.batch_size} on {self.devices}, {self.steps} steps"
    return "\n".join([head, *(f"{a:30}{b:>12}" for a, b in rows)])


def bench_step(config: config_lib.Config, *, steps: int = 20) -> StepSpeed:
  """Times the train step of a config, with and without its input pipeline.

  The step alone runs on one batch again and again: the floor that the loop
  would reach if data cost nothing. Every step is waited for, so nothing runs
  ahead. On several hosts, call it on all.

  Args:
    config: as `train.run` takes it; nothing is saved or evaluated.
    steps: to time, of each kind.
  """
  with tempfile.TemporaryDirectory() as workdir:
    experiment = experiment_lib.build(config, workdir)
  state = train.start(experiment, None)
  update = experiment.program.update
  with experiment_lib.make_loader(experiment, 0) as loader:
    batch = sharding.place_batch(next(loader), experiment.mesh)
    begin = time.perf_counter()
    state, values = jax.block_until_ready(update(state, batch))
    compile_seconds = time.perf_counter() - begin

    alone = []
    for _ in range(steps):
      begin = time.perf_counter()
      state, values = update(state, batch)
      jax.block_until_ready(values)
      alone.append(time.perf_counter() - begin)

    batches = train.placed_batches(loader, experiment.mesh)
    next(batches)
    looped, waits = [], []
    for _ in range(steps):
      begin = time.perf_counter()
      batch = next(batches)
      waits.append(time.perf_counter() - begin)
      state, values = update(state, batch)
      jax.block_until_ready(values)
      looped.append(time.perf_counter() - begin)
  batch_size = experiment.config.batch_size
  device = jax.devices()[0]
  return StepSpeed(
    step_ms=1e3 * statistics.median(alone),
    loop_ms=1e3 * statistics.median(looped),
    wait=sum(waits) / sum(looped),
    images_per_second=batch_size * steps / sum(looped),
    compile_seconds=compile_seconds,
    batch_size=batch_size,
    steps=steps,
    devices=f"{jax.device_count()} x {device.device_kind}",
  )
