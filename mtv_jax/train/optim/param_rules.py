"""Rules of parameters: multipliers of the learning rate and the weight decay.

Rules are pairs (regex, dict(lr=, weight_decay=, decay_to=, layer_decay=,
start_steps=)). The regex may match anywhere in the name; only the first
matching rule applies. With `decay_to="start"` a parameter p decays to its value
p_0 at step 0, by weight_decay * (p - p_0): L2-SP (Li et al. 2018, arXiv
1802.01483), decoupled from the gradient's moments as the weight decay is.

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
from typing import Any, Literal

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
  decay_to: Literal["zero", "start"] = "zero"
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
  # Learning-rate multipliers: `lr`, or one per layer of a stack.
  rates: tuple[float, ...]
  start: int = 0  # First update of the parameter; moments advance before it.
  decay_to: Literal["zero", "start"] = "zero"

  @property
  def frozen(self) -> bool:
    return self.lr == 0

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
    name, (multipliers, start) = match.name, match.value or (_Multipliers(), 0)
    decay = multipliers.weight_decay
    if decay is None:
      # By name rather than by rank: stacked blocks have a leading depth.
      decay = float(name.split("/")[-1] == "kernel")
    starts = [s for prefix, s in start_steps.items() if name.startswith(prefix)]
    exponents = (0,)
    if multipliers.layer_decay != 1:
      exponents = _layer_exponents(name, depths)
    rates = tuple(
      multipliers.lr * multipliers.layer_decay**e for e in exponents
    )
    start = max([start, *starts])
    table.append(
      ParamRule(
        name,
        shapes[name],
        match.pattern,
        multipliers.lr,
        decay,
        rates,
        start,
        multipliers.decay_to,
      )
    )
  for pattern, (multipliers, _) in values:
    rows = [row for row in table if row.rule == pattern]
    has_decay = any(row.rates != (row.lr,) for row in rows)
    if multipliers.layer_decay != 1 and rows and not has_decay:
      raise ConfigError(
        f"config.optim.rules: {pattern!r} has a layer_decay, but matches only"
        " parameters outside the blocks and embeddings of the towers, such as"
        f" {rows[0].name}. Set lr for them instead."
      )
  return tuple(table)


def _read_rule(
  rule: Any, length: RunLength
) -> tuple[str, tuple[_Multipliers, int]]:
  """Parses a rule into its pattern, multipliers and start step."""
  is_pair = isinstance(rule, list | tuple) and len(rule) == 2
  if not is_pair or not isinstance(rule[1], Mapping):
    raise ConfigError(
      f"config.optim.rules: expected (regex, dict(lr=...)), got {rule!r}."
    )
  where = f"config.optim.rules: {rule[0]!r}"
  multipliers = sections.read(_Multipliers, rule[1], where)
  start = length.steps(multipliers.start) or 0
  if start and multipliers.lr == 0:
    raise ConfigError(
      f"{where} has a start, but lr=0 freezes its parameters for the whole run."
    )
  if multipliers.lr == 0 and multipliers.layer_decay != 1:
    raise ConfigError(
      f"{where} has a layer_decay, but lr=0 freezes all layers."
    )
  if multipliers.decay_to == "start" and 0 in (
    multipliers.lr,
    multipliers.weight_decay,
  ):
    raise ConfigError(
      f"{where} has decay_to='start', but lr=0 or weight_decay=0 disables it."
    )
  if start and start >= length.total_steps:
    raise ConfigError(
      f"{where} starts at step {start} of a run of {length.total_steps} steps,"
      " so its parameters would never be updated. To freeze them, set lr=0."
    )
  return rule[0], (multipliers, start)


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
  format_line = "{:<32} {:>13} {:>7} {:>7} {:>13}  {}".format
  titles = ("rule", "lr x", "decay x", "arrays", "parameters", "for example")
  lines = [format_line(*titles)]
  for (rule, _, decay, start), rows in groups.items():
    size = f"{sum(math.prod(row.shape) for row in rows):,}"
    rates = [rate for row in rows for rate in row.rates]
    ends = [f"{rate:.4g}" for rate in sorted({min(rates), max(rates)})]
    lr = "frozen" if rows[0].frozen else "-".join(ends)
    example = rows[0].name + (f" (from step {start})" if start else "")
    example += " (decays to its start)" * (rows[0].decay_to == "start")
    lines.append(format_line(rule, lr, f"{decay:g}", len(rows), size, example))
  return "\n".join(lines)
