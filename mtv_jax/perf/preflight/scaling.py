"""Growth of memory and collectives with the number of chips.

Traffic for gradients is computed analytically. The rest of the compiled
program's traffic should grow only with the losses over the global batch.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mtv_jax.config.sections import Config
from mtv_jax.objectives import (
  base,
  build_objective,
  captioning,
  contrastive,
)
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  make_mesh,
  replicated_sharding,
)
from mtv_jax.parallel.rules import axis_names
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight.compile import CompilePlan, CompileResult
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

# 16, 64 and 256 chips.
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5e:16x16")
_FUSED = {"qkv": 3, "kv": 2}  # Layers of a `models.layers.FusedDense`.


def count_gradient_sizes(plan: CompilePlan) -> collections.Counter[int]:
  """Counts the gradient reductions of a step: `{elements: reductions}`.

  A parameter's gradient is reduced once per encoding and microbatch, split by
  block, prototype chunk and layer of a fused kernel. With `fsdp`, a chip may
  contribute the whole gradient or its shard; both sizes count.
  """
  spec, sizes = plan.spec, collections.Counter()
  encodings = collections.Counter(
    e.tower for e in spec.plan if e.weights == base.STUDENT
  )
  for name, leaf in flatten_with_names(plan.train_step.abstract.params):
    if name in spec.frozen:
      continue
    tower, kind = name.split("/")[:2]
    if tower == "heads":
      chunk, total, times = _head_reductions(spec.objectives, kind, name, leaf)
    else:
      chunk, total = 1, leaf.shape[0] if kind == "blocks" else 1
      times = encodings[tower]
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    axes = axis_names(tuple(leaf.sharding.spec))
    # After the all-gather over `fsdp`.
    gathered_size = shard * (plan.mesh.shape["fsdp"] if "fsdp" in axes else 1)
    layers = _FUSED.get(name.split("/")[-2], 1)
    parts = -(-total // chunk) * layers
    for size in {shard, gathered_size}:
      size = size * chunk // total // layers
      sizes[size] += parts * times * plan.config.accumulate
  return sizes


def _head_reductions(objectives, head, name, leaf) -> tuple[int, int, int]:
  """Columns per reduction, total columns, and reductions of each column."""
  users = [o for o in objectives.values() if head in o.heads()]
  decoders = [o for o in users if isinstance(o, captioning.Captioning)]
  times = len(users) + sum(o.decoder_calls - 1 for o in decoders)
  if "/last_layer/" in name and not name.endswith("kernel"):
    # The scale's gradient follows from the kernel's.
    return 1, 1, 0
  if "/last_layer/" not in name and not (decoders and "/projection/" in name):
    return 1, 1, times
  columns = leaf.shape[-1]
  chunks = [getattr(user, "chunk", None) or columns for user in users]
  return min([*chunks, columns]), columns, times


def find_gradient_reductions(
  rows: Sequence[hlo.Collective], sizes: collections.Counter[int]
) -> list[hlo.Collective]:
  """Finds collectives that reduce gradients, counting only gradient bytes.

  The compiler chooses precision, fusion and shape, so operands match `sizes` by
  number of elements, backward passes first; surplus operands are activations.
  """
  unmatched, reductions = collections.Counter(sizes), []
  for row in sorted(rows, key=lambda r: "transpose(" not in r.scope):
    if row.kind not in ("all-reduce", "reduce-scatter"):
      continue
    matched = total = 0.0
    for operand in hlo.parse_shapes(row.shape):
      size = math.prod(operand.dims)
      times = min(unmatched[size], row.count)
      unmatched[size] -= times
      matched += operand.bytes * times / row.count
      total += operand.bytes
    if matched:
      gradient_bytes = row.bytes * matched / total
      reductions.append(dataclasses.replace(row, bytes=gradient_bytes))
  return reductions


def make_step_row(plan: CompilePlan, compiled: CompileResult) -> dict[str, Any]:
  """Returns a plan's bytes per chip and step: `received`, and parts of it.

  The `rest` are the losses over the global batch, whose traffic grows with the
  batch, and everything else but gradients.
  """
  collectives = compiled.collectives
  reductions = find_gradient_reductions(collectives, count_gradient_sizes(plan))
  received, gradients = (
    sum((row.bytes for row in rows), 0.0) for rows in (collectives, reductions)
  )
  return dict(
    chips=plan.mesh.size,
    peak=compiled.memory.peak,
    received=received,
    gradients=gradients,
    rest=received - gradients,
    seconds=compiled.seconds,
  )


def compile_row(
  config: Config, topology: str, *, rows: int = 64
) -> dict[str, Any]:
  """Compiles a config's step for a topology, with `rows` per chip."""
  parsed_topology = topologies.parse(topology)
  changes = [f"batch_size={rows * parsed_topology.chips}"]
  plan = compile_lib.make_plan(config, parsed_topology, changes)
  compiled = compile_lib.compile_step(plan)
  if compiled.memory is None:
    raise ConfigError(f"on {topology}: {compiled.refusal}")
  return make_step_row(plan, compiled)


def compile_loss(
  method: str, topology: str, *, rows: int = 256, width: int = 768
) -> dict[str, Any]:
  """Compiles only the sigmoid loss and its gradients, with `rows` per chip.

  With few rows, logits don't need HBM. Sizes are in bytes per chip.
  """
  objective = build_objective("contrastive", dict(method=method))
  devices = topologies.get_devices(topologies.parse(topology))
  mesh = make_mesh({"data": -1}, devices)

  def loss(image, text, valid, params):
    heads = base.BoundHeads(objective.heads(), {"contrastive": params})
    loss_inputs = contrastive.LossInputs(
      image=image[:, None], text=text, valid=valid
    )
    context = base.Context(jnp.zeros(()), 1, {}, mesh=mesh)
    return objective.loss(loss_inputs, heads, context).loss.value()

  split, replicated = NamedSharding(mesh, BATCH_SPEC), replicated_sharding(mesh)
  batch = rows * len(devices)
  embeddings = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=split)
  valid = jax.ShapeDtypeStruct((batch,), bool, sharding=split)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  params = {"logit_scale": scalar, "logit_bias": scalar}
  grad_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3)))
  lowered = grad_fn.lower(embeddings, embeddings, valid, params)
  compiled = lowered.compile()
  return dict(
    method=method,
    chips=len(devices),
    temporaries=compile_lib.Memory.of(compiled, None).temporaries,
    received=sum(row.bytes for row in hlo.list_collectives(compiled)),
  )


def compute_growth(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
  """Computes growth of peak and rest from the first row, in percent."""
  first, *others = rows
  return {
    k: [100 * (row[k] / first[k] - 1) if first[k] else 0.0 for row in others]
    for k in ("peak", "rest")
  }


def to_dict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The rows, with their growth if they are train steps."""
  steps = rows and "rest" in rows[0]
  growths = {"growth_percent": compute_growth(rows)} if steps else {}
  return {"rows": list(rows), **growths}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats one line per row, and growth if the rows are train steps."""
  lines = ["  ".join(_format(*item) for item in row.items()) for row in rows]
  if len(rows) > 1 and "rest" in rows[0]:
    chips = " and ".join(str(row["chips"]) for row in rows[1:])
    lines.append(f"growth from {rows[0]['chips']} chips to {chips}:")
    for key, percents in compute_growth(rows).items():
      lines.append(f"  {key:7} " + "  ".join(f"{x:+.1f} %" for x in percents))
  return "\n".join(lines)


def _format(key: str, value: str | int | float) -> str:
  templates = {"seconds": "compiled in {:.0f} s", "method": "method {:8}"}
  if template := (templates | {"chips": "chips {:<3}"}).get(key):
    return template.format(value)
  return f"{key} {value / 2**20:7,.1f} MiB"
