"""The optimizer: optax under schedules and per-parameter rules.

One update, for a parameter p with gradient g:

  g <- g * min(1, clip_norm / |g|)           (norm over all trained parameters)
  u <- adam(g) | adafactor(g) | lion(g) | momentum(g)
  p <- p - lr(t) * m_lr * (u + weight_decay * m_wd * p)

m_lr and m_wd are the multipliers of the first rule found in its name. Decay is
decoupled from the gradient but follows the learning rate, as in optax (and
torch). big_vision writes it relative to the peak: its `wd=1e-4` at `lr=1e-3` is
`weight_decay=0.1` here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtv_jax.config.schema import Config, steps
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import flatten_with_names, map_with_names, match_rules

Schedule = Callable[[Any], Float[Array, ""]]

# Only weight matrices shrink: not biases, norms and scalars, nor embeddings,
# tokens and probes, whose size is their meaning. By name rather than by rank,
# since stacked blocks lead every leaf with the depth. The same as big_vision.
_DECAYED = "kernel"
_MULTIPLIERS = ("lr", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Row:
  """How one parameter is updated: multipliers of the rate and the decay."""

  name: str
  shape: tuple[int, ...]
  rule: str | None  # The pattern that took it; None where none did.
  lr: float
  weight_decay: float

  @property
  def frozen(self) -> bool:
    """Whether it is never updated."""
    return self.lr == 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optax transformation, its learning rate by step, and who got what."""

  tx: optax.GradientTransformation
  schedule: Schedule
  table: tuple[Row, ...]


def make_optimizer(
  optim_config: Config,
  schedule_config: Config,
  *,
  total_steps: int,
  batch_size: int,
  params: Any,
  examples_per_epoch: int | None = None,
) -> Optimizer:
  """Builds the optimizer of a config.

  Args:
    optim_config: `config.optim`: name, lr, weight_decay, b1, b2, eps,
      momentum, mu_dtype, clip_norm, rules.
    schedule_config: `config.schedule`, see `make_schedule`.
    total_steps: of the run.
    batch_size: examples a step.
    params: the parameters, or their shapes.
    examples_per_epoch: for durations in epochs.

  Returns:
    Optimizer: the state of `tx` holds moments of the parameters' names and
    shapes, and none for frozen ones, which stay as they are.

  Raises:
    ConfigError: an unknown name or multiplier.
    ValueError: a rule that matches no parameter.
  """
  schedule = make_schedule(
    schedule_config,
    lr=float(optim_config["lr"]),
    total_steps=total_steps,
    batch_size=batch_size,
    examples_per_epoch=examples_per_epoch,
  )
  table = rule_table(params, optim_config.get("rules") or ())
  rows = {row.name: row for row in table}
  if all(row.frozen for row in table):
    raise ConfigError("config.optim.rules freeze every parameter.")
  weight_decay = optim_config.get("weight_decay") or 0.0
  clip_norm = optim_config.get("clip_norm") or 0.0
  trained = optax.chain(
    *([optax.clip_by_global_norm(clip_norm)] if clip_norm else []),
    _preconditioner(optim_config),
    _decay_and_multiply(rows, weight_decay),
    optax.scale_by_learning_rate(schedule),
  )
  frozen = map_with_names(lambda name, _: rows[name].frozen, params)
  if any(row.frozen for row in table):
    learns = jax.tree.map(lambda x: not x, frozen)
    # Masked rather than multiplied by 0: no moments, no share in the norm.
    trained = optax.chain(
      optax.masked(trained, learns),
      optax.masked(optax.set_to_zero(), frozen),
    )
  return Optimizer(trained, schedule, table)


def _preconditioner(config: Config) -> optax.GradientTransformation:
  """The gradient to an update of the size of the learning rate."""
  name = config.get("name") or "adamw"
  b1, b2 = config.get("b1"), config.get("b2")
  b1 = 0.9 if b1 is None else b1
  mu_dtype = config.get("mu_dtype") or "float32"
  if name == "adamw":
    b2 = 0.999 if b2 is None else b2
    eps = config.get("eps") or 1e-8
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
  if name == "lion":
    return optax.scale_by_lion(
      b1, 0.99 if b2 is None else b2, mu_dtype=mu_dtype
    )
  if name == "adafactor":
    return _adafactor(b1, 0.999 if b2 is None else b2, mu_dtype)
  if name == "sgd":
    momentum = config.get("momentum")
    if not momentum:
      return optax.identity()
    return optax.trace(momentum, accumulator_dtype=mu_dtype)
  raise ConfigError(
    f"config.optim.name is {name!r}."
    f" {did_you_mean(name, ['adamw', 'adafactor', 'lion', 'sgd'])}"
  )


def _adafactor(
  momentum: float, b2_cap: float, mu_dtype: str
) -> optax.GradientTransformation:
  """Adafactor as it trains ViTs (Zhai et al. 2021, arXiv 2106.04560, 3.4).

  No scaling by the parameter's size, momentum in half precision if asked for,
  and a second moment that never stops moving: its decay is capped.
  """

  def decay_rate(step: Any, exponent: Any) -> Any:
    return jnp.minimum(b2_cap, 1.0 - (step + 1.0) ** -exponent)

  parts = [
    optax.scale_by_factored_rms(decay_rate_fn=decay_rate),
    optax.clip_by_block_rms(1.0),
  ]
  if momentum:
    parts.append(optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype))
  return optax.chain(*parts)


def _decay_and_multiply(
  rows: Mapping[str, Row], weight_decay: float
) -> optax.GradientTransformation:
  """u to m_lr * (u + weight_decay * m_wd * p)."""

  def one(name: str, update: Any, param: Any) -> Any:
    row = rows[name]
    decay = weight_decay * row.weight_decay
    if decay:
      update = update + decay * param
    return update if row.lr == 1 else row.lr * update

  return optax.stateless(
    lambda updates, params: map_with_names(one, updates, params)
  )


def rule_table(params: Any, rules: Sequence[Sequence[Any]]) -> tuple[Row, ...]:
  """Which rule took which parameter.

  Args:
    params: the parameters, or their shapes.
    rules: pairs (regex, dict(lr=multiplier, weight_decay=multiplier)); the
      first one found in a name takes it, and what it doesn't say is as
      without rules: lr 1, weight_decay 1 for kernels and 0 for the rest.

  Raises:
    ConfigError: an unknown or negative multiplier.
    ValueError: a rule that matches no parameter.
  """
  for rule in rules:
    given = rule[1] if len(rule) == 2 else None
    if not isinstance(given, Mapping):
      raise ConfigError(
        "config.optim.rules: a rule is (regex, dict(lr=...,"
        f" weight_decay=...)), got {rule!r}."
      )
    for key, value in given.items():
      if key not in _MULTIPLIERS:
        raise ConfigError(
          f"config.optim.rules: {rule[0]!r} sets {key!r}."
          f" {did_you_mean(key, _MULTIPLIERS)}"
        )
      if not value >= 0:
        raise ConfigError(
          f"config.optim.rules: {rule[0]!r} sets {key} to {value!r}, expected"
          " a multiplier, at least 0."
        )
  named = dict(flatten_with_names(params))
  rows = []
  for match in match_rules(named, rules, what="config.optim.rules"):
    decayed = match.name.split("/")[-1] == _DECAYED
    mults = {"lr": 1.0, "weight_decay": float(decayed)} | (match.value or {})
    shape = tuple(named[match.name].shape)
    mults = {key: float(value) for key, value in mults.items()}
    rows.append(Row(match.name, shape, match.pattern, **mults))
  return tuple(rows)


def describe(table: Sequence[Row]) -> str:
  """The table for the log: one line for each rule and pair of multipliers."""
  groups: dict[Any, list[Row]] = {}
  for row in table:
    key = row.rule or "(no rule)", row.lr, row.weight_decay
    groups.setdefault(key, []).append(row)
  lines = [
    f"{'rule':<32} {'lr x':>7} {'decay x':>7} {'arrays':>7} {'numbers':>13}"
    "  for example"
  ]
  for (rule, lr, decay), rows in groups.items():
    size = sum(math.prod(row.shape) for row in rows)
    lines.append(
      f"{rule:<32} {'frozen' if lr == 0 else f'{lr:g}':>7} {decay:>7g}"
      f" {len(rows):>7} {size:>13,}  {rows[0].name}"
    )
  return "\n".join(lines)


def make_schedule(
  config: Config,
  *,
  lr: float,
  total_steps: int,
  batch_size: int,
  examples_per_epoch: int | None = None,
) -> Schedule:
  """The learning rate at the update that follows step t.

  With T steps, of which w warm up and c cool down:

    warm-up   min(1, (t + 1) / w): the first update already moves
    cosine    end + (1 - end) (1 + cos(pi (t - w) / (T - w))) / 2
    rsqrt     sqrt(s / (s + max(t - w, 0))), s the timescale
    constant  1
    cool-down min(1, (T - t) / c): linear, to zero at T

  and the three are multiplied with `lr`.

  Args:
    config: name, end, and the durations warmup, cooldown and timescale.
    lr: the peak.
    total_steps: T.
    batch_size: examples a step, for durations in examples and epochs.
    examples_per_epoch: for durations in epochs.

  Raises:
    ConfigError: an unknown name, or warm-up and cool-down longer than T.
  """
  name = config.get("name") or "cosine"
  units = {
    "batch_size": batch_size,
    "examples_per_epoch": examples_per_epoch,
    "total_steps": total_steps,
  }
  warmup = steps("warmup", config, default=0, **units)
  cooldown = steps("cooldown", config, default=0, **units)
  timescale = steps("timescale", config, default=10_000, **units)
  end = config.get("end") or 0.0
  if warmup + cooldown > total_steps:
    raise ConfigError(
      f"config.schedule: {warmup} steps of warm-up and {cooldown} of cool-down"
      f" don't fit in a run of {total_steps}."
    )

  def cosine(after: Array) -> Array:
    progress = jnp.clip(after / max(total_steps - warmup, 1), 0.0, 1.0)
    return end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  shapes = {
    "cosine": cosine,
    "rsqrt": lambda after: jnp.sqrt(timescale / (timescale + after)),
    "constant": jnp.ones_like,
  }
  if name not in shapes:
    raise ConfigError(
      f"config.schedule.name is {name!r}. {did_you_mean(name, shapes)}"
    )

  def schedule(step: Any) -> Float[Array, ""]:
    t = jnp.asarray(step, jnp.float32)
    rate = lr * shapes[name](jnp.maximum(t - warmup, 0.0))
    if warmup:
      rate = rate * jnp.minimum(1.0, (t + 1) / warmup)
    if cooldown:
      rate = rate * jnp.clip((total_steps - t) / cooldown, 0.0, 1.0)
    return rate

  return schedule


def ema_update(
  ema: Any, params: Any, decay: Any, *, step: Any | None = None
) -> Any:
  """One step of the exponential moving average, decay e + (1 - decay) p.

  Args:
    ema: a tree of arrays, which keep their dtypes.
    params: the same tree after an update.
    decay: such as 0.9999; may be traced.
    step: if given, the average warms up: its decay is at most
      (1 + step) / (10 + step), so that it forgets the initialisation.
  """
  rate = jnp.asarray(decay, jnp.float32)
  if step is not None:
    rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda e, p: (e + (1.0 - rate) * (p - e)).astype(e.dtype), ema, params
  )
