"""Whether a config fits a machine and what it will do there, as a report."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from mtv_jax.config import schema
from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import sharding_table
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.bench import flops as flops_lib
from mtv_jax.perf.preflight import measure as measure_lib
from mtv_jax.perf.preflight import program

# Of the chips' peak that the step is taken to reach, where the host's share is
# reckoned. Ours: what large ViTs reach on TPUs when nothing waits.
MFU = 0.4
_SHOWN = 12
_WITHOUT_NORMS = (
  "  A run without them (--config.log.gradients_steps=None) does not need this."
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What `preflight` found.

  Attributes:
    plan: what was compiled.
    measured: what compiling says.
    model_flops: of a step of the whole machine, by analysis, each product once.
    mfu: assumed, for what the hosts must deliver.
    tables: 'short' or 'all' rows of the parameters.
    norms: what compiling the objectives' gradient norms says; None where that
      was not done.
  """

  plan: program.Plan
  measured: measure_lib.Measured
  model_flops: float
  mfu: float = MFU
  tables: str = "short"
  norms: measure_lib.Norms | None = None

  @property
  def fits(self) -> bool:
    """Whether all that was compiled can run."""
    return self.measured.fits and (self.norms is None or self.norms.fits)

  @property
  def useful(self) -> float | None:
    """Model FLOPs over the compiled program's; None where it has none."""
    if not self.measured.flops:
      return None
    return self.model_flops / self.plan.mesh.size / self.measured.flops

  @property
  def row_bytes(self) -> int:
    """Of one example as the host hands it over."""
    return sum(
      math.prod(field.shape) * np.dtype(field.dtype).itemsize
      for field in self.plan.fields.values()
    )

  @property
  def examples_per_second(self) -> float | None:
    """Of the whole machine at `mfu`; None where the peak is not known."""
    peak = self.plan.topology.chip.peak_bf16_flops
    if peak is None:
      return None
    per_example = self.model_flops / self.plan.config.batch_size
    return self.mfu * peak * self.plan.topology.chips / per_example

  def to_dict(self) -> dict[str, Any]:
    """Everything, as plain values."""
    plan, measured, topology = self.plan, self.measured, self.plan.topology
    rate = self.examples_per_second
    rows = sharding_table(plan.program.abstract.params)
    return {
      "topology": topology.name,
      "chips": topology.chips,
      "hosts": topology.hosts,
      "compiled_for": "the chips" if topology.is_tpu else "a CPU (an estimate)",
      "mesh": {axis: plan.mesh.shape[axis] for axis in MESH_AXES},
      "batch_size": plan.config.batch_size,
      "accumulate": plan.config.accumulate,
      "remat": plan.config.model.remat,
      "batch": {
        name: {"shape": list(f.shape), "dtype": str(f.dtype)}
        for name, f in plan.fields.items()
      },
      "batch_bytes_per_host": self.row_bytes
      * plan.config.batch_size
      // topology.hosts,
      "parameters": sum(math.prod(row[1]) for row in rows),
      "sharding": [
        dict(name=name, shape=list(shape), partition=spec, bytes_per_chip=size)
        for name, shape, spec, size in rows
      ],
      "fits": self.fits,
      "memory": dataclasses.asdict(measured.memory)
      if measured.memory
      else None,
      "norms": self.norms and dataclasses.asdict(self.norms),
      "refusal": measured.refusal or None,
      "model_flops": self.model_flops,
      "compiled_flops_per_chip": measured.flops or None,
      "useful": self.useful,
      "collectives": {
        kind: {"count": count, "bytes_per_chip": size}
        for kind, (count, size) in hlo.by_kind(measured.collectives).items()
      },
      "large_gathers": [
        dict(shape=g.shape, bytes=g.result, scope=g.scope)
        for g in large_gathers(plan, measured)
      ],
      "largest_temporaries": [
        dataclasses.asdict(row) for row in measured.largest
      ],
      "assumed_mfu": self.mfu,
      "examples_per_second": rate,
      "input_bytes_per_second_per_host": rate
      and rate * self.row_bytes / topology.hosts,
      "compile_seconds": measured.seconds,
    }

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(self.to_dict())

  def __str__(self) -> str:
    parts = [
      self._machine(),
      self._batch(),
      self._parameters(),
      self._memory(),
      self._norms(),
      self._work(),
      self._exchanges(),
      self._input(),
      f"compiled in {self.measured.seconds:.0f} s",
    ]
    return "\n\n".join(part for part in parts if part)

  def _machine(self) -> str:
    plan = self.plan
    mesh = " x ".join(f"{plan.mesh.shape[a]} {a}" for a in MESH_AXES)
    lines = [
      str(plan.topology),
      f"mesh {mesh}; batch {plan.config.batch_size:,}, "
      f"accumulate {plan.config.accumulate}, remat {plan.config.model.remat}",
    ]
    if not plan.topology.is_tpu:
      lines.append(
        "Compiled for a CPU: memory is an estimate, and nothing is said of the "
        "chips' own program."
      )
    if any("epochs" in line for line in _durations(plan.config)):
      epoch = self.plan.examples_per_epoch
      lines.append(f"An epoch is taken to be {epoch:,} examples (--examples).")
    return "\n".join(lines)

  def _batch(self) -> str:
    rows = self.plan.config.batch_size // self.plan.topology.hosts
    lines = [f"batch: {rows:,} rows a host, {_size(rows * self.row_bytes)}"]
    for name, field in self.plan.fields.items():
      shape = "x".join(map(str, field.shape)) or "-"
      lines.append(f"  {name:14} {shape:14} {np.dtype(field.dtype).name}")
    return "\n".join(lines)

  def _parameters(self) -> str:
    rows = sharding_table(self.plan.program.abstract.params)
    count = sum(math.prod(row[1]) for row in rows)
    state = sum(r[3] for r in sharding_table(self.plan.program.abstract))
    lines = [
      f"parameters: {count:,}; they take "
      f"{_size(sum(row[3] for row in rows))} a chip, the state {_size(state)}"
    ]
    shown = sorted(rows, key=lambda row: -row[3])
    if self.tables == "short":
      shown = shown[:_SHOWN]
    width = max(len(row[0]) for row in shown)
    for name, shape, spec, size in shown:
      sizes = "x".join(map(str, shape)) or "-"
      lines.append(f"  {name:{width}} {sizes:16} {_size(size):>9}  {spec}")
    if len(shown) < len(rows):
      lines.append(f"  and {len(rows) - len(shown)} more (--tables)")
    return "\n".join(lines)

  def _memory(self) -> str:
    found, chip = self.measured.memory, self.plan.topology.chip
    if found is None:
      lines = ["memory: DOES NOT FIT", _indented(self.measured.refusal)]
      if self.measured.largest:
        at = f"{self.measured.largest_at:,}"
        lines.append(f"  the largest arrays of a chip, at a batch of {at}:")
        lines += [f"    {row}" for row in _temporaries(self.measured.largest)]
      return "\n".join(lines)
    of = f" of {_size(found.limit)}" if found.limit else ""
    verdict = "fits" if found.fits else "DOES NOT FIT"
    if found.limit is None:
      verdict = f"{chip.kind} has no limit that is known"
    lines = [
      f"memory a chip: peak {_size(found.peak)}{of}: {verdict}",
      f"  arguments {_size(found.arguments)}, temporaries "
      f"{_size(found.temporaries)}, output {_size(found.output)}",
    ]
    if not found.fits:
      lines.append("  the largest arrays:")
      lines += [f"    {line}" for line in _temporaries(self.measured.largest)]
    return "\n".join(lines)

  def _norms(self) -> str:
    """Of the other program of a run that measures gradients' norms."""
    if self.norms is None:
      if not self.plan.takes_norms:
        return ""
      return (
        "memory of the objectives' gradient norms (config.log.gradients_...), "
        "a program of its own: not compiled (--norms)"
      )
    found = self.norms.memory
    if found is None:
      lines = ["memory of the objectives' gradient norms: DOES NOT FIT"]
      return "\n".join([*lines, _indented(self.norms.refusal), _WITHOUT_NORMS])
    verdict = "fits" if found.fits else "DOES NOT FIT"
    line = (
      f"memory of the objectives' gradient norms: peak {_size(found.peak)}, "
      f"{verdict}; compiled in {self.norms.seconds:.0f} s"
    )
    return line if found.fits else f"{line}\n{_WITHOUT_NORMS}"

  def _work(self) -> str:
    each = self.model_flops / self.plan.mesh.size
    lines = [
      f"FLOPs: {self.model_flops:.4g} a step by analysis, {each:.4g} a chip"
    ]
    if self.useful is not None:
      lines.append(
        f"  the program does {self.measured.flops:.4g} a chip: "
        f"{self.useful:.1%} of it is useful, the rest is recomputed"
      )
    return "\n".join(lines)

  def _exchanges(self) -> str:
    kinds = hlo.by_kind(self.measured.collectives)
    if not kinds:
      return "" if self.measured.memory is None else "collectives: none"
    lines = ["collectives, bytes that a chip receives in a step:"]
    for kind, (count, size) in kinds.items():
      lines.append(f"  {kind:20} {count:8,.0f} {_size(size):>10}")
    large = large_gathers(self.plan, self.measured)
    if large:
      lines.append("  gathers larger than any parameter:")
      lines += [
        f"    {_size(g.result)} of {g.shape} from {g.scope or 'no source'}"
        for g in large
      ]
    return "\n".join(lines)

  def _input(self) -> str:
    rate, topology = self.examples_per_second, self.plan.topology
    if rate is None:
      return ""
    host = rate / topology.hosts
    return (
      f"input: at {self.mfu:.0%} of the chips' peak (assumed) "
      f"{rate:,.0f} examples/s; a host delivers {host:,.0f} examples/s, "
      f"{host * self.row_bytes / 1e6:,.0f} MB/s of rows"
    )


def preflight(
  config: schema.Config,
  topology: str,
  *,
  mfu: float = MFU,
  tables: str = "short",
  examples_per_epoch: int | None = None,
  norms: bool = False,
) -> Report:
  """Compiles the train step of a config for a machine that need not be there.

  Args:
    config: as `train.run` takes it; neither data nor weights are opened.
    topology: see `topologies.parse`.
    mfu: assumed share of the chips' peak, for what the hosts must deliver.
    tables: 'short' or 'all' rows of the parameters.
    examples_per_epoch: for durations in epochs.
    norms: whether to compile the objectives' gradient norms as well, if the
      config asks for them: about as long again.

  Raises:
    ConfigError: for a config or a topology that can't be used.
  """
  plan = program.make_plan(
    config,
    topologies.parse(topology),
    examples_per_epoch=examples_per_epoch,
  )
  counted = flops_lib.bench_flops(config, batch_size=plan.config.batch_size)
  measured = measure_lib.measure(plan)
  wanted = norms and plan.takes_norms
  return Report(
    plan=plan,
    measured=measured,
    norms=measure_lib.measure_norms(plan) if wanted else None,
    model_flops=counted.total * plan.config.batch_size,
    mfu=mfu,
    tables=tables,
  )


def large_gathers(
  plan: program.Plan, measured: measure_lib.Measured
) -> list[hlo.Collective]:
  """All-gathers whose result is larger than any parameter.

  An activation that is gathered by accident shows here.
  """
  most = max(
    math.prod(row[1]) * 4
    for row in sharding_table(plan.program.abstract.params)
  )
  return [
    row
    for row in measured.collectives
    if row.kind == "all-gather" and row.result > most
  ]


def _durations(config: Any) -> list[str]:
  return [
    key
    for section in (config, config.schedule, config.log, config.checkpoint)
    for key, value in section.items()
    if value is not None
  ]


def _temporaries(rows) -> list[str]:
  return [
    f"{_size(row.bytes):>9} {row.shape} x{row.count}  {row.scope or row.name}"
    for row in rows
  ]


def _indented(text: str) -> str:
  return "\n".join(f"  {line}" for line in text.splitlines() if line.strip())


def _size(count: float | int) -> str:
  """Bytes as a person reads them; in powers of 1024, as chips are sold."""
  for unit in ("B", "KiB", "MiB"):
    if abs(count) < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.2f} GiB"
