"""An experiment: a checked config and everything that is built from it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mtv_jax.augment import views
from mtv_jax.config import schema
from mtv_jax.data import ops, pipeline, tokenizers
from mtv_jax.data import registry as sources_lib
from mtv_jax.data.labels.join import join_labels
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import base as evals_base
from mtv_jax.models import two_tower as model_lib
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import (
  MESH_AXES,
  check_batch_size,
  host_rows,
  make_mesh,
)
from mtv_jax.parallel.rules import check_sharding_rules, sharding_table
from mtv_jax.train import optim
from mtv_jax.train.step import Program, make_program
from mtv_jax.train.step_spec import ObjectiveWeight, StepSpec, abstract_params
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A checked config and everything that is built from it.

  Attributes:
    config: resolved, defaults filled in.
    workdir: the run's folder.
    mesh: of all devices of all processes.
    step_spec: what the train step computes.
    tokenizer: of the captions; None for a model without text.
    sources: of `config.data.train`, in order.
    examples_per_epoch: records of all sources together.
    total_steps: of the run.
    optimizer: with its schedule and its table of rules.
    program: the compiled step and the shape of its state.
    evaluators: of `config.evals`.
  """

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  step_spec: StepSpec
  tokenizer: Any
  sources: list[Any]
  examples_per_epoch: int
  total_steps: int
  optimizer: optim.Optimizer
  program: Program
  evaluators: dict[str, evals_base.Evaluator]

  def every(self, name: str, section: ConfigDict) -> int | None:
    """A duration of a section in steps, None where it has none."""
    return schema.steps(
      name,
      section,
      batch_size=self.config.batch_size,
      examples_per_epoch=self.examples_per_epoch,
      total_steps=self.total_steps,
      default=None,
    )


def build_step_spec(config: ConfigDict, total_steps: int) -> StepSpec:
  """The train step of a resolved config."""
  options = model_lib.runtime(config.model)
  weights = {
    name: _weight(name, entry, config.batch_size, total_steps)
    for name, entry in config.objectives.items()
  }
  if weights and not any(weight.active(0) for weight in weights.values()):
    first = min(weight.start for weight in weights.values())
    raise ConfigError(
      f"config.objectives: the first one starts at step {first}; at least one "
      "must start at step 0."
    )
  built_views = views.build_views(config.views.to_dict())
  model = model_lib.ModelSpec.from_config(config.model)
  objectives = {
    name: build_objective(name, entry).resolve(model, built_views)
    for name, entry in config.objectives.items()
  }
  read = {e for o in objectives.values() for e in o.needs().encodings}
  # Recorded in the resolved config, from which the run's model is opened.
  if any(built_views[e.view].max_masked for e in read if e.view in built_views):
    config.model.mask_token = True
  if config.model.text and all(e.tower != "text" for e in read):
    log.warning("No objective reads text: config.model.text is left out.")
    config.model.text = None
  spec = StepSpec(
    model=model_lib.ModelSpec.from_config(config.model),
    dtype=jnp.dtype(options.pop("dtype", "float32")),
    runtime=options,
    objectives=objectives,
    weights=weights,
    views=built_views,
    seed=config.seed,
    total_steps=total_steps,
    teacher_momentum=config.teacher.momentum,
    teacher_end=config.teacher.end,
    ema_decay=config.ema.decay if config.ema else None,
    accumulate=config.accumulate,
  )
  if not config.optim.rules:
    return spec
  shapes = abstract_params(spec)
  table = optim.match_param_rules(shapes, config.optim.rules)
  return dataclasses.replace(
    spec, frozen=frozenset(row.name for row in table if row.frozen)
  )


def _weight(
  name: str, entry: ConfigDict, batch_size: int, total_steps: int
) -> ObjectiveWeight:
  """A number, or dict(value, start_steps|percent.., ramp_steps|percent..)."""
  weight, where = entry.weight, f"config.objectives.{name}.weight"
  if not isinstance(weight, ConfigDict):
    return ObjectiveWeight(_not_negative(weight, where))
  known = [f"{k}_{u}" for k in ("start", "ramp") for u in schema.UNITS]
  for key in weight:
    if key not in ("value", *known):
      raise ConfigError(
        f"{where}: no key {key!r}. {did_you_mean(key, ['value', *known])}"
      )
  start, ramp = (
    schema.steps(
      key, weight, batch_size=batch_size, total_steps=total_steps, default=0
    )
    for key in ("start", "ramp")
  )
  if start >= total_steps:
    raise ConfigError(
      f"{where}: it starts at step {start} of a run of {total_steps} steps "
      "and would never be trained."
    )
  value = _not_negative(weight.get("value", 1.0), f"{where}.value")
  return ObjectiveWeight(value, start, ramp)


def _not_negative(value: Any, where: str) -> float:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not 0 <= value < math.inf:
    raise ConfigError(f"{where} is {value!r}; expected a number >= 0.")
  return float(value)


def make_config_mesh(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of a resolved config; checks that it divides the batch.

  Args:
    config: resolved.
    devices: of the mesh; all by default.

  Raises:
    ConfigError: the sizes don't fit the devices, or the batch doesn't fit.
  """
  mesh = make_mesh(config.mesh, devices)
  if config.batch_size % config.accumulate:
    raise ConfigError(
      f"config.batch_size is {config.batch_size}, which config.accumulate="
      f"{config.accumulate} does not divide."
    )
  check_batch_size(config.batch_size // config.accumulate, mesh)
  return mesh


def build_program(
  config: ConfigDict, spec: StepSpec, mesh: Mesh, examples: int
) -> tuple[optim.Optimizer, Program]:
  """The optimizer and the train step of a resolved config; compiles nothing.

  Args:
    config: resolved.
    spec: from `build_step_spec`.
    mesh: from `make_config_mesh`.
    examples: of an epoch, for durations.

  Raises:
    ConfigError: for an invalid rule, or one that matches no parameter.
  """
  params = abstract_params(spec)
  optimizer = optim.make_optimizer(
    config.optim,
    config.schedule,
    total_steps=spec.total_steps,
    batch_size=config.batch_size,
    examples_per_epoch=examples,
    params=params,
    attention_heads=spec.attention_heads,
  )
  names = [name for name, _ in flatten_with_names(params)]
  check_sharding_rules(config.sharding, names)
  program = make_program(spec, optimizer.tx, mesh, config.sharding)
  return optimizer, program


def build_experiment(
  config: schema.Config, workdir: str | os.PathLike
) -> Experiment:
  """Checks a config and builds everything but the state.

  Raises:
    ConfigError: for anything in the config that can't be used.
  """
  config = schema.check_config(config)
  if "://" in str(workdir):
    raise ConfigError(
      f"--workdir={workdir}: a run is not written to a bucket directly; mount "
      "it (with gcsfuse, for example) and give the folder's path."
    )
  mesh = make_config_mesh(config)
  tokenizer = None
  if text := config.model.text:
    # Before the data, which may take long to open.
    tokenizer = tokenizers.build_tokenizer(text.tokenizer, clean=text.clean)
    tokenizers.check_vocabulary(
      tokenizer, text.vocab_size, where="config.model.text.vocab_size"
    )
  entries = config.data.to_dict()["train"]
  sources = [
    sources_lib.build_source({**entry, "labels": None}) for entry in entries
  ]
  examples = sum(len(source) for source in sources)
  total_steps = schema.total_steps(config, examples)
  spec = build_step_spec(config, total_steps)
  # Labels that no objective reads are not opened.
  read = build_data_ops(config, spec, tokenizer).labels
  sources = [
    join_labels(source, entry["labels"], fields=read)
    if entry.get("labels")
    else source
    for source, entry in zip(sources, entries, strict=True)
  ]
  optimizer, program = build_program(config, spec, mesh, examples)
  return Experiment(
    config=config,
    workdir=pathlib.Path(workdir),
    mesh=mesh,
    step_spec=spec,
    tokenizer=tokenizer,
    sources=sources,
    examples_per_epoch=examples,
    total_steps=total_steps,
    optimizer=optimizer,
    program=program,
    evaluators=_evaluators(config, spec),
  )


def _evaluators(
  config: ConfigDict, spec: StepSpec
) -> dict[str, evals_base.Evaluator]:
  """Builds the evaluators and opens their data, so that errors show early."""
  lacking = {}
  if spec.ema_decay is None:
    lacking["ema"] = "config.ema is not set"
  if not spec.has_teacher:
    lacking["teacher"] = "no objective reads a teacher"
  entries = {}
  for name, entry in config.evals.items():
    weights = entry.get("weights", "student")
    every = ["student", "teacher", "ema"]
    if weights in lacking or weights not in every:
      why = lacking.get(weights) or did_you_mean(str(weights), every)
      raise ConfigError(f"config.evals.{name}.weights is {weights!r}: {why}")
    ours = ("weights", "at_start")
    entries[name] = {k: v for k, v in entry.items() if k not in ours}
  evaluators = evals_lib.build(entries)
  for evaluator in evaluators.values():
    evaluator.prepare()
  return evaluators


def build_data_ops(
  config: ConfigDict, spec: StepSpec, tokenizer: Any
) -> ops.Ops:
  """The input pipeline's ops for the fields that the train step reads."""
  return ops.build_ops(
    config.data.ops, tokenizer=tokenizer, wanted=spec.fields()
  )


def make_loader(experiment: Experiment, start_step: int) -> pipeline.Loader:
  """The loader of this process's rows of every batch, from a step on.

  Raises:
    ConfigError: if an objective reads a field that the batches lack.
  """
  rows = host_rows(experiment.config.batch_size, experiment.mesh)
  loader = pipeline.make_loader(
    experiment.config.data.to_dict(),
    batch_size=experiment.config.batch_size,
    seed=experiment.config.seed,
    start_step=start_step,
    process_index=rows.index,
    process_count=rows.count,
    tokenizer=experiment.tokenizer,
    wanted=experiment.step_spec.fields(),
    sources=experiment.sources,
  )
  for field, readers in experiment.step_spec.fields().items():
    if field not in loader.fields:
      raise ConfigError(
        f"objective {readers[0]!r} reads the batch field {field!r}, which no "
        f"source and op of config.data gives; there are: "
        f"{sorted(loader.fields)}. Add the source or the op, or drop the "
        "objective."
      )
  _require_length(experiment.config.model.text, loader.fields)
  return loader


def _require_length(
  text: ConfigDict | None, fields: Mapping[str, ops.Field]
) -> None:
  """Refuses captions of another length than the model's texts."""
  if not text or "caption" not in fields:
    return
  (length,) = fields["caption"].shape
  if length != text.length:
    raise ConfigError(
      f"config.data.ops gives captions of {length} tokens, but "
      f"config.model.text.length, the length of texts in evaluations and "
      f"exports, is {text.length}. Give both the same number."
    )


def save_config(experiment: Experiment) -> None:
  """Writes the resolved config and the tokenizer file to the run's folder."""
  if jax.process_index() != 0:
    return
  experiment.workdir.mkdir(parents=True, exist_ok=True)
  path = experiment.workdir / "config.json"
  text = json.dumps(experiment.config.to_dict(), indent=2) + "\n"
  if path.exists() and path.read_text() != text:
    log.warning(
      "%s has changed; the old one is config.json.old. With another seed, "
      "batch size or data the run continues with other rows.",
      path,
    )
    path.replace(path.with_name("config.json.old"))
  path.write_text(text)
  if experiment.tokenizer is not None and experiment.tokenizer.path is not None:
    folder = experiment.workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    target = folder / pathlib.Path(experiment.tokenizer.path).name
    if not target.exists():
      shutil.copyfile(experiment.tokenizer.path, target)


def log_experiment(experiment: Experiment) -> None:
  """Logs parameters with their sharding, rules, encodings and length."""
  params = experiment.program.abstract.params
  log.info(
    "\n%s",
    parameter_overview.get_parameter_overview(params, include_stats="sharding"),
  )
  log.info("\n%s\n", optim.describe_rules(experiment.optimizer.table))
  if experiment.optimizer.note:
    log.info(experiment.optimizer.note)
  mesh, config = experiment.mesh, experiment.config
  size = sum(row[3] for row in sharding_table(experiment.program.abstract))
  log.info(
    "The state takes %.1f MB a device on a mesh of %s.",
    size / 1e6,
    " x ".join(f"{mesh.shape[axis]} {axis}" for axis in MESH_AXES),
  )
  log.info("Encodings: %s.", ", ".join(map(str, experiment.step_spec.plan)))
  log.info(
    "%d steps of %d examples; an epoch of %s examples is %.1f steps.",
    experiment.total_steps,
    config.batch_size,
    f"{experiment.examples_per_epoch:,}",
    experiment.examples_per_epoch / config.batch_size,
  )
  _warn_of_repeats(experiment)


def _warn_of_repeats(experiment: Experiment) -> None:
  """Warns of sources with fewer records than their share of a batch."""
  size = experiment.config.batch_size
  weights = [e.get("weight", 1.0) for e in experiment.config.data.train]
  for source, weight in zip(experiment.sources, weights, strict=True):
    rows = size * weight / sum(weights)
    if rows > len(source):
      log.warning(
        "A batch of %d takes %.0f rows of %r, which has only %d records: some "
        "are in it more than once, and for contrastive losses an image's own "
        "caption is then also a wrong one. A smaller batch_size helps, more "
        "data, or less weight of this source.",
        size,
        rows,
        source,
        len(source),
      )
