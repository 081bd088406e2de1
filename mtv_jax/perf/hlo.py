"""Compiled HLO, parsed from its text: collectives, largest arrays, FLOPs.

XLA's own cost analysis counts the body of a loop once. Here an instruction in
a loop counts as often as the loop runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mtv_jax.utils.errors import InputError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations|called_computations|"
  r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array type, such as 'bf16[8,128]', with its size and memory space.

  Attributes:
    text: dtype and dimensions.
    dims: dimensions.
    bytes: size without padding.
    padded: size with the padding of the layout's tiles.
    space: memory space; 0 is HBM.
  """

  text: str
  dims: tuple[int, ...]
  bytes: int
  padded: int
  space: int = 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One HLO instruction.

  Attributes:
    name: unique in the module.
    opcode: such as 'fusion' or 'all-gather-start'.
    shapes: of the result; several for a tuple.
    operands: names of instructions.
    scope: `op_name` of the metadata, the operation in the JAX source.
    text: the rest of the line after the operands.
    literal: the value of a constant, as text.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  scope: str
  text: str
  literal: str = ""

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
  """A parsed HLO module.

  Attributes:
    computations: by name, the instructions of each in order.
    entry: name of the entry computation.
    roots: name of the root instruction of each computation.
    partitions: number of devices that run the module.
  """

  computations: Mapping[str, Computation]
  entry: str
  roots: Mapping[str, str]
  partitions: int

  @functools.cached_property
  def run_counts(self) -> dict[str, float]:
    """How often each computation runs; all branches of a conditional count."""
    counts: dict[str, float] = collections.defaultdict(float)

    def visit(name, times):
      counts[name] += times
      for instruction in self.computations[name].values():
        inner = times
        if instruction.opcode == "while":
          inner *= _trip_count(self, name, instruction)
        for _, called in instruction.called_computations():
          if called in self.computations:
            visit(called, inner)

    visit(self.entry, 1.0)
    return dict(counts)

  def executed(self) -> Iterator[tuple[Instruction, Computation, float]]:
    """Instructions that run, with their computation and run count."""
    for name, times in self.run_counts.items():
      computation = self.computations[name]
      for instruction in computation.values():
        yield instruction, computation, times


def parse(program: Any) -> Module:
  """Parses a compiled program.

  Args:
    program: a compiled program, its text (`compiled.as_text()`), or a `Module`,
      which is returned as it is.

  Raises:
    InputError: the text has no ENTRY computation.
  """
  if isinstance(program, Module):
    return program
  text = program if isinstance(program, str) else program.as_text()
  computations, roots, entry, current = {}, {}, None, None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = header[2]
        computations[current] = {}
        entry = current if header[1] else entry
    elif line.startswith("}"):
      current = None
    elif head := _NAME.match(line):
      computations[current][head[2]] = _instruction(head[2], line[head.end() :])
      if head[1]:
        roots[current] = head[2]
  if entry is None:
    raise InputError("expected the text of a compiled program: it has no ENTRY")
  partitions = re.search(r"\bnum_partitions=(\d+)", text)
  replicas = re.search(r"\breplica_count=(\d+)", text)
  count = math.prod(int(m[1]) for m in (partitions, replicas) if m)
  return Module(computations, entry, roots, count)


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest) if rest.startswith("(") else rest.find(" ")
  result, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  arguments, text = rest[: end - 1], rest[end:]
  scope = _SCOPE.search(text)
  return Instruction(
    name=name,
    opcode=opcode,
    shapes=parse_shapes(result),
    operands=tuple(_OPERAND.findall(arguments)),
    scope=scope[1] if scope else "",
    text=text,
    literal=arguments if opcode == "constant" else "",
  )


def _closing(text: str) -> int:
  """Index after the parenthesis that closes the first one."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return i + 1
  return len(text)


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, 'f32[8]{0}' or '(f32[8]{0}, s32[])'."""
  return tuple(_shape(*match) for match in _ARRAY.findall(text))


@functools.lru_cache(maxsize=65_536)
def _shape(dtype: str, sizes: str, layout: str) -> Shape:
  digits = re.search(r"\d+", dtype)
  bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
  dims = [int(size) for size in sizes.split(",") if size]
  order, _, rest = layout.partition(":")
  tile = re.search(r"T\(([\d,]+)\)", rest)
  space = re.search(r"S\((\d+)\)", rest)
  padded = list(dims)
  if tile:
    minor = [int(i) for i in order.split(",") if i]
    edges = [int(i) for i in tile[1].split(",")]
    for axis, edge in zip(minor, reversed(edges), strict=False):
      padded[axis] = -(-dims[axis] // edge) * edge
  return Shape(
    text=f"{dtype}[{sizes}]",
    dims=tuple(dims),
    bytes=math.prod(dims) * bits // 8,
    padded=math.prod(padded) * bits // 8,
    space=int(space[1]) if space else 0,
  )


# ---------------------------------------------------------------------------
# Trip counts of loops.


def _trip_count(module: Module, caller: str, loop: Instruction) -> int:
  """The trip count that XLA noted, or the one that the condition implies.

  Understood are loops from a constant to a constant by a constant step, as
  `scan`, `map` and `fori_loop` compile to; any other counts as 1.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
  if known:
    return int(known[1])
  called = dict(loop.called_computations())
  condition, body = (
    module.computations[called[role]] for role in ("condition", "body")
  )
  test = condition[module.roots[called["condition"]]]
  compare = re.search(r"direction=(LT|LE)", test.text)
  if test.opcode != "compare" or not compare:
    return 1
  outer = module.computations[caller]
  start = outer[loop.operands[0]]

  def initial(index):
    if start.opcode != "tuple" or index is None:
      return None
    return _constant(outer, start.operands[index])

  counter = _tuple_index(condition, test.operands[0])
  limit = _constant(condition, test.operands[1])
  if limit is None:
    limit = initial(_tuple_index(condition, test.operands[1]))
  if limit is None or counter is None:
    return 1
  # JAX's loops count from 0, where the initial value can't be followed.
  first = initial(counter) or 0
  step = _increment(body, module.roots[called["body"]], counter)
  last = limit + (compare[1] == "LE")
  return max(-(-(last - first) // step), 0)


def _source(computation: Computation, name: str) -> Instruction:
  """The instruction behind copies and bitcasts."""
  source = computation[name]
  while source.opcode in ("copy", "bitcast") and source.operands:
    source = computation[source.operands[0]]
  return source


def _tuple_index(computation: Computation, name: str) -> int | None:
  """Index of a value in the tuple that the loop carries."""
  source = _source(computation, name)
  index = re.search(r"\bindex=(\d+)", source.text)
  return int(index[1]) if source.opcode == "get-tuple-element" else None


def _constant(computation: Computation, name: str) -> int | None:
  source = _source(computation, name)
  whole = re.fullmatch(r"-?\d+", source.literal)
  return int(whole[0]) if source.opcode == "constant" and whole else None


def _increment(body: Computation, root: str, counter: int) -> int:
  """The constant that a loop adds to its counter; 1 where it is not clear."""
  result = body[root]
  if result.opcode != "tuple":
    return 1
  update = body[result.operands[counter]]
  if update.opcode != "add":
    return 1
  values = [_constant(body, operand) for operand in update.operands]
  return next((value for value in values if value and value > 0), 1)


# ---------------------------------------------------------------------------
# Collectives.

# Bytes that a chip receives per byte of its operand in a group of n chips, by
# bidirectional ring algorithms, the best for large arrays.
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
  """One collective of a compiled program.

  Attributes:
    kind: 'all-gather', 'all-reduce', ...
    name: of the instruction.
    shape: of the operands on one chip.
    result: bytes of the result on one chip.
    group: number of chips in the replica group.
    count: executions per step.
    bytes: received by a chip per step.
    scope: `op_name`, the operation in the JAX source.
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
  """All collectives of a program, largest first.

  An asynchronous collective counts once. Bytes are those that a chip receives
  with ring algorithms in a group of n: (n - 1) times the operand for an
  all-gather, 2 (n - 1) / n for an all-reduce, (n - 1) / n for a reduce-scatter
  or an all-to-all, 1 for a permute.

  Args:
    program: see `parse`.
  """
  module = parse(program)
  rows = []
  for instruction, computation, times in module.executed():
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _RECEIVED or _is_continuation(instruction, computation):
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


def _is_continuation(instruction: Instruction, computation: Computation):
  """Whether this is a later piece of a collective that is counted already.

  The TPU compiler cuts a collective into a chain of pieces that overlap with
  compute; each piece repeats the whole operand.
  """
  return 'chain_id="' in instruction.text and not any(
    'custom_call_target="AsyncCollectiveStart"' in other.text
    for other in computation.values()
  )


def group_size(instruction: Instruction, partitions: int) -> int:
  """Number of chips in a collective's replica group."""
  text = instruction.text
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
  if pairs:
    return pairs[1].count("{") or 1
  # {{0,1},{2,3}}; [2,2]<=[4], sizes first; mesh['a'=2,'b'=4] {'b'}.
  explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
  if explicit:
    return len(explicit[1].split(","))
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
  if iota:
    return int(iota[2])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
  if mesh:
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[k] for k, part in axes)
  return partitions


def sum_by_kind(rows: Iterable[Collective]) -> dict[str, tuple[float, float]]:
  """`{kind: (executions per step, bytes per chip and step)}`."""
  totals: dict[str, tuple[float, float]] = {}
  for row in rows:
    count, size = totals.get(row.kind, (0.0, 0.0))
    totals[row.kind] = (count + row.count, size + row.bytes)
  return dict(sorted(totals.items()))


# ---------------------------------------------------------------------------
# Arrays.


@dataclasses.dataclass(frozen=True)
class Temporary:
  """An array that a program allocates in HBM.

  Attributes:
    bytes: with padding.
    shape: dtype and dimensions.
    name: of the instruction that computes it.
    scope: `op_name`, the operation in the JAX source.
    count: number of arrays of this shape and scope.
  """

  bytes: int
  shape: str
  name: str
  scope: str
  count: int = 1


# Instructions that allocate no array.
_ALIASES = (
  "parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant",
  "conditional", "call", "after-all", "opt-barrier",
)  # fmt: skip


def largest_temporaries(program: Any, *, limit: int = 10) -> list[Temporary]:
  """The largest arrays that a program allocates in HBM.

  They are not all live at the same time. Arrays of one shape and scope are one
  row.

  Args:
    program: see `parse`.
    limit: number of rows.
  """
  module = parse(program)
  # Instructions inside of a fusion allocate nothing.
  fused = {
    called
    for computation in module.computations.values()
    for instruction in computation.values()
    if instruction.opcode not in ("while", "conditional", "call")
    for _, called in instruction.called_computations()
  }
  rows: dict[tuple[str, str], Temporary] = {}
  for name, computation in module.computations.items():
    if name in fused or name not in module.run_counts:
      continue
    for instruction in computation.values():
      if instruction.opcode in _ALIASES or instruction.opcode.endswith("-done"):
        continue
      for shape in instruction.shapes:
        if shape.space:
          continue
        key = (shape.text, instruction.scope)
        row = rows.get(key) or Temporary(
          shape.padded, shape.text, instruction.name, instruction.scope, count=0
        )
        rows[key] = dataclasses.replace(row, count=row.count + 1)
  return sorted(rows.values(), key=lambda row: -row.bytes)[:limit]


# ---------------------------------------------------------------------------
# FLOPs.


def count_flops(program: Any) -> float:
  """FLOPs of the matrix products and convolutions of one chip.

  As in XLA's cost analysis, taps of a convolution that meet only padding or
  dilation do not count. Unlike there, loops are multiplied by their trip count.

  Args:
    program: see `parse`.
  """
  costs = {"dot": _dot_flops, "convolution": _convolution_flops}
  total = 0.0
  for instruction, computation, times in parse(program).executed():
    if instruction.opcode in costs:
      left, right = (
        computation[operand].shapes[0].dims
        for operand in instruction.operands[:2]
      )
      total += times * costs[instruction.opcode](instruction, left, right)
  return total


def _dot_flops(instruction: Instruction, left: tuple, right: tuple) -> float:
  del right
  match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
  axes = [int(i) for i in match[1].split(",") if i] if match else []
  out = math.prod(instruction.shapes[0].dims)
  return 2.0 * out * math.prod(left[i] for i in axes)


def _convolution_flops(
  instruction: Instruction, left: tuple, right: tuple
) -> float:
  text, out = instruction.text, instruction.shapes[0].dims
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
  on_left, on_right, on_out = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", text)
  fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

  def groups(name):
    match = re.search(rf"{name}=(\d+)", text)
    return int(match[1]) if match else 1

  def field(name, axis, default="1"):
    values = fields.get(name)
    return values.split("x")[axis] if values else default

  taps = 1
  for i in range(len(on_left) - 2):
    axis = str(i)
    taps *= count_valid_taps(
      left[on_left.index(axis)],
      right[on_right.index(axis)],
      out[on_out.index(axis)],
      padding=int(field("pad", i, "0_0").split("_")[0]),
      stride=int(field("stride", i)),
      lhs_dilation=int(field("lhs_dilate", i)),
      rhs_dilation=int(field("rhs_dilate", i)),
    )
  features = left[on_left.index("f")] // groups("feature_group_count")
  batch = left[on_left.index("b")] // groups("batch_group_count")
  return 2.0 * taps * features * batch * out[on_out.index("f")]


def count_valid_taps(
  size: int, kernel: int, out: int, *, padding: int, stride: int,
  lhs_dilation: int, rhs_dilation: int,
) -> int:  # fmt: skip
  """Pairs (output, tap) along one axis that read an element of the input.

  The others read padding, or zeros that the dilation of a transposed
  convolution (or of a strided one's gradient) inserts.
  """
  outputs, taps = np.arange(out)[:, None], np.arange(kernel)
  at = outputs * stride + taps * rhs_dilation - padding  # [out, kernel]
  valid = (at >= 0) & (at <= (size - 1) * lhs_dilation)
  return int((valid & (at % lhs_dilation == 0)).sum())
