"""Base class and registry of view ops.

A view op is a frozen dataclass whose fields are the parameters of the op
string, checked against their annotations (`config.options`). It is a function
of `num_uniforms` uniform numbers in [0, 1): a single generator call for all ops
of a view shortens compilation, and tests need no keys.

To add an op, subclass the base class of its stage and give it a name:

    @dataclasses.dataclass(frozen=True)
    class Posterize(PhotometricOp, name="posterize"):
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mtv_jax.utils.errors import ConfigError

# Required order in an op string.
STAGES = ("geometry", "photometrics", "masks")
# Op classes by their name in op strings.
OPS: dict[str, type[ViewOp]] = {}


@dataclasses.dataclass(frozen=True)
class ViewOp:
  """Base class of view ops."""

  name: ClassVar[str]  # In op strings.
  stage: ClassVar[str]  # One of `STAGES`.
  uniforms: ClassVar[int]  # Uniform numbers that it consumes, at any size.

  def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any):
    """Registers the class under `name`; base classes omit it."""
    super().__init_subclass__(**kwargs)
    if name is None:
      return
    # Allow redefinition, as in a notebook.
    if name in OPS and OPS[name].__qualname__ != cls.__qualname__:
      raise TypeError(f"The view op {name!r} already exists: {OPS[name]}.")
    cls.name = name
    OPS[name] = cls

  def num_uniforms(self, size: int) -> int:
    """Uniform numbers that the op consumes in a view of `size` pixels."""
    del size
    return self.uniforms

  def check(self, size: int) -> None:
    """Raises ConfigError if the op does not fit a view of `size` pixels."""


def check_ascending(what: str, low: float, high: float) -> None:
  """Raises ConfigError if a range is inverted."""
  if low > high:
    raise ConfigError(f"{what} from {low} to {high} must ascend.")
