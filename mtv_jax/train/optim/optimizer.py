"""The optimizer: optax under schedules and per-parameter rules.

One update, for a parameter p with gradient g:

  g <- g * min(1, clip_norm / |g|)      (global norm over trained parameters, or
                                         norm of p's tower or head)
  u <- adam(g) | adafactor(g) | lion(g) | momentum(g) | muon(g)
  p <- p - lr(t) * m_lr * (u + weight_decay(t) * m_wd * p)

m_lr and m_wd are the multipliers of the parameter's rule, see `param_rules`.
With `decay_to="start"`, the decay's p is the distance from p at step 0. m_lr is
a vector over the layers of a stack with layer decay. Before the parameter's
start, m_lr is 0 but the moments advance. The weight decay is multiplied by the
learning rate, as in optax and torch: big_vision's `wd=1e-4` at `lr=1e-3` is
`weight_decay=0.1`.
"""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtv_jax.config import options
from mtv_jax.config.durations import RunLength
from mtv_jax.config.options import NonNegativeFloat, PositiveInt
from mtv_jax.config.sections import further_options, list_keys
from mtv_jax.train.mup import Multiplier
from mtv_jax.train.optim.param_rules import ParamRule
from mtv_jax.train.optim.schedules import (
  Schedule,
  ScheduleConfig,
  half_cosine,
  make_schedule,
)
from mtv_jax.train.optim.transforms import (
  OPTIMIZERS,
  Transform,
  UpdateRule,
)
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, map_with_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """`config.optim`: settings of every optimizer, and options of its class."""

  name: str = "adamw"
  lr: NonNegativeFloat
  # If set, lr is the rate at this batch size and is scaled to
  # `config.batch_size`.
  lr_per_examples: PositiveInt | None = None
  lr_scaling: Literal["linear", "sqrt"] = "linear"
  weight_decay: NonNegativeFloat = 0.0  # Multiplied by the rate, as in optax.
  # End value of a half cosine over the run, as in DINOv2; None: constant.
  weight_decay_end: NonNegativeFloat | None = None
  eps: float = 1e-8
  mu_dtype: Literal["float32", "bfloat16"] = "float32"
  clip_norm: NonNegativeFloat = 1.0  # 0 disables clipping.
  # Clips the global norm, or the norm of each tower and head separately.
  clip_by: Literal["global", "module"] = "global"
  # Pairs (regex, dict(...)), see the module docstring.
  rules: tuple[Any, ...] = ()
  options: Mapping[str, Any] = further_options()  # Fields of the class.

  def scale_lr(self, batch_size: int) -> float:
    """The peak rate at a batch size.

    With `lr_per_examples`, scales `lr` by batch_size / lr_per_examples (Goyal
    et al. 2017, arXiv 1706.02677) or by its square root, as in DINOv2.
    """
    if self.lr_per_examples is None:
      if self.lr_scaling != "linear":
        raise ConfigError(
          f"config.optim.lr_scaling={self.lr_scaling!r} has no effect without"
          " config.optim.lr_per_examples, the batch size at which lr is the"
          " rate."
        )
      return self.lr
    ratio = batch_size / self.lr_per_examples
    return self.lr * (ratio if self.lr_scaling == "linear" else ratio**0.5)

  def make_weight_decay(self, total_steps: int) -> float | Schedule:
    """The weight decay, or its schedule over steps."""
    start, end = self.weight_decay, self.weight_decay_end
    if end is None or end == start:
      return start

    def decay(step: Any) -> Any:
      step = jnp.asarray(step, jnp.float32)
      return half_cosine(step, start, end, total_steps)

    return decay


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optax transformation, its schedules and its parameter rules."""

  # Its `update` takes `inactive`, modules that the update leaves unchanged.
  tx: Transform
  schedule: Schedule  # The learning rate.
  weight_decay: float | Schedule
  table: tuple[ParamRule, ...]
  note: str = ""  # For the log.
  # (state of `tx`, params) -> params to evaluate; None: the trained params.
  eval_params: Callable[[Any, Any], Any] | None = None

  def hyperparameters(self, step: int) -> dict[str, Any]:
    """Scheduled values of update `step`, counted from 0, for the metrics."""
    values = {"lr": self.schedule(step)}
    if callable(self.weight_decay):
      values["weight_decay"] = self.weight_decay(step)
    return values


def make_optimizer(
  rule: UpdateRule,
  config: OptimConfig,
  schedule_config: ScheduleConfig,
  *,
  length: RunLength,
  params: Any,
  table: Sequence[ParamRule],
  attention_heads: Mapping[str, int] = types.MappingProxyType({}),
  mup: Mapping[str, Multiplier] = types.MappingProxyType({}),
) -> Optimizer:
  """Builds the optimizer of a config.

  `rule` is built from `config` (`build_optimizer`), `params` are the
  parameters, or their shapes, `table` their rules, and `mup` muP's multipliers,
  which scale u but not the weight decay. The state of `tx` has moments with the
  parameters' names and shapes, and the initial values of parameters that decay
  to them. Frozen parameters lack moments and don't change.
  """
  schedule = make_schedule(
    schedule_config, lr=config.scale_lr(length.batch_size), length=length
  )
  rows = {row.name: row for row in table}
  rates = _compute_mup_rates(rule, mup, table) if mup else {}
  trained = [row for row in table if not row.frozen]
  if not trained:
    raise ConfigError("config.optim.rules freeze every parameter.")
  weight_decay = config.make_weight_decay(length.total_steps)
  if callable(weight_decay) and not any(row.weight_decay for row in trained):
    raise ConfigError(
      "config.optim.weight_decay_end has no effect: the decay multiplier of"
      " every trained parameter is 0. Change config.optim.rules, or drop it."
    )
  tx = optax.chain(
    *_make_clipping(config),
    rule.scale(attention_heads),
    # An empty state even without muP, since checkpoints contain one here.
    _scale_updates(rates) if rates else optax.identity(),
    _apply_rules(rows, schedule, weight_decay),
  )
  tx, eval_params = rule.wrap(tx, schedule), rule.eval_params
  if not isinstance(tx, optax.GradientTransformationExtraArgs):
    raise ConfigError(
      f"config.optim.name={config.name!r}: wrap() returned a transformation"
      " without extra arguments, which would update modules of objectives that"
      " start later. Return optax.GradientTransformationExtraArgs, and pass the"
      " arguments on."
    )
  if len(trained) < len(table):
    frozen = map_with_names(lambda name, _: rows[name].frozen, params)
    trainable = jax.tree.map(operator.not_, frozen)
    # Frozen parameters lack moments and are not part of the gradient norm.
    tx = optax.chain(
      optax.masked(tx, trainable), optax.masked(optax.set_to_zero(), frozen)
    )
    if eval_params is not None:
      eval_params = functools.partial(_eval_trained_params, eval_params, frozen)
  return Optimizer(
    tx=tx,
    schedule=schedule,
    weight_decay=weight_decay,
    table=tuple(table),
    note=rule.describe([row.name for row in trained]) + _describe_mup(rates),
    eval_params=eval_params,
  )


def _eval_trained_params(
  eval_params: Callable[[Any, Any], Any], frozen: Any, state: Any, params: Any
) -> Any:
  """Applies `eval_params` to the trained parameters, as `optax.masked` does."""
  node = optax.MaskedNode
  masked = jax.tree.map(lambda f, p: node() if f else p, frozen, params)
  new = eval_params(state[0].inner_state, masked)
  return jax.tree.map(lambda p, x: p if isinstance(x, node) else x, params, new)


def build_optimizer(config: OptimConfig) -> UpdateRule:
  """Instantiates the optimizer's class with the config's options.

  Ignores common options that the class lacks, so that changing a recipe's
  optimizer takes only a new name.
  """
  where = "config.optim"
  cls = options.look_up(
    OPTIMIZERS, config.name, where=where, key="name", base=UpdateRule
  )
  arguments = {"eps": config.eps, "mu_dtype": config.mu_dtype, **config.options}
  fields = {field.name for field in dataclasses.fields(cls)}
  ignored = {"b1", "b2", "eps", "momentum", "mu_dtype"} - fields
  return options.build(
    cls,
    {k: v for k, v in arguments.items() if v is not None and k not in ignored},
    where=where,
    reserved=list_keys(OptimConfig),
  )


def _make_clipping(config: OptimConfig) -> list[Transform]:
  """The gradient clipping of a config; empty if disabled."""
  clip_norm, clip_by = config.clip_norm, config.clip_by
  if not clip_norm and clip_by != "global":
    raise ConfigError(
      f"config.optim.clip_by={clip_by!r} has no effect, as clip_norm=0 disables"
      " clipping. Set a clip_norm, such as DINOv2's 3.0, or drop clip_by."
    )
  if not clip_norm:
    return []
  if clip_by == "module":
    return [_clip_by_module_norm(clip_norm)]
  return [optax.clip_by_global_norm(clip_norm)]


def _clip_by_module_norm(max_norm: float) -> Transform:
  """Clips the gradient norm of each tower and head, like DINOv2's modules."""

  def name_module(name: str) -> str:
    first, second, *_ = f"{name}/".split("/")
    return f"heads/{second}" if first == "heads" else first

  def clip(updates: Any, params: Any) -> Any:
    del params
    modules: dict[str, list[Any]] = {}
    for name, leaf in flatten_with_names(updates):
      modules.setdefault(name_module(name), []).append(leaf)
    norms = {name: optax.tree.norm(leaves) for name, leaves in modules.items()}

    def scale(name: str, leaf: Any) -> Any:
      norm = norms[name_module(name)]
      # Like optax, leaves gradients below the norm bit-identical.
      return jnp.where(norm < max_norm, leaf, leaf / norm * max_norm)

    return map_with_names(scale, updates)

  return optax.stateless(clip)


def _compute_mup_rates(
  rule: UpdateRule, mup: Mapping[str, Multiplier], table: Sequence[ParamRule]
) -> dict[str, Any]:
  """muP's learning-rate multipliers: numbers, or arrays over columns."""
  return {
    row.name: mup[row.name].rate
    * rule.mup_rate(row.name, row.shape, mup[row.name].base_shape)
    for row in table
  }


def _describe_mup(rates: Mapping[str, Any]) -> str:
  """A sentence on muP for the log, or ""."""
  if not rates:
    return ""
  values = np.concatenate([np.ravel(rate) for rate in rates.values()])
  rate_range = f"{values.min():.3g} to {values.max():.3g}"
  return f" muP multiplies learning rates by {rate_range}."


def _scale_updates(rates: Mapping[str, Any]) -> Transform:
  return optax.stateless(
    lambda updates, _: map_with_names(lambda n, u: u * rates[n], updates)
  )


class _RulesState(NamedTuple):
  """A count, and the parameters with `decay_to="start"` at step 0."""

  count: jax.Array
  start: Any


def _apply_rules(
  rows: Mapping[str, ParamRule],
  schedule: Schedule,
  weight_decay: float | Schedule,
) -> Transform:
  """Maps u to -lr(t) * m_lr * (u + weight_decay(t) * m_wd * p).

  Maps it to 0 for the modules `inactive` (`text`, `heads/NAME`): they have zero
  gradients, but the weight decay would shrink them. Its state equals
  `optax.scale_by_learning_rate`'s unless a parameter decays to its start.
  """
  names = [
    name
    for name, row in rows.items()
    if row.decay_to == "start" and row.weight_decay and not row.frozen
  ]

  def init(params: Any) -> optax.ScaleByScheduleState | _RulesState:
    count = jnp.zeros((), jnp.int32)
    if not names:
      return optax.ScaleByScheduleState(count=count)
    masked = optax.MaskedNode()
    start = map_with_names(
      lambda name, p: jnp.copy(p) if name in names else masked, params
    )
    return _RulesState(count, start)

  def update(
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    inactive: Sequence[str] = (),
    **extra_args: Any,
  ) -> Any:
    del extra_args  # Other transformations read them.
    prefixes = tuple(f"{module}/" for module in inactive)
    step_size = -schedule(state.count)
    is_scheduled = callable(weight_decay)
    decay = weight_decay(state.count) if is_scheduled else weight_decay
    starts = dict(flatten_with_names(state.start)) if names else {}

    def apply(name: str, update: Any, param: Any) -> Any:
      row = rows[name]
      if name.startswith(prefixes):
        return jnp.zeros_like(update)
      if row.weight_decay and (is_scheduled or decay):
        distance = param - starts[name] if name in starts else param
        update = update + decay * row.weight_decay * distance
      if row.rates != (1,):
        update = row.multiplier * update
      if row.start:
        update = jnp.where(state.count >= row.start, update, 0.0)
      return jnp.asarray(step_size, update.dtype) * update

    count = optax.safe_increment(state.count)
    updates = map_with_names(apply, updates, params)
    return updates, state._replace(count=count)

  return optax.GradientTransformationExtraArgs(init, update)
