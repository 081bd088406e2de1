"""The contract of a view op, its registry, and checks of its parameters.

An op of a view is a frozen dataclass: its fields are the parameters that an op
string gives. It draws no random numbers itself but is a function of uniform
numbers in [0, 1), as many as `num_uniforms` says. One call of the generator for
all ops of a view keeps compilation short, and an op can be tested without keys.

To add an op, subclass the base class of its stage and give it a name; nothing
else has to change:

    @dataclasses.dataclass(frozen=True)
    class Posterize(PhotometricOp, name="posterize"):
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mtv_jax.utils.errors import ConfigError

# In the order in which an op string has to name them.
STAGES = ("geometry", "photometrics", "masks")
# Op classes by the name that an op string uses.
OPS: dict[str, type[ViewOp]] = {}


@dataclasses.dataclass(frozen=True)
class ViewOp:
  """Base class of view ops.

  Attributes:
    name: in op strings.
    stage: one of `STAGES`.
  """

  name: ClassVar[str]
  stage: ClassVar[str]

  def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any):
    """Registers the class under `name`; base classes of a stage have none."""
    super().__init_subclass__(**kwargs)
    if name is not None:
      cls.name = name
      OPS[name] = cls

  def num_uniforms(self, size: int) -> int:
    """Uniform numbers that the op takes in a view of `size` pixels."""
    raise NotImplementedError(f"{type(self).__name__} lacks num_uniforms()")

  def check(self, size: int) -> None:
    """Raises ConfigError where the op does not fit a view of `size` pixels."""


def check_size(op: str, size: Any) -> None:
  """Raises ConfigError unless `size` is a positive number of pixels."""
  if not isinstance(size, int) or isinstance(size, bool) or size < 1:
    raise ConfigError(
      f"{op}: a size of {size!r}; expected a whole number of pixels a side, "
      f"such as {op}(224)."
    )


def check_range(
  op: str,
  name: str,
  value: Any,
  *,
  low: float = 0.0,
  high: float = float("inf"),
) -> None:
  """Raises ConfigError unless a parameter is a number from `low` to `high`."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not low <= value <= high:
    limits = f"a number from {low:g}"
    if high != float("inf"):
      limits += f" to {high:g}"
    raise ConfigError(f"{op}: {name}={value!r}; expected {limits}.")


def check_pair(op: str, name: str, pair: Any) -> None:
  """Raises ConfigError unless a range is two positive ascending numbers."""
  numbers = (
    isinstance(pair, tuple | list)
    and len(pair) == 2
    and all(isinstance(x, int | float) for x in pair)
  )
  if not numbers or not 0 < pair[0] <= pair[1] < float("inf"):
    raise ConfigError(
      f"{op}: {name}={pair!r}; expected the smallest and the largest, such as "
      f"{name}=(0.5, 2.0)."
    )
