"""Non-finite updates, and spikes of the gradient norm.

The train step skips an update if the loss or the gradient is non-finite (see
`step.make_update_fn`). This module counts skipped updates and decides when a
run rolls back to an earlier checkpoint.
"""

import collections
import dataclasses
import logging
import math
import pathlib
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

import mtv_jax
from mtv_jax.config.options import NonNegativeInt
from mtv_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# Window of the median gradient norm; also the minimum steps between warnings.
_WINDOW = 100
_FEWEST = 50

_HINT = (
  "Resume with a lower learning rate, a longer warm-up, clipping or b2=0.95,"
  " or look at nonfinite.jsonl for their rows."
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
  """Losses or gradients stay non-finite."""


class RollbackError(Exception):
  """Raised to roll back to the last checkpoint before some steps.

  The default reason is too many non-finite updates in a row.

  Attributes:
    first: first step to undo.
    last: last step to undo.
    what: the reason, for messages.
    hint: what to try if the run ends.
    then: "rollback" or "stop"; None for `config.nonfinite.then`.
    then_key: the config key of `then`.
    error_type: type of the error that ends the run if it does not roll back.
  """

  def __init__(
    self,
    first: int,
    last: int,
    *,
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

  Args:
    max_consecutive: more skipped updates in a row raise RollbackError.
    spike_factor: a spike is a gradient norm this many times the median of the
      last 100; None disables detection.
    skipped_updates: number of updates that earlier sessions skipped.
    nonfinite_since: first step of the current series of skipped updates.
  """

  max_consecutive: int
  spike_factor: float | None
  skipped_updates: int = 0
  nonfinite_since: int | None = None

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
    if self.spike_factor and len(self._norms) >= _FEWEST:
      median = statistics.median(self._norms)
      is_spike = grad_norm > self.spike_factor * median > 0
      if is_spike and step - self._last_spike >= _WINDOW:
        self._last_spike, factor = step, grad_norm / median
    self._norms.append(grad_norm)
    return factor

  def to_dict(self) -> dict[str, Any]:
    """The counters to store in a checkpoint."""
    return {name: getattr(self, name) for name in SAVED}


def list_non_finite(values: Mapping[str, Any]) -> list[str]:
  """Names of the non-finite metrics."""
  return [name for name, value in values.items() if not math.isfinite(value)]


def format_values(values: Mapping[str, float]) -> str:
  """ "a 1.2, b 0.3"."""
  return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def format_names(names: Sequence[str], limit: int = 16) -> str:
  """The first `limit` names, and the number of further ones."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def locate_nan(function: Callable[..., Any], *args: Any) -> str:
  """Locates the first NaN or infinity: the call stack, outermost call first.

  Runs the function operation by operation, which is slow.
  """
  root = pathlib.Path(mtv_jax.__file__).parent
  try:
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
      function(*args)
  except FloatingPointError as error:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if root in pathlib.Path(f.filename).parents]
    calls = [
      f"{pathlib.Path(f.filename).relative_to(root)}:{f.lineno} {f.name}"
      for f in inside
    ]
    return f"{str(error).splitlines()[0]} In: {' > '.join(calls)}"
  return "no operation by itself: it depends on the compiled order of sums"
