"""Description of a run: lines that `train` logs and `--dry_run` prints."""

import collections
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mtv_jax.config import origin
from mtv_jax.data.pipeline import Batch
from mtv_jax.data.registry import read_weight
from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import sharding_table
from mtv_jax.train.config import RunConfig
from mtv_jax.train.hooks import Hook
from mtv_jax.train.optim.param_rules import describe_rules
from mtv_jax.train.param_source import open_param_source
from mtv_jax.train.run import Run, make_loader
from mtv_jax.utils import atomic, xla_flags
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import UserError
from mtv_jax.utils.text import format_bytes, format_percent
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)

PARAMETERS = "parameters.txt"


def describe_facts(run: Run) -> dict[str, Any]:
  """Data sources, and number of parameters by tower and head, as JSON."""
  parameters = collections.Counter()
  for name, x in flatten_with_names(run.train_step.abstract.params):
    parameters[name.partition("/")[0]] += x.size
  return {"data": run.source_descriptions, "parameters": parameters}


def describe_origin(
  config: RunConfig,
  sources: Sequence[Mapping[str, Any]],
  recorded: origin.Origin | None = None,
) -> origin.Origin:
  """Lists what a run starts and learns from; `sources` describe its open data.

  A resumed run adds to what earlier sessions `recorded`.
  """
  recorded = recorded or origin.Origin()
  labels, data = dict(recorded.labels), dict.fromkeys(recorded.data)
  for entry, source in zip(config.data.train, sources, strict=True):
    name = str(source["name"])
    # Omits the path of a folder or a bucket.
    is_public = name.startswith(("hf:", "tfds:"))
    data[name if is_public else name.rstrip("/").rpartition("/")[2]] = None
    for name in source.get("labels", ()):
      kind, _, teacher = name.partition(".")
      label_set = entry["labels"][kind]
      label_set = label_set[teacher] if teacher else label_set
      if isinstance(label_set, Mapping):
        label_set = label_set["path"]
      folder = path_lib.as_path(label_set)
      label_origin = origin.read_file(folder / origin.FILE)
      labels[name] = label_origin or origin.Origin(name=folder.name)
  teachers = dict(recorded.teachers)
  for name, teacher in config.teachers.items():
    if teacher.path and name not in teachers:
      teachers[name] = _read_origin(teacher.path)
  init = recorded.init
  if init is None and config.init:
    init = _read_origin(config.init.path)
  return origin.Origin(
    training="lora" if config.lora else "full",
    init=init,
    teachers=teachers,
    labels=labels,
    data=tuple(data),
  )


def _read_origin(path: str) -> origin.Origin:
  """Reads a source's origin; only its name if a resumed run can't read it."""
  try:
    return open_param_source().read_origin(path)
  except (UserError, OSError) as error:
    log.warning("The origin of %s is not recorded: %s", path, error)
    return origin.Origin(name=path_lib.as_path(path).name)


def describe_run(run: Run, hooks: Sequence[Hook] = ()) -> list[str]:
  """Describes data, model, devices, length and hooks of a run."""
  config, length = run.config, run.length
  mesh, state = run.mesh, run.train_step.abstract
  lines = _list_sources(run)
  if run.tokenizer is not None:
    lines.append(f"Tokenizer: {run.tokenizer!r}.")
  table = run.optimizer.table
  sizes = {row.name: math.prod(row.shape) for row in table}
  num_trained = sum(sizes[row.name] for row in table if not row.frozen)
  lines.append(
    f"{sum(sizes.values()):,} parameters, {num_trained:,} of them trained."
  )
  if run.optimizer.note:
    lines.append(run.optimizer.note)
  axes = " x ".join(f"{mesh.shape[axis]} {axis}" for axis in MESH_AXES)
  state_bytes = sum(row[3] for row in sharding_table(state))
  lines.append(
    f"The state takes {format_bytes(state_bytes)} per device, on a mesh of"
    f" {axes} ({mesh.size} {mesh.devices.flat[0].device_kind}, processes:"
    f" {jax.process_count()})."
  )
  if config.xla_flags:
    platform = mesh.devices.flat[0].platform
    flags = xla_flags.select_flags(config.xla_flags, platform)
    text = ", ".join(f"{name}={value}" for name, value in flags.items())
    text = text or f"unused on {platform.upper()}s"
    lines.append(f"XLA flags {config.xla_flags}: {text}.")
  if state.teacher or state.ema:
    lines.append(
      f"Evaluations and exports read the {config.weights} weights "
      "(config.weights), unless they set others."
    )
  plan = ", ".join(map(str, run.spec.plan))
  lines.append(f"Encodings: {plan}.")
  steps, size = run.total_steps, config.batch_size
  epoch = length.examples_per_epoch
  lines.append(
    f"{steps:,} steps of {size:,} examples: {steps * size / epoch:.3g} epochs"
    f" of {epoch:,} examples, {epoch / size:.1f} steps each."
  )
  for hook in hooks:
    lines += hook.describe(run)
  return lines


def describe_start(run: Run, first: int) -> list[str]:
  """Reads the batch after `first` updates; describes it and the start.

  Ignores batches skipped by rollbacks.
  """
  total, init = run.total_steps, run.config.init
  if first >= total:
    return [f"Complete at step {first:,}: nothing left to train."]
  begin = time.perf_counter()
  with make_loader(run, first) as loader:
    batch = next(loader)
  seconds = time.perf_counter() - begin
  rows = len(next(iter(batch.values())))
  labels = ", ".join(
    f"{kind} {format_percent(float(mask.mean()))}"
    for kind, mask in find_labelled(batch).items()
  )
  source = f"the weights of {init.path}" if init else "random parameters"
  where = f"at step 0, from {source}"
  if init and init.branch:
    where = f"at step {init.step or 'the last'} of {init.path}"
  if first:
    where = f"at step {first:,} of {total:,}, from the last checkpoint"
  return [
    f"Read a batch of {rows:,} rows in {seconds:.1f} s (process"
    f" {jax.process_index()}). With labels: {labels or 'none are read'}.",
    f"Starts {where}.",
  ]


def find_labelled(batch: Batch) -> dict[str, np.ndarray]:
  """bool [B] by kind of label: which rows of a batch have such a label."""
  fields = dict(captions="caption_valid", boxes="box_valid", depth="depth")
  return {
    kind: (batch[field] > 0).reshape(len(batch[field]), -1).any(axis=1)
    for kind, field in fields.items()
    if field in batch
  }


def log_run(run: Run, hooks: Sequence[Hook] = ()) -> None:
  """Logs the description; writes parameters, rules and origin to files."""
  for line in describe_run(run, hooks):
    log.info(line)
  if jax.process_index() == 0:
    overview = parameter_overview.get_parameter_overview
    params = run.train_step.abstract.params
    text = overview(params, include_stats="sharding")
    rules = describe_rules(run.optimizer.table)
    run.workdir.mkdir(parents=True, exist_ok=True)
    atomic.write_text(run.workdir / PARAMETERS, f"{text}\n{rules}\n")
    path = run.workdir / origin.FILE
    sources = run.source_descriptions
    try:
      recorded = origin.read_file(path)
    except (UserError, OSError) as error:
      log.warning(
        "%s: rewriting it without the sources of earlier sessions.",
        error,
      )
      recorded = None
    run_origin = describe_origin(run.config, sources, recorded)
    atomic.write_text(path, origin.to_json(run_origin))


def _list_sources(run: Run) -> list[str]:
  weights = [read_weight(entry) for entry in run.config.data.train]
  lines = []
  for source, weight in zip(run.sources, weights, strict=True):
    description, share = source.describe(), weight / sum(weights)
    parts = [f"Data: {description['name']}, {len(source):,} records"]
    if labels := description.get("labels"):
      parts.append(f"label sets: {', '.join(labels)}")
    parts.append(f"{format_percent(share)} of a batch.")
    lines.append("; ".join(parts))
  return lines
