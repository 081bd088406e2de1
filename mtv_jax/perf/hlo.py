"""What a compiled program says of itself: what it sends, holds and computes.

XLA's own counts take the body of a loop once. Here the text of the optimised
program is read, and what is in a loop counts as often as the loop runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from mtv_jax.perf.hlo_text import Instruction, as_module

# Bytes that a chip receives for one byte of its operands, of n chips in a
# group, by the algorithms that are best for large arrays: rings, both ways.
_RECEIVED = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
  "collective-broadcast": lambda n: 1.0,
}
KINDS = tuple(_RECEIVED)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange of a program.

  Attributes:
    kind: of `KINDS`.
    name: of the instruction.
    shape: of the operands of one chip.
    result: bytes of the result on a chip.
    group: how many chips exchange with each other.
    count: how often it runs in a step.
    bytes: that a chip receives in a step.
    scope: the operation in the source that it comes from.
  """

  kind: str
  name: str
  shape: str
  result: int
  group: int
  count: float
  bytes: float
  scope: str


def collectives(program: Any) -> tuple[Collective, ...]:
  """Everything that a program's chips send each other, largest first.

  An exchange that starts and ends apart is one. Bytes are those that a chip
  receives with ring algorithms, of n chips: n - 1 times its operand for an
  all-gather, 2 (n - 1) / n for an all-reduce, (n - 1) / n for a reduce-scatter
  or an all-to-all, 1 for a permutation.

  Args:
    program: compiled, or its text, or a parsed `Module`.
  """
  module = as_module(program)
  rows = []
  for name, times in module.runs.items():
    computation = module.computations[name]
    started = any(
      'custom_call_target="AsyncCollectiveStart"' in instruction.text
      for instruction in computation.values()
    )
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      # The TPU compiler cuts an exchange in a chain of pieces that run beside
      # other work, also within loops; each piece names all of the exchange.
      chained = 'chain_id="' in instruction.text
      if kind not in _RECEIVED or (chained and not started):
        continue
      operands = [
        shape
        for operand in instruction.operands
        for shape in computation[operand].shapes
      ]
      sent = sum(shape.bytes for shape in operands)
      group = group_size(instruction, module.partitions)
      factor = _RECEIVED[kind](group) if group > 1 else 0.0
      rows.append(
        Collective(
          kind=kind,
          name=instruction.name,
          shape=", ".join(shape.text for shape in operands),
          result=sent * group if kind == "all-gather" else sent,
          group=group,
          count=times,
          bytes=sent * factor * times,
          scope=instruction.scope,
        )
      )
  return tuple(sorted(rows, key=lambda row: -row.bytes))


def group_size(instruction: Instruction, partitions: int) -> int:
  """How many chips exchange with each other."""
  text = instruction.text
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
  if pairs:
    return pairs[1].count("{") or 1
  # {{0,1},{2,3}}; [2,2]<=[4], sizes first; mesh['a'=2,'b'=4] {'b'}.
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
  if listed:
    return len(listed[1].split(","))
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
  if iota:
    return int(iota[2])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
  if mesh:
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[k] for k, part in axes)
  return partitions


def by_kind(rows: Iterable[Collective]) -> dict[str, tuple[float, float]]:
  """Sums by kind: (exchanges a step, bytes a chip and step)."""
  found: dict[str, list[float]] = {}
  for row in rows:
    total = found.setdefault(row.kind, [0.0, 0.0])
    total[0] += row.count
    total[1] += row.bytes
  return {kind: tuple(total) for kind, total in sorted(found.items())}


@dataclasses.dataclass(frozen=True)
class Temporary:
  """An array that a program holds for a while.

  Attributes:
    bytes: with padding.
    shape: dtype and sizes.
    name: of the instruction that makes it.
    scope: the operation in the source that it comes from.
    count: how many of this shape come from there.
  """

  bytes: int
  shape: str
  name: str
  scope: str
  count: int = 1


# What makes no array of its own.
_NOTHING = (
  "parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant",
  "conditional", "call", "after-all", "opt-barrier", "copy-done",
)  # fmt: skip


def largest_temporaries(program: Any, *, limit: int = 10) -> list[Temporary]:
  """The largest arrays that a program makes in the chip's main memory.

  Not all of them live at the same time. Equal ones of one source are one row.

  Args:
    program: compiled, or its text, or a parsed `Module`.
    limit: how many rows.
  """
  module = as_module(program)
  # What runs inside of a fusion makes no arrays.
  fused = {
    called
    for computation in module.computations.values()
    for instruction in computation.values()
    if instruction.opcode not in ("while", "conditional", "call")
    for _, called in instruction.called()
  }
  groups: dict[tuple[str, str], list[Temporary]] = {}
  for name, computation in module.computations.items():
    if name in fused or name not in module.runs:
      continue
    for instruction in computation.values():
      if instruction.opcode in _NOTHING or instruction.opcode.endswith("-done"):
        continue
      for shape in instruction.shapes:
        if shape.space == 0:
          row = Temporary(
            shape.padded, shape.text, instruction.name, instruction.scope
          )
          groups.setdefault((shape.text, row.scope), []).append(row)
  rows = [
    dataclasses.replace(group[0], count=len(group)) for group in groups.values()
  ]
  return sorted(rows, key=lambda row: -row.bytes)[:limit]


def flops(program: Any, *, loops: str = "multiplied") -> float:
  """Operations of a program's matrix products and convolutions, on one chip.

  Taps of a convolution that meet only padding or holes don't count, as in
  XLA's own count.

  Args:
    program: compiled, or its text, or a parsed `Module`.
    loops: 'multiplied', or 'once' to take bodies of loops once, as XLA's
      `cost_analysis` does.
  """
  module = as_module(program)
  total = 0.0
  for name, times in module.runs.items():
    computation = module.computations[name]
    for instruction in computation.values():
      if instruction.opcode not in ("dot", "convolution"):
        continue
      left, right = (
        computation[operand].shapes[0].dims
        for operand in instruction.operands[:2]
      )
      count = _dot if instruction.opcode == "dot" else _convolution
      cost = count(instruction, left, right)
      total += cost * (times if loops == "multiplied" else 1.0)
  return total


def _dot(instruction: Instruction, left: tuple, right: tuple) -> float:
  found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
  axes = [int(i) for i in found[1].split(",") if i] if found else []
  out = math.prod(instruction.shapes[0].dims)
  return 2.0 * out * math.prod(left[i] for i in axes)


def _convolution(instruction: Instruction, left: tuple, right: tuple) -> float:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
  on_left, on_right, on_out = labels.groups()
  out = instruction.shapes[0].dims
  window = re.search(r"window=\{([^}]*)\}", instruction.text)
  fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

  def group(name):
    found = re.search(rf"{name}=(\d+)", instruction.text)
    return int(found[1]) if found else 1

  def sides(name, default):
    given = fields.get(name)
    return given.split("x") if given else [default] * len(on_left)

  taps = 1
  strides, spreads, reaches, pads = (
    sides("stride", "1"),
    sides("lhs_dilate", "1"),
    sides("rhs_dilate", "1"),
    sides("pad", "0_0"),
  )
  for i in range(len(on_left) - 2):
    axis = str(i)
    taps *= valid_taps(
      left[on_left.index(axis)],
      right[on_right.index(axis)],
      out[on_out.index(axis)],
      low=int(pads[i].split("_")[0]),
      stride=int(strides[i]),
      spread=int(spreads[i]),
      reach=int(reaches[i]),
    )
  features = left[on_left.index("f")] // group("feature_group_count")
  batch = left[on_left.index("b")] // group("batch_group_count")
  return 2.0 * taps * features * batch * out[on_out.index("f")]


def valid_taps(
  size: int, kernel: int, out: int, *, low: int, stride: int, spread: int,
  reach: int,
) -> int:  # fmt: skip
  """Along one axis: pairs of an output and a tap that meet a true input."""
  if kernel == 1 and low == 0 and spread == 1:
    return min(out, -(-size // stride))
  found = 0
  for k in range(kernel):
    for i in range(out):
      place = i * stride + k * reach - low
      found += 0 <= place <= (size - 1) * spread and place % spread == 0
  return found
