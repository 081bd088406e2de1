"""How memory and exchanges grow with the number of chips, by compiling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtv_jax import config as config_lib
from mtv_jax import hlo, overrides, sharding, topologies
from mtv_jax.objectives import base, build_objective, contrastive
from mtv_jax.preflight import measure as measure_lib
from mtv_jax.preflight import program

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
      mesh = sharding.make_mesh({"data": -1}, devices)
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
  place = NamedSharding(mesh, sharding.BATCH)
  whole = NamedSharding(mesh, PartitionSpec())

  def of(image, text, valid, params):
    heads = base.BoundHeads(objective.heads(), {"contrastive": params})
    evidence = contrastive.Evidence(image=image, text=text, valid=valid)
    context = base.Context(jnp.zeros(()), 1, {}, mesh=mesh)
    return objective.loss(evidence, heads, context).loss.value()

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
    gradients: of those, what reducing the gradients costs, by analysis:
      2 (n - 1) / n of the parameters' bytes.
    embeddings: of those, what goes around the rings of the losses.
    seconds: of compiling.
  """

  chips: int
  peak: int
  received: float
  gradients: float
  embeddings: float
  seconds: float

  @property
  def rest(self) -> float:
    """Bytes received that are neither."""
    return self.received - self.gradients - self.embeddings


def step(config: config_lib.Config, name: str, *, rows: int = 64) -> StepRow:
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
    config_lib.check(config), [f"batch_size={batch}"]
  )
  plan = program.make_plan(changed, parsed)
  measured = measure_lib.measure(plan)
  if measured.memory is None:
    raise config_lib.ConfigError(f"on {name}: {measured.refusal}")
  parameters = sum(
    4 * math.prod(row[1])
    for row in sharding.table(plan.program.abstract.params)
  )
  n = parsed.chips
  return StepRow(
    chips=n,
    peak=measured.memory.peak,
    received=sum(row.bytes for row in measured.collectives),
    gradients=2 * (n - 1) / n * parameters,
    embeddings=_permuted(measured.collectives),
    seconds=measured.seconds,
  )


def _permuted(rows: Sequence[hlo.Collective]) -> float:
  """What goes around the ring, by the program itself."""
  return sum(row.bytes for row in rows if row.kind == "collective-permute")


def table(rows: Sequence[LossRow | StepRow]) -> str:
  """Rows as text, one a line."""
  lines = []
  for row in rows:
    fields = dataclasses.asdict(row)
    if isinstance(row, StepRow):
      fields["rest"] = row.rest
    lines.append(
      "  ".join(
        f"{key} {value / 2**20:,.1f} MiB"
        if isinstance(value, float | int) and key not in ("chips", "seconds")
        else f"{key} {value}"
        for key, value in fields.items()
      )
    )
  return "\n".join(lines)
