"""The train step of a config: specification, optimizer, compiled functions."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mtv_jax.augment import views
from mtv_jax.config import options, schema
from mtv_jax.models import two_tower as model_lib
from mtv_jax.models.remat import Remat
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel.mesh import check_batch_size, make_mesh
from mtv_jax.parallel.rules import check_sharding_rules
from mtv_jax.train import balance as balance_lib
from mtv_jax.train.optim import param_rules
from mtv_jax.train.optim.optimizer import Optimizer, make_optimizer
from mtv_jax.train.spec import (
  ObjectiveWeight,
  StepSpec,
  abstract_params,
  find_first_reads,
)
from mtv_jax.train.step import Program, make_program
from mtv_jax.train.teachers import build_teachers, select_teachers
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

  def duration(self, name: str, section: ConfigDict) -> int | None:
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


def build_step_spec(
  config: ConfigDict, total_steps: int, examples_per_epoch: int | None = None
) -> StepSpec:
  """Builds the specification of the train step of a resolved config.

  Durations in epochs need `examples_per_epoch`. Sets what the objectives decide
  in the config: the mask token, and whether there is a text tower.

  Raises:
    ConfigError: for views, objectives, weights or rules that don't fit.
  """
  length = schema.RunLength(config.batch_size, examples_per_epoch, total_steps)
  weights = {
    name: _build_weight(name, entry.weight, length)
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
  teachers = build_teachers(config, model, length)
  objectives = {
    name: build_objective(name, entry)
    .resolve(model, built_views)
    .resolve_teachers(model, built_views, teachers)
    for name, entry in config.objectives.items()
  }
  _resolve_model(config, objectives, built_views)
  runtime = model_lib.runtime(config.model)
  model = model_lib.ModelSpec.from_config(config.model)
  spec = StepSpec(
    model=model,
    dtype=jnp.dtype(runtime.pop("dtype", "float32")),
    remat=_read_remat(runtime.pop("remat", "none"), objectives),
    runtime=runtime,
    objectives=objectives,
    weights=weights,
    views=built_views,
    seed=config.seed,
    total_steps=total_steps,
    init=config.model.init,
    balance=_build_balance(config.balance, length),
    teacher_momentum=config.teacher.momentum,
    teacher_end=config.teacher.end,
    teacher_ema=config.teacher.ema,
    ema_decay=config.ema.decay if config.ema else None,
    accumulate=config.accumulate,
    teachers=select_teachers(
      build_teachers(config, model, length),
      model,
      find_first_reads(objectives, weights),
    ),
  )
  if not config.optim.rules:
    return spec
  params = abstract_params(spec)
  table = param_rules.match_param_rules(params, config.optim.rules)
  frozen = frozenset(row.name for row in table if row.frozen)
  if all(r.frozen for r in table if r.name.startswith("image/")):
    _reject_encoder_gradients(config, spec.balance)
  return dataclasses.replace(spec, frozen=frozen)


def _read_remat(text: str, objectives: Mapping[str, base.Objective]) -> Remat:
  """The towers' rematerialisation; entries are of encodings that are trained.

  Raises:
    ConfigError: for an unknown encoding, policy or array.
  """
  read = {e for o in objectives.values() for e in o.needs().encodings}
  trained = [e for e in read if e.weights == base.STUDENT]
  return Remat.parse(text, {key for e in trained for key in (e.tower, e.view)})


def _reject_encoder_gradients(
  config: ConfigDict, balance: balance_lib.Balance
) -> None:
  """Raises ConfigError for what measures gradients of a frozen encoder."""
  settings = {
    "config.interference": config.interference is not None,
    "config.balance": balance.uses_encoder_gradients,
  }
  for name, is_set in settings.items():
    if is_set:
      raise ConfigError(
        f"{name} compares the objectives' gradients on the image encoder, "
        "which config.optim.rules freeze whole, so that all of them are 0. "
        f"Leave it out (--{name}=None), or train a part of the encoder."
      )


def _resolve_model(
  config: ConfigDict,
  objectives: Mapping[str, base.Objective],
  built_views: Mapping[str, views.View],
) -> None:
  """Sets mask token and text tower of the config by what the objectives read.

  In the config, as the run's model is opened from its resolved config.
  """
  read = {e for o in objectives.values() for e in o.needs().encodings}
  if any(built_views[e.view].max_masked for e in read if e.view in built_views):
    config.model.mask_token = True
  if not config.model.text or any(e.tower == "text" for e in read):
    return
  # A captioning decoder has the tokens, and by default the shape, of the tower.
  tokens = {"caption", "box_phrase"}
  if not any(tokens & {*o.needs().fields} for o in objectives.values()):
    log.warning("No objective reads text: config.model.text is left out.")
    config.model.text = None
    return
  log.warning(
    "No objective trains the text tower, which has the tokens of captions: "
    "it is frozen, at random values unless config.init gives others."
  )
  if _FROZEN_TEXT not in map(list, config.optim.rules):
    config.optim.rules = [_FROZEN_TEXT, *config.optim.rules]


def _build_weight(
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


def _build_balance(
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
