"""Durations in steps, epochs, examples or percent of a run."""

import dataclasses
from typing import Annotated

from mtv_jax.config.options import Range, shorten_repr
from mtv_jax.utils.errors import ConfigError

UNITS = ("steps", "epochs", "examples", "percent")
_MAX_STEPS = 2**31 - 1  # The step on devices is an int32.


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training, in one of four units.

  A section's field `warmup: Duration` is read from `warmup_steps`,
  `warmup_epochs`, `warmup_examples` or `warmup_percent`.
  """

  value: float | int
  unit: str = "steps"
  # Config key, for errors, such as "config.schedule.warmup".
  name: str = dataclasses.field(default="duration", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Units:
  """Restricts the units of an annotated duration."""

  names: tuple[str, ...]


PositiveDuration = Annotated[Duration, Range(above=0)]
TotalDuration = Annotated[PositiveDuration, Units(UNITS[:3])]


@dataclasses.dataclass(frozen=True)
class RunLength:
  """Batch size and length of a run; converts durations to steps."""

  batch_size: int
  examples_per_epoch: int | None = None  # None for endless data.
  total_steps: int | None = None

  @classmethod
  def of_total(
    cls, total: Duration, batch_size: int, examples_per_epoch: int | None = None
  ) -> "RunLength":
    """Builds the length from a total duration."""
    length = cls(batch_size, examples_per_epoch)
    try:
      steps = length.steps(total)
    except OverflowError:
      steps = _MAX_STEPS + 1
    if steps > _MAX_STEPS:
      key = f"{total.name}_{total.unit} is {shorten_repr(total.value)}"
      raise ConfigError(f"{key}, expected at most {_MAX_STEPS:,} steps.")
    return dataclasses.replace(length, total_steps=steps)

  def steps(self, duration: Duration | None) -> int | None:
    """Converts a duration to steps, at least one if positive; None to None."""
    if duration is None:
      return None
    value, key = duration.value, f"{duration.name}_{duration.unit}"
    if duration.unit == "steps":
      return int(value)
    if duration.unit == "percent":
      if self.total_steps is None:
        raise ConfigError(f"{key} needs a run of known length.")
      count = value / 100 * self.total_steps
    elif duration.unit == "examples":
      count = value / self.batch_size
    else:
      if self.examples_per_epoch is None:
        name = duration.name.rpartition(".")[2]
        hint = f"use {name}_steps or {name}_examples"
        raise ConfigError(f"{key}: the data's length is unknown; {hint}.")
      count = value * self.examples_per_epoch / self.batch_size
    return max(round(count), 1) if value else 0
