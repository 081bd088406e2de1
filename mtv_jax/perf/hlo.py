"""Parser of compiled HLO text: collectives, largest arrays, FLOPs.

An instruction in a loop counts once per iteration; XLA's cost analysis counts
it once. A `program` is a compiled program, its text, or a `Module`.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.models import attention
from mtv_jax.utils.errors import InputError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NESTED = r"[^()]*"
for _ in range(3):
  _NESTED = rf"[^()]*(?:\({_NESTED}\)[^()]*)*"
# `ROOT %name = type opcode(operands), attributes`.
_INSTRUCTION = re.compile(
  rf"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(({_NESTED})\)(.*)"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations|called_computations|"
  r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_KERNEL_FLOPS = re.compile(r'"cost_estimate": ?\{[^}]*"flops": ?"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles": ?"?(\d+)')
_UNKNOWN_CYCLES = 2**48  # Days on a chip; XLA reports 2^64 - 1 for some loops.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array type."""

  text: str  # Dtype and dimensions, such as 'bf16[8,128]'.
  dims: tuple[int, ...]
  bytes: int  # Without padding.
  padded: int  # Bytes, padded to the layout's tiles.
  space: int = 0  # Memory space; 0 is HBM.


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One HLO instruction."""

  name: str  # Unique in the module.
  opcode: str  # Such as 'fusion' or 'all-gather-start'.
  shapes: tuple[Shape, ...]  # The result's shape; several for a tuple.
  arguments: str  # Text of the operands, or a constant's value.
  text: str  # The rest of the line after the operands.

  @property
  def operands(self) -> list[str]:
    """Names of the instructions whose results are read."""
    return _OPERAND.findall(self.arguments)

  @property
  def scope(self) -> str:
    """`op_name` metadata: the operation in the JAX source."""
    scope = _SCOPE.search(self.text)
    return scope[1] if scope else ""

  def called_computations(self) -> list[tuple[str, str]]:
    """Pairs (role, computation); `-done` and `-update` call nothing."""
    if self.opcode.endswith(("-done", "-update")):
      return []
    return [
      (role, name)
      for role, names in _CALLED.findall(self.text)
      for name in _OPERAND.findall(names)
    ]


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed HLO module."""

  computations: Mapping[str, Computation]  # By name.
  entry: str  # Name of the entry computation.
  roots: Mapping[str, Instruction]  # Root of each computation.
  partitions: int  # Number of devices that run the module.

  @functools.cached_property
  def run_counts(self) -> dict[str, float]:
    """Number of runs of each computation.

    A conditional counts its False branch, or branch 0: in the train step, True
    is a rare fallback.
    """
    counts: dict[str, float] = collections.defaultdict(float)

    def visit(name, times):
      counts[name] += times
      for instruction in self.computations[name].values():
        inner_times = times
        if instruction.opcode == "while":
          inner_times *= _find_trip_count(self, name, instruction)
        called = instruction.called_computations()
        if instruction.opcode == "conditional":
          called = [c for c in called if c[0] != "true_computation"][:1]
        for _, computation in called:
          if computation in self.computations:
            visit(computation, inner_times)

    visit(self.entry, 1.0)
    return dict(counts)

  @functools.cached_property
  def fused_computations(self) -> frozenset[str]:
    """Computations inside an instruction such as a fusion; allocate nothing."""
    return frozenset(
      called
      for computation in self.computations.values()
      for instruction in computation.values()
      if instruction.opcode not in ("while", "conditional", "call")
      for _, called in instruction.called_computations()
    )

  def executed(self) -> Iterator[tuple[Instruction, Computation, float]]:
    """Instructions that run, with their computation and run count."""
    for name, times in self.run_counts.items():
      computation = self.computations[name]
      for instruction in computation.values():
        yield instruction, computation, times


def parse(program: Any) -> Module:
  """Parses a program."""
  if isinstance(program, Module):
    return program
  hlo_text = program if isinstance(program, str) else program.as_text()
  computations, roots, entry, current, latest = {}, {}, None, None, None
  for line in hlo_text.splitlines():
    if current is None:
      if match := _HEADER.match(line):
        current = match[2]
        computations[current], latest = {}, None
        entry = current if match[1] else entry
    elif line.startswith("}") and not line.startswith("}}"):
      current = None
    elif match := _INSTRUCTION.match(line):
      root, name, result, opcode, arguments, text = match.groups()
      latest = Instruction(name, opcode, parse_shapes(result), arguments, text)
      computations[current][name] = latest
      if root:
        roots[current] = latest
    elif latest is not None:
      # Metadata of Pallas kernels contains line breaks.
      latest = dataclasses.replace(latest, text=f"{latest.text}\n{line}")
      computations[current][latest.name] = latest
      if current in roots and roots[current].name == latest.name:
        roots[current] = latest
  if entry is None:
    raise InputError("expected the text of a compiled program: it lacks ENTRY")
  header = hlo_text.partition("\n")[0]
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  return Module(computations, entry, roots, math.prod(map(int, counts)))


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Parses the arrays of a type, 'f32[8]{0}' or '(f32[8]{0}, s32[])'."""
  return tuple(_parse_shape(*match) for match in _ARRAY.findall(text))


@functools.lru_cache(maxsize=65_536)
def _parse_shape(dtype: str, sizes: str, layout: str) -> Shape:
  digits = re.search(r"\d+", dtype)
  bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
  dims = _parse_integers(sizes)
  order, _, tiling = layout.partition(":")
  tile = re.search(r"T\(([\d,]+)\)", tiling)
  space = re.search(r"S\((\d+)\)", tiling)
  padded = list(dims)
  if tile:
    edges = reversed(_parse_integers(tile[1]))
    for axis, edge in zip(_parse_integers(order), edges, strict=False):
      padded[axis] = -(-dims[axis] // edge) * edge
  return Shape(
    text=f"{dtype}[{sizes}]",
    dims=dims,
    bytes=math.prod(dims) * bits // 8,
    padded=math.prod(padded) * bits // 8,
    space=int(space[1]) if space else 0,
  )


def _parse_integers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)


def _find_trip_count(module: Module, caller: str, loop: Instruction) -> int:
  """The trip count: recorded, or from constant bounds and step, or else 1."""
  if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
    return int(match[1])
  called = dict(loop.called_computations())
  outer, condition, body = (
    module.computations[name]
    for name in (caller, called["condition"], called["body"])
  )
  test, result = (module.roots[called[role]] for role in ("condition", "body"))
  direction = re.search(r"direction=(LT|LE)", test.text)
  if test.opcode != "compare" or not direction:
    return 1
  counter, limit = (
    _read_value(condition, operand, "get-tuple-element")
    for operand in test.operands
  )
  initial, start = outer[loop.operands[0]], None
  end = _read_value(condition, test.operands[1], "constant")
  if initial.opcode == "tuple" and counter is not None:
    start = _read_value(outer, initial.operands[counter], "constant")
    if end is None and limit is not None:
      end = _read_value(outer, initial.operands[limit], "constant")
  if end is None or counter is None:
    return 1
  steps = []
  if result.opcode == "tuple":
    update = body[result.operands[counter]]
    if update.opcode == "add":
      steps = [_read_value(body, name, "constant") for name in update.operands]
  step = next((step for step in steps if step and step > 0), 1)
  # If the start is unknown, assumes 0, as in JAX's loops.
  return len(range(start or 0, end + (direction[1] == "LE"), step))


def _read_value(computation: Computation, name: str, opcode: str) -> int | None:
  """Reads a constant's value or a tuple element's index, through copies."""
  source = computation[name]
  while source.opcode in ("copy", "bitcast") and source.operands:
    source = computation[source.operands[0]]
  number = re.fullmatch(r"-?\d+", source.arguments) or re.search(
    r"(?<=\bindex=)\d+", source.text
  )
  return int(number[0]) if number and source.opcode == opcode else None


# Bytes that a chip receives per operand byte in a group of n chips, with
# bidirectional ring algorithms, which are the best for large arrays.
_RECEIVED = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
  "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a compiled program."""

  kind: str  # 'all-gather', 'all-reduce', ...
  name: str  # Instruction name.
  shape: str  # Operand shapes on one chip.
  result: int  # Bytes of the result on one chip.
  group: int  # Number of chips in the replica group.
  count: float  # Executions per step.
  bytes: float  # Bytes that a chip receives per step.
  scope: str  # The operation in the JAX source.


def list_collectives(program: Any) -> tuple[Collective, ...]:
  """Collectives of a program, largest first; asynchronous ones count once."""
  module, rows = parse(program), []
  for instruction, computation, times in module.executed():
    kind = instruction.opcode.removesuffix("-start")
    # The TPU compiler splits a collective into a chain of pieces to overlap
    # with compute. Each repeats the whole operand; only the first counts.
    start = 'custom_call_target="AsyncCollectiveStart"'
    is_later_piece = 'chain_id="' in instruction.text and not any(
      start in other.text for other in computation.values()
    )
    if kind not in _RECEIVED or is_later_piece:
      continue
    operands = [s for o in instruction.operands for s in computation[o].shapes]
    nbytes = sum(shape.bytes for shape in operands)
    group = read_group_size(instruction, module.partitions)
    result = nbytes * group if kind == "all-gather" else nbytes
    received = nbytes * (_RECEIVED[kind](group) if group > 1 else 0.0) * times
    text = ", ".join(shape.text for shape in operands)
    row = kind, instruction.name, text, result, group, times, received
    rows.append(Collective(*row, instruction.scope))
  return tuple(sorted(rows, key=lambda row: -row.bytes))


def read_group_size(instruction: Instruction, partitions: int) -> int:
  """Reads the number of chips in a collective's replica group."""
  text = instruction.text
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
    return pairs[1].count("{") or 1
  # {{0,1},{2,3}}; [groups,size]<=[4]; mesh['a'=2,'b'=4] {'b'}.
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(groups[1].split(","))
  if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
    return int(groups[1])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return partitions


def sum_by_kind(rows: Iterable[Collective]) -> dict[str, tuple[float, float]]:
  """Sums by kind: `{kind: (executions per step, bytes per chip and step)}`."""
  totals = collections.defaultdict(lambda: np.zeros(2))
  for row in rows:
    totals[row.kind] += row.count, row.bytes
  return {kind: tuple(totals[kind].tolist()) for kind in sorted(totals)}


# Instructions that allocate no array.
ALIASES = (
  "parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant",
  "conditional", "call", "after-all", "opt-barrier",
)  # fmt: skip


def find_largest_temporaries(
  program: Any, *, limit: int = 10
) -> list[dict[str, Any]]:
  """Lists the largest arrays that a program allocates in HBM at any time.

  One row per shape and scope, with padded `bytes`, `count` and an instruction.
  """
  module = parse(program)
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  for name, computation in module.computations.items():
    if name in module.fused_computations or name not in module.run_counts:
      continue
    for instruction in computation.values():
      if instruction.opcode in ALIASES or instruction.opcode.endswith("-done"):
        continue
      name, scope = instruction.name, instruction.scope
      for shape in instruction.shapes:
        if shape.space == 0:
          row = dict(bytes=shape.padded, shape=shape.text, name=name)
          row |= dict(scope=scope, count=0)
          rows.setdefault((shape.text, scope), row)["count"] += 1
  return sorted(rows.values(), key=lambda row: -row["bytes"])[:limit]


def count_flops(program: Any, dtype: str = "") -> float:
  """Counts one chip's FLOPs of matrix products, convolutions, Pallas kernels.

  `dtype`, such as "s8", counts only products whose operands all have it.
  """
  costs = {"dot": _count_dot_flops, "convolution": _count_conv_flops}
  total = 0.0
  for instruction, computation, times in parse(program).executed():
    if instruction.opcode in costs:
      operands = [computation[o].shapes[0] for o in instruction.operands]
      if all(shape.text.startswith(dtype) for shape in operands):
        dims = (shape.dims for shape in operands)
        total += times * costs[instruction.opcode](instruction, *dims)
    elif dtype:  # Kernels don't compute 8-bit products.
      continue
    elif estimate := _KERNEL_FLOPS.search(instruction.text):
      total += times * int(estimate[1])
    elif '"tpu_custom_call"' in instruction.text:
      dims = [
        s.dims for o in instruction.operands for s in computation[o].shapes
      ]
      total += times * attention.kernel_flops(instruction.scope, dims)
  return total


def count_cycles(program: Any) -> float:
  """Sums the compiler's cycles, without collectives, transfers and kernels."""
  total = 0.0
  for instruction, _, times in parse(program).executed():
    estimate = _CYCLES.search(instruction.text)
    if estimate and int(estimate[1]) < _UNKNOWN_CYCLES:
      total += times * int(estimate[1])
  return total


def _count_dot_flops(instruction: Instruction, lhs: tuple, _: tuple) -> float:
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
  inner = math.prod(lhs[i] for i in _parse_integers(axes[1])) if axes else 1
  return 2.0 * math.prod(instruction.shapes[0].dims) * inner


def _count_conv_flops(
  instruction: Instruction, lhs: tuple, rhs: tuple
) -> float:
  text = instruction.text
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
  spatial = "0123456789"[: len(labels[0]) - 2]
  specs = [
    [axes.index(label) for label in first + spatial]
    for axes, first in zip(labels, ("bf", "oi", "bf"), strict=True)
  ]
  text = re.search(r"window=\{([^}]*)\}|$", text)
  fields = dict(re.findall(r"(\w+)=(\S+)", text[1] or ""))

  def field(name, default="1"):
    values = fields[name].split("x") if name in fields else default * len(rhs)
    return [int(value.split("_")[0]) for value in values]

  window = {
    "padding": [(low, 0) for low in field("pad", "0")],
    "window_strides": field("stride"),
    "lhs_dilation": field("lhs_dilate"),
    "rhs_dilation": field("rhs_dilate"),
  }
  shapes = (lhs, rhs, instruction.shapes[0].dims)
  return count_conv_flops(shapes, specs, window)


def count_conv_flops(
  shapes: Sequence[Sequence[int]],
  specs: Sequence[Sequence[int]],
  window: Mapping[str, Any],
) -> float:
  """Counts a convolution's FLOPs: two per tap that reads an input element.

  Taps on padding or dilation are free. `shapes` and `specs` (axes, see
  `jax.lax.ConvDimensionNumbers`) are of input, kernel and output; `window` has
  keywords of `jax.lax.conv_general_dilated`.
  """
  lhs, rhs, out = (
    [shape[axis] for axis in spec]
    for shape, spec in zip(shapes, specs, strict=True)
  )
  total = 2.0 * out[0] * out[1] * rhs[1]
  for i, size in enumerate(out[2:]):
    stride, dilation = window["window_strides"][i], window["rhs_dilation"][i]
    starts = np.arange(size)[:, None] * stride - window["padding"][i][0]
    index = starts + np.arange(rhs[2 + i]) * dilation  # [outputs, taps]
    dilation = window["lhs_dilation"][i]
    is_valid = (index >= 0) & (index <= (lhs[2 + i] - 1) * dilation)
    total *= int((is_valid & (index % dilation == 0)).sum())
  return total
