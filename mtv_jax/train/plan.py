"""What a run would do: data, length, evaluations, checkpoints, start."""

import math
import pathlib
import shutil
import time
from collections.abc import Sequence

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
  config, total = experiment.config, experiment.total_steps
  rows = {"data": _list_sources(experiment)}
  if experiment.tokenizer is not None:
    rows["tokenizer"] = [repr(experiment.tokenizer)]
  if batch:
    shares = label_shares(batch).items()
    labels = ", ".join(f"{name} {format_percent(s)}" for name, s in shares)
    where = " of process 0" if jax.process_count() > 1 else ""
    rows["batch"] = [
      f"{len(next(iter(batch.values()))):,} rows{where}, read in {seconds:.1f} "
      f"s (the first one); with labels: {labels or 'none are read'}",
      f"{stats.corrupt} unusable records, {stats.dropped.total()} dropped "
      "labels",
    ]
  size, epoch = config.batch_size, experiment.length.examples_per_epoch
  rows["length"] = [
    f"{total:,} steps of {size:,} examples: {total * size:,}, "
    f"{total * size / epoch:.3g} epochs of {epoch:,}"
  ]
  mesh, state = experiment.mesh, sharding_table(experiment.program.abstract)
  axes = " x ".join(f"{mesh.shape[axis]} {axis}" for axis in MESH_AXES)
  rows["devices"] = [
    f"{mesh.size} {mesh.devices.flat[0].device_kind}, {axes}, processes: "
    f"{jax.process_count()}; the state takes "
    f"{format_bytes(sum(row[3] for row in state))} a device, activations more "
    "(preflight)"
  ]
  evaluations = list_evaluations(experiment)
  rows["evaluations"] = [
    f"{name} on {data}{_count(evaluator)}, {schedule}"
    for name, evaluator in experiment.evaluators.items()
    for data, schedule in [evaluations[name]]
  ] or ["none"]
  rows["checkpoints"] = _describe_checkpoints(experiment, first)
  rows["start"] = _describe_start(experiment, first, changes)
  lines = [f"Dry run of {experiment.workdir}: nothing is compiled or written."]
  for name, texts in rows.items():
    titles = [name, *[""] * (len(texts) - 1)]
    pairs = zip(titles, texts, strict=True)
    lines += [f"{title:12}{text}" for title, text in pairs]
  return "\n".join(lines)


def _describe_start(
  experiment: Experiment, first: int, changes: Sequence[str]
) -> list[str]:
  init, total = experiment.config.init, experiment.total_steps
  source = f"the weights of {init.path}" if init else "random parameters"
  start = f"at step 0, from {source}"
  if first:
    start = f"resumes at step {first:,} of {total:,}, from its last checkpoint"
  if first >= total:
    start = f"complete at step {first:,}: trains no step"
  text = f"its config.json differs:\n{first_lines(changes, 20)}"
  return [start, text] if changes else [start]


def _list_sources(experiment: Experiment) -> list[str]:
  weights = [read_weight(entry) for entry in experiment.config.data.train]
  rows = []
  for source, weight in zip(experiment.sources, weights, strict=True):
    described = source.describe()
    labels = ", ".join(described.get("labels", {})) or "none"
    share = f"; {format_percent(weight / sum(weights))} of a batch"
    rows.append(
      f"{described['name']}: {len(source):,} records; label sets: {labels}"
      f"{share if len(weights) > 1 else ''}"
    )
  return rows


def _count(evaluator: evals_base.Evaluator) -> str:
  count = evaluator.count_images()
  return "" if count is None else f" ({count:,} images)"


def _describe_checkpoints(experiment: Experiment, first: int) -> list[str]:
  options, total = experiment.config.checkpoint, experiment.total_steps
  every = experiment.length.steps(options.every)
  leaves = jax.tree.leaves(experiment.program.abstract)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  # The last `keep`, one that is being written, and the periodic ones.
  kept = min(options.keep, math.ceil(total / every)) + 1
  periodic = total // options.keep_every if options.keep_every else 0
  needed = size * (kept + periodic)
  forever = f", and every {options.keep_every:,}" if periodic else ""
  rows = [
    f"every {every:,} steps, the last {options.keep} stay{forever}; "
    f"{format_bytes(size)} each, at most {format_bytes(needed)}"
  ]
  if not path_lib.is_remote(experiment.workdir):
    folder = pathlib.Path(experiment.workdir).absolute()
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    lacks = free < needed - size * (first > 0)
    warning = "WARNING: this may not suffice: " if lacks else ""
    rows.append(f"{warning}{format_bytes(free)} are free")
  return rows
