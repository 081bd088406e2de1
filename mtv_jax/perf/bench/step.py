"""Train step benchmark: the step alone and behind its input pipeline."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import jax

from mtv_jax.config import schema
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops
from mtv_jax.perf.bench import floors, harness
from mtv_jax.train.experiment import build_experiment, make_loader
from mtv_jax.train.loop import init_or_restore, prefetch_to_device


class StepTimer:
  """A config's train step, timed on one batch that stays on the devices."""

  def __init__(self, config: schema.Config):
    with tempfile.TemporaryDirectory() as workdir:
      self.experiment = build_experiment(config, workdir)
    # After the steps so far.
    self.state = init_or_restore(self.experiment, None)
    with make_loader(self.experiment, 0) as loader:
      self.batch = shard_batch(next(loader), self.experiment.mesh)
    self.compile_seconds = self.time_step()

  def time_step(self, batch: Any = None) -> float:
    """Seconds of one step, waited for; by default on the timer's batch."""
    batch = self.batch if batch is None else batch
    with harness.Stopwatch() as watch:
      self.state, values = self.experiment.program.update(self.state, batch)
      jax.block_until_ready((self.state, values))
    return watch.wall

  def median_step(self, steps: int) -> float:
    """Median seconds of some steps."""
    return statistics.median(self.time_step() for _ in range(steps))


def run(config: schema.Config, *, steps: int = 20) -> harness.Result:
  """Times the train step of a config with and without its input pipeline.

  The step alone repeats one batch: the limit that the loop reaches if data
  costs nothing. Every step is waited for. On several hosts, run it on all.

  Args:
    config: as `train` takes it; nothing is saved or evaluated.
    steps: to time, with and without the pipeline.
  """
  timer = StepTimer(config)
  experiment = timer.experiment
  step = timer.median_step(steps)
  waits, loop = [], []
  with make_loader(experiment, 0) as loader:
    batches = prefetch_to_device(loader, experiment.mesh)
    next(batches)
    for _ in range(steps):
      with harness.Stopwatch() as wait:
        batch = next(batches)
      waits.append(wait.wall)
      loop.append(wait.wall + timer.time_step(batch))
  images, dtype = experiment.config.batch_size, str(experiment.step_spec.dtype)
  cost = flops.model_flops(
    experiment.step_spec, experiment.optimizer.tx, timer.batch
  )
  peak = floors.matmul_peak(dtype)
  result = harness.Result(
    batch_size=images,
    steps=steps,
    devices=floors.describe_devices(),
    dtype=dtype,
    flops=cost,
  )
  add, gflops = result.add, "{:.1f} GFLOP/s"
  add("step_ms", 1e3 * step, "step alone, median", "{:.1f} ms")
  speed = cost / step
  add("flops_per_second", speed, "  without recomputation", gflops, 1e9)
  add("peak", peak, "  matrix products alone", gflops, 1e9)
  add("share", speed / peak, "  share of that peak", "{:.1%}")
  loop_ms, rate = 1e3 * statistics.median(loop), images * steps / sum(loop)
  add("loop_ms", loop_ms, "step in the loop, median", "{:.1f} ms")
  add("wait", sum(waits) / sum(loop), "  waiting for data", "{:.1%}")
  add("images_per_second", rate, "  images a second", "{:.1f}")
  seconds = timer.compile_seconds
  add("compile_seconds", seconds, "first step, with compilation", "{:.1f} s")
  return result
