"""Benchmark of the device views, beside the step and decoding on the host."""

from __future__ import annotations

import functools
import statistics

import jax
from jax.sharding import NamedSharding

from mtv_jax.config import schema
from mtv_jax.parallel.mesh import BATCH_SPEC
from mtv_jax.perf import flops
from mtv_jax.perf.bench import data, floors, harness
from mtv_jax.perf.bench.step import StepTimer


def run(config: schema.Config, *, steps: int = 5) -> harness.Result:
  """Times the views of a config alone, in one program, and in the step.

  Args:
    config: as `train` takes it.
    steps: to time of each.
  """
  timer = StepTimer(config)
  spec, mesh = timer.experiment.step_spec, timer.experiment.mesh
  batch = {k: timer.batch[k] for k in ("image", "image_size")}
  rows, canvas = batch["image"].shape[:2]
  split = NamedSharding(mesh, BATCH_SPEC)

  def time_views(names):
    views = functools.partial(flops.make_views, spec, names=names, mesh=mesh)
    jitted = jax.jit(views, in_shardings=split, out_shardings=split)
    times = harness.time_rounds(
      [lambda: jax.block_until_ready(jitted(batch))], rounds=steps
    )
    return 1e3 * statistics.median(times[:, 0]) / rows

  names = sorted({e.view for e in spec.plan if e.tower == "image"})
  step = 1e3 * timer.median_step(steps) / rows
  views, together = {n: time_views([n]) for n in names}, time_views(names)
  result = harness.Result(
    batch_size=rows, canvas=canvas, devices=floors.describe_devices()
  )
  for name, ms in views.items():
    result.add("views", views, f"view {name}", f"{ms:.3f} ms an image")
  for name, ms, label in (
    ("all_views", together, "all views, one program"),
    ("step", step, "train step"),
    ("decode", data.decode_cpu_ms(canvas), "decode and resize, a core"),
  ):
    result.add(name, ms, label, "{:.3f} ms an image")
  result.add("share", together / step, "views / step", "{:.1%}")
  return result
