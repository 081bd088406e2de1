"""Table of a study's runs: images, FLOPs, estimated time, state."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtv_jax.perf import flops
from mtv_jax.report.run_folders import read_metrics
from mtv_jax.studies import runner
from mtv_jax.studies.expand import Study, StudyRun, code_version
from mtv_jax.train.run import resolve
from mtv_jax.utils.errors import UserError
from mtv_jax.utils.text import align_columns, format_duration

# Maximum batch size for counting; the cost per image hardly depends on it.
_ROWS = 64


def count_flops(settings: Mapping[str, Any]) -> float:
  """Training FLOPs per image once all objectives have started.

  `settings` is a resolved config; see `flops.model_flops`.
  """
  config = resolve(settings)
  spec = flops.build_long_step_spec(config)
  rows = min(config.batch_size, _ROWS)
  batch = flops.abstract_batch(rows, flops.batch_fields(config, spec))
  return flops.model_flops(spec, optax.adam(1e-3), batch) / rows


def known_costs(folder: pathlib.Path) -> Mapping[str, float]:
  """FLOPs stored by a study in the folder, see `Study.costs`.

  Empty without a study, or if its `code_version` differs.
  """
  try:
    study = runner.read(folder)
  except UserError:
    return {}
  return study.costs if study.counted_by == code_version() else {}


def format_runs(
  folder: pathlib.Path, study: Study, *, measure: bool = True
) -> str:
  """A line per run, the total, and the source of the time estimates.

  Estimates use the measured speed of the study's runs. Before any run has
  trained, they use this process's device if `measure`, else they are omitted.
  """
  done = {run.name: runner.is_finished(folder, run) for run in study.runs}
  rate, source = _measure_rate(folder, study.runs, measure)
  rows = [["", "run", "steps", "images", "GFLOP/image", "PFLOP", "time", ""]]
  seconds = 0.0
  for number, run in enumerate(study.runs):
    estimate = run.flops / rate if run.flops and rate else float("nan")
    seconds += 0.0 if done[run.name] else estimate
    rows.append(
      [
        str(number),
        run.name,
        f"{run.steps:,}",
        f"{run.images:,}",
        f"{(run.flops or np.nan) / run.images / 1e9:.3f}",
        f"{(run.flops or np.nan) / 1e15:.3g}",
        format_duration(estimate) if rate else "",
        "finished" if done[run.name] else "",
      ]
    )
  left = len(study.runs) - sum(done.values())
  table = "\n".join(align_columns(rows, left=(1, len(rows[0]) - 1)))
  total = f"{table}\n{left} of {len(study.runs)} runs to train"
  if not rate:
    return total
  return (
    f"{total}, {format_duration(seconds)} {source}, without compilation and"
    " evaluations"
  )


def _measure_rate(
  folder: pathlib.Path, runs: Sequence[StudyRun], measure: bool
) -> tuple[float | None, str]:
  """FLOP/s and a description of their source.

  The median rate of the study's runs if any has trained; else, if `measure`,
  the matmul rate of this process's device, an upper bound.
  """
  rates = [
    run.flops / run.images * speed
    for run in runs
    if run.flops and (speed := _images_per_second(folder, run))
  ]
  if rates:
    return float(np.median(rates)), "at the rate of the runs so far"
  if not measure:
    return None, ""
  rate, device = _matmul_rate(), jax.devices()[0].device_kind
  text = f"at {rate / 1e9:,.0f} GFLOP/s of a matrix product"
  return rate, f"at least, {text} on one {device}"


def _images_per_second(folder: pathlib.Path, run: StudyRun) -> float | None:
  """Median speed of a run; None if unknown."""
  try:
    series = read_metrics(folder / runner.RUNS / run.name)
  except UserError:
    # A crash damaged the log; resuming the run repairs it.
    return None
  speeds = [x for _, x in series.get("speed/images_per_second", ()) if x]
  return float(np.median(speeds)) if speeds else None


def _matmul_rate() -> float:
  """FLOP/s of a float32 matmul of square matrices."""
  size = 1024
  x = jnp.ones((size, size))
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
