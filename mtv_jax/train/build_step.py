"""The train step of a config: specification, optimizer, compiled functions."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.data import ops, tokenizers
from mtv_jax.models.remat import Remat
from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import BATCH_SPEC, check_batch_size, make_mesh
from mtv_jax.parallel.rules import check_sharding_rules
from mtv_jax.train.balance import Balance, build_balance
from mtv_jax.train.mup import Mup
from mtv_jax.train.optim.optimizer import Optimizer, make_optimizer
from mtv_jax.train.optim.param_rules import ParamRule, match_param_rules
from mtv_jax.train.run import RunConfig, WeightConfig
from mtv_jax.train.spec import (
  ObjectiveWeight,
  StepSpec,
  abstract_params,
  find_first_read_steps,
)
from mtv_jax.train.step import Program, make_program
from mtv_jax.train.teachers import select_teachers
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names
from mtv_jax.utils.xla_flags import parse_flags


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The train step of a config on a mesh, not yet compiled."""

  config: RunConfig
  length: RunLength
  step_spec: StepSpec
  optimizer: Optimizer
  program: Program

  @property
  def mesh(self) -> Mesh:
    return self.program.mesh

  @property
  def total_steps(self) -> int:
    return self.length.total_steps

  def abstract_batch(
    self, rows: int | None = None
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the sharded global batch; `rows` overrides the batch size."""
    fields = batch_fields(self.config, self.step_spec)
    sharding = NamedSharding(self.mesh, BATCH_SPEC)
    return abstract_batch(rows or self.config.batch_size, fields, sharding)

  def is_due(self, every: Duration | None, step: int) -> bool:
    """Whether a step is a multiple of a duration; False for None or 0."""
    steps = self.length.steps(every)
    return bool(steps) and step % steps == 0

  def require_fields(self, fields: Iterable[str]) -> None:
    """Raises ConfigError if an objective reads a field not in `fields`."""
    for field, readers in self.step_spec.fields().items():
      if field not in fields:
        raise ConfigError(
          f"objective {readers[0]!r} reads the batch field {field!r}, but"
          f" config.data yields only {sorted(fields)}. Add its source or op, or"
          " drop the objective."
        )


def make_config_mesh(
  config: RunConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh of a config, by default over all devices."""
  mesh = make_mesh(config.mesh, devices)
  check_batch_size(
    "config.batch_size", config.batch_size, mesh, accumulate=config.accumulate
  )
  return mesh


def build_train_step(
  config: RunConfig, mesh: Mesh, examples_per_epoch: int | None
) -> TrainStep:
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
  program = make_program(
    spec, optimizer.tx, mesh, config.sharding, config.xla_flags
  )
  return TrainStep(config, length, spec, optimizer, program)


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


def build_step_spec(
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
