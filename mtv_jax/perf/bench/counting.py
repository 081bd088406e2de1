"""FLOPs of a function by its shapes: traced, never run.

Matrix products and convolutions count, a loop's as often as it runs, one that
is written twice once, and one that nobody reads not at all: what a compiler
would make of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class Traced:
  """What a function costs, and what it reads.

  Attributes:
    flops: of its matrix products and convolutions.
    reads: for each leaf of the arguments, whether the results depend on it.
  """

  flops: float
  reads: list[bool]


def trace(
  function: Callable[..., PyTree], *args: PyTree, keep: Sequence[bool] = ()
) -> Traced:
  """Counts a function by tracing it; nothing is computed.

  Args:
    function: of arrays.
    args: arrays or `jax.ShapeDtypeStruct`s.
    keep: which leaves of the result count; by default all of them.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  keep = keep or [True] * len(jaxpr.outvars)
  return Traced(*_live(jaxpr, list(keep)))


def _live(jaxpr: Any, keep: list[bool]) -> tuple[float, list[bool]]:
  """FLOPs of what the kept results need, and which inputs that is.

  Backwards through the program, so that what nobody reads is left out, and what
  is written twice is counted once, as the compiler does both.
  """
  same = _equal_values(jaxpr)
  needed = {
    same.get(var, var)
    for var, kept in zip(jaxpr.outvars, keep, strict=True)
    if kept and not isinstance(var, core.Literal)
  }
  total = 0.0
  for eqn in reversed(jaxpr.eqns):
    kept = [var in needed for var in eqn.outvars]
    if not any(kept) and not eqn.effects:
      continue
    flops, reads = _equation(eqn, kept)
    total += flops
    needed |= {
      same.get(var, var)
      for var, read in zip(eqn.invars, reads, strict=True)
      if read and not isinstance(var, core.Literal)
    }
  return total, [var in needed for var in jaxpr.invars]


def _equal_values(jaxpr: Any) -> dict[Any, Any]:
  """Variables that repeat an operation, each with the one it was first in."""
  first: dict[Any, Any] = {}
  same: dict[Any, Any] = {}
  for eqn in jaxpr.eqns:
    inputs = tuple(
      ("literal", str(var), str(var.aval))
      if isinstance(var, core.Literal)
      else same.get(var, var)
      for var in eqn.invars
    )
    # A custom derivative's functions are made anew a call, and don't matter:
    # what was to be differentiated is.
    params = tuple(
      (key, _identity(value))
      for key, value in sorted(eqn.params.items())
      if not callable(value)
    )
    known = first.setdefault((eqn.primitive, inputs, params), eqn)
    if known is not eqn and not eqn.effects:
      same.update(zip(eqn.outvars, known.outvars, strict=True))
  return same


def _equation(eqn: Any, kept: list[bool]) -> tuple[float, list[bool]]:
  """FLOPs of one operation, and which of its inputs it reads."""
  every = [True] * len(eqn.invars)
  name = eqn.primitive.name
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    inner = math.prod(shape[i] for i in contract)
    return 2.0 * eqn.outvars[0].aval.size * inner, every
  if name == "conv_general_dilated":
    return _convolution(eqn), every
  inner = [_open(j) for j in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)]
  inner = [j for j in inner if j is not None]
  if not inner:
    return 0.0, every
  if len(inner) == 1 and name not in ("scan", "while", "cond"):
    (body,) = inner
    if len(body.invars) == len(every) and len(body.outvars) == len(kept):
      return _live(body, kept)
  if name == "cond":
    counted, reads = zip(*(_live(body, kept) for body in inner), strict=True)
    return max(counted), [True, *map(any, zip(*reads, strict=True))]
  # Of a loop everything is needed, since a pass reads what the last one made.
  counted = [_live(body, [True] * len(body.outvars))[0] for body in inner]
  return sum(counted) * eqn.params.get("length", 1), every


def _is_jaxpr(x: Any) -> bool:
  return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _identity(param: Any) -> Any:
  # A program is the same where it reads the same, but for constants in it.
  if _is_jaxpr(param) and getattr(param, "consts", None):
    return id(param)
  return str(param)


def _open(x: Any) -> Any:
  if not _is_jaxpr(x):
    return None
  return x.jaxpr if isinstance(x, core.ClosedJaxpr) else x


def _convolution(eqn: Any) -> float:
  """A product for each output and each tap that meets no padding or hole.

  Holes are rows that dilation puts in: of a transposed convolution and of a
  strided one's gradients.
  """
  numbers = eqn.params["dimension_numbers"]
  left, right, out = (
    v.aval.shape for v in (eqn.invars[0], eqn.invars[1], eqn.outvars[0])
  )
  taps = 1.0
  for i, (low, _) in enumerate(eqn.params["padding"]):
    taps *= _valid_taps(
      left[numbers.lhs_spec[2 + i]],
      right[numbers.rhs_spec[2 + i]],
      out[numbers.out_spec[2 + i]],
      low=low,
      stride=eqn.params["window_strides"][i],
      spread=eqn.params["lhs_dilation"][i],
      reach=eqn.params["rhs_dilation"][i],
    )
  others = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
  return 2.0 * taps * others * right[numbers.rhs_spec[1]]


def _valid_taps(
  size: int, kernel: int, out: int, *, low: int, stride: int, spread: int,
  reach: int,
) -> int:  # fmt: skip
  """Along one axis: pairs of an output and a tap that meet a true input."""
  found = 0
  for i in range(out):
    for k in range(kernel):
      place = i * stride + k * reach - low
      found += 0 <= place <= (size - 1) * spread and place % spread == 0
  return found
