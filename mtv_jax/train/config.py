"""The config of a run: one frozen object, resolved before anything is built.

`resolve` reads a recipe with its overrides, or a run's `config.json`, and fills
in derived values. `RunConfig.to_dict` returns the content of `config.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mtv_jax.augment import views as views_lib
from mtv_jax.checkpoint.checkpointer import CheckpointConfig
from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config import sections
from mtv_jax.config.durations import Duration, PositiveDuration, TotalDuration
from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  PositiveInt,
  Range,
)
from mtv_jax.config.sections import Config, further_options, sparse
from mtv_jax.data.pipeline import DataConfig
from mtv_jax.data.tokenizers.source import TokenizerSource
from mtv_jax.models.lora import LoraConfig
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelConfig, ModelSpec
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel.mesh import MeshConfig
from mtv_jax.train.balance import BalanceConfig
from mtv_jax.train.measurements import InterferenceConfig
from mtv_jax.train.optim.optimizer import OptimConfig, build_optimizer
from mtv_jax.train.optim.schedules import RampShape, ScheduleConfig
from mtv_jax.train.optim.transforms import UpdateRule
from mtv_jax.train.rollback import Bound, NonFiniteConfig
from mtv_jax.train.runtime.watchdog import WatchdogConfig
from mtv_jax.train.teachers import (
  FrozenTeacher,
  TeacherConfig,
  build_teachers,
  read_teacher_models,
)
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils import hub
from mtv_jax.utils.errors import ConfigError, UserError
from mtv_jax.utils.path_patterns import pin_all
from mtv_jax.utils.tree import select_names

log = logging.getLogger(__name__)

Weights = Literal["student", "teacher", "ema"]
_EMBEDDING = ["text/token_embedding"]
_FROZEN_TEXT = ["^text/", {"lr": 0.0}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
  """An entry of `config.views`; see `views.build_views`."""

  count: int = 1
  ops: str | tuple[str, ...]
  options: Mapping[str, Any] = further_options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightConfig:
  """An objective's weight: 0 until `start`, then a ramp."""

  value: NonNegativeFloat = 1.0
  start: Duration | None = None
  ramp: Duration | None = None
  ramp_shape: RampShape = sparse("linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """An entry of `config.objectives`."""

  type: str
  weight: NonNegativeFloat | WeightConfig = 1.0
  options: Mapping[str, Any] = further_options()  # Fields of the objective.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
  """`config.ema`: an EMA of all parameters, for evaluation and export."""

  decay: Fraction = 0.9999


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaTeacherConfig:
  """`config.teacher`: the EMA teacher of self-distillation."""

  # Constant as in SILC, which reports that a rising momentum hurts the text
  # tower. With `end`, half a cosine from `momentum` to `end`, as in DINOv2.
  momentum: Fraction = 0.996
  end: Fraction | None = None
  # heads: the teacher's encoder is the student's current one (TIPSv2).
  ema: Literal["all", "heads"] = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
  """`config.init`: the parameters that a run starts from."""

  path: str
  step: int | None = None
  weights: Weights = "student"
  # Whether to load the source's EMA teacher instead of copying the student.
  # With `weights="teacher"`, the student also gets the teacher's heads.
  teacher: bool = False
  # Whether heads that the source lacks, or has in another shape, start at
  # random values; otherwise they are an error.
  grow_heads: bool = False
  # Whether the tokenizer may differ from the source's.
  new_tokenizer: bool = False
  include: tuple[str, ...] | None = None  # Regexes of names; None: all.
  rename: tuple[Any, ...] = ()  # Pairs (pattern, replacement).
  min_coverage: Fraction = 0.99
  # Whether the run continues the source run from `step` on, with its optimizer,
  # averages, statistics and data, as if it had resumed.
  branch: bool = sparse(False)
  # A run, or a folder or hub model of transformers, with the language model for
  # `next_token`; None: initialised like other heads.
  language_model: str | None = sparse(None)

  def __post_init__(self):
    unused = [
      field.name
      for field in dataclasses.fields(self)
      if field.name not in ("path", "step", "branch")
      and getattr(self, field.name) != field.default
    ]
    if self.branch and self.step is None:
      # The source may save later steps; a restart must read the same one.
      raise ConfigError("config.init.branch needs config.init.step.")
    if self.branch and unused:
      raise ConfigError(
        f"config.init.branch restores a run's whole state, so {unused[0]} "
        "has no effect. Leave it out."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """An entry of `config.evals`."""

  type: str
  every: Duration | None = None  # None: only after the last step.
  at_start: bool = sparse(False)
  weights: str | None = sparse(None)  # None: `config.weights`.
  bound: Bound | None = sparse(None)
  # Whether to skip it rather than fail if the run or data lack what it needs.
  optional: bool = sparse(False)
  options: Mapping[str, Any] = further_options()  # Fields of the evaluator.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """`config.log`."""

  every: PositiveDuration = Duration(50)
  # Interval between measurements of each objective's gradient norm.
  gradients: Duration | None = None
  # Logs a spike if the gradient norm is this many times the median; 0: never.
  spikes: NonNegativeFloat = 10.0
  # Op strings, see `train/metrics/trackers.py`.
  trackers: str | tuple[str, ...] = ("jsonl", "tensorboard")
  # First and last step to profile, inclusive.
  profile_steps: tuple[PositiveInt, PositiveInt] | None = None

  def __post_init__(self):
    first, last = self.profile_steps or (1, 1)
    if last < first:
      raise ConfigError(
        f"config.log.profile_steps is ({first}, {last}), expected the first"
        " step and the last step."
      )


@dataclasses.dataclass(frozen=True)
class StepParts:
  """Model, views, teachers, objectives and update rule; built by `resolve`."""

  model: ModelSpec
  views: Mapping[str, views_lib.View]
  teachers: Mapping[str, FrozenTeacher]  # Including unused ones.
  objectives: Mapping[str, base.Objective]
  update_rule: UpdateRule
  base: StepParts | None = None  # muP's base model.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A run's config, resolved."""

  seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # JAX drops higher bits.
  # Examples per step, over all hosts.
  batch_size: Annotated[int, Range(1, 2**24)]
  total: TotalDuration
  data: DataConfig
  views: Mapping[str, ViewConfig]
  model: ModelConfig
  accumulate: PositiveInt = 1  # Parts of a batch, encoded one at a time.
  objectives: Mapping[str, ObjectiveConfig]
  balance: BalanceConfig | None = None  # None: fixed weights.
  # Measures the interference of the objectives' gradients on the encoder.
  interference: InterferenceConfig | None = None
  optim: OptimConfig
  schedule: ScheduleConfig
  ema: EmaConfig | None = None
  teacher: EmaTeacherConfig
  teachers: Mapping[str, TeacherConfig]  # Frozen teachers.
  # Default weights of evaluation and export; image-only self-distillation
  # publishes the teacher.
  weights: Weights = "student"
  mesh: MeshConfig
  sharding: tuple[Any, ...] = ()  # (regex, axes of the trailing dimensions).
  # Compiler flags of the step, see `xla_flags.parse_flags`.
  xla_flags: str = sparse("")
  init: InitConfig | None = None
  lora: LoraConfig | None = sparse(None)
  evals: Mapping[str, EvalConfig]
  checkpoint: CheckpointConfig
  log: LogConfig
  nonfinite: NonFiniteConfig
  watchdog: WatchdogConfig
  parts: StepParts | None = sections.derived()  # Set by `resolve`.

  def __post_init__(self):
    for i, source in enumerate(self.data.train):
      if not isinstance(source, Mapping) or not {"type", "path"} & {*source}:
        raise ConfigError(
          f"config.data.train[{i}] is {source!r}, expected a dictionary with a"
          " type or a path."
        )
    if not self.data.train:
      raise ConfigError("config.data.train is empty: no data to train on.")
    for name in self.evals:
      if "/" in name:
        raise ConfigError(
          f"config.evals has an entry {name!r}: its results are written to"
          " files of that name, which can't contain a '/'."
        )

  def to_dict(self) -> dict[str, Any]:
    return sections.to_dict(self)


def check_config(config: Config | RunConfig) -> RunConfig:
  """Checks keys, types and ranges, and fills in defaults; builds nothing."""
  if isinstance(config, RunConfig):
    return config
  config_dict = sections.to_dict(config)
  return sections.read(RunConfig, config_dict, "config")


def _resolve_inputs(
  run: RunConfig, workdir: str | os.PathLike | None, *, reads_files: bool
) -> RunConfig:
  """Pins hub data sets and tokenizer; sets the vocabulary's size.

  Known commits come from the config or a run in `workdir`, whose tokenizer must
  be readable. The size comes from the config, else from that run or the run in
  `config.init`.
  """
  recorded_config = {}
  if workdir is not None and saved_steps(workdir):
    recorded_config = read_recorded_config(workdir)
  commits = dict((recorded_config.get("data") or {}).get("commits") or {})
  commits |= run.data.commits
  train = run.data.train
  if reads_files:
    train = tuple(pin_all(entry, commits) for entry in train)
  text = run.model.text
  if text is not None:
    recorded_text = (recorded_config.get("model") or {}).get("text") or {}
    source, size = TokenizerSource(text.tokenizer, text.clean), text.vocab_size
    if reads_files:
      source = source.pin(commits)
    size = recorded_text.get("vocab_size") if size is None else size
    if size is None and reads_files:
      size = _read_init_rows(run.init)
    if size is None:
      is_required = workdir is not None
      size = source.count_ids(
        TextSpec.vocab_size, reads_files=reads_files, is_required=is_required
      )
    text = dataclasses.replace(text, tokenizer=source.spec, vocab_size=size)
  data = dataclasses.replace(run.data, train=train, commits=commits)
  model = dataclasses.replace(run.model, text=text)
  return dataclasses.replace(run, data=data, model=model)


def _read_init_rows(init: InitConfig | None) -> int | None:
  """Rows of the token embedding of the run in `config.init`, if any."""
  loads_text = init and select_names(_EMBEDDING, init.include or ("",))
  if not loads_text or init.new_tokenizer or hub.is_name(init.path):
    return None
  # An export lacks a recorded config; loading raises if it can't be read.
  with contextlib.suppress(UserError, OSError, ImportError):
    text = read_recorded_config(init.path).get("model", {}).get("text") or {}
    return text.get("vocab_size")
  return None


def resolve(
  config: Config | RunConfig,
  workdir: str | os.PathLike | None = None,
  *,
  reads_files: bool = True,
) -> RunConfig:
  """Checks a config and fills in derived values; ConfigError if invalid.

  Derived values are the teachers' architectures, the mask token, the text tower
  with the size of its vocabulary, and the commits of Hugging Face data sets and
  tokenizer. A resolved config is returned unchanged. The `config.json` of a run
  in `workdir` records teachers, size and commits. Without `reads_files`,
  teachers and commits are unchanged, the size is None if the tokenizer isn't
  built in, and a config with a teacher of unknown `model` is only checked.
  """
  run = check_config(config)
  if run.parts is not None:
    return run
  rule = build_optimizer(run.optim)
  run = _freeze_adapted_modules(_use_averaged_weights(run, rule))
  teachers = run.teachers
  if reads_files:
    teachers = read_teacher_models(run.teachers, workdir)
  elif any(t.path and t.model is None for t in teachers.values()):
    return run
  run = _resolve_inputs(run, workdir, reads_files=reads_files)
  run = dataclasses.replace(run, teachers=teachers)
  parts = _build_parts(run, rule)
  run = _apply_needs(run, parts)
  model = run.model.spec
  # Teachers that share the student's architecture.
  shared = {
    name: dataclasses.replace(teacher, model=ModelSpec(image=model.image))
    for name, teacher in parts.teachers.items()
    if teachers[name].model is None
  }
  built = {**parts.teachers, **shared}
  mup_base = None
  if run.model.has_mup:
    base_run = dataclasses.replace(run, model=run.model.mup_base)
    mup_base = _build_parts(base_run, rule)
  parts = dataclasses.replace(parts, model=model, teachers=built, base=mup_base)
  return dataclasses.replace(run, parts=parts)


def _use_averaged_weights(run: RunConfig, rule: UpdateRule) -> RunConfig:
  """Evaluates the weights that an optimizer averages, not the student.

  Raises ConfigError if the config averages them, too.
  """
  if rule.eval_params is None:
    return run
  if run.ema is not None:
    raise ConfigError(
      f"config.optim.name={run.optim.name!r} averages the parameters itself, as"
      " the weights 'ema': leave config.ema out (--config.ema=None)."
    )
  weights = "ema" if run.weights == "student" else run.weights
  return dataclasses.replace(run, weights=weights)


def _freeze_adapted_modules(run: RunConfig) -> RunConfig:
  """Freezes what `config.lora` doesn't train in the modules it adapts."""
  if run.lora is None:
    return run
  if run.init is None or run.model.has_mup:
    problem = "muP" if run.model.has_mup else "no config.init"
    raise ConfigError(
      f"config.lora adapts a loaded encoder, but this config has {problem}: "
      "set config.init.path without muP, or leave config.lora out."
    )
  rule = run.lora.freezing_rule
  if rule in run.optim.rules:  # From a run's config.json.
    return run
  optim = dataclasses.replace(run.optim, rules=(rule, *run.optim.rules))
  return dataclasses.replace(run, optim=optim)


def _build_parts(run: RunConfig, rule: UpdateRule) -> StepParts:
  """Builds the views, teachers and objectives."""
  mean, std = run.model.pixels
  views = views_lib.build_views(sections.to_dict(run.views), mean=mean, std=std)
  teachers = build_teachers(run.teachers, run.model)
  objectives = {
    name: build_objective(name, {"type": entry.type, **entry.options}).resolve(
      run.model.spec, views, teachers
    )
    for name, entry in run.objectives.items()
  }
  return StepParts(run.model.spec, views, teachers, objectives, rule)


def _apply_needs(run: RunConfig, parts: StepParts) -> RunConfig:
  """Adds a mask token, and drops or freezes the text tower, as needed."""
  model, needs = run.model, [o.needs() for o in parts.objectives.values()]
  encodings = {encoding for need in needs for encoding in need.encodings}
  views = [parts.views[e.view] for e in encodings if e.view in parts.views]
  if any(view.max_masked for view in views):
    options = {**model.options, "mask_token": True}
    model = dataclasses.replace(model, options=options)
  run = dataclasses.replace(run, model=model)
  if model.text is None or any(e.tower == "text" for e in encodings):
    return run
  if not any({"caption", "box_phrase"} & {*need.fields} for need in needs):
    log.warning("No objective reads text: config.model.text is left out.")
    return dataclasses.replace(run, model=dataclasses.replace(model, text=None))
  # A captioning decoder takes its tokens and default shape from the text tower.
  log.warning(
    "No objective trains the text tower, which defines the captions' tokens: "
    "it is frozen, at random values unless config.init loads it."
  )
  if _FROZEN_TEXT in run.optim.rules:
    return run
  rules = (_FROZEN_TEXT, *run.optim.rules)
  optim = dataclasses.replace(run.optim, rules=rules)
  return dataclasses.replace(run, optim=optim)
