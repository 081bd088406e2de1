"""Learning-rate schedules: a shape between a warm-up and a cool-down.

A new schedule is one class in `SCHEDULES`; its fields are its options.
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
    progress = jnp.clip(step / max(decay_steps, 1), 0.0, 1.0)
    return self.end + (1 - self.end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


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


def make_schedule(
  config: schema.Config, *, lr: float, length: schema.RunLength
) -> Schedule:
  """The learning rate at the update that follows step t.

  With T steps, of which w warm up and c cool down:

    warm-up   min(1, (t + 1) / w): the first update already moves
    shape     of `SCHEDULES`, at max(t - w, 0) of T - w steps
    cool-down min(1, (T - t) / c): linear, to zero at T

  and the three are multiplied with `lr`.

  `config` has the name, the durations warmup and cooldown, and options of the
  schedule.

  Raises:
    ConfigError: an unknown name or option, or a warm-up and cool-down that
      exceed T.
  """
  total_steps = length.total_steps
  warmup = length.steps("warmup", config, default=0)
  cooldown = length.steps("cooldown", config, default=0)
  if warmup + cooldown > total_steps:
    raise ConfigError(
      f"config.schedule: {warmup} steps of warm-up and {cooldown} of cool-down"
      f" don't fit in a run of {total_steps}."
    )
  name = config.get("name") or "cosine"
  cls = options.look_up(SCHEDULES, name, where="config.schedule", key="name")
  reserved = ["name"]
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
  shape = options.build(
    cls, given | durations, where="config.schedule", reserved=reserved
  )

  def schedule(step: Any) -> Float[Array, ""]:
    t = jnp.asarray(step, jnp.float32)
    rate = lr * shape(jnp.maximum(t - warmup, 0.0), total_steps - warmup)
    if warmup:
      rate = rate * jnp.minimum(1.0, (t + 1) / warmup)
    if cooldown:
      rate = rate * jnp.clip((total_steps - t) / cooldown, 0.0, 1.0)
    return rate

  return schedule
