"""Rollback after non-finite updates or metrics out of bounds.

The train step skips an update if the loss or the gradient is non-finite (see
`step.make_update_fn`); `UpdateMonitor` counts these and spikes of the gradient
norm.
"""

import collections
import dataclasses
import logging
import math
import pathlib
import statistics
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

import mtv_jax
from mtv_jax.config.options import NonNegativeInt, PositiveFloat
from mtv_jax.config.sections import sparse
from mtv_jax.utils.errors import ConfigError, UserError, did_you_mean

log = logging.getLogger(__name__)

# Window of the median gradient norm; also the minimum steps between warnings.
_WINDOW = 100
_MIN_NORMS = 50

_HINT = (
  "Resume with a lower learning rate, a longer warm-up, clipping or b2=0.95,"
  " or look up the rows in nonfinite.jsonl."
)

# Arguments of UpdateMonitor that a checkpoint stores.
SAVED = ("skipped_updates", "nonfinite_since")


@dataclasses.dataclass(frozen=True)
class NonFiniteConfig:
  """`config.nonfinite`: non-finite updates are skipped.

  After more than `max_consecutive` in a row, the run restores the checkpoint
  before them and skips their rows.
  """

  max_consecutive: NonNegativeInt = 10
  then: Literal["rollback", "stop"] = "rollback"
  max_rollbacks: NonNegativeInt = 3


class NonFiniteError(UserError, FloatingPointError):
  """Raised if losses or gradients stay non-finite."""


class RollbackError(Exception):
  """Raised to undo the steps `first` to `last`, inclusive.

  `what` is the reason (default: too many non-finite updates in a row), and
  `hint` what to try if the run ends. `then` is "rollback" or "stop" (None for
  `config.nonfinite.then`), and `then_key` its config key. `error_type` ends the
  run if it does not roll back.
  """

  def __init__(
    self,
    first: int,
    last: int,
    what: str | None = None,
    hint: str = _HINT,
    then: str | None = None,
    then_key: str = "config.nonfinite.then",
    error_type: type[UserError] = NonFiniteError,
  ):
    self.first, self.last, self.hint = first, last, hint
    self.what = what or f"the updates of steps {first} to {last} are not finite"
    self.then, self.then_key, self.error_type = then, then_key, error_type
    super().__init__(self.what)


@dataclasses.dataclass
class UpdateMonitor:
  """Counts skipped updates and detects spikes.

  All processes see equal numbers and make equal decisions.
  """

  max_consecutive: int  # More skipped updates in a row raise RollbackError.
  # A spike is a gradient norm this many times the median of the last 100; 0
  # disables detection.
  spike_factor: float
  skipped_updates: int = 0  # Including earlier sessions'.
  nonfinite_since: int | None = None  # First step of the current series.

  def __post_init__(self):
    self._norms = collections.deque(maxlen=_WINDOW)
    self._last_spike = -_WINDOW

  def observe(self, step: int, skipped: bool, grad_norm: float) -> float | None:
    """Records a step; returns the factor if it is a spike, else None."""
    if skipped:
      self.skipped_updates += 1
      first = self.nonfinite_since = self.nonfinite_since or step
      if step - first >= self.max_consecutive:
        raise RollbackError(first, step)
      return None
    self.nonfinite_since = None
    factor = None
    if self.spike_factor and len(self._norms) >= _MIN_NORMS:
      median = statistics.median(self._norms)
      is_spike = grad_norm > self.spike_factor * median > 0
      if is_spike and step - self._last_spike >= _WINDOW:
        self._last_spike, factor = step, grad_norm / median
    self._norms.append(grad_norm)
    return factor

  def to_dict(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in SAVED}


def list_non_finite(values: Mapping[str, Any]) -> list[str]:
  """Names of the non-finite metrics."""
  return [name for name, value in values.items() if not math.isfinite(value)]


def locate_nan(function: Callable[..., Any], *args: Any) -> str:
  """Returns the call stack of the first NaN or infinity, outermost call first.

  Runs the function operation by operation, which is slow.
  """
  root = pathlib.Path(mtv_jax.__file__).parent
  try:
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
      function(*args)
  except FloatingPointError as error:
    frames = traceback.extract_tb(error.__traceback__)
    mtv_frames = [f for f in frames if root in pathlib.Path(f.filename).parents]
    calls = [
      f"{pathlib.Path(f.filename).relative_to(root)}:{f.lineno} {f.name}"
      for f in mtv_frames
    ]
    return f"{str(error).splitlines()[0]} In: {' > '.join(calls)}"
  return "no single operation: it depends on the compiled order of sums"


class BoundError(UserError):
  """Raised if a metric is out of bounds and the run does not roll back."""


@dataclasses.dataclass(frozen=True)
class Bound:
  """An evaluation's `bound`: minimum, maximum or maximum drop of a metric.

  A `drop` is the decrease since the evaluation before the first step. It counts
  if the 95 % interval over the items, paired by resample, also excludes 0. With
  `beyond_noise`, `min` and `max` count if the value's interval excludes them;
  metrics without resamples, such as CKA, have no interval.

  If the metric is out of bounds, `rollback` restores the last checkpoint at
  which it was within them and skips the rows since then, at most
  `config.nonfinite.max_rollbacks` times; `return` restores it and ends the run
  there; `stop` ends the run with an error. A result has the `metrics` and
  `resamples` of `evals.core.base.Result`.
  """

  metric: str
  min: float | None = sparse(None)
  max: float | None = sparse(None)
  drop: PositiveFloat | None = sparse(None)
  beyond_noise: bool = sparse(False)
  then: Literal["rollback", "return", "stop"] = sparse("rollback")

  def __post_init__(self):
    if self.min is None and self.max is None and self.drop is None:
      raise ConfigError("has no min, max or drop: set at least one.")

  def check(
    self,
    name: str,
    result: Any,
    step: int,
    last_within: int,
    *,
    is_met: bool,
  ) -> None:
    """Raises RollbackError or BoundError unless the bound `is_met`.

    `last_within` is the step of the previous evaluation, within bounds.
    """
    value = self.value(name, result)
    if is_met:
      return
    drop = f"more than {self.drop} below its value at step 0"
    violation = self._describe_outside(result) or drop
    what = f"{name}/{self.metric} is {value:.4g} at step {step}, {violation}"
    if step == 0:
      raise BoundError(
        f"{what}: the run starts out of bounds (config.evals.{name}.bound)."
      )
    raise RollbackError(
      first=last_within + 1,
      last=step,
      what=what,
      hint="Resume with a lower learning rate, a stronger anchor or lower"
      " layer_decay, or loosen the bound.",
      then=self.then,
      then_key=f"config.evals.{name}.bound.then",
      error_type=BoundError,
    )

  def value(self, name: str, result: Any) -> float:
    """The metric of evaluation `name`; ConfigError if it is missing."""
    metrics = result.metrics
    if self.metric not in metrics:
      raise ConfigError(
        f"config.evals.{name}.bound.metric: {name} has no {self.metric!r}. "
        f"{did_you_mean(self.metric, metrics)}"
      )
    return metrics[self.metric]

  def is_met(self, result: Any, first: Any) -> bool:
    """Whether a result is within the bound; NaN is not.

    `first` is the result before the first step, which a `drop` needs.
    """
    if self._describe_outside(result):
      return False
    return not (self.drop and self._has_dropped(result, first))

  def _describe_outside(self, result: Any) -> str:
    """How the value violates `min` or `max`, or ""."""
    value, noise = result.metrics[self.metric], 0.0
    if self.beyond_noise and self.metric in result.resamples:
      noise = 1.96 * float(np.nanstd(result.resamples[self.metric]))
    if self.min is not None and not value + noise >= self.min:
      return f"below {self.min:g}"
    if self.max is not None and not value - noise <= self.max:
      return f"above {self.max:g}"
    return ""

  def _has_dropped(self, result: Any, first: Any) -> bool:
    drop = first.metrics[self.metric] - result.metrics[self.metric]
    pair = [r.resamples.get(self.metric) for r in (first, result)]
    is_paired = all(x is not None for x in pair)
    noise = 1.96 * float(np.std(pair[0] - pair[1])) if is_paired else 0.0
    return not drop <= max(self.drop, noise)
