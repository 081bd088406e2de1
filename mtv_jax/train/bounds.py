"""Bounds on evaluation metrics, beyond which a run rolls back or stops."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from mtv_jax.config.sections import sparse
from mtv_jax.train.numerics import RollbackError
from mtv_jax.utils.errors import ConfigError, UserError, did_you_mean


class BoundError(UserError):
  """A metric is beyond its bound, and the run does not roll back."""


@dataclasses.dataclass(frozen=True)
class Bound:
  """An evaluation's `bound`: minimum and/or maximum of one metric.

  If the metric is out of bounds, `rollback` restores the last checkpoint at
  which it was within them and skips the rows since then, at most
  `config.nonfinite.max_rollbacks` times; `stop` ends the run.
  """

  metric: str
  min: float | None = sparse(None)
  max: float | None = sparse(None)
  then: Literal["rollback", "stop"] = sparse("rollback")

  def __post_init__(self):
    if self.min is None and self.max is None:
      raise ConfigError("has neither min nor max: give one or both.")

  def check(
    self,
    name: str,
    metrics: Mapping[str, float],
    step: int,
    last_step_within: int,
  ) -> None:
    """Checks the metrics of evaluation `name` after a step.

    `last_step_within` is the step of the previous evaluation, within bounds.
    """
    value = self.value(name, metrics)
    if self.is_met(value):
      return
    low = self.min is not None and not value >= self.min
    side = f"below {self.min:g}" if low else f"above {self.max:g}"
    what = f"{name}/{self.metric} is {value:.4g} at step {step}, {side}"
    if step == 0:
      raise BoundError(
        f"{what}: the run starts beyond config.evals.{name}.bound."
      )
    raise RollbackError(
      last_step_within + 1,
      step,
      what=what,
      hint=(
        "Resume with a lower learning rate, a stronger anchor or lower "
        "layer_decay, or loosen the bound."
      ),
      then=self.then,
      then_key=f"config.evals.{name}.bound.then",
      error_type=BoundError,
    )

  def value(self, name: str, metrics: Mapping[str, float]) -> float:
    """The metric of evaluation `name`; ConfigError if it is missing."""
    if self.metric not in metrics:
      raise ConfigError(
        f"config.evals.{name}.bound.metric: {name} has no {self.metric!r}. "
        f"{did_you_mean(self.metric, metrics)}"
      )
    return metrics[self.metric]

  def is_met(self, value: float) -> bool:
    """Whether a value is within the bound; NaN is not."""
    low = self.min is not None and not value >= self.min
    high = self.max is not None and not value <= self.max
    return not (low or high)
