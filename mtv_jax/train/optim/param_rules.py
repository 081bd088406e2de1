"""Learning-rate and decay multipliers of parameters, by rules over their names.

Rules are pairs (regex, dict(lr=, weight_decay=, layer_decay=, start_steps=)).
The regex may match anywhere in the name; only the first matching rule applies.

`layer_decay` is raised to an exponent that decreases towards the output (Clark
et al. 2020, ELECTRA; BEiT) and multiplies the layer's rate. The exponents are
DINOv2's; in a tower of n blocks they are

  n + 1    embeddings of patches, positions and text tokens; CLS, register and
           mask tokens; a norm before the blocks
  n - i    block i, from 0
  0        parameters after the blocks, and heads
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config import sections
from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.config.options import NonNegativeFloat, PositiveFraction
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, match_rules

_BLOCKS = re.compile(r"^(image|text)/blocks/")
_EMBEDDING = re.compile(
  r"^(image|text)/(patch_embed|position_embedding|token_embedding|cls_token|"
  r"registers|mask_token|pre_norm)\b"
)


@dataclasses.dataclass(frozen=True)
class _Multipliers:
  """The options of a rule."""

  lr: NonNegativeFloat = 1.0
  # None: 1 for kernels, 0 for biases, norms, scalars, embeddings, tokens and
  # probes, as in big_vision.
  weight_decay: NonNegativeFloat | None = None
  layer_decay: PositiveFraction = 1.0
  start: Duration | None = None  # The parameter is not updated before it.


@dataclasses.dataclass(frozen=True)
class ParamRule:
  """Learning-rate and decay multipliers of one parameter."""

  name: str
  shape: tuple[int, ...]
  rule: str | None  # The matching pattern.
  lr: float
  weight_decay: float
  # Layer-decay factors of the rate: one, or one per layer of a stack.
  layers: tuple[float, ...] = (1.0,)
  start: int = 0  # First update of the parameter; moments advance before it.

  @property
  def frozen(self) -> bool:
    """Whether the parameter is frozen."""
    return self.lr == 0

  @property
  def rates(self) -> tuple[float, ...]:
    """Learning-rate multipliers: one, or one per layer of a stack."""
    return tuple(self.lr * factor for factor in self.layers)

  @property
  def multiplier(self) -> float | np.ndarray:
    """Learning-rate multiplier; `[depth, 1, ...]` float32 for a stack."""
    if len(self.rates) == 1:
      return self.rates[0]
    shape = (len(self.rates),) + (1,) * (len(self.shape) - 1)
    return np.asarray(self.rates, np.float32).reshape(shape)


def match_param_rules(
  params: Any,
  rules: Sequence[Any],
  *,
  length: RunLength,
  start_steps: Mapping[str, int] = types.MappingProxyType({}),
) -> tuple[ParamRule, ...]:
  """Matches each parameter with the first matching rule.

  `start_steps` has start steps by name prefix; a parameter takes the later of
  this and its rule's start.
  """
  values = [_read_rule(rule, length) for rule in rules]
  shapes = {name: tuple(x.shape) for name, x in flatten_with_names(params)}
  depths = {m[1]: s[0] for n, s in shapes.items() if (m := _BLOCKS.match(n))}
  table = []
  for match in match_rules(shapes, values, what="config.optim.rules"):
    name, (given, start) = match.name, match.value or (_Multipliers(), 0)
    decay = given.weight_decay
    if decay is None:
      # By name rather than by rank: stacked blocks have a leading depth.
      decay = float(name.split("/")[-1] == "kernel")
    starts = [s for prefix, s in start_steps.items() if name.startswith(prefix)]
    exponents = (0,)
    if given.layer_decay != 1:
      exponents = _layer_exponents(name, depths)
    row = ParamRule(
      name,
      shapes[name],
      match.pattern,
      given.lr,
      decay,
      tuple(given.layer_decay**e for e in exponents),
      max([start, *starts]),
    )
    table.append(row)
  for pattern, (given, _) in values:
    if given.layer_decay != 1:
      _check_layer_decay(pattern, [row for row in table if row.rule == pattern])
  return tuple(table)


def _check_layer_decay(pattern: str, rows: Sequence[ParamRule]) -> None:
  """Raises ConfigError if a rule's layer decay applies to none of its rows."""
  if rows and all(row.layers == (1,) for row in rows):
    raise ConfigError(
      f"config.optim.rules: {pattern!r} has a layer_decay, but matches no"
      " block or embedding of the image or text tower, for example"
      f" {rows[0].name}. Use lr for parameters after the blocks."
    )


def _read_rule(
  rule: Any, length: RunLength
) -> tuple[str, tuple[_Multipliers, int]]:
  """Parses a rule to its pattern, multipliers and start step."""
  pair = isinstance(rule, list | tuple) and len(rule) == 2
  if not pair or not isinstance(rule[1], Mapping):
    raise ConfigError(
      "config.optim.rules: a rule is (regex, dict(lr=...,"
      f" weight_decay=...)), got {rule!r}."
    )
  where = f"config.optim.rules: {rule[0]!r}"
  given = sections.read(_Multipliers, rule[1], where)
  start = length.steps(given.start) or 0
  if start and given.lr == 0:
    raise ConfigError(
      f"{where} has a start, but lr=0 freezes for the whole run."
    )
  if given.lr == 0 and given.layer_decay != 1:
    raise ConfigError(
      f"{where} has a layer_decay, but lr=0 freezes all layers."
    )
  if start and start >= length.total_steps:
    raise ConfigError(
      f"{where} starts at step {start} of a run of {length.total_steps} steps"
      " and would never be updated. To freeze it, use lr=0."
    )
  return rule[0], (given, start)


def _layer_exponents(name: str, depths: Mapping[str, int]) -> tuple[int, ...]:
  """Exponents of the layer decay: one, or one per block."""
  if match := _BLOCKS.match(name):
    return tuple(range(depths[match[1]], 0, -1))
  match = _EMBEDDING.match(name)
  if match and match[1] in depths:
    return (depths[match[1]] + 1,)
  return (0,)


def describe_rules(table: Sequence[ParamRule]) -> str:
  """Formats the rules as a table for the log."""
  groups: dict[Any, list[ParamRule]] = {}
  for row in table:
    key = row.rule or "(no rule)", row.lr, row.weight_decay, row.start
    groups.setdefault(key, []).append(row)
  line = "{:<32} {:>13} {:>7} {:>7} {:>13}  {}".format
  lines = [line("rule", "lr x", "decay x", "arrays", "numbers", "for example")]
  for (rule, _, decay, start), rows in groups.items():
    size = f"{sum(math.prod(row.shape) for row in rows):,}"
    rates = [rate for row in rows for rate in row.rates]
    ends = [f"{rate:.4g}" for rate in sorted({min(rates), max(rates)})]
    lr = "frozen" if rows[0].frozen else "-".join(ends)
    example = rows[0].name + (f" (from step {start})" if start else "")
    lines.append(line(rule, lr, f"{decay:g}", len(rows), size, example))
  return "\n".join(lines)
