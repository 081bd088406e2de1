"""Preflight report: whether a config fits a topology, and its cost there."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtv_jax.config.sections import Config
from mtv_jax.hooks.evaluation import list_evaluations
from mtv_jax.models.remat import AUTO
from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import sharding_table
from mtv_jax.perf import data_plane as data_plane_lib
from mtv_jax.perf import flops as flops_lib
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf import roofline as roofline_lib
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight import cost as cost_lib
from mtv_jax.perf.preflight import search as search_lib
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.utils import progress
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.text import format_bytes

_NUM_SHORT = 12  # Rows of the short parameter table.


@dataclasses.dataclass(frozen=True)
class Report:
  """Result of `preflight`."""

  plan: compile_lib.CompilePlan
  compiled: compile_lib.CompileResult  # The train step.
  model_flops: float  # Per step, all chips, without recomputation.
  # The program of the objectives' gradient norms, if it was compiled.
  norms: compile_lib.CompileResult | None = None
  mfu: float = 0.4  # Assumed; typical of large ViTs on TPUs.
  tables: str = "short"  # Or 'all' rows of the parameter table.
  trials: tuple[search_lib.Trial, ...] = ()  # For `remat` 'auto'.
  step_seconds: float | None = None  # Measured; replaces `mfu`.
  data_plane: data_plane_lib.DataPlane | None = None
  chip_hour: float | None = None  # Dollars per chip and hour.

  @property
  def fits(self) -> bool:
    """Whether all compiled programs fit."""
    return self.compiled.fits and (self.norms is None or self.norms.fits)

  @property
  def useful_flops_share(self) -> float | None:
    """Model FLOPs over the compiled program's FLOPs; None if unknown."""
    if not self.compiled.flops:
      return None
    return self.model_flops / self.plan.mesh.size / self.compiled.flops

  @property
  def roofline(self) -> roofline_lib.Roofline | None:
    """Lower bound of a step's time; None if unknown, as with several slices."""
    if self.plan.topology.slices > 1:
      return None
    return roofline_lib.estimate(
      self.plan.topology.chip,
      flops=self.compiled.flops,
      int8_flops=self.compiled.int8_flops,
      hbm_bytes=self.compiled.hbm_bytes,
      host_bytes=self.compiled.host_bytes,
      received=sum((row.bytes for row in self.compiled.collectives), 0.0),
    )

  @property
  def row_bytes(self) -> int:
    """Bytes of one example from the input pipeline."""
    return sum(
      math.prod(field.shape) * np.dtype(field.dtype).itemsize
      for field in self.plan.fields.values()
    )

  @property
  def examples_per_second(self) -> float | None:
    """Examples per second at `mfu`; None if the chips' peak is unknown."""
    topology = self.plan.topology
    if self.step_seconds is not None:
      return self.plan.config.batch_size / self.step_seconds
    if topology.chip.peak_bf16_flops is None:
      return None
    per_example = self.model_flops / self.plan.config.batch_size
    peak = topology.chip.peak_bf16_flops * topology.chips
    return self.mfu * peak / per_example

  @property
  def costs(self) -> list[dict[str, Any]]:
    """The run at `mfu` or `step_seconds`, and at the roofline, if known."""
    seconds = {}
    if rate := self.examples_per_second:
      basis = f"{100 * self.mfu:g} % MFU"
      if self.step_seconds is not None:
        basis = f"{self.step_seconds:g} s a step"
      seconds[basis] = self.plan.config.batch_size / rate
    if bound := self.roofline:
      seconds["the roofline"] = bound.total
    return cost_lib.compute_costs(self.plan, seconds, self.chip_hour)

  @functools.cached_property
  def params(self) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, partition and bytes per chip of each parameter."""
    return sharding_table(self.plan.train_step.abstract.params)

  def find_large_gathers(self) -> list[hlo.Collective]:
    """Finds all-gathers of activations: larger than the largest parameter."""
    largest = max(math.prod(shape) * 4 for _, shape, _, _ in self.params)
    gathers = (r for r in self.compiled.collectives if r.kind == "all-gather")
    return [row for row in gathers if row.result > largest]

  def to_dict(self) -> dict[str, Any]:
    """The report as plain values."""
    plan, compiled, topology = self.plan, self.compiled, self.plan.topology
    config, rate = plan.config, self.examples_per_second
    bound = self.roofline
    hosts, norms = topology.hosts, self.norms and dataclasses.asdict(self.norms)
    return {
      "topology": topology.name,
      "chips": topology.chips,
      "hosts": hosts,
      "compiled_for": "the chips" if topology.is_tpu else "a CPU (an estimate)",
      "mesh": {axis: plan.mesh.shape[axis] for axis in MESH_AXES},
      "batch_size": config.batch_size,
      "accumulate": config.accumulate,
      "remat": config.model.remat,
      "remat_trials": [dataclasses.asdict(trial) for trial in self.trials],
      "batch": {
        name: {"shape": list(f.shape), "dtype": str(f.dtype)}
        for name, f in plan.fields.items()
      },
      "batch_bytes_per_host": self.row_bytes * config.batch_size // hosts,
      "parameters": sum(math.prod(shape) for _, shape, _, _ in self.params),
      "sharding": [
        dict(name=name, shape=list(shape), partition=spec, bytes_per_chip=size)
        for name, shape, spec, size in self.params
      ],
      "fits": self.fits,
      "memory": compiled.memory and dataclasses.asdict(compiled.memory),
      "norms": norms
      and {k: norms[k] for k in ("memory", "refusal", "seconds")},
      "refusal": compiled.refusal or None,
      "model_flops": self.model_flops,
      "compiled_flops_per_chip": compiled.flops or None,
      "useful": self.useful_flops_share,
      "hbm_bytes_per_chip": compiled.hbm_bytes or None,
      "host_bytes_per_chip": compiled.host_bytes,
      "estimated_cycles": compiled.cycles or None,
      "roofline_seconds": bound
      and {**dataclasses.asdict(bound), "total": bound.total},
      "collectives": {
        kind: {"count": count, "bytes_per_chip": size}
        for kind, (count, size) in hlo.sum_by_kind(compiled.collectives).items()
      },
      "large_gathers": [
        dict(shape=g.shape, bytes=g.result, scope=g.scope)
        for g in self.find_large_gathers()
      ],
      "largest_temporaries": compiled.largest,
      "assumed_mfu": self.mfu,
      "examples_per_second": rate,
      "input_bytes_per_second_per_host": rate and rate * self.row_bytes / hosts,
      "data_plane": self.data_plane and self.data_plane.to_dict(),
      "total_steps": plan.total_steps,
      "costs": self.costs,
      "evaluations": list_evaluations(plan.config, plan.length),
      "compile_seconds": compiled.seconds,
    }

  def to_json(self) -> str:
    """The report as one line of JSON."""
    return json.dumps(self.to_dict())

  def __str__(self) -> str:
    sections = [
      self._format_machine(),
      self._format_batch(),
      self._format_parameters(),
      self._format_remat(),
      self._format_memory(),
      self._format_norms(),
      self._format_flops(),
      self._format_collectives(),
      [str(self.data_plane)] if self.data_plane else [],
      [f"compiled in {self.compiled.seconds:.0f} s"],
      cost_lib.format_run(self.plan, self.costs, self.row_bytes),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)

  def _format_machine(self) -> list[str]:
    plan, config = self.plan, self.plan.config
    mesh = " x ".join(f"{plan.mesh.shape[a]} {a}" for a in MESH_AXES)
    step = f"accumulate {config.accumulate}, remat {config.model.remat}"
    shape = f"mesh {mesh}; batch {config.batch_size:,}, {step}"
    lines = [str(plan.topology), shape]
    if config.xla_flags:
      lines.append(f"XLA flags {config.xla_flags}")
    if not plan.topology.is_tpu:
      lines.append(
        "Compiled for a CPU: memory is an estimate; the FLOPs of the "
        "chips' own program are unknown."
      )
    sections = (config, config.schedule, config.log, config.checkpoint)
    durations = [v for s in sections for v in vars(s).values()]
    if any(getattr(v, "unit", None) == "epochs" for v in durations):
      examples = f"{plan.length.examples_per_epoch:,} examples per epoch"
      lines.append(f"Assumes {examples} (--examples).")
    return lines

  def _format_batch(self) -> list[str]:
    rows = self.plan.config.batch_size // self.plan.topology.hosts
    size = format_bytes(rows * self.row_bytes)
    lines = [f"batch: {rows:,} rows per host, {size}"]
    for name, field in self.plan.fields.items():
      dtype = np.dtype(field.dtype).name
      lines.append(f"  {name:14} {_format_shape(field.shape):14} {dtype}")
    return lines

  def _format_parameters(self) -> list[str]:
    count = sum(math.prod(shape) for _, shape, _, _ in self.params)
    size, state = (
      format_bytes(sum(row[3] for row in rows))
      for rows in (self.params, sharding_table(self.plan.train_step.abstract))
    )
    lines = [f"parameters: {count:,}; {size} per chip, the train state {state}"]
    rows = sorted(self.params, key=lambda row: -row[3])
    rows = rows[: _NUM_SHORT if self.tables == "short" else None]
    width = max(len(row[0]) for row in rows)
    for name, shape, spec, size in rows:
      cells = f"{_format_shape(shape):16} {format_bytes(size):>9}  {spec}"
      lines.append(f"  {name:{width}} {cells}")
    if num_hidden := len(self.params) - len(rows):
      lines.append(f"  and {num_hidden} more (--tables)")
    return lines

  def _format_remat(self) -> list[str]:
    if not self.trials:
      return []
    lines = ["rematerialisation, compiled:"]
    lines += [f"  {trial}" for trial in self.trials]
    return [*lines, f"  --config.model.remat='{self.plan.config.model.remat}'"]

  def _format_memory(self) -> list[str]:
    compiled, memory = self.compiled, self.compiled.memory
    arrays = [
      f"    {format_bytes(row['bytes']):>9} {row['shape']} x{row['count']}  "
      f"{row['scope'] or row['name']}"
      for row in compiled.largest
    ]
    if memory is None:
      title = "  the largest arrays of a chip, at a batch of"
      arrays = arrays and [f"{title} {compiled.largest_batch:,}:", *arrays]
      return ["memory: DOES NOT FIT", *_indent(compiled.refusal), *arrays]
    limit = f" of {format_bytes(memory.limit)}" if memory.limit else ""
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    if memory.limit is None:
      verdict = f"the limit of {self.plan.topology.chip.kind} is unknown"
    lines = [
      f"memory per chip: peak {format_bytes(memory.peak)}{limit}: {verdict}",
      f"  arguments {format_bytes(memory.arguments)}, temporaries "
      f"{format_bytes(memory.temporaries)}, output "
      f"{format_bytes(memory.output)}",
    ]
    if memory.host:
      lines.append(f"  in the host's memory {format_bytes(memory.host)}")
    if not memory.fits:
      lines += ["  the largest arrays:", *arrays]
    return lines

  def _format_norms(self) -> list[str]:
    title, norms = "memory of the objectives' gradient norms", self.norms
    if norms is None:
      if not self.plan.measures_norms:
        return []
      return [
        f"{title} (config.log.gradients_..., interference, balance), a "
        "separate program: not compiled (--norms)"
      ]
    verdict, memory = "fits" if norms.fits else "DOES NOT FIT", norms.memory
    lines = [f"{title}: {verdict}", *_indent(norms.refusal)]
    if memory is not None:
      peak = f"peak {format_bytes(memory.peak)}, {verdict}"
      lines = [f"{title}: {peak}; compiled in {norms.seconds:.0f} s"]
    if not norms.fits:
      lines.append(
        "  Set --config.log.gradients_steps=None, --config.interference=None "
        "and a config.balance that measures none, to train without these norms "
        "and this memory."
      )
    return lines

  def _format_flops(self) -> list[str]:
    total, per_chip = self.model_flops, self.model_flops / self.plan.mesh.size
    lines = [f"model FLOPs per step: {total:.4g}, per chip: {per_chip:.4g}"]
    if (useful := self.useful_flops_share) is not None:
      lines.append(
        f"  the program computes {self.compiled.flops:.4g} per chip: "
        f"{useful:.1%} of it is useful, the rest is recomputation"
      )
    if bound := self.roofline:
      lines.append(
        f"  roofline of a step: compute {bound.compute:.3f} s, memory "
        f"{bound.memory:.3f} s, links {bound.links:.3f} s, host "
        f"{bound.host:.3f} s"
      )
    if self.compiled.cycles:
      lines.append(
        f"  the compiler estimates {self.compiled.cycles:.3e} cycles, without "
        "collectives and kernels"
      )
    return lines

  def _format_collectives(self) -> list[str]:
    kinds = hlo.sum_by_kind(self.compiled.collectives)
    if not kinds:
      return [] if self.compiled.memory is None else ["collectives: none"]
    lines = ["collectives, bytes that a chip receives in a step:"]
    for kind, (count, size) in kinds.items():
      lines.append(f"  {kind:20} {count:8,.0f} {format_bytes(size):>10}")
    if large := self.find_large_gathers():
      lines.append("  all-gathers larger than any parameter:")
    for gather in large:
      source = f"{gather.shape} from {gather.scope or 'an unknown scope'}"
      lines.append(f"    {format_bytes(gather.result)} of {source}")
    return lines


def preflight(
  config: Config | RunConfig,
  topology: topologies.Topology,
  *,
  examples_per_epoch: int | None = None,
  norms: bool | None = None,
  budget: int | None = None,
  data: bool = False,
  **options: Any,
) -> Report:
  """Compiles a config's train step for a topology; opens no weights.

  With `data`, opens the config's data, and reports the load of reading it.
  `norms` also compiles the objectives' gradient norms if the config measures
  them, None only if its balance does. `remat='auto'` compiles choices for a
  `budget` in bytes. `options` are other fields of the report.
  """
  config = resolve(config)
  if data and not (
    options.get("step_seconds") or topology.chip.peak_bf16_flops
  ):
    raise ConfigError(
      f"the peak of {topology.chip.kind} is unknown: add --step_seconds"
    )
  if config.model.remat.strip() == AUTO:
    choice = search_lib.find_remat(
      config, topology, budget=budget, examples_per_epoch=examples_per_epoch
    )
    plan, options["trials"] = choice.plan, choice.trials
    compiled, compiled_norms = choice.compiled, choice.norms
  else:
    compiled = compiled_norms = None
    plan = compile_lib.make_plan(
      config, topology, examples_per_epoch=examples_per_epoch
    )
  config, batch_size = plan.config, plan.config.batch_size
  jobs = {
    "counting FLOPs": lambda: (
      flops_lib.run(config, batch_size=batch_size).total
    ),
    "compiling the step": lambda: compiled or compile_lib.compile_step(plan),
  }
  if norms is None:
    norms = bool(plan.spec.balance.every_steps)
  if compiled_norms or (norms and plan.measures_norms):
    jobs["compiling the gradient norms"] = lambda: (
      compiled_norms or compile_lib.compile_norms(plan)
    )
  results = []
  for description, job in jobs.items():
    with progress.activity(description):
      results.append(job())
  per_example, compiled, *extras = results
  report = Report(plan, compiled, per_example * batch_size, *extras, **options)
  if not data:
    return report
  return dataclasses.replace(
    report,
    data_plane=data_plane_lib.compute(
      config.data,
      batch_size=batch_size,
      hosts=topology.hosts,
      examples_per_second=report.examples_per_second,
    ),
  )


def _format_shape(shape: Sequence[int]) -> str:
  return "x".join(map(str, shape)) or "-"


def _indent(text: str) -> list[str]:
  return [f"  {line}" for line in text.splitlines() if line.strip()]


# The table in docs/pods.md; its first two columns define what to compile.
BEGIN, END = "<!-- fits: begin -->", "<!-- fits: end -->"


def read_table(page: str) -> list[tuple[str, ...]]:
  """Config, topology and changes of each row of a page's table."""
  rows = []
  for line in _find_table(page)[1].splitlines()[2:]:
    recipe, topology = _split_cells(line)[1:3]
    config, *changes = recipe.replace(r"\|", "|").split()
    rows.append((config, topology.strip(), *changes))
  return rows


def format_table_row(config: str, report: Report, *changes: str) -> str:
  """Formats a report as a row of the table."""
  memory, topology = report.compiled.memory, report.plan.topology
  received = sum(row.bytes for row in report.compiled.collectives) / 1e9
  useful = report.useful_flops_share
  cells = [
    " ".join([config, *changes]),
    topology.name,
    f"{report.plan.config.batch_size:,}",
    f"{memory.peak / 2**30:.1f} GiB" if memory else "does not fit",
    f"{memory.limit / 2**30:.2f} GiB" if memory and memory.limit else "",
    f"{report.model_flops / 1e15:.2f}",
    f"{useful:.0%}" if useful else "-",
    f"{received:.2f} GB",
    importlib.metadata.version("libtpu") if topology.is_tpu else "",
  ]
  escaped = [cell.replace("|", r"\|") for cell in cells]
  return f"| {' | '.join(escaped)} |"


def update_table(page: str, row: str) -> str:
  """Replaces a row of a page's table, or appends it."""
  match = _find_table(page)
  rows = match[1].splitlines()
  keys = [_split_cells(line)[:3] for line in (*rows, row)]
  index = keys.index(keys[-1])
  rows[index : index + 1] = [row]
  table = "".join(f"{row}\n" for row in rows)
  return page[: match.start(1)] + table + page[match.end(1) :]


def _find_table(page: str) -> re.Match[str]:
  match = re.search(f"{BEGIN}\n((?:\\|.*\n)+)(?s:.*){END}", page)
  if match is None:
    raise ConfigError(f"the page needs a table between {BEGIN} and {END}")
  return match


def _split_cells(row: str) -> list[str]:
  return re.split(r"(?<!\\)\|", row)
