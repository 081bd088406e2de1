"""Growth of memory and collectives with the number of chips.

A step has to reduce gradients, and its losses over all rows have to exchange
embeddings. Both are computed here from the recipe and the mesh, analytically;
the rest of what the compiled program sends should not grow.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mtv_jax.config import overrides, schema
from mtv_jax.objectives import (
  base,
  build_objective,
  contrastive,
  distillation,
  grounding,
)
from mtv_jax.objectives.self_distillation import SelfDistillation
from mtv_jax.parallel import ring
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  make_mesh,
  num_batch_shards,
  replicated_sharding,
)
from mtv_jax.parallel.rules import axis_names
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight.compile import Plan
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

# 16, 64 and 256 chips.
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5e:16x16")

# ---------------------------------------------------------------------------
# Required traffic.

# Metadata bytes per embedding: a contrastive row has an index and a flag, a
# region the id of its phrase as well, a row of KoLeo a flag alone.
_CONTRASTIVE, _GROUNDING, _KOLEO = 4 + 1, 4 + 4 + 1, 1


def embedding_bytes(plan: Plan) -> int:
  """Bytes that a chip receives for losses that compare all rows of a batch.

  Of n chips with b float32 rows of D channels: in a ring, as sigmoid losses and
  KoLeo use it, embeddings with their metadata come n - 1 times and their
  gradients n times. All-gathered, the embeddings of n - 1 other chips come
  once, and the gradients of a chip's own from n - 1 others.
  """
  return sum(
    _objective_bytes(objective, plan)
    for objective in plan.step_spec.objectives.values()
  )


def _objective_bytes(objective: base.Objective, plan: Plan) -> int:
  chips, spec = num_batch_shards(plan.mesh), plan.step_spec.model
  rows, width = plan.config.batch_size // chips, spec.embed_dim

  def pairwise(rows, use_ring, metadata):
    chunk = 4 * rows * width
    if chips == 1 or not use_ring:
      return 2 * (chips - 1) * chunk
    return (chips - 1) * (chunk + metadata * rows) + chips * chunk

  if isinstance(objective, distillation.Distillation):
    if not objective.koleo_weight:
      return 0
    width = spec.image.embed_dim
    crops = plan.step_spec.views[objective.view_global].count
    return crops * pairwise(rows, True, _KOLEO)
  if isinstance(objective, contrastive.Contrastive):
    sigmoid = objective.loss_type == "sigmoid"
    use_ring = sigmoid and ring.should_use_ring(objective.method, plan.mesh)
    return pairwise(rows, use_ring, _CONTRASTIVE)
  if isinstance(objective, grounding.Grounding):
    regions = rows * min(objective.regions, plan.fields["boxes"].shape[0])
    use_ring = ring.should_use_ring(objective.method, plan.mesh)
    return pairwise(regions, use_ring, _GROUNDING)
  return 0


def gradient_sizes(plan: Plan) -> collections.Counter[int]:
  """Reductions of gradients that a step needs: `{elements: how many}`.

  The gradient of a parameter is reduced once for each encoding that uses it,
  block by block where blocks are stacked, chunk by chunk for prototypes, and
  once for each part of an accumulated batch. With `fsdp` a chip may contribute
  the whole gradient or its shard only; both sizes are allowed.
  """
  recipe, sizes = plan.step_spec, collections.Counter()
  encodings = collections.Counter(
    e.tower for e in recipe.plan if e.weights == base.STUDENT
  )
  for name, leaf in flatten_with_names(plan.abstract_params):
    if name in recipe.frozen:
      continue
    tower, kind = name.split("/")[:2]
    if tower == "heads":
      parts, times = _head_reductions(recipe.objectives, kind, name, leaf)
    else:
      parts = leaf.shape[0] if kind == "blocks" else 1
      times = encodings[tower]
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    for size in {shard, _size_without_fsdp(leaf)}:
      sizes[size // parts] += parts * times * plan.config.accumulate
  return sizes


def _head_reductions(objectives, head, name, leaf) -> tuple[int, int]:
  """In how many parts, and how often, a head's parameter is reduced."""
  users = [o for o in objectives.values() if head in o.heads()]
  if "/last_layer/" not in name:
    return 1, len(users)
  if not name.endswith("kernel"):
    # The scale's gradient follows from that of the kernel.
    return 1, 0
  chunks = [
    o.chunk for o in users if isinstance(o, SelfDistillation) and o.chunk
  ]
  columns = leaf.shape[-1]
  return columns // min([*chunks, columns]), len(users)


def _size_without_fsdp(leaf) -> int:
  """Elements of a parameter on a chip after the all-gather over `fsdp`."""
  names = axis_names(tuple(leaf.sharding.spec))
  shards = leaf.sharding.mesh.shape
  return math.prod(leaf.shape) // math.prod(
    shards[name] for name in names if name != "fsdp"
  )


def gradient_reductions(
  rows: Sequence[hlo.Collective], sizes: collections.Counter[int]
) -> list[hlo.Collective]:
  """The collectives that reduce gradients.

  The compiler chooses the precision (block gradients in bfloat16), fuses
  reductions of several arrays under the name of one of them, and reshapes them.
  So each operand counts by its number of elements, and no more operands of a
  size than the recipe has gradients of it: an activation of a parameter's size
  stays in the rest. Operands of backward passes are matched first.

  Args:
    rows: from `hlo.collectives`.
    sizes: from `gradient_sizes`.

  Returns:
    The reductions, each with only the bytes of its gradients.
  """
  left, reductions = collections.Counter(sizes), []
  for row in sorted(rows, key=lambda r: "transpose(" not in r.scope):
    if row.kind not in ("all-reduce", "reduce-scatter"):
      continue
    matched = total = 0.0
    for operand in hlo.parse_shapes(row.shape):
      size = math.prod(operand.dims)
      times = min(left[size], row.count)
      left[size] -= times
      matched += operand.bytes * times / row.count
      total += operand.bytes
    if matched:
      share = row.bytes * matched / total
      reductions.append(dataclasses.replace(row, bytes=share))
  return reductions


# ---------------------------------------------------------------------------
# Compiled programs at a constant batch per chip.


@dataclasses.dataclass(frozen=True)
class StepRow:
  """A compiled step.

  Attributes:
    chips: of the topology.
    peak: bytes per chip.
    received: bytes that a chip receives per step.
    gradients: of those, the bytes that reduce gradients.
    embeddings: bytes that losses over all rows need, analytically.
    steady: the rest, with each all-reduce as in an infinite ring. Of n chips it
      brings each (n - 1) / n of that, which grows by 6.25 % from 16 to 256
      chips although nothing more is reduced.
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

  def to_dict(self) -> dict[str, Any]:
    """All fields and `rest`."""
    fields = dataclasses.asdict(self)
    return fields | {"rest": self.rest, "seconds": fields.pop("seconds")}


def step_row(
  plan: Plan,
  collectives: Sequence[hlo.Collective],
  *,
  peak: int,
  seconds: float,
) -> StepRow:
  """The row of a compiled plan.

  Args:
    plan: that was compiled.
    collectives: of its program.
    peak: bytes per chip.
    seconds: of compiling.
  """
  reduced = gradient_reductions(collectives, gradient_sizes(plan))
  embeddings = embedding_bytes(plan)
  steady = sum(map(_infinite_ring_bytes, collectives))
  steady -= sum(map(_infinite_ring_bytes, reduced)) + embeddings
  return StepRow(
    chips=plan.mesh.size,
    peak=peak,
    received=sum((row.bytes for row in collectives), 0.0),
    gradients=sum((row.bytes for row in reduced), 0.0),
    embeddings=embeddings,
    steady=steady,
    seconds=seconds,
  )


def _infinite_ring_bytes(row: hlo.Collective) -> float:
  # The operand of a reduce-scatter grows with the ring.
  if row.kind != "all-reduce" or row.group < 2:
    return row.bytes
  return row.bytes * row.group / (row.group - 1)


def compile_row(
  config: schema.Config, topology: str, *, rows: int = 64
) -> StepRow:
  """Compiles a config's step at a constant batch per chip.

  Args:
    config: as `train` takes it.
    topology: see `topologies.parse`.
    rows: of the batch per chip.

  Raises:
    ConfigError: the step does not fit.
  """
  parsed = topologies.parse(topology)
  batch = f"batch_size={rows * parsed.chips}"
  changed = overrides.override(schema.check_config(config), [batch])
  plan = compile_lib.make_plan(changed, parsed)
  compiled = compile_lib.compile_step(plan)
  if compiled.memory is None:
    raise ConfigError(f"on {topology}: {compiled.refusal}")
  return step_row(
    plan,
    compiled.collectives,
    peak=compiled.memory.peak,
    seconds=compiled.seconds,
  )


@dataclasses.dataclass(frozen=True)
class LossRow:
  """The sigmoid contrastive loss with its gradients, compiled alone.

  Attributes:
    method: 'ring' or 'gathered'.
    chips: of the topology.
    temporaries: bytes per chip.
    received: bytes that a chip receives.
  """

  method: str
  chips: int
  temporaries: int
  received: float

  def to_dict(self) -> dict[str, Any]:
    """All fields."""
    return dataclasses.asdict(self)


def compile_loss(
  method: str, topology: str, *, rows: int = 256, width: int = 768
) -> LossRow:
  """Compiles the sigmoid loss alone at a constant batch per chip.

  Args:
    method: of `contrastive`, 'ring' or 'gathered'.
    topology: see `topologies.parse`.
    rows: per chip; the logits of few rows need no HBM at all.
    width: of the embeddings.
  """
  objective = build_objective("contrastive", dict(method=method))
  devices = topologies.devices(topologies.parse(topology))
  mesh = make_mesh({"data": -1}, devices)
  compiled = _lower_loss(objective, mesh, rows * len(devices), width).compile()
  return LossRow(
    method=method,
    chips=len(devices),
    temporaries=compile_lib.Memory.of(compiled, None).temporaries,
    received=sum(row.bytes for row in hlo.collectives(compiled)),
  )


def _lower_loss(objective: base.Objective, mesh: Mesh, batch: int, width: int):
  def loss(image, text, valid, params):
    heads = base.BoundHeads(objective.heads(), {"contrastive": params})
    loss_inputs = contrastive.LossInputs(image=image, text=text, valid=valid)
    context = base.Context(jnp.zeros(()), 1, {}, mesh=mesh)
    return objective.loss(loss_inputs, heads, context).loss.value()

  def rows(shape, dtype):
    split = NamedSharding(mesh, BATCH_SPEC)
    return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)

  scalar = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=replicated_sharding(mesh)
  )
  params = {"logit_scale": scalar, "logit_bias": scalar}
  gradients = jax.value_and_grad(loss, argnums=(0, 1, 3))
  embeddings = rows((width,), jnp.float32)
  return jax.jit(gradients).lower(
    embeddings, embeddings, rows((), bool), params
  )


# ---------------------------------------------------------------------------
# Output.


def growth(rows: Sequence[StepRow]) -> dict[str, list[float]]:
  """Growth of peak, rest and steady over the first row, in percent."""

  def percent(key, row):
    first = getattr(rows[0], key)
    return 100 * (getattr(row, key) / first - 1) if first else 0.0

  keys = ("peak", "rest", "steady")
  return {key: [percent(key, row) for row in rows[1:]] for key in keys}


def to_dict(rows: Sequence[LossRow | StepRow]) -> dict[str, Any]:
  """The rows as plain values, and the growth of steps."""
  values: dict[str, Any] = {"rows": [row.to_dict() for row in rows]}
  if steps := [row for row in rows if isinstance(row, StepRow)]:
    values["growth_percent"] = growth(steps)
  return values


def format_table(rows: Sequence[LossRow | StepRow]) -> str:
  """One line per row, and the growth of steps."""
  lines = [
    "  ".join(_cell(key, value) for key, value in row.to_dict().items())
    for row in rows
  ]
  steps = [row for row in rows if isinstance(row, StepRow)]
  if len(steps) > 1:
    chips = " and ".join(str(row.chips) for row in steps[1:])
    lines.append(f"growth from {steps[0].chips} chips to {chips}:")
    for key, percents in growth(steps).items():
      lines.append(f"  {key:7} " + "  ".join(f"{x:+.1f} %" for x in percents))
  return "\n".join(lines)


def _cell(key: str, value: str | int | float) -> str:
  if key == "seconds":
    return f"compiled in {value:.0f} s"
  if key == "method":
    return f"{key} {value:8}"
  if key == "chips":
    return f"{key} {value:<3}"
  return f"{key} {value / 2**20:7,.1f} MiB"
