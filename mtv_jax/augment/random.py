"""Turning uniform numbers into what the ops of a view need.

Each op of a view is a plain function of its share of one vector of uniform
numbers in [0, 1). One call of the generator for a view, instead of several
for each op, keeps compilation short, and makes every op testable without keys.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.utils.errors import ConfigError


def coin(u: Float[Array, ""], p: float | int) -> Bool[Array, ""]:
  """True with probability `p`, exactly so for 0 and 1."""
  return u < p


def between(
  u: Float[Array, "*n"], low: float | int, high: float | int
) -> Float[Array, "*n"]:
  """Uniform from `low` to `high`."""
  return low + u * (high - low)


def ranks(u: Float[Array, "n"]) -> Int[Array, "n"]:
  """How many entries come before each one in ascending order.

  A random permutation of 0 to n - 1 where `u` is random. By comparing all
  pairs, which for a few hundred numbers is cheaper than sorting twice.
  """
  place = jnp.arange(u.shape[0])
  before = u[None, :] < u[:, None]
  # Of equal numbers the first one wins, so that no rank is given twice.
  tied = (u[None, :] == u[:, None]) & (place[None, :] < place[:, None])
  return (before | tied).sum(axis=1, dtype=jnp.int32)


def check_size(op: str, size: Any) -> None:
  """Raises ConfigError where `size` is no number of pixels."""
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
  """Raises ConfigError where a parameter is no number from `low` to `high`."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not low <= value <= high:
    limits = f"a number from {low:g}"
    if high != float("inf"):
      limits += f" to {high:g}"
    raise ConfigError(f"{op}: {name}={value!r}; expected {limits}.")


def check_pair(op: str, name: str, pair: Any) -> None:
  """Raises ConfigError where a range is not two positive ascending numbers."""
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
