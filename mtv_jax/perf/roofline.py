"""Roofline of a compiled step: a lower bound of its time on a chip.

Compute, memory, links and host each take at least their work divided by their
peak rate; the slowest is the bound. Ignores the network between slices, and
broadcasts and iotas outside fusions.
"""

import dataclasses
from typing import Any

from mtv_jax.perf import hlo, topologies

# Instructions without memory traffic, or whose traffic is ignored.
_FREE = (*hlo.ALIASES, "partition-id", "replica-id", "iota", "broadcast")
# Custom calls that only allocate or alias memory.
_FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
_SLICES = ("dynamic-slice", "slice", "gather")
_HOST = 5  # Memory space of the host.


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a chip's step, by resource."""

  compute: float  # Matrix products.
  memory: float  # Reads and writes of HBM.
  links: float  # Bytes received, over all links of the torus at once.
  host: float  # Bytes from and to host memory, not overlapped.

  @property
  def total(self) -> float:
    """The bound: the slowest resource."""
    return max(dataclasses.astuple(self))


def estimate(
  chip: topologies.Chip,
  *,
  flops: float | int,
  hbm_bytes: float | int,
  received: float | int,
  host_bytes: float | int = 0,
  int8_flops: float | int = 0,
) -> Roofline | None:
  """The roofline of a chip's step; None if the chip's rates are unknown.

  `int8_flops` is the part of `flops` with 8-bit integer operands.
  """
  rates = (
    chip.peak_bf16_flops,
    chip.peak_int8_flops,
    chip.hbm_bandwidth,
    chip.link_bandwidth,
    chip.host_bandwidth,
  )
  if None in rates or not flops:
    return None
  work = flops - int8_flops, int8_flops, hbm_bytes, received, host_bytes
  compute, int8, *rest = (w / r for w, r in zip(work, rates, strict=True))
  return Roofline(compute + int8, *rest)


def count_hbm_bytes(train_step: Any) -> float:
  """Counts the bytes of HBM that a program reads and writes, with padding.

  A slice reads only the slice and an in-place update writes only the update,
  also inside fusions. Arrays outside HBM are free.
  """
  module = hlo.parse(train_step)
  total = 0.0
  for name, times in module.run_counts.items():
    if name in module.fused_computations:
      continue
    computation = module.computations[name]
    for instruction in computation.values():
      if _is_free(instruction):
        continue
      size = _count_written(module, computation, instruction)
      for operand in {*instruction.operands}:
        size += _count_read(module, computation, instruction, operand)
      total += times * size
  return total


def count_host_bytes(train_step: Any) -> float:
  """Counts the bytes that a program moves between HBM and host memory."""
  total = 0.0
  for instruction, _, times in hlo.parse(train_step).executed():
    if instruction.opcode.endswith("-start"):
      # The whole array and a slice, or two equal arrays.
      arrays = _arrays(instruction)
      if _HOST in [array.space for array in arrays]:
        total += times * min(array.padded for array in arrays)
  return total


def _is_free(instruction) -> bool:
  opcode = instruction.opcode
  if opcode == "custom-call":
    return any(target in instruction.text for target in _FREE_CALLS)
  return opcode in _FREE or opcode.endswith(("-done", "-update"))


def _arrays(instruction) -> list[hlo.Shape]:
  """Arrays of an instruction's type, without indices and semaphores."""
  return [shape for shape in instruction.shapes if shape.dims]


def _sum_bytes(shapes) -> int:
  return sum(shape.padded for shape in shapes if shape.space == 0)


def _count_read(module, computation, user, operand) -> int:
  """Counts the bytes of an operand that an instruction reads."""
  if operand not in computation:
    return 0
  operand_bytes = _sum_bytes(computation[operand].shapes)
  opcode = user.opcode.removesuffix("-start")
  if opcode in _SLICES and operand == user.operands[0]:
    return min(operand_bytes, sum(shape.padded for shape in _arrays(user)[-1:]))
  if opcode == "dynamic-update-slice" and operand == user.operands[0]:
    return 0
  if user.opcode != "fusion" or not operand_bytes:
    return operand_bytes
  ((_, called),) = user.called_computations()
  body = module.computations[called]
  parameters = {
    i.arguments: name for name, i in body.items() if i.opcode == "parameter"
  }
  return sum(
    _count_read_inside(module, body, parameters[str(i)], operand_bytes)
    for i, name in enumerate(user.operands)
    if name == operand
  )


def _count_read_inside(module, body, name, limit) -> int:
  """Counts bytes of a parameter that a fusion's body reads, at most `limit`."""
  total = 0
  for user in body.values():
    if name not in user.operands:
      continue
    if user.opcode == "bitcast":
      total += _count_read_inside(module, body, user.name, limit)
    elif user.opcode != "tuple":
      total += _count_read(module, body, user, name)
  return min(total, limit)


def _count_written(module, computation, instruction) -> int:
  """Counts the bytes that an instruction writes."""
  shapes = instruction.shapes
  opcode = instruction.opcode.removesuffix("-start")
  if opcode != instruction.opcode:
    index = 0 if opcode in ("copy", "dynamic-update-slice") else 1
    shapes = _arrays(instruction)[index : index + 1]
  result_bytes = _sum_bytes(shapes)
  if opcode == "dynamic-update-slice":
    update = instruction.operands[1]
    return min(result_bytes, _sum_bytes(computation[update].shapes))
  if opcode == "fusion" and result_bytes:
    ((_, called),) = instruction.called_computations()
    body, root = module.computations[called], module.roots[called]
    outputs = [root]
    if root.opcode == "tuple":
      outputs = [body[name] for name in root.operands]
    # Shapes inside a fusion may lack the result's memory space.
    updates = 0
    for output, shape in zip(outputs, instruction.shapes, strict=False):
      while output.opcode == "bitcast":
        output = body[output.operands[0]]
      inner = _count_written(module, body, output)
      updates += min(shape.padded, inner) if shape.space == 0 else 0
    return updates
  return result_bytes
