"""Ahead-of-time compilation of a config's train step for a topology."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from mtv_jax.config import overrides
from mtv_jax.config.sections import Config
from mtv_jax.data import ops
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.perf import hlo, roofline, topologies
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.measurements import GradientMeasurements
from mtv_jax.train.run import (
  Run,
  batch_fields,
  build_run,
  make_config_mesh,
)
from mtv_jax.utils import progress

# Default number of examples per epoch; does not affect the results.
EPOCH = 1_000_000
_NUM_LARGEST = 8  # Arrays in a report.
_STEP_ACTIVITY = "compiling the step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilePlan(Run):
  """A config's train step on a topology, not yet compiled."""

  topology: topologies.Topology
  fields: Mapping[str, ops.Field]  # Fields of the batch.

  def lower(self, rows: int | None = None) -> jax.stages.Lowered:
    """Lowers the update with all objectives, for a batch of `rows`."""
    batch = self.abstract_batch(rows)
    return self.train_step.update.lower(self.train_step.abstract, batch)

  @property
  def measures_norms(self) -> bool:
    """Whether the run measures each objective's gradient on the encoder."""
    config, balance = self.config, self.spec.balance
    measures = config.interference or balance.every_steps
    return bool(measures or self.length.steps(config.log.gradients))

  @property
  def may_measure_norms(self) -> bool:
    """Whether the run may measure gradient norms, including at spikes."""
    return self.measures_norms or bool(self.config.log.spikes)

  def lower_norms(self) -> jax.stages.Lowered:
    """Lowers the gradient-norm program, or the interference meter."""
    inputs = (self.train_step.abstract, self.abstract_batch())
    objectives = tuple(self.spec.objectives)
    measurements = GradientMeasurements(self.train_step)
    if section := self.config.interference:
      lr = jax.ShapeDtypeStruct((), "float32") if section.transfer else None
      return measurements.interference.lower(*inputs, objectives, lr)
    return measurements.encoder_grad_norms.lower(*inputs, objectives)


def make_plan(
  config: Config | RunConfig,
  topology: topologies.Topology,
  changes: Iterable[str] = (),
  *,
  examples_per_epoch: int | None = None,
) -> CompilePlan:
  """Builds a config's step with 'KEY=VALUE' changes; opens no data.

  Reads the folders of frozen teachers unless their `model` is set.
  """
  if changes:
    config = overrides.override(config, changes)
  config = resolve(config)
  mesh = make_config_mesh(config, topologies.get_devices(topology))
  step = build_run(config, mesh, examples_per_epoch or EPOCH)
  fields = batch_fields(config, step.spec)
  step.require_fields(fields)
  return CompilePlan(**vars(step), topology=topology, fields=fields)


@dataclasses.dataclass(frozen=True)
class Memory:
  """The compiler's memory plan: bytes of HBM on one chip."""

  arguments: int  # Train state and batch.
  temporaries: int  # Live within a step.
  output: int  # Most of it aliases donated arguments.
  peak: int  # Maximum live at once.
  limit: int | None  # The chip's limit; None if unknown.
  host: int = 0  # Bytes in host memory.

  @property
  def fits(self) -> bool:
    """Whether the peak is within the limit; True if the limit is unknown."""
    return self.limit is None or self.peak <= self.limit

  @classmethod
  def of(cls, compiled: jax.stages.Compiled, limit: int | None) -> Memory:
    """Reads the memory analysis of a compiled program."""
    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    output = analysis.output_size_in_bytes
    live = arguments + output - analysis.alias_size_in_bytes + temporaries
    host = analysis.host_temp_size_in_bytes
    # XLA's peak includes host memory.
    peak = max(live, analysis.peak_memory_in_bytes - host)
    return cls(arguments, temporaries, output, peak, limit, host)


@dataclasses.dataclass(frozen=True)
class CompileResult:
  """Result of compiling a program; sizes and FLOPs are per chip and step."""

  memory: Memory | None  # None if the compiler refused the program.
  refusal: str = ""  # The compiler's message in that case.
  seconds: float = 0.0  # Lowering and compilation time.
  collectives: tuple[hlo.Collective, ...] = ()  # Largest first.
  flops: float = 0.0  # With recomputation, see `hlo.count_flops`; 0: unknown.
  int8_flops: float = 0.0  # Part of `flops` with 8-bit integer operands.
  hbm_bytes: float = 0.0  # Read and written, see `roofline`; 0: unknown.
  host_bytes: float = 0.0  # Transferred from and to host memory.
  cycles: float = 0.0  # See `hlo.count_cycles`; 0: unknown.
  largest: Sequence[dict[str, Any]] = ()  # See `hlo.find_largest_temporaries`.
  # Batch size of `largest`; below the config's if the step does not fit.
  largest_batch: int = 0

  @property
  def fits(self) -> bool:
    """Whether the program can run."""
    return self.memory is not None and self.memory.fits

  @property
  def required_bytes(self) -> int | None:
    """Peak bytes, also of a refused program if the compiler reports them."""
    if self.memory is not None:
      return self.memory.peak
    pattern = r"(?:Used|temporaries \(|requirement )\s*([\d.]+)([KMGT])"
    match = re.search(pattern, self.refusal)
    return match and int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1))


def compile_step(plan: CompilePlan, *, explain: bool = True) -> CompileResult:
  """Compiles a plan's train step and lists the largest arrays.

  With `explain`, a refused step is recompiled with fewer rows to list them.
  """
  result, program = _compile(plan.lower, plan, _STEP_ACTIVITY)
  config, is_tpu = plan.config, plan.topology.is_tpu
  if program is not None:
    module = hlo.parse(program)
    return dataclasses.replace(
      result,
      collectives=hlo.list_collectives(module),
      # Off TPU, XLA calls libraries whose FLOPs the HLO does not show.
      flops=hlo.count_flops(module) if is_tpu else 0.0,
      int8_flops=hlo.count_flops(module, "s8") if is_tpu else 0.0,
      hbm_bytes=roofline.count_hbm_bytes(module) if is_tpu else 0.0,
      host_bytes=roofline.count_host_bytes(module),
      cycles=hlo.count_cycles(module),
      largest=hlo.find_largest_temporaries(module, limit=_NUM_LARGEST),
      largest_batch=config.batch_size,
    )
  multiple = num_batch_shards(plan.mesh) * config.accumulate
  for divisor in (16, 256) if explain else ():
    # Lowers the plan with fewer rows, not the config with a smaller batch_size:
    # durations in examples would overflow int32 steps in long runs.
    batch = max(config.batch_size // divisor // multiple, 1) * multiple
    lower = functools.partial(plan.lower, batch)
    _, program = _compile(lower, plan, f"{_STEP_ACTIVITY} with {batch:,} rows")
    if program is not None:
      arrays = hlo.find_largest_temporaries(program, limit=_NUM_LARGEST)
      return dataclasses.replace(result, largest=arrays, largest_batch=batch)
  return result


def compile_norms(plan: CompilePlan) -> CompileResult:
  """Compiles the gradient-norm program, see `CompilePlan.lower_norms`."""
  return _compile(plan.lower_norms, plan, "compiling the gradient norms")[0]


def _compile(
  lower: Callable[[], jax.stages.Lowered], plan: CompilePlan, description: str
) -> tuple[CompileResult, jax.stages.Compiled | None]:
  start = time.perf_counter()
  lowered = lower()
  try:
    with progress.activity(description, can_exit=True):
      program, refusal = lowered.compile(), ""
    memory = Memory.of(program, plan.topology.chip.hbm_bytes)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    program, refusal, memory = None, str(error), None
  seconds = time.perf_counter() - start
  return CompileResult(memory, refusal, seconds), program
