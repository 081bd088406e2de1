"""An experiment: a checked config and everything that is built from it."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mtv_jax.augment import views
from mtv_jax.checkpoint.checkpointer import saved_steps
from mtv_jax.config import options, schema
from mtv_jax.data import ops, pipeline, tokenizers
from mtv_jax.data import registry as sources_lib
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess, preprocess_from_config
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import base as evals_base
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as model_lib
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel.mesh import (
  MESH_AXES,
  check_batch_size,
  host_rows,
  make_mesh,
)
from mtv_jax.parallel.rules import check_sharding_rules, sharding_table
from mtv_jax.train import balance as balance_lib
from mtv_jax.train.optim import param_rules
from mtv_jax.train.optim.optimizer import Optimizer, make_optimizer
from mtv_jax.train.step import Program, make_program
from mtv_jax.train.step_spec import (
  FrozenTeacher,
  ObjectiveWeight,
  StepSpec,
  abstract_params,
)
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)
_FROZEN_TEXT = ["^text/", {"lr": 0.0}]


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The train step of a resolved config on a mesh, not yet compiled."""

  config: ConfigDict
  length: schema.RunLength
  step_spec: StepSpec
  optimizer: Optimizer
  program: Program

  @property
  def mesh(self) -> Mesh:
    """Mesh of all devices of all processes."""
    return self.program.mesh

  @property
  def total_steps(self) -> int:
    """Number of steps of the run."""
    return self.length.total_steps

  def every(self, name: str, section: ConfigDict) -> int | None:
    """A duration of a section in steps; None if it has none."""
    return self.length.steps(name, section, default=None)

  def require_fields(self, fields: Iterable[str]) -> None:
    """Raises ConfigError if an objective reads another batch field."""
    for field, readers in self.step_spec.fields().items():
      if field not in fields:
        raise ConfigError(
          f"objective {readers[0]!r} reads the batch field {field!r}, but"
          f" config.data gives only {sorted(fields)}. Add its source or op, or"
          " drop the objective."
        )


@dataclasses.dataclass(frozen=True)
class Experiment(TrainStep):
  """A checked config and everything that is built from it."""

  workdir: pathlib.Path
  tokenizer: Any  # None for a model without text.
  sources: list[Any]  # Of `config.data.train`, in order.
  evaluators: dict[str, evals_base.Evaluator]


def build_step_spec(
  config: ConfigDict, total_steps: int, examples_per_epoch: int | None = None
) -> StepSpec:
  """The train step of a resolved config.

  Durations in epochs need `examples_per_epoch`.

  Raises:
    ConfigError: for views, objectives, weights or rules that don't fit.
  """
  length = schema.RunLength(config.batch_size, examples_per_epoch, total_steps)
  weights = {
    name: _weight(name, entry.weight, length)
    for name, entry in config.objectives.items()
  }
  first = min((weight.start for weight in weights.values()), default=0)
  if first > 0:
    raise ConfigError(
      f"config.objectives: the first one starts at step {first}; at least one "
      "must start at step 0."
    )
  mean, std = schema.pixel_statistics(config.model)
  built_views = views.build_views(config.views.to_dict(), mean=mean, std=std)
  model = model_lib.ModelSpec.from_config(config.model)
  objectives = {
    name: build_objective(name, entry).resolve(model, built_views)
    for name, entry in config.objectives.items()
  }
  read = {e for o in objectives.values() for e in o.needs().encodings}
  # Recorded in the resolved config, from which the run's model is opened.
  if any(built_views[e.view].max_masked for e in read if e.view in built_views):
    config.model.mask_token = True
  # A captioning decoder has the tokens, and by default the shape, of the tower.
  tokens = {"caption", "box_phrase"}
  reads_text = any(tokens & {*o.needs().fields} for o in objectives.values())
  reads_text = reads_text or any(e.tower == "text" for e in read)
  if config.model.text and not reads_text:
    log.warning("No objective reads text: config.model.text is left out.")
    config.model.text = None
  elif config.model.text and not any(e.tower == "text" for e in read):
    log.warning(
      "No objective trains the text tower, which has the tokens of captions: "
      "it is frozen, at random values unless config.init gives others."
    )
    if _FROZEN_TEXT not in map(list, config.optim.rules):
      config.optim.rules = [_FROZEN_TEXT, *config.optim.rules]
  runtime = model_lib.runtime(config.model)
  model = model_lib.ModelSpec.from_config(config.model)
  spec = StepSpec(
    model=model,
    dtype=jnp.dtype(runtime.pop("dtype", "float32")),
    runtime=runtime,
    objectives=objectives,
    weights=weights,
    views=built_views,
    seed=config.seed,
    total_steps=total_steps,
    init=config.model.init,
    balance=_balance(config.balance, length),
    teacher_momentum=config.teacher.momentum,
    teacher_end=config.teacher.end,
    teacher_ema=config.teacher.ema,
    ema_decay=config.ema.decay if config.ema else None,
    accumulate=config.accumulate,
    teachers=_frozen_teachers(
      config, model, _first_reads(objectives, weights), length
    ),
  )
  if not config.optim.rules:
    return spec
  params = abstract_params(spec)
  table = param_rules.match_param_rules(params, config.optim.rules)
  frozen = frozenset(row.name for row in table if row.frozen)
  return dataclasses.replace(spec, frozen=frozen)


def _first_reads(
  objectives: Mapping[str, base.Objective],
  weights: Mapping[str, ObjectiveWeight],
) -> dict[str, int]:
  """The first step that reads the student and each teacher, by name."""
  first: dict[str, int] = {}
  for name, objective in objectives.items():
    start = weights[name].start
    for encoding in objective.needs().encodings:
      first[encoding.weights] = min(start, first.get(encoding.weights, start))
  return first


def _frozen_teachers(
  config: ConfigDict,
  model: model_lib.ModelSpec,
  first_reads: Mapping[str, int],
  length: schema.RunLength,
) -> dict[str, FrozenTeacher]:
  """The frozen teachers of a config that objectives read."""
  teachers = {}
  for name, entry in config.teachers.items():
    where = f"config.teachers.{name}"
    if name in (base.STUDENT, base.TEACHER):
      raise ConfigError(f"{where}: the name is taken; choose another.")
    if name not in first_reads:
      log.warning("No objective reads %s: it is not loaded.", where)
      continue
    own = model_lib.ModelSpec(image=model.image)
    if entry.model is not None:
      own = model_lib.ModelSpec.from_dict({"image": entry.model.to_dict()})
    teacher = FrozenTeacher(
      model=own,
      snapshot=entry.path is None,
      update_every=length.steps("update_every", entry, default=None),
      max_updates=entry.max_updates,
    )
    if teacher.copies and base.TEACHER not in first_reads:
      raise ConfigError(
        f"{where} is copied from the EMA teacher, which no objective reads. "
        "Give a path without update_every, or add a self-distillation."
      )
    copied = first_reads[name]
    if not teacher.snapshot:
      copied += teacher.update_every or 0
    if teacher.copies and copied < first_reads[base.TEACHER]:
      raise ConfigError(
        f"{where} is copied from the EMA teacher at step {copied}, which "
        f"starts at step {first_reads[base.TEACHER]}. Start the objective that "
        f"reads {name} later, or self-distillation earlier."
      )
    if teacher.copies and own.image != model.image:
      raise ConfigError(
        f"{where} is copied from the EMA teacher and must have the student's "
        "architecture: leave its `model` out."
      )
    teachers[name] = teacher
  return teachers


def read_teacher_models(
  config: ConfigDict, workdir: pathlib.Path | None = None
) -> None:
  """Records the architectures of teachers with a path in a resolved config.

  A run that resumes has recorded them, and their parameters are in its
  checkpoints: the teachers' own folders are not read.

  Raises:
    ConfigError: one was trained with other pixel statistics than this run's.
  """
  ours = preprocess_from_config(config)
  recorded = {}
  if config.teachers and workdir is not None and saved_steps(workdir):
    run = json.loads((workdir / "config.json").read_text("utf-8"))
    recorded = run.get("teachers") or {}
  for name, entry in config.teachers.items():
    # Refreshed from the EMA teacher, it has the student's.
    refreshed = any(entry.get(f"update_every_{u}") for u in schema.UNITS)
    if entry.path is None or entry.model is not None or refreshed:
      continue
    same = recorded.get(name) or {}
    named = all(same.get(k) == entry[k] for k in ("path", "weights", "step"))
    if named and same.get("model"):
      entry.model = same["model"]
      continue
    model = loading.read_model(
      entry.path, weights=entry.weights, step=entry.step
    )
    theirs = Preprocess.from_dict(model.preprocess)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
      raise ConfigError(
        f"config.teachers.{name}: {entry.path} takes pixels of mean "
        f"{theirs.mean} and deviation {theirs.std}, this run's views have "
        f"{ours.mean} and {ours.std}. Train with the teacher's."
      )
    entry.model = model.spec.to_dict()["image"]


def _balance(
  section: ConfigDict | None, length: schema.RunLength
) -> balance_lib.Balance:
  """The balancing method; fixed weights if the config has none."""
  if section is None:
    return balance_lib.Balance()
  where, key = "config.balance", "method"
  method = options.look_up(
    balance_lib.METHODS, section.method, where=where, key=key
  )
  durations = [f"every_{unit}" for unit in schema.UNITS]
  given = {
    k: v for k, v in section.items() if v is not None and k not in durations
  }
  del given[key]
  every = length.steps("every", section, default=None)
  if every is not None:
    given["every_steps"] = every
  return options.build(method, given, where=where, reserved=(key,))


def _weight(
  name: str, weight: float | ConfigDict, length: schema.RunLength
) -> ObjectiveWeight:
  if not isinstance(weight, ConfigDict):
    return ObjectiveWeight(weight)
  start, ramp = (length.steps(k, weight, default=0) for k in ("start", "ramp"))
  if start >= length.total_steps:
    raise ConfigError(
      f"config.objectives.{name}.weight: it starts at step {start} of a run of "
      f"{length.total_steps} steps and would never be trained."
    )
  return ObjectiveWeight(weight.value, start, ramp)


def make_config_mesh(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of a resolved config, over all devices by default.

  Raises:
    ConfigError: the sizes don't fit the devices, or don't divide the batch.
  """
  mesh = make_mesh(config.mesh, devices)
  if config.batch_size % config.accumulate:
    raise ConfigError(
      f"config.batch_size is {config.batch_size}, which config.accumulate="
      f"{config.accumulate} does not divide."
    )
  check_batch_size(config.batch_size // config.accumulate, mesh)
  return mesh


def build_train_step(
  config: ConfigDict, mesh: Mesh, examples_per_epoch: int | None
) -> TrainStep:
  """Builds the train step of a resolved config; opens no data.

  Raises:
    ConfigError: as `build_step_spec`; for an invalid rule, or one that matches
      no parameter.
  """
  length = schema.RunLength.from_config(config, examples_per_epoch)
  spec = build_step_spec(config, length.total_steps, examples_per_epoch)
  params = abstract_params(spec)
  optimizer = make_optimizer(
    config.optim,
    config.schedule,
    length=length,
    params=params,
    attention_heads=spec.attention_heads,
    start_steps=spec.start_steps,
  )
  names = [name for name, _ in flatten_with_names(params)]
  check_sharding_rules(config.sharding, names)
  program = make_program(spec, optimizer.tx, mesh, config.sharding)
  return TrainStep(config, length, spec, optimizer, program)


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
      f"--workdir={workdir}: a run is not written to a bucket directly. Mount "
      "it, for example with gcsfuse, and give the folder's path."
    )
  mesh = make_config_mesh(config)
  read_teacher_models(config, pathlib.Path(workdir))
  tokenizer = None
  if text := config.model.text:
    # Before the data, which may take long to open.
    tokenizer = tokenizers.build_tokenizer(text.tokenizer, clean=text.clean)
    tokenizers.check_vocabulary(
      tokenizer, text.vocab_size, where="config.model.text.vocab_size"
    )
  entries = config.data.to_dict()["train"]
  # As labels are aligned to whole sources, limits come last.
  whole = [
    sources_lib.build_source({**entry, "labels": None, "limit": None})
    for entry in entries
  ]
  lengths = [
    len(sources_lib.complete_source(source, {"limit": entry.get("limit")}))
    for entry, source in zip(entries, whole, strict=True)
  ]
  step = build_train_step(config, mesh, sum(lengths))
  heads = heads_lib.heads_of_config(config.objectives, step.step_spec.model)
  for head in heads.values():
    head.check_tokenizer(tokenizer)
  # Labels that no objective reads are not opened.
  read = ops.build_ops(
    config.data.ops, tokenizer=tokenizer, wanted=step.step_spec.fields()
  ).labels
  sources = [
    sources_lib.complete_source(
      source, {**entry, "labels": entry.get("labels") or None}, fields=read
    )
    for entry, source in zip(entries, whole, strict=True)
  ]
  return Experiment(
    **vars(step),
    workdir=pathlib.Path(workdir),
    tokenizer=tokenizer,
    sources=sources,
    evaluators=_evaluators(config, step),
  )


def build_evaluators(config: ConfigDict) -> dict[str, evals_base.Evaluator]:
  """The evaluators of a resolved config by name; opens no data."""
  entries = {}
  for name, entry in config.evals.items():
    entries[name] = entry.to_dict()
    for key in ("at_start", "weights"):  # The trainer's.
      entries[name].pop(key, None)
  return evals_lib.build(entries)


def evaluable(config: ConfigDict, spec: model_lib.ModelSpec) -> frozenset[str]:
  """What evaluators of a run may require, see `Evaluator.requires`."""
  heads = heads_lib.heads_of_config(config.objectives, spec).values()
  text = {"text"} if spec.text is not None else set()
  return frozenset(text | {head.objective for head in heads})


def _evaluators(
  config: ConfigDict, step: TrainStep
) -> dict[str, evals_base.Evaluator]:
  """Builds the evaluators and opens their data, so that errors show early."""
  given = evaluable(config, step.step_spec.model)
  weights = {"config.weights": config.weights}
  for name, entry in config.evals.items():
    weights[f"config.evals.{name}"] = entry.get("weights", config.weights)
  for where, kind in weights.items():
    try:
      step.program.abstract.weights(kind)
    except ConfigError as error:
      raise ConfigError(f"{where}: {error}") from None
  evaluators = build_evaluators(config)
  for name, evaluator in evaluators.items():
    if lacking := sorted(evaluator.requires - given):
      what = (
        "a text tower" if "text" in lacking else f"objective {lacking[0]!r}"
      )
      raise ConfigError(
        f"config.evals.{name} evaluates {what}, which this run does not train."
        f" Add it, or leave the evaluation out (--config.evals.{name}=None)."
      )
    evaluator.prepare()
  return evaluators


def make_loader(experiment: Experiment, start_step: int) -> pipeline.Loader:
  """Builds the loader of this process's batch rows, from a step on.

  Raises:
    ConfigError: an objective reads a field that the batches lack, or captions
      have another length than the model's texts.
  """
  config = experiment.config
  rows = host_rows(experiment.mesh)
  loader = pipeline.make_loader(
    config.data.to_dict(),
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    process_index=rows.index,
    process_count=rows.count,
    tokenizer=experiment.tokenizer,
    wanted=experiment.step_spec.fields(),
    sources=experiment.sources,
  )
  experiment.require_fields(loader.fields)
  if config.model.text and "caption" in loader.fields:
    (length,) = loader.fields["caption"].shape
    if length != config.model.text.length:
      raise ConfigError(
        f"config.data.ops gives captions of {length} tokens, but evaluations "
        f"and exports use config.model.text.length={config.model.text.length}. "
        "Give both the same number."
      )
  return loader


def save_config(experiment: Experiment, command: str = "") -> None:
  """Writes config, command and tokenizer file to the run's folder.

  The config is resolved; a command that is not known replaces none.
  """
  if jax.process_index() != 0:
    return
  experiment.workdir.mkdir(parents=True, exist_ok=True)
  path = experiment.workdir / "config.json"
  text = json.dumps(experiment.config.to_dict(), indent=2) + "\n"
  old = path.read_text() if path.exists() else None
  if old not in (None, text):
    log.warning(
      f"{path} has changed; the old one is config.json.old. With another seed, "
      "batch size or data the run continues with other rows."
    )
    shutil.copyfile(path, path.with_name("config.json.old"))
  if old != text:
    # A resumed run and a study read it, also after a kill at this moment.
    atomic.write(path, text.encode())
  if command:
    path.with_name("command.txt").write_text(command + "\n", encoding="utf-8")
  if experiment.tokenizer is not None and experiment.tokenizer.path is not None:
    folder = experiment.workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    target = folder / pathlib.Path(experiment.tokenizer.path).name
    if not target.exists():
      shutil.copyfile(experiment.tokenizer.path, target)


def log_experiment(experiment: Experiment) -> None:
  """Logs parameters with their sharding, rules, encodings and length."""
  state, mesh = experiment.program.abstract, experiment.mesh
  overview = parameter_overview.get_parameter_overview(
    state.params, include_stats="sharding"
  )
  log.info("\n%s", overview)
  log.info("\n%s\n", param_rules.describe_rules(experiment.optimizer.table))
  if experiment.optimizer.note:
    log.info(experiment.optimizer.note)
  megabytes = sum(row[3] for row in sharding_table(state)) / 1e6
  axes = " x ".join(f"{mesh.shape[axis]} {axis}" for axis in MESH_AXES)
  log.info(f"The state takes {megabytes:.1f} MB a device on a mesh of {axes}.")
  if state.teacher or state.ema:
    log.info(
      f"Evaluations and exports take the {experiment.config.weights} weights "
      "(config.weights) unless told otherwise."
    )
  log.info("Encodings: %s.", ", ".join(map(str, experiment.step_spec.plan)))
  size = experiment.config.batch_size
  epoch = experiment.length.examples_per_epoch
  log.info(
    f"{experiment.total_steps} steps of {size} examples; an epoch of {epoch:,} "
    f"examples is {epoch / size:.1f} steps."
  )
  weights = [e.get("weight", 1.0) for e in experiment.config.data.train]
  for source, weight in zip(experiment.sources, weights, strict=True):
    rows = size * weight / sum(weights)
    if rows > len(source):
      log.warning(
        f"A batch of {size} takes {rows:.0f} rows of {source!r}, which has "
        f"only {len(source)} records: some are repeated, and contrastive losses"
        " count their captions as negatives. Reduce batch_size or the source's"
        " weight, or add data."
      )
