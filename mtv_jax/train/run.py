"""A run: a resolved config and everything that is built from it."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from mtv_jax.config import overrides, sections
from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.data import ops, order, pipeline, tokenizers
from mtv_jax.data import registry as sources_lib
from mtv_jax.data.ops import CONVERSATION_TOKENIZER, find_op
from mtv_jax.data.sources.base import Source
from mtv_jax.data.stats import Stats
from mtv_jax.models.heads import (
  PredictionHead,
  heads_of_config,
)
from mtv_jax.models.remat import Remat
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  check_batch_size,
  find_host_rows,
  make_mesh,
)
from mtv_jax.parallel.rules import check_sharding_rules
from mtv_jax.train import metrics
from mtv_jax.train.balance import Balance, build_balance
from mtv_jax.train.config import RunConfig, WeightConfig, resolve
from mtv_jax.train.mup import Mup
from mtv_jax.train.optim.optimizer import Optimizer, make_optimizer
from mtv_jax.train.optim.param_rules import ParamRule, match_param_rules
from mtv_jax.train.spec import (
  ObjectiveWeight,
  StepSpec,
  abstract_params,
  find_first_read_steps,
)
from mtv_jax.train.step import TrainStep, make_train_step
from mtv_jax.train.teachers import select_teachers
from mtv_jax.train.tokenizer import build_tokenizer, require_tokenizer
from mtv_jax.train.workdir import check_workdir, read_recorded_config
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.text import first_lines
from mtv_jax.utils.tree import flatten_with_names
from mtv_jax.utils.xla_flags import parse_flags

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
  """A resolved config and everything that is built from it, but the state.

  `build_run` opens no data; `open_run` adds data, tokenizer and trackers.
  """

  config: RunConfig
  length: RunLength
  optimizer: Optimizer
  train_step: TrainStep
  # `train` replaces a bucket by a local folder.
  workdir: pathlib.PurePath = pathlib.PurePath()
  tokenizer: Any = None  # None for a model without text.
  sources: Sequence[Any] = ()  # In the order of `config.data.train`.
  prediction_heads: Mapping[str, PredictionHead] = dataclasses.field(
    default_factory=dict
  )
  # Not opened yet.
  trackers: Mapping[str, metrics.Tracker] = dataclasses.field(
    default_factory=dict
  )

  @property
  def spec(self) -> StepSpec:
    return self.train_step.spec

  @property
  def mesh(self) -> Mesh:
    return self.train_step.mesh

  @property
  def total_steps(self) -> int:
    return self.length.total_steps

  def abstract_batch(
    self, rows: int | None = None
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the sharded global batch; `rows` overrides the batch size."""
    fields = batch_fields(self.config, self.spec)
    sharding = NamedSharding(self.mesh, BATCH_SPEC)
    return abstract_batch(rows or self.config.batch_size, fields, sharding)

  def is_due(self, every: Duration | None, step: int) -> bool:
    """Whether a step is a multiple of a duration; False for None or 0."""
    steps = self.length.steps(every)
    return bool(steps) and step % steps == 0

  def require_fields(self, fields: Iterable[str]) -> None:
    """Raises ConfigError if an objective reads a field not in `fields`."""
    for field, readers in self.spec.fields().items():
      if field not in fields:
        raise ConfigError(
          f"objective {readers[0]!r} reads the batch field {field!r}, but"
          f" config.data yields only {sorted(fields)}. Add its source or op, or"
          " drop the objective."
        )

  @functools.cached_property
  def source_descriptions(self) -> list[dict[str, Any]]:
    """Files, record counts and label sets of each source, as JSON."""
    return [source.describe() for source in self.sources]


def make_config_mesh(
  config: RunConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh of a config, by default over all devices."""
  mesh = make_mesh(config.mesh, devices)
  check_batch_size(
    "config.batch_size", config.batch_size, mesh, accumulate=config.accumulate
  )
  return mesh


def build_run(
  config: RunConfig, mesh: Mesh, examples_per_epoch: int | None
) -> Run:
  """Builds the train step of a config; opens no data."""
  total, batch_size = config.total, config.batch_size
  length = RunLength.of_total(total, batch_size, examples_per_epoch)
  spec, params, table = _build_spec(config, length)
  optimizer = make_optimizer(
    config.parts.update_rule,
    config.optim,
    config.schedule,
    length=length,
    params=params,
    table=table,
    attention_heads=spec.attention_heads,
    mup=spec.mup_multipliers,
  )
  spec = dataclasses.replace(spec, eval_params=optimizer.eval_params)
  names = [name for name, _ in flatten_with_names(params)]
  check_sharding_rules(config.sharding, names)
  parse_flags(config.xla_flags)  # Raises for invalid flags on CPUs, too.
  train_step = make_train_step(
    spec, optimizer.tx, mesh, config.sharding, config.xla_flags
  )
  return Run(config, length, optimizer, train_step)


def batch_fields(config: RunConfig, spec: StepSpec) -> Mapping[str, ops.Field]:
  """Shapes and dtypes of a batch's rows; opens neither data nor tokenizer."""
  # Shapes do not depend on the tokenizer.
  text = config.model.text
  tokenizer = tokenizers.build_tokenizer("bytes") if text else None
  return ops.build_ops(
    config.data.ops,
    tokenizer=tokenizer,
    batch_fields=spec.fields(),
    features=spec.feature_layouts,
  ).fields


def abstract_batch(
  rows: int, fields: Mapping[str, ops.Field], sharding: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch."""
  return {
    name: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype, sharding=sharding)
    for name, f in fields.items()
  }


def build_spec(
  config: RunConfig, total_steps: int, examples_per_epoch: int | None = None
) -> StepSpec:
  """Builds the train step specification of a config.

  Durations in epochs need `examples_per_epoch`.
  """
  length = RunLength(config.batch_size, examples_per_epoch, total_steps)
  return _build_spec(config, length)[0]


def _build_spec(
  config: RunConfig, length: RunLength
) -> tuple[StepSpec, PyTree, tuple[ParamRule, ...]]:
  """Builds the specification, its parameters' shapes, and their rules."""
  parts, runtime = config.parts, config.model.runtime
  weights = {
    name: _build_weight(name, entry.weight, length)
    for name, entry in config.objectives.items()
  }
  if start := min((weight.start for weight in weights.values()), default=0):
    raise ConfigError(
      f"config.objectives: the earliest objective starts at step {start}; at "
      "least one must start at step 0."
    )
  first_read_steps = find_first_read_steps(parts.objectives, weights)
  spec = StepSpec(
    model=parts.model,
    dtype=jnp.dtype(runtime.pop("dtype")),
    remat=_read_remat(runtime.pop("remat"), parts.objectives),
    runtime=runtime,
    objectives=parts.objectives,
    weights=weights,
    views=parts.views,
    seed=config.seed,
    total_steps=length.total_steps,
    init=config.model.init,
    balance=build_balance(config.balance, length),
    teacher_momentum=config.teacher.momentum,
    teacher_end=config.teacher.end,
    teacher_ema=config.teacher.ema,
    ema_decay=config.ema.decay if config.ema else None,
    accumulate=config.accumulate,
    lora=config.lora,
    in_lanes=config.data.shuffle == "lanes",
    teachers=select_teachers(
      config.teachers,
      parts.teachers,
      model=parts.model,
      first_read_steps=first_read_steps,
      length=length,
    ),
  )
  if parts.base is not None:
    base_spec = dataclasses.replace(
      spec, model=parts.base.model, objectives=parts.base.objectives
    )
    mup = Mup(base_spec, config.model.depth_ratios)
    spec = dataclasses.replace(spec, mup=mup)
  params, rules = abstract_params(spec), config.optim.rules
  starts = spec.start_steps
  table = match_param_rules(params, rules, length=length, start_steps=starts)
  if all(row.frozen for row in table if row.name.startswith("image/")):
    _reject_encoder_gradients(config, spec.balance)
  frozen = frozenset(row.name for row in table if row.frozen)
  spec = dataclasses.replace(spec, frozen=frozen)
  _ = spec.towers  # Raises option errors before data is opened.
  return spec, params, table


def _read_remat(text: str, objectives: Mapping[str, base.Objective]) -> Remat:
  """Parses the remat policy; its entries name encodings of the student."""
  encodings = {e for o in objectives.values() for e in o.needs().encodings}
  trained = [e for e in encodings if e.weights == base.STUDENT]
  return Remat.parse(text, {key for e in trained for key in (e.tower, e.view)})


def _reject_encoder_gradients(config: RunConfig, balance: Balance) -> None:
  """Raises ConfigError for settings that need gradients of the encoder."""
  if config.interference is not None:
    name = "config.interference"
  elif balance.uses_encoder_gradients:
    name = "config.balance"
  else:
    return
  raise ConfigError(
    f"{name} compares the objectives' gradients on the image encoder, which"
    " config.optim.rules freeze entirely, so they are all 0. Leave it out"
    f" (--{name}=None), or train a part of the encoder."
  )


def _build_weight(
  name: str, weight: float | WeightConfig, length: RunLength
) -> ObjectiveWeight:
  if not isinstance(weight, WeightConfig):
    return ObjectiveWeight(weight)
  start, ramp = length.steps(weight.start) or 0, length.steps(weight.ramp) or 0
  if start >= length.total_steps:
    raise ConfigError(
      f"config.objectives.{name}.weight: starts at step {start} of a run of "
      f"{length.total_steps} steps, so the objective would never be trained."
    )
  return ObjectiveWeight(weight.value, start, ramp, weight.ramp_shape)


def open_run(
  config: sections.Config | RunConfig, workdir: str | os.PathLike
) -> Run:
  """Resolves a config and builds everything except the state.

  The evaluations' data are opened by `open_evaluations`.
  """
  check_workdir(workdir)
  config = resolve(config, workdir)
  trackers = metrics.build_trackers(config.log.trackers)
  mesh = make_config_mesh(config)
  require_tokenizer(config)  # Before the data, which may be slow to open.
  # Limits and controls come last, because labels are aligned to whole sources.
  whole_sources = [
    sources_lib.build_source({**entry, **sources_lib.WHOLE})
    for entry in config.data.train
  ]
  entries = [*zip(config.data.train, whole_sources, strict=True)]
  limited_sources = [
    sources_lib.complete_source(source, {"limit": entry.get("limit")})
    for entry, source in entries
  ]
  tokenizer = build_tokenizer(config, workdir, limited_sources)
  run = build_run(config, mesh, sum(map(len, limited_sources)))
  model = run.spec.model
  heads = build_prediction_heads(config, model)
  op = find_op(config.data.ops)
  head_tokenizers = {
    "text": tokenizer,
    "conversation": op and op.text.tokenizer,
  }
  for head in heads.values():
    head.check_tokenizer(head_tokenizers[head.tokenizer])
  # Labels that no objective reads are not opened.
  labels = ops.build_ops(
    config.data.ops,
    tokenizer=tokenizer,
    batch_fields=run.spec.fields(),
    features=run.spec.feature_layouts,
  ).labels
  sources = [
    sources_lib.complete_source(
      source, {**entry, "labels": entry.get("labels") or None}, fields=labels
    )
    for entry, source in entries
  ]
  _warn_of_repeated_rows(config, sources)
  return dataclasses.replace(
    run,
    workdir=path_lib.as_path(workdir),
    tokenizer=tokenizer,
    sources=sources,
    prediction_heads=heads,
    trackers=trackers,
  )


def build_prediction_heads(
  config: RunConfig, spec: ModelSpec
) -> dict[str, PredictionHead]:
  """The prediction heads that a run trains, by name."""
  length = ops.phrase_length(config.data.ops)
  return heads_of_config(config.to_dict()["objectives"], spec, length)


def make_loader(
  run: Run,
  start_step: int,
  skipped: order.SkippedBatches = (),
  stats: Stats | None = None,
) -> pipeline.Loader:
  """Builds the loader of this process's batch rows, from `start_step` on."""
  config = run.config
  rows = find_host_rows(run.mesh)
  loader = pipeline.make_loader(
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    skipped=skipped,
    process_index=rows.index,
    process_count=rows.count,
    tokenizer=run.tokenizer,
    batch_fields=run.spec.fields(),
    features=run.spec.feature_layouts,
    sources=run.sources,
    stats=stats,
  )
  run.require_fields(loader.fields)
  if config.model.text is not None and "caption" in loader.fields:
    (length,) = loader.fields["caption"].shape
    if length != config.model.text.length:
      raise ConfigError(
        f"config.data.ops makes captions of {length} tokens, but evaluations "
        f"and exports use config.model.text.length={config.model.text.length}. "
        "Set both to the same number."
      )
  return loader


def save_config(run: Run, command: str = "", *, is_new: bool = True) -> None:
  """Writes resolved config, command and tokenizer file to the run's folder.

  An empty `command` does not replace a recorded one, and only a new run
  replaces a tokenizer that an earlier start left.
  """
  if jax.process_index() != 0:
    return
  run.workdir.mkdir(parents=True, exist_ok=True)
  # Temporary files of killed sessions.
  for folder in (run.workdir, run.workdir / "evals"):
    atomic.remove_abandoned(folder)
  path = run.workdir / "config.json"
  new = run.config.to_dict()
  data = (json.dumps(new, indent=2) + "\n").encode()
  old = path.read_bytes() if path.exists() else None
  recorded = new if old is None else read_recorded_config(run.workdir)
  if changes := overrides.describe_difference(recorded, new):
    log.warning(
      f"{path} has changed; the old one is config.json.old. If the seed, the"
      " batch size or the data changed, the run continues with other rows.\n"
      f"{first_lines(changes, 20)}"
    )
    shutil.copyfile(path, path.with_name("config.json.old"))
  if old != data:
    # Atomic, since resumed runs and studies read it even after a kill here.
    atomic.write(path, data)
  if command:
    atomic.write_text(path.with_name("command.txt"), command + "\n")
  op = find_op(run.config.data.ops)
  for folder, tokenizer in (
    ("tokenizer", run.tokenizer),
    (CONVERSATION_TOKENIZER, op and op.text.tokenizer),
  ):
    if not (source := getattr(tokenizer, "path", None)):
      continue
    folder = run.workdir / folder
    folder.mkdir(exist_ok=True)
    for file in tokenizers.list_files(source):
      target = folder / file.name
      if is_new or not target.exists():
        # Atomic, so that a later start does not accept a truncated file.
        with atomic.replace_file(target) as temporary:
          shutil.copyfile(file, temporary)


def _warn_of_repeated_rows(
  config: RunConfig, sources: Sequence[Source]
) -> None:
  """Warns of sources with fewer records than their rows in a batch."""
  size = config.batch_size
  weights = [sources_lib.read_weight(entry) for entry in config.data.train]
  for source, weight in zip(sources, weights, strict=True):
    rows = size * weight / sum(weights)
    if rows > len(source):
      log.warning(
        f"A batch of {size} takes {rows:.0f} rows of {source!r}, which has "
        f"only {len(source)} records: some are repeated, and contrastive losses"
        " count their captions as negatives. Reduce batch_size or the source's"
        " weight, or add data."
      )
