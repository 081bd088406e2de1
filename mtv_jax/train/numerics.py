"""Updates that are not finite, and spikes of the gradient norm.

The step leaves the state as it is where the loss or the gradient is not finite
(`step.make_update_fn`). This module counts those steps and
decides when a run returns to an earlier checkpoint.
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

# Norms of which a spike is a multiple, and steps without another message.
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
  """`config.nonfinite`: updates that are not finite are skipped.

  After more than `max_consecutive` the run returns to the checkpoint before
  them, and leaves out their rows.
  """

  max_consecutive: NonNegativeInt = 10
  then: Literal["rollback", "stop"] = "rollback"
  max_rollbacks: NonNegativeInt = 3


class NonFiniteError(UserError, FloatingPointError):
  """Losses or gradients stay non-finite."""


class RollbackError(Exception):
  """A run is to undo steps: to return to the last checkpoint before them.

  By default, since too many updates in a row are not finite.

  Attributes:
    first: the first of these steps.
    last: the last one.
    what: what is wrong, for messages.
    hint: what to try, if the run ends.
    then: "rollback" or "stop"; None for `config.nonfinite.then`.
    then_key: the config key of `then`.
    error_type: of the error that ends the run if it does not return.
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
  """Counts the skipped updates, and recognises spikes.

  Every process sees the same numbers and decides alike.

  Args:
    max_consecutive: more skipped updates in a row raise RollbackError.
    spike_factor: a spike is a gradient norm of so many times the median of the
      last 100; None for no spikes.
    skipped_updates: those of earlier sessions.
    nonfinite_since: the first of those in a row, if the last step was one.
  """

  max_consecutive: int
  spike_factor: float | None
  skipped_updates: int = 0
  nonfinite_since: int | None = None

  def __post_init__(self):
    self._norms = collections.deque(maxlen=_WINDOW)
    self._last_spike = -_WINDOW

  def observe(self, step: int, skipped: bool, grad_norm: float) -> float | None:
    """Takes the numbers of a step; returns the factor of a spike, or None."""
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
    """What a checkpoint stores of it."""
    return {name: getattr(self, name) for name in SAVED}


def list_non_finite(values: Mapping[str, Any]) -> list[str]:
  """The names of the metrics that are not finite."""
  return [name for name, value in values.items() if not math.isfinite(value)]


def format_values(values: Mapping[str, float]) -> str:
  """ "a 1.2, b 0.3"."""
  return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def format_names(names: Sequence[str], limit: int = 16) -> str:
  """The first names of a list, and the number of further ones."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def locate_nan(function: Callable[..., Any], *args: Any) -> str:
  """Where a function first computes NaN or infinity: calls, outermost first.

  Runs it operation by operation, which is slow.
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
