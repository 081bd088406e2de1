"""The optimizer: optax under schedules and per-parameter rules.

One update, for a parameter p with gradient g:

  g <- g * min(1, clip_norm / |g|)      (norm over all trained parameters, or
                                         those of its tower or head)
  u <- adam(g) | adafactor(g) | lion(g) | momentum(g) | muon(g)
  p <- p - lr(t) * m_lr * (u + weight_decay(t) * m_wd * p)

m_lr and m_wd are the multipliers of `param_rules`; m_lr is a vector over the
layers of a stack if its rate decays by layer, and 0 before the parameter's
start, while the optimizer's moments advance. The weight decay is multiplied by
the learning rate, as in optax and torch; big_vision's `wd=1e-4` at `lr=1e-3` is
`weight_decay=0.1` here.
"""

import dataclasses
import operator
import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mtv_jax.config import options, schema
from mtv_jax.train.optim.param_rules import ParamRule, match_param_rules
from mtv_jax.train.optim.schedules import (
  Schedule,
  make_schedule,
  make_weight_decay,
  scale_lr,
)
from mtv_jax.train.optim.transforms import OPTIMIZERS
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, map_with_names


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optax transformation, its schedules and the rules of its parameters."""

  tx: optax.GradientTransformation
  schedule: Schedule  # Of the learning rate.
  weight_decay: float | Schedule
  table: tuple[ParamRule, ...]
  note: str = ""  # For the log.

  def hyperparameters(self, step: int) -> dict[str, Any]:
    """Scheduled values of the update after `step` others, for the metrics."""
    values = {"lr": self.schedule(step)}
    if callable(self.weight_decay):
      values["weight_decay"] = self.weight_decay(step)
    return values


def make_optimizer(
  optim_config: schema.Config,
  schedule_config: schema.Config,
  *,
  length: schema.RunLength,
  params: Any,
  attention_heads: Mapping[str, int] = types.MappingProxyType({}),
  start_steps: Mapping[str, int] = types.MappingProxyType({}),
) -> Optimizer:
  """Builds the optimizer of a config.

  Args:
    optim_config: the keys of `_COMMON`, and the options of a class in
      `transforms.OPTIMIZERS`.
    schedule_config: see `make_schedule`.
    length: the run's length.
    params: the parameters, or their shapes.
    attention_heads: see `StepSpec.attention_heads`.
    start_steps: see `StepSpec.start_steps`.

  Returns:
    The state of its `tx` has moments of the parameters' names and shapes, and
    none for frozen ones, which are unchanged.

  Raises:
    ConfigError: an unknown name or multiplier, or settings without an effect.
    InputError: a rule that matches no parameter.
  """
  schedule = make_schedule(
    schedule_config,
    lr=scale_lr(optim_config, length.batch_size),
    length=length,
  )
  optimizer = _build_optimizer(optim_config)
  table = match_param_rules(
    params,
    optim_config.get("rules") or (),
    length=length,
    start_steps=start_steps,
  )
  rows = {row.name: row for row in table}
  trained = [row for row in table if not row.frozen]
  if not trained:
    raise ConfigError("config.optim.rules freeze every parameter.")
  weight_decay = make_weight_decay(optim_config, length.total_steps)
  if callable(weight_decay) and not any(row.weight_decay for row in trained):
    raise ConfigError(
      "config.optim.weight_decay_end has no effect: the decay multiplier of"
      " every trained parameter is 0. Change config.optim.rules, or drop it."
    )
  tx = optax.chain(
    *_make_clipping(optim_config),
    optimizer.scale(attention_heads),
    optax.identity(),  # Earlier checkpoints have an empty state here.
    _apply_rules(rows, schedule, weight_decay),
  )
  if len(trained) < len(table):
    tx = _mask_frozen(tx, rows, params)
  note = ""
  if hasattr(optimizer, "describe"):
    note = optimizer.describe([row.name for row in trained])
  return Optimizer(tx, schedule, weight_decay, table, note)


def _mask_frozen(
  tx: optax.GradientTransformation, rows: Mapping[str, ParamRule], params: Any
) -> optax.GradientTransformation:
  """Leaves frozen parameters without moments, and out of the norm."""
  frozen = map_with_names(lambda name, _: rows[name].frozen, params)
  trainable = jax.tree.map(operator.not_, frozen)
  return optax.chain(
    optax.masked(tx, trainable), optax.masked(optax.set_to_zero(), frozen)
  )


# Keys of `config.optim` that belong to every optimizer.
_COMMON = (
  "name",
  "lr",
  "lr_per_examples",
  "lr_scaling",
  "weight_decay",
  "weight_decay_end",
  "clip_norm",
  "clip_by",
  "rules",
)
# Options that optimizers without them ignore, so that a recipe's optimizer can
# be changed by its name alone.
_SHARED = ("b1", "b2", "eps", "momentum", "mu_dtype")


def _build_optimizer(config: schema.Config) -> Any:
  """The instance of a class in `OPTIMIZERS` with the config's options."""
  where, name = "config.optim", config.get("name") or "adamw"
  cls = options.look_up(OPTIMIZERS, name, where=where, key="name")
  fields = {field.name for field in dataclasses.fields(cls)}
  ignored = {*_COMMON, *_SHARED} - fields
  given = {
    k: v for k, v in config.items() if v is not None and k not in ignored
  }
  return options.build(cls, given, where=where, reserved=_COMMON)


def _make_clipping(config: schema.Config) -> list[optax.GradientTransformation]:
  """The clipping of a config; empty if it has none."""
  clip_norm = config.get("clip_norm") or 0.0
  clip_by = config.get("clip_by") or "global"
  options.check_value(
    clip_by, Literal["global", "module"], "config.optim.clip_by"
  )
  if not clip_norm and clip_by != "global":
    raise ConfigError(
      f"config.optim.clip_by={clip_by!r} has no effect, as clip_norm=0 switches"
      " clipping off. Give a clip_norm, such as DINOv2's 3.0, or drop clip_by."
    )
  if not clip_norm:
    return []
  if clip_by == "module":
    return [_clip_by_module_norm(clip_norm)]
  return [optax.clip_by_global_norm(clip_norm)]


def _clip_by_module_norm(max_norm: float) -> optax.GradientTransformation:
  """Clips the norm of each tower and each head, as DINOv2 its modules."""

  def module(name: str) -> str:
    first, second, *_ = f"{name}/".split("/")
    return f"heads/{second}" if first == "heads" else first

  def clip(updates: Any, params: Any) -> Any:
    del params
    modules: dict[str, list[Any]] = {}
    for name, leaf in flatten_with_names(updates):
      modules.setdefault(module(name), []).append(leaf)
    norms = {name: optax.tree.norm(leaves) for name, leaves in modules.items()}

    def scale(name: str, leaf: Any) -> Any:
      norm = norms[module(name)]
      # As optax, which leaves gradients below the norm bit-equal.
      return jnp.where(norm < max_norm, leaf, leaf / norm * max_norm)

    return map_with_names(scale, updates)

  return optax.stateless(clip)


def _apply_rules(
  rows: Mapping[str, ParamRule],
  schedule: Schedule,
  weight_decay: float | Schedule,
) -> optax.GradientTransformation:
  """Maps u to -lr(t) * m_lr * (u + weight_decay(t) * m_wd * p).

  Its state is that of `optax.scale_by_learning_rate`.
  """

  def init(params: Any) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    step_size = -schedule(state.count)
    scheduled = callable(weight_decay)
    decay = weight_decay(state.count) if scheduled else weight_decay

    def apply(name: str, update: Any, param: Any) -> Any:
      row = rows[name]
      if row.weight_decay and (scheduled or decay):
        update = update + decay * row.weight_decay * param
      if row.rates != (1,):
        update = row.multiplier * update
      if row.start:
        update = jnp.where(state.count >= row.start, update, 0.0)
      return jnp.asarray(step_size, update.dtype) * update

    count = optax.safe_increment(state.count)
    updates = map_with_names(apply, updates, params)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init, update)
