"""What a run would do: data, length, evaluations, checkpoints, start."""

import math
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence

import jax

from mtv_jax.data import order
from mtv_jax.data.pipeline import Batch
from mtv_jax.data.registry import read_weight
from mtv_jax.data.stats import Stats
from mtv_jax.evals.core import base as evals_base
from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import sharding_table
from mtv_jax.train.build_step import TrainStep
from mtv_jax.train.experiment import Experiment, make_loader
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.text import (
  first_lines,
  format_bytes,
  format_percent,
  format_setting,
)

_INDENT = 12  # Columns of a line's title.


def read_batch(
  experiment: Experiment, step: int, skipped: order.SkippedBatches = ()
) -> tuple[Batch, float, Stats]:
  """Reads this process's rows of the batch after `step` updates.

  Returns the rows, the seconds from opening the loader on, and the counts of
  unusable records.
  """
  begin = time.perf_counter()
  with make_loader(experiment, step, skipped) as loader:
    batch = next(loader)
    return batch, time.perf_counter() - begin, loader.stats


def label_shares(batch: Batch) -> dict[str, float]:
  """Share of a batch's rows that have each kind of label."""
  labels = {
    name.removesuffix("_valid"): values
    for name, values in batch.items()
    if name == "depth" or name.endswith("_valid")
  }
  return {
    name: float(values.reshape(len(values), -1).any(axis=1).mean())
    for name, values in labels.items()
  }


def list_evaluations(step: TrainStep) -> dict[str, tuple[str, str]]:
  """Data and schedule of each evaluation of a config; opens no data."""
  rows = {}
  for name, entry in step.config.evals.items():
    defaults = evals_base.default_options(entry.type)
    data = entry.options.get("data", defaults.get("data"))
    every = step.length.steps(entry.every)
    count = math.ceil(step.total_steps / every) if every else 1
    count += bool(entry.at_start or entry.bound)
    schedule = f"every {every:,} steps" if every else "after the last step"
    schedule += f", {count} times" if count > 1 else ""
    rows[name] = (
      "no data" if data is None else format_setting(data, 60),
      schedule,
    )
  return rows


def describe(
  experiment: Experiment,
  first: int,
  batch: Batch | None = None,
  seconds: float = 0.0,
  stats: Stats | None = None,
  *,
  changes: Sequence[str] = (),
) -> str:
  """Describes a run that would start after `first` updates, a line a subject.

  `batch`, `seconds` and `stats` are from `read_batch`; `changes` are lines on
  the config of a run that resumes.
  """
  rows = [
    *_describe_data(experiment),
    *(_describe_batch(batch, seconds, stats) if batch else ()),
    *_describe_length(experiment),
    *_describe_evaluations(experiment),
    *_describe_checkpoints(experiment, first),
    *_describe_start(experiment, first, changes),
  ]
  head = f"Dry run of {experiment.workdir}: nothing is compiled or written."
  return "\n".join([head, *(f"{name:{_INDENT}}{text}" for name, text in rows)])


def _describe_data(experiment: Experiment) -> Iterator[tuple[str, str]]:
  entries, title = experiment.config.data.train, "data"
  weights = [read_weight(entry) for entry in entries]
  for source, weight in zip(experiment.sources, weights, strict=True):
    described = source.describe()
    labels = ", ".join(described.get("labels", {})) or "none"
    text = f"{described['name']}: {len(source):,} records; label sets: {labels}"
    if len(weights) > 1:
      text += f"; {format_percent(weight / sum(weights))} of a batch"
    yield title, text
    title = ""
  if experiment.tokenizer is not None:
    yield "tokenizer", f"{experiment.tokenizer!r}"


def _describe_batch(
  batch: Batch, seconds: float, stats: Stats
) -> Iterator[tuple[str, str]]:
  count = len(next(iter(batch.values())))
  shares = label_shares(batch).items()
  labels = ", ".join(f"{name} {format_percent(s)}" for name, s in shares)
  where = " of process 0" if jax.process_count() > 1 else ""
  yield (
    "batch",
    f"{count:,} rows{where}, read in {seconds:.1f} s (the first one)",
  )
  yield "", f"rows with labels: {labels or 'none are read'}"
  dropped = sum(stats.dropped.values())
  yield "", f"{stats.corrupt} unusable records, {dropped} dropped labels"


def _describe_length(experiment: Experiment) -> Iterator[tuple[str, str]]:
  size, mesh = experiment.config.batch_size, experiment.mesh
  steps, epoch = experiment.total_steps, experiment.length.examples_per_epoch
  yield (
    "length",
    f"{steps:,} steps of {size:,} examples: {steps * size:,}, "
    f"{steps * size / epoch:.3g} epochs of {epoch:,}",
  )
  state = sum(row[3] for row in sharding_table(experiment.program.abstract))
  axes = " x ".join(f"{mesh.shape[axis]} {axis}" for axis in MESH_AXES)
  device = mesh.devices.flat[0].device_kind
  yield (
    "devices",
    f"{mesh.size} {device}, {axes}, processes: {jax.process_count()}; the state"
    f" takes {format_bytes(state)} a device, activations more (preflight)",
  )


def _describe_evaluations(experiment: Experiment) -> Iterator[tuple[str, str]]:
  rows, title = list_evaluations(experiment), "evaluations"
  for name, evaluator in experiment.evaluators.items():
    data, schedule = rows[name]
    count = evaluator.count_images()
    size = f" ({count:,} images)" if count is not None else ""
    yield title, f"{name} on {data}{size}, {schedule}"
    title = ""
  if not experiment.evaluators:
    yield title, "none"


def _describe_checkpoints(
  experiment: Experiment, first: int
) -> Iterator[tuple[str, str]]:
  options, total = experiment.config.checkpoint, experiment.total_steps
  every = experiment.length.steps(options.every)
  leaves = jax.tree.leaves(experiment.program.abstract)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  # The last `keep`, one that is being written, and the periodic ones.
  kept = min(options.keep, math.ceil(total / every)) + 1
  periodic = options.keep_every and total // options.keep_every
  forever = f", and every {options.keep_every:,}" if periodic else ""
  needed = size * (kept + (periodic or 0))
  yield (
    "checkpoints",
    f"every {every:,} steps, the last {options.keep} stay{forever}; "
    f"{format_bytes(size)} each, at most {format_bytes(needed)}",
  )
  if path_lib.is_remote(experiment.workdir):
    return
  folder = pathlib.Path(experiment.workdir).absolute()
  folder = next(p for p in (folder, *folder.parents) if p.exists())
  free = shutil.disk_usage(folder).free
  text = f"{format_bytes(free)} are free"
  if free < needed - size * (first > 0):
    text = f"WARNING: {text}, which may not suffice"
  yield "", text


def _describe_start(
  experiment: Experiment, first: int, changes: Sequence[str]
) -> Iterator[tuple[str, str]]:
  config, total = experiment.config, experiment.total_steps
  source = f"the weights of {config.init.path}" if config.init else ""
  text = f"at step 0, from {source or 'random parameters'}"
  if first:
    text = f"resumes at step {first:,} of {total:,}, from its last checkpoint"
  if first >= total:
    text = f"complete at step {first:,}: trains no step"
  yield "start", text
  if changes:
    yield "", f"its config.json differs:\n{first_lines(changes, 20)}"
