"""Schedules of the learning rate and of the weight decay.

A learning rate has a warm-up, a shape and a cool-down. A new shape is one class
in `SCHEDULES`; its fields are its options.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.config import options, schema
from mtv_jax.config.options import Fraction, PositiveInt
from mtv_jax.utils.errors import ConfigError

Schedule = Callable[[Any], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Cosine:
  """Half a cosine from 1 to `end` (Loshchilov and Hutter 2017)."""

  end: Fraction = 0.0

  def __call__(self, step: Array, decay_steps: int) -> Array:
    return half_cosine(step, 1.0, self.end, decay_steps)


@dataclasses.dataclass(frozen=True)
class Rsqrt:
  """sqrt(s / (s + step)) (Zhai et al. 2022, Scaling vision transformers)."""

  timescale_steps: PositiveInt = 10_000  # s; a duration in a config.

  def __call__(self, step: Array, decay_steps: int) -> Array:
    return jnp.sqrt(self.timescale_steps / (self.timescale_steps + step))


@dataclasses.dataclass(frozen=True)
class Constant:
  """1 at every step."""

  def __call__(self, step: Array, decay_steps: int) -> Array:
    return jnp.ones_like(step)


# `(step, decay_steps) -> factor`: both count from the end of the warm-up,
# `decay_steps` to the end of the run.
SCHEDULES: dict[str, type[Callable[[Array, int], Array]]] = {
  "cosine": Cosine,
  "rsqrt": Rsqrt,
  "constant": Constant,
}
# Options that schedules without them ignore: `schema` always gives a default.
_SHARED = ("end", "timescale_steps")


def half_cosine(
  step: Any, start: float | Array, end: float, steps: int
) -> Float[Array, ""]:
  """Half a cosine from `start` at step 0 to `end` at `steps` and after."""
  progress = jnp.clip(step / max(steps, 1), 0.0, 1.0)
  return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def scale_lr(config: schema.Config, batch_size: int) -> float:
  """The peak rate of `config.optim` at a batch size.

  `lr` itself, or with `lr_per_examples` it times batch_size / lr_per_examples
  (Goyal et al. 2017, arXiv 1706.02677), or times the square root of that ratio,
  as in DINOv2.

  Raises:
    ConfigError: a scaling without `lr_per_examples`.
  """
  lr, examples = float(config["lr"]), config.get("lr_per_examples")
  scaling = config.get("lr_scaling") or "linear"
  if examples is None:
    if scaling != "linear":
      raise ConfigError(
        f"config.optim.lr_scaling={scaling!r} has no effect without"
        " config.optim.lr_per_examples, the batch size at which lr is the rate."
      )
    return lr
  ratio = batch_size / examples
  return lr * (ratio if scaling == "linear" else ratio**0.5)


def make_weight_decay(
  config: schema.Config, total_steps: int
) -> float | Schedule:
  """The weight decay of `config.optim`: a number, or a function of the step.

  With `weight_decay_end` half a cosine over the whole run, as in DINOv2.
  """
  start = float(config.get("weight_decay") or 0.0)
  end = config.get("weight_decay_end")
  if end is None or end == start:
    return start

  def decay(step: Any) -> Float[Array, ""]:
    return half_cosine(
      jnp.asarray(step, jnp.float32), start, float(end), total_steps
    )

  return decay


def make_schedule(
  config: schema.Config, *, lr: float, length: schema.RunLength
) -> Schedule:
  """The learning rate of the update after t others.

  With T steps, of which w warm up and c cool down:

    warm-up   min(1, (t + 1) / w): the first update already moves
    shape     of `SCHEDULES`, at max(t - w, 0) of T - w steps
    cool-down min(1, (T - t) / c): linear, to zero at T

  and the three are multiplied with `lr`.

  `config` has the name, the durations warmup and cooldown, and options of the
  schedule. `end_lr` is the end of a cosine as a rate, which does not scale with
  `lr` (DINOv2's min_lr); `end` as a share of `lr`.

  Raises:
    ConfigError: an unknown name or option, a warm-up and cool-down that exceed
      T, or an `end_lr` that the schedule can't end at.
  """
  total_steps = length.total_steps
  warmup = length.steps("warmup", config, default=0)
  cooldown = length.steps("cooldown", config, default=0)
  if warmup + cooldown > total_steps:
    raise ConfigError(
      f"config.schedule: {warmup} steps of warm-up and {cooldown} of cool-down"
      f" don't fit in a run of {total_steps}."
    )
  shape = _build_shape(config, lr, length, cooldown)

  def schedule(step: Any) -> Float[Array, ""]:
    t = jnp.asarray(step, jnp.float32)
    rate = lr * shape(jnp.maximum(t - warmup, 0.0), total_steps - warmup)
    if warmup:
      rate = rate * jnp.minimum(1.0, (t + 1) / warmup)
    if cooldown:
      rate = rate * jnp.clip((total_steps - t) / cooldown, 0.0, 1.0)
    return rate

  return schedule


def _build_shape(
  config: schema.Config, lr: float, length: schema.RunLength, cooldown: int
) -> Callable[[Array, int], Array]:
  """The instance of a class in `SCHEDULES`; durations are in steps."""
  name = config.get("name") or "cosine"
  cls = options.look_up(SCHEDULES, name, where="config.schedule", key="name")
  reserved = ["name", "end_lr"]
  reserved += [f"{d}_{u}" for d in ("warmup", "cooldown") for u in schema.UNITS]
  fields = {field.name: field.default for field in dataclasses.fields(cls)}
  taken = {*reserved, *(k for k in _SHARED if k not in fields)}
  durations = {}
  for field, default in fields.items():
    if field.endswith("_steps"):
      name = field.removesuffix("_steps")
      durations[field] = length.steps(name, config, default)
      taken |= {f"{name}_{unit}" for unit in schema.UNITS}
  given = {k: v for k, v in config.items() if v is not None and k not in taken}
  if (end_lr := config.get("end_lr")) is not None:
    given["end"] = _end_share(end_lr, lr, cls, given.get("end"), cooldown)
  return options.build(
    cls, given | durations, where="config.schedule", reserved=reserved
  )


def _end_share(
  end_lr: float, lr: float, cls: type, end: float | None, cooldown: int
) -> float:
  """An absolute end of a cosine as a share of the peak rate."""
  problem = None
  if cls is not Cosine:
    problem = "is an option of the cosine alone"
  elif end:
    problem = f"and end={end} are two ends; give one of them"
  elif cooldown:
    problem = "contradicts a cool-down, which ends at a rate of 0"
  elif end_lr > lr:
    problem = f"exceeds the peak rate, {lr:g} at this batch size"
  if problem:
    raise ConfigError(f"config.schedule.end_lr={end_lr:g} {problem}.")
  return end_lr / lr if lr else 0.0
