"""How memory and exchanges grow with the number of chips, by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtv_jax.config import overrides, schema
from mtv_jax.objectives import base, build_objective, contrastive
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.preflight import exchanges, program
from mtv_jax.perf.preflight import measure as measure_lib
from mtv_jax.utils.errors import ConfigError

# 16, 64 and 256 chips.
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5e:16x16")


@dataclasses.dataclass(frozen=True)
class LossRow:
  """A contrastive loss and its gradients, compiled alone.

  Attributes:
    method: how the embeddings meet: 'ring' or 'gathered'.
    chips: of the machine.
    temporaries: bytes a chip.
    received: bytes that a chip receives.
  """

  method: str
  chips: int
  temporaries: int
  received: float


def losses(
  *,
  rows: int = 256,
  width: int = 768,
  methods: Sequence[str] = ("ring", "gathered"),
  names: Sequence[str] = TOPOLOGIES,
) -> list[LossRow]:
  """Compiles the sigmoid loss alone at a constant batch a chip.

  Args:
    rows: a chip; with few, a chip's logits need no main memory at all.
    width: of the embeddings.
    methods: of `contrastive`.
    names: topologies, from small to large.
  """
  found = []
  for method in methods:
    objective = build_objective("contrastive", dict(method=method))
    for name in names:
      devices = topologies.devices(name)
      mesh = make_mesh({"data": -1}, devices)
      compiled = _loss(objective, mesh, rows * len(devices), width)
      memory = measure_lib.memory_of(compiled, None)
      exchanged = hlo.collectives(compiled)
      found.append(
        LossRow(
          method=method,
          chips=len(devices),
          temporaries=memory.temporaries,
          received=sum(row.bytes for row in exchanged),
        )
      )
  return found


def _loss(objective: base.Objective, mesh: Mesh, batch: int, width: int):
  place = NamedSharding(mesh, BATCH_SPEC)
  whole = NamedSharding(mesh, PartitionSpec())

  def of(image, text, valid, params):
    heads = base.BoundHeads(objective.heads(), {"contrastive": params})
    loss_inputs = contrastive.LossInputs(image=image, text=text, valid=valid)
    context = base.Context(jnp.zeros(()), 1, {}, mesh=mesh)
    return objective.loss(loss_inputs, heads, context).loss.value()

  def rows(shape, dtype):
    return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place)

  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  params = {"logit_scale": scalar, "logit_bias": scalar}
  graded = jax.value_and_grad(of, argnums=(0, 1, 3))
  vectors = rows((width,), jnp.float32)
  lowered = jax.jit(graded).lower(vectors, vectors, rows((), bool), params)
  return lowered.compile()


@dataclasses.dataclass(frozen=True)
class StepRow:
  """A whole step at a constant batch a chip.

  Attributes:
    chips: of the machine.
    peak: bytes a chip.
    received: bytes that a chip receives in a step.
    gradients: of those, what reduces the gradients; see `exchanges`.
    embeddings: what losses over all rows need to send, by analysis.
    steady: what is left, as if all reductions were over rings without end. Of
      n chips a reduction brings each (n - 1) / n of what that would: from 16
      to 256 chips it grows by 6.25 % though nothing more is reduced.
    seconds: of compiling.
  """

  chips: int
  peak: int
  received: float
  gradients: float
  embeddings: int
  steady: float
  seconds: float

  @property
  def rest(self) -> float:
    """Bytes received that are neither gradients nor embeddings."""
    return self.received - self.gradients - self.embeddings


def step(config: schema.Config, name: str, *, rows: int = 64) -> StepRow:
  """Compiles a config's step at a constant batch a chip.

  Args:
    config: as `train.run` takes it.
    name: of a topology.
    rows: a chip.

  Raises:
    ConfigError: where it does not fit.
  """
  parsed = topologies.parse(name)
  batch = rows * parsed.chips
  changed = overrides.override(
    schema.check_config(config), [f"batch_size={batch}"]
  )
  plan = program.make_plan(changed, parsed)
  measured = measure_lib.measure(plan)
  if measured.memory is None:
    raise ConfigError(f"on {name}: {measured.refusal}")
  return step_row(
    plan,
    measured.collectives,
    peak=measured.memory.peak,
    seconds=measured.seconds,
  )


def step_row(
  plan: program.Plan,
  collectives: Sequence[hlo.Collective],
  *,
  peak: int,
  seconds: float,
) -> StepRow:
  """The row of a plan that was compiled.

  Args:
    plan: what was compiled.
    collectives: of its program.
    peak: bytes a chip.
    seconds: of compiling.
  """
  reduced = exchanges.gradients(collectives, exchanges.gradient_sizes(plan))
  embeddings = exchanges.embeddings(plan)
  endless = sum(_endless(r) for r in collectives) - sum(map(_endless, reduced))
  return StepRow(
    chips=plan.mesh.size,
    peak=peak,
    received=sum((row.bytes for row in collectives), 0.0),
    gradients=sum((row.bytes for row in reduced), 0.0),
    embeddings=embeddings,
    steady=endless - embeddings,
    seconds=seconds,
  )


def _endless(row: hlo.Collective) -> float:
  """Bytes received, were a reduction's ring without end.

  A reduce-scatter is left as it is: its operand grows with the ring.
  """
  if row.kind != "all-reduce" or row.group < 2:
    return row.bytes
  return row.bytes * row.group / (row.group - 1)


def growth(rows: Sequence[StepRow]) -> dict[str, list[float]]:
  """By how much peak and rest grow from the first row on, in percent."""
  first = rows[0]
  return {
    key: [
      100 * (getattr(row, key) / getattr(first, key) - 1)
      if getattr(first, key)
      else 0.0
      for row in rows[1:]
    ]
    for key in ("peak", "rest", "steady")
  }


def to_dict(rows: Sequence[LossRow | StepRow]) -> dict[str, Any]:
  """The rows as plain values, and of a step how it grows."""
  steps = [row for row in rows if isinstance(row, StepRow)]
  made = {"rows": [_fields(row) for row in rows]}
  return made | ({"growth_percent": growth(steps)} if steps else {})


def _fields(row: LossRow | StepRow) -> dict[str, Any]:
  fields = dataclasses.asdict(row)
  if isinstance(row, StepRow):
    fields |= {"rest": row.rest, "seconds": fields.pop("seconds")}
  return fields


def table(rows: Sequence[LossRow | StepRow]) -> str:
  """Rows as text, one a line, and of a step how it grows."""
  lines = [
    "  ".join(_cell(key, value) for key, value in _fields(row).items())
    for row in rows
  ]
  steps = [row for row in rows if isinstance(row, StepRow)]
  if len(steps) > 1:
    chips = " and ".join(str(row.chips) for row in steps[1:])
    lines.append(f"growth from {steps[0].chips} chips to {chips}:")
    for key, grown in growth(steps).items():
      lines.append(f"  {key:7} " + "  ".join(f"{x:+.1f} %" for x in grown))
  return "\n".join(lines)


def _cell(key: str, value: str | int | float) -> str:
  if key == "seconds":
    return f"compiled in {value:.0f} s"
  if key == "method":
    return f"{key} {value:8}"
  if key == "chips":
    return f"{key} {value:<3}"
  return f"{key} {value / 2**20:7,.1f} MiB"
