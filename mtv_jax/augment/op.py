"""The contract of a view op, and the registry of view ops.

An op of a view is a frozen dataclass: its fields are the parameters that an op
string gives, checked against their annotations (`config.options`). It draws no
random numbers itself but is a function of `num_uniforms` uniform numbers in
[0, 1). One call of the generator for
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


def check_pair(op: str, name: str, pair: tuple[float, float]) -> None:
  """Raises ConfigError unless a range is two positive ascending numbers."""
  if not 0 < pair[0] <= pair[1]:
    raise ConfigError(
      f"{op}: {name}={pair!r}; expected the smallest and the largest, such as "
      f"{name}=(0.5, 2.0)."
    )
