"""Benchmarks of the train step, its views and its gradient measurements."""

import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtv_jax.config.sections import Config
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh, shard_batch
from mtv_jax.perf import flops
from mtv_jax.perf.bench import data, harness
from mtv_jax.report.run_folders import read_rows
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.measurements import (
  GradientMeasurements,
  InterferenceConfig,
  measure_interference,
)
from mtv_jax.train.run import make_loader, open_run
from mtv_jax.train.runtime.prefetch import prefetch_to_device
from mtv_jax.utils.errors import InputError, check_choice


class StepTimer:
  """Times a config's train step on one batch that stays on the devices."""

  def __init__(self, config: Config | RunConfig, *, compile: bool = True):
    with tempfile.TemporaryDirectory() as workdir:
      self.run = open_run(config, workdir)
    self.state = initialize_state(self.run)
    with make_loader(self.run, 0) as loader:
      self.batch = shard_batch(next(loader), self.run.mesh)
    self.compile_seconds = self.time_step() if compile else 0.0

  def time_step(self, batch: Any = None) -> float:
    """Wall seconds of one step; `batch` defaults to the timer's."""
    batch = self.batch if batch is None else batch
    with harness.Stopwatch() as watch:
      self.state, values = self.run.train_step.update(self.state, batch)
      jax.block_until_ready((self.state, values))
    return watch.wall

  def median_step(self, steps: int) -> float:
    """Median wall seconds of `steps` steps."""
    return statistics.median(self.time_step() for _ in range(steps))


def matmul_peak(dtype: str) -> float:
  """FLOP/s of large matrix products on all devices, best of 5 rounds."""
  side = 1536 if jax.default_backend() == "cpu" else 8192
  mesh = make_mesh({"data": -1})
  shape = (mesh.size, side, side)
  x = jnp.ones(shape, dtype, device=NamedSharding(mesh, BATCH_SPEC))
  product = jax.jit(lambda a, b: a @ b)
  times = harness.time_rounds(
    [lambda: jax.block_until_ready(product(x, x))], rounds=5
  )
  return float(2.0 * mesh.size * side**3 / times.min())


def run(config: Config, *, steps: int = 20) -> harness.BenchResult:
  """Times a config's train step with and without its input pipeline.

  Timing one repeated batch, blocking after every step, bounds the loop's
  throughput. With several hosts, run it on each.

  Args:
    config: a config as `train` takes it; nothing is saved or evaluated.
    steps: number of steps to time, with and without the pipeline.
  """
  timer = StepTimer(config)
  run = timer.run
  step = timer.median_step(steps)
  waits, loop = [], []
  with make_loader(run, 0) as loader:
    batches = prefetch_to_device(loader, run.mesh)
    next(batches)
    for _ in range(steps):
      with harness.Stopwatch() as wait:
        batch = next(batches)
      waits.append(wait.wall)
      loop.append(wait.wall + timer.time_step(batch))
  images, dtype = run.config.batch_size, str(run.spec.dtype)
  spec, tx = run.spec, run.optimizer.tx
  cost = flops.model_flops(spec, tx, timer.batch)
  peak = matmul_peak(dtype)
  result = harness.BenchResult(
    batch_size=images,
    steps=steps,
    devices=harness.describe_devices(),
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
  add("images_per_second", rate, "  images per second", "{:.1f}")
  seconds = timer.compile_seconds
  add("compile_seconds", seconds, "first step, with compilation", "{:.1f} s")
  return result


def time_views(config: Config, *, steps: int = 5) -> harness.BenchResult:
  """Times a config's views: each alone, all in one program, and the step.

  Args:
    config: a config as `train` takes it.
    steps: number of timed calls of each.
  """
  timer = StepTimer(config)
  spec, mesh = timer.run.spec, timer.run.mesh
  batch = {k: timer.batch[k] for k in ("image", "image_size")}
  rows, canvas = batch["image"].shape[:2]
  sharding = NamedSharding(mesh, BATCH_SPEC)

  def time_alone(names):
    views = functools.partial(flops.make_views, spec, names=names, mesh=mesh)
    jitted = jax.jit(views, in_shardings=sharding, out_shardings=sharding)
    times = harness.time_rounds(
      [lambda: jax.block_until_ready(jitted(batch))], rounds=steps
    )
    return 1e3 * statistics.median(times[:, 0]) / rows

  names = sorted({e.view_name for e in spec.plan if e.tower == "image"})
  step = 1e3 * timer.median_step(steps) / rows
  views, all_ms = {n: time_alone([n]) for n in names}, time_alone(names)
  result = harness.BenchResult(
    batch_size=rows, canvas=canvas, devices=harness.describe_devices()
  )
  add, text = result.add, "{:.3f} ms per image"
  for name, ms in views.items():
    add("views", views, f"view {name}", text.format(ms))
  add("all_views", all_ms, "all views, one program", text)
  add("step", step, "train step", text)
  decode = data.measure_decode_cpu_ms(canvas)
  add("decode", decode, "decode and resize, per core", text)
  result.add("share", all_ms / step, "views / step", "{:.1%}")
  return result


def time_interference(
  config: Config, *, rounds: int = 10, measure: str = "time"
) -> harness.BenchResult:
  """Times the interference meter of a config against its train step.

  Args:
    config: a config as `train` takes it; without `interference`, its defaults
      apply.
    rounds: rounds of the step and of the meter with and without the transfer.
    measure: "time", or "flops", which runs nothing.
  """
  check_choice("measure", measure, ("time", "flops"))
  settings = resolve(config)
  if settings.interference is None:
    settings = dataclasses.replace(settings, interference=InterferenceConfig())
  timer = StepTimer(settings, compile=measure == "time")
  run = timer.run
  spec, measurements = (
    run.spec,
    GradientMeasurements(run.train_step),
  )
  lr = np.float32(run.optimizer.schedule(run.total_steps // 2))
  every = run.length.steps(settings.interference.every)
  meters = (("norms and cosines", None), ("with the transfer", lr))

  def run_meter(lr):
    active = tuple(spec.objectives)
    arrays = measurements.interference(timer.state, timer.batch, active, lr)
    jax.block_until_ready(arrays)

  result = harness.BenchResult(
    batch_size=run.config.batch_size,
    objectives=len(spec.objectives),
    every=every,
    devices=harness.describe_devices(),
  )
  step = flops.model_flops(spec, run.optimizer.tx, timer.batch)
  plain_spec = flops.without_recomputation(spec)
  meter = functools.partial(measure_interference, plain_spec)
  text = f"{{:.2f}} steps, {{:.1%}} of the run at one in {every} steps"
  for label, rate in meters:
    cost = flops.count(meter, timer.state, dict(timer.batch), rate).flops / step
    words = text.format(cost, cost / (every + cost))
    result.add(f"{label} flops", cost, f"{label}, FLOPs", words)
  if measure == "time":
    calls = [functools.partial(run_meter, rate) for _, rate in meters]
    times = harness.time_rounds([timer.time_step, *calls], rounds=rounds)
    step, *times = np.median(times, axis=0).tolist()
    result.add("step", step, "a step, median", "{:.3f} s")
    for (label, _), seconds in zip(meters, times, strict=True):
      cost = seconds / step
      words = text.format(cost, cost / (every + cost))
      result.add(label, seconds, f"{label}, median", words)
  return result


def measure_norms(workdir: str, *, after: int = 0) -> harness.BenchResult:
  """Measures mean norms, and ratios of the largest norm to the smallest.

  Args:
    workdir: a run with `log.gradients_steps` and a balance that has factors.
    after: use only norms logged after this step.
  """
  names, balanced, raw = read_norms(pathlib.Path(workdir), after)
  result = harness.BenchResult(
    run=workdir, after=after, measurements=len(balanced)
  )
  for title, norms in (("balanced", balanced), ("without_factors", raw)):
    means, ratios = mean_norms(norms), norms.max(1) / norms.min(1)
    scatter = np.log(norms).std(0)
    label = title.replace("_", " ")
    ratio = float(means.max() / means.min())
    result.add(f"{title}_ratio", ratio, f"{label}, means' ratio", "{:.1f}")
    values = [*zip(names, means, scatter, strict=True)]
    result.add(title, {name: float(mean) for name, mean, _ in values})
    for name, mean, deviation in values:
      text = f"{mean:.2f}, deviation of the log {deviation:.2f}"
      result.add(f"{title}_{name}_deviation", float(deviation), name, text)
    above = f"{(ratios > 10).sum()} of {len(ratios)} above 10"
    largest = float(ratios.max())
    text = f"{largest:.1f}, {above}"
    result.add(f"{title}_largest", largest, "largest single ratio", text)
  return result


def read_norms(
  workdir: pathlib.Path, after: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Reads names, norms, and norms without balance factors, `[steps, names]`."""
  config = json.loads((workdir / "config.json").read_text())["objectives"]
  weights = {name: entry["weight"] for name, entry in config.items()}
  balanced, raw = [], []
  old_weights = dict(weights)  # Before the update; initially the config's.
  for row in read_rows(workdir / "metrics.jsonl"):
    if any(f"{name}/weight" not in row for name in weights):
      continue
    norms = {n: row.get(f"{n}/encoder_grad_norm") for n in weights}
    if all(norms.values()) and row["step"] > after:
      balanced.append(list(norms.values()))
      raw.append([v * weights[n] / old_weights[n] for n, v in norms.items()])
    old_weights = {name: row[f"{name}/weight"] for name in weights}
  if not balanced:
    raise InputError(
      f"{workdir} has no gradient norms of all objectives after step {after}:"
      " train it with log.gradients_steps."
    )
  return list(weights), np.array(balanced), np.array(raw)


def mean_norms(norms: np.ndarray) -> np.ndarray:
  """Computes geometric means over steps, `[names]`."""
  return np.exp(np.log(norms).mean(0))
