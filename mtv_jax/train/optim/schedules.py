"""Learning-rate schedules: a warm-up, a shape and a cool-down.

A new shape is a class in `SCHEDULES`; its fields are its options.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.config.options import Fraction, NonNegativeFloat, PositiveInt
from mtv_jax.config.sections import further_options, list_keys, sparse
from mtv_jax.utils.errors import ConfigError

Schedule = Callable[[Any], Float[Array, ""]]
# Rise to 1 in n steps. linear: from 1/n; cosine: half a cosine from 0, as
# DINOv3's `linear_warmup_cosine_decay` with a peak of 0.
RampShape = Literal["linear", "cosine"]


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


# `(step, decay_steps) -> factor`, counted from the end of the warm-up;
# `decay_steps` is the number of steps to the end of the run.
SCHEDULES: dict[str, type[Callable[[Array, int], Array]]] = {
  "cosine": Cosine,
  "rsqrt": Rsqrt,
  "constant": Constant,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """`config.schedule`; see `make_schedule`."""

  name: str = "cosine"
  warmup: Duration = Duration(0)
  warmup_shape: RampShape = sparse("linear")
  cooldown: Duration = Duration(0)
  timescale: Duration = Duration(10_000)  # For rsqrt.
  end: Fraction = 0.0  # For cosine, as a share of the peak rate.
  # For cosine, as an absolute rate, independent of `lr` (DINOv2's min_lr).
  end_lr: NonNegativeFloat | None = None
  options: Mapping[str, Any] = further_options()  # Fields of the shape.


def half_cosine(
  step: Any, start: float | Array, end: float, steps: int
) -> Float[Array, ""]:
  """Half a cosine from `start` at step 0 to `end` at step `steps` and later."""
  progress = jnp.clip(step / max(steps, 1), 0.0, 1.0)
  return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def ramp_factor(
  step: Any, steps: int, shape: RampShape = "linear"
) -> Float[Array, ""]:
  """Share of the final value at a step counted from 0; 1 after `steps`."""
  if shape == "linear":
    return jnp.clip((step + 1) / max(steps, 1), 0.0, 1.0)
  return half_cosine(step, 0.0, 1.0, steps - 1) if steps > 1 else jnp.ones(())


def make_schedule(
  config: ScheduleConfig, *, lr: float, length: RunLength
) -> Schedule:
  """The learning rate of update t, counted from 0.

  `lr` times the product of three factors, for T steps, w of warm-up and c of
  cool-down:

    warm-up   `ramp_factor`: by default min(1, (t + 1) / w), above 0 at t = 0
    shape     a class in `SCHEDULES`, at step max(t - w, 0) of T - w
    cool-down min(1, (T - t) / c): linear to 0 at T

  The shape `constant` with a cool-down is the warm-up-stable-decay (WSD)
  schedule.
  """
  total_steps = length.total_steps
  warmup, cooldown = length.steps(config.warmup), length.steps(config.cooldown)
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
      rate = rate * ramp_factor(t, warmup, config.warmup_shape)
    if cooldown:
      rate = rate * jnp.clip((total_steps - t) / cooldown, 0.0, 1.0)
    return rate

  return schedule


def _build_shape(
  config: ScheduleConfig, lr: float, length: RunLength, cooldown: int
) -> Callable[[Array, int], Array]:
  """Instantiates a class in `SCHEDULES`; ignores options that it lacks."""
  where = "config.schedule"
  cls = options.look_up(SCHEDULES, config.name, where=where, key="name")
  fields = {field.name for field in dataclasses.fields(cls)}
  arguments = {"end": config.end}
  if config.end_lr is not None:
    arguments["end"] = _convert_end_lr(config, lr, cls, cooldown)
  if "timescale_steps" in fields:
    arguments["timescale_steps"] = length.steps(config.timescale)
  arguments = {k: v for k, v in arguments.items() if k in fields}
  further = {k: v for k, v in config.options.items() if v is not None}
  keys = list_keys(ScheduleConfig)
  return options.build(cls, further | arguments, where=where, reserved=keys)


def _convert_end_lr(
  config: ScheduleConfig, lr: float, cls: type, cooldown: int
) -> float:
  """Converts `end_lr` to a share of the peak rate."""
  end_lr, problem = config.end_lr, None
  if cls is not Cosine:
    problem = "applies only to the cosine"
  elif config.end:
    problem = f"contradicts end={config.end}; set only one of them"
  elif cooldown:
    problem = "contradicts a cool-down, which ends at a rate of 0"
  elif end_lr > lr:
    problem = f"exceeds the peak rate, {lr:g} at this batch size"
  if problem:
    raise ConfigError(f"config.schedule.end_lr={end_lr:g} {problem}.")
  return end_lr / lr if lr else 0.0
