"""The text of a compiled program (XLA's optimised HLO), parsed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

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
  """An array of a program: 'bf16[8,128]', its bytes, and where it is.

  Attributes:
    text: dtype and sizes.
    dims: sizes.
    bytes: of its elements.
    padded: with what the layout's tiles add.
    space: of memory: 0 is the chip's main one.
  """

  text: str
  dims: tuple[int, ...]
  bytes: int
  padded: int
  space: int = 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    name: unique.
    opcode: such as 'fusion' or 'all-gather-start'.
    shapes: of the result; several for a tuple.
    operands: names.
    scope: the operation in the source that it comes from (`op_name`).
    text: what follows the operands.
    literal: of a constant, its text.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  scope: str
  text: str
  literal: str = ""

  @property
  def bytes(self) -> int:
    """Of the whole result."""
    return sum(shape.bytes for shape in self.shapes)

  def called(self) -> list[tuple[str, str]]:
    """Pairs (role, computation) that it runs; a `-done` runs nothing."""
    if self.opcode.endswith(("-done", "-update")):
      return []
    return [
      (role, name)
      for role, names in _CALLED.findall(self.text)
      for name in _OPERAND.findall(names)
    ]


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program.

  Attributes:
    computations: by name, each one's instructions in order.
    entry: the name of the one that runs.
    roots: the result of each computation.
    partitions: how many devices run it.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str
  roots: Mapping[str, str]
  partitions: int

  @functools.cached_property
  def runs(self) -> dict[str, float]:
    """How often each computation runs in one run of the program.

    Of the branches of a conditional each counts as run.
    """
    counts: dict[str, float] = collections.defaultdict(float)

    def visit(name, times):
      counts[name] += times
      for instruction in self.computations[name].values():
        inner = times
        if instruction.opcode == "while":
          inner *= trip_count(self, name, instruction)
        for _, called in instruction.called():
          if called in self.computations:
            visit(called, inner)

    visit(self.entry, 1.0)
    return dict(counts)


def parse(text: str) -> Module:
  """Reads a program's text, as `compiled.as_text()` gives it.

  Raises:
    ValueError: if it has no entry.
  """
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
    else:
      found = _instruction(line)
      if found is not None:
        root, instruction = found
        computations[current][instruction.name] = instruction
        if root:
          roots[current] = instruction.name
  if entry is None:
    raise ValueError("this is no text of a compiled program: it has no ENTRY.")
  partitions = re.search(r"\bnum_partitions=(\d+)", text)
  replicas = re.search(r"\breplica_count=(\d+)", text)
  count = math.prod(int(m[1]) for m in (partitions, replicas) if m)
  return Module(computations, entry, roots, count)


def _instruction(line: str) -> tuple[bool, Instruction] | None:
  head = _NAME.match(line)
  if head is None:
    return None
  rest = line[head.end() :]
  end = _closing(rest) if rest.startswith("(") else rest.find(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  arguments, text = rest[: end - 1], rest[end:]
  scope = _SCOPE.search(text)
  return bool(head[1]), Instruction(
    name=head[2],
    opcode=opcode,
    shapes=shapes(kind),
    operands=tuple(_OPERAND.findall(arguments)),
    scope=scope[1] if scope else "",
    text=text,
    literal=arguments if opcode in ("constant", "parameter") else "",
  )


def _closing(text: str) -> int:
  """The place after the parenthesis that closes the first one."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return i + 1
  return len(text)


def shapes(kind: str) -> tuple[Shape, ...]:
  """The arrays of a type, 'f32[8]{0}' or '(f32[8]{0}, s32[])'."""
  return tuple(_shape(*found) for found in _ARRAY.findall(kind))


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


def trip_count(module: Module, within: str, loop: Instruction) -> int:
  """How often a loop runs: what XLA notes, or what its condition says.

  A loop is understood that counts from a constant to a constant by a constant
  step, as `scan`, `map` and `fori_loop` do; another counts once.

  Args:
    module: the program.
    within: the computation that the loop is in.
    loop: the `while`.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
  if known:
    return int(known[1])
  called = dict(loop.called())
  condition, body = (
    module.computations[called[role]] for role in ("condition", "body")
  )
  test = condition[module.roots[called["condition"]]]
  compare = re.search(r"direction=(LT|LE)", test.text)
  if test.opcode != "compare" or not compare:
    return 1
  start = module.computations[within][loop.operands[0]]

  def initial(index):
    if start.opcode != "tuple" or index is None:
      return None
    return _constant(module.computations[within], start.operands[index])

  counter = _element(condition, test.operands[0])
  limit = _constant(condition, test.operands[1])
  if limit is None:
    limit = initial(_element(condition, test.operands[1]))
  if limit is None or counter is None:
    return 1
  first = initial(counter)
  # What can't be followed is a counter from 0 by 1, as loops of JAX are.
  first = 0 if first is None else first
  step = _step(body, module.roots[called["body"]], counter)
  last = limit + (compare[1] == "LE")
  return max(-(-(last - first) // step), 0)


def _element(computation: Mapping[str, Instruction], name: str) -> int | None:
  """Which element of the loop's tuple a value is."""
  found = computation[name]
  while found.opcode in ("copy", "bitcast"):
    found = computation[found.operands[0]]
  index = re.search(r"\bindex=(\d+)", found.text)
  return int(index[1]) if found.opcode == "get-tuple-element" else None


def _constant(computation: Mapping[str, Instruction], name: str) -> int | None:
  found = computation[name]
  while found.opcode in ("copy", "bitcast") and found.operands:
    found = computation[found.operands[0]]
  whole = re.fullmatch(r"-?\d+", found.literal)
  return int(whole[0]) if found.opcode == "constant" and whole else None


def _step(body: Mapping[str, Instruction], root: str, counter: int) -> int:
  """What a loop adds to its counter."""
  result = body[root]
  if result.opcode != "tuple":
    return 1
  found = body[result.operands[counter]]
  if found.opcode != "add":
    return 1
  for operand in found.operands:
    value = _constant(body, operand)
    if value is not None and value > 0:
      return value
  return 1


def as_module(program: Any) -> Module:
  """A parsed program, of whatever form it has."""
  if isinstance(program, Module):
    return program
  return parse(program if isinstance(program, str) else program.as_text())
