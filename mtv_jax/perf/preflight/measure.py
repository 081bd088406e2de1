"""Compiles a plan, and reads off the program what it takes."""

from __future__ import annotations

import dataclasses
import re
import time

import jax

from mtv_jax.config import overrides
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.perf import hlo, hlo_text
from mtv_jax.perf.preflight.program import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one chip.

  Attributes:
    arguments: the state and the batch.
    temporaries: what lives within a step.
    output: of the step; nearly all of it takes the place of donated arguments.
    peak: the most that is held at a time.
    limit: what the chip has; None where it is not known.
  """

  arguments: int
  temporaries: int
  output: int
  peak: int
  limit: int | None

  @property
  def fits(self) -> bool:
    """Whether the peak is within the limit, so far as there is one."""
    return self.limit is None or self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Measured:
  """What compiling says.

  Attributes:
    memory: of one chip; None where the compiler gave up for lack of it.
    refusal: the compiler's words where it did.
    collectives: exchanges between the chips, largest first.
    flops: of one chip and step: matrix products and convolutions of the
      compiled program, recomputation included; 0 where they can't be read.
    largest: the largest arrays that the program makes.
    seconds: of lowering and compiling.
    largest_at: the batch that `largest` are of; of a step that does not fit
      there is no program, and a smaller batch's is looked at.
  """

  memory: Memory | None
  refusal: str
  collectives: tuple[hlo.Collective, ...]
  flops: float
  largest: tuple[hlo.Temporary, ...]
  seconds: float
  largest_at: int = 0

  @property
  def fits(self) -> bool:
    """Whether the program can run."""
    return self.memory is not None and self.memory.fits


def measure(plan: Plan, *, largest: int = 8) -> Measured:
  """Compiles a plan's step for its topology.

  Args:
    plan: from `make_plan`.
    largest: how many of the largest arrays to name.
  """
  begin = time.perf_counter()
  lowered = plan.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    seconds = time.perf_counter() - begin
    arrays, batch = _largest_of_less(plan, largest)
    return Measured(None, str(error), (), 0.0, arrays, seconds, batch)
  seconds = time.perf_counter() - begin
  module = hlo_text.parse(compiled.as_text())
  # Other backends call libraries, whose operations the program does not show.
  flops = hlo.flops(module) if plan.topology.is_tpu else 0.0
  return Measured(
    memory=memory_of(compiled, plan.topology.chip.hbm_bytes),
    refusal="",
    collectives=hlo.collectives(module),
    flops=flops,
    largest=tuple(hlo.largest_temporaries(module, limit=largest)),
    seconds=seconds,
    largest_at=plan.config.batch_size,
  )


@dataclasses.dataclass(frozen=True)
class Norms:
  """What compiling the program of the objectives' gradient norms says.

  Attributes:
    memory: of one chip; None where the compiler gave up for lack of it.
    refusal: the compiler's words where it did.
    seconds: of lowering and compiling.
  """

  memory: Memory | None
  refusal: str
  seconds: float

  @property
  def fits(self) -> bool:
    """Whether the program can run."""
    return self.memory is not None and self.memory.fits


def measure_norms(plan: Plan) -> Norms:
  """Compiles what a run with `log.gradients_steps` runs beside its step."""
  begin = time.perf_counter()
  lowered = plan.lower_norms()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Norms(None, str(error), time.perf_counter() - begin)
  memory = memory_of(compiled, plan.topology.chip.hbm_bytes)
  return Norms(memory, "", time.perf_counter() - begin)


def _largest_of_less(
  plan: Plan, count: int
) -> tuple[tuple[hlo.Temporary, ...], int]:
  """The largest arrays of the same step with fewer rows, and that batch."""
  if not count:
    return (), 0
  least = num_batch_shards(plan.mesh) * plan.config.accumulate
  for share in (16, 256):
    batch = max(plan.config.batch_size // share // least, 1) * least
    changed = overrides.override(plan.config, [f"batch_size={batch}"])
    less = make_plan(changed, plan.topology)
    try:
      compiled = less.lower().compile()
    except jax.errors.JaxRuntimeError:
      continue
    return tuple(hlo.largest_temporaries(compiled, limit=count)), batch
  return (), 0


def memory_of(compiled: jax.stages.Compiled, limit: int | None) -> Memory:
  """Of one chip, as the compiler planned it."""
  found = compiled.memory_analysis()
  arguments, output = (
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
  )
  temporaries = found.temp_size_in_bytes
  # Donated arguments become results in place.
  held = arguments + output - found.alias_size_in_bytes + temporaries
  return Memory(
    arguments=arguments,
    temporaries=temporaries,
    output=output,
    peak=max(held, found.peak_memory_in_bytes),
    limit=limit,
  )


def required(refusal: str) -> int | None:
  """The bytes that a compiler's refusal says would be needed."""
  found = re.search(
    r"(?:Used|temporaries \(|requirement )\s*([\d.]+)([KMGT])", refusal
  )
  if not found:
    return None
  power = "KMGT".index(found[2]) + 1
  return int(float(found[1]) * 1024**power)
