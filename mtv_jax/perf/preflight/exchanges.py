"""What the chips of a plan have to send each other, by analysis.

Two exchanges of a step are meant: the gradients are reduced, and the losses
that compare all rows with all others hand embeddings around. What these cost is
reckoned here from the recipe and the mesh, not from the compiled program, so
that what the program sends beside them can't hide among them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from mtv_jax.objectives import base, contrastive, distillation, grounding
from mtv_jax.objectives.self_distillation import SelfDistillation
from mtv_jax.parallel import ring
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.perf import hlo, hlo_text
from mtv_jax.perf.preflight.program import Plan
from mtv_jax.utils.tree import flatten_with_names

_FLOAT32 = 4
# Bytes beside its embedding: a contrastive row has an index and a flag, a
# region the id of its phrase as well, and a row of KoLeo's a flag alone.
_CONTRASTIVE_MARKS, _GROUNDING_MARKS, _KOLEO_MARKS = 4 + 1, 4 + 4 + 1, 1
_REDUCTIONS = ("all-reduce", "reduce-scatter")


def embeddings(plan: Plan) -> int:
  """Bytes that a chip receives for losses that compare all rows of a batch.

  Of n chips with b rows of D channels each, in float32: around a ring, as
  sigmoid losses and KoLeo do, the embeddings with their marks go n - 1 times,
  the gradients of them n times. Gathered, the embeddings of the n - 1 others
  come once, and the gradients of one's own from n - 1 others.
  """
  return sum(
    _of_objective(objective, plan)
    for objective in plan.recipe.objectives.values()
  )


def _of_objective(objective: base.Objective, plan: Plan) -> int:
  count = num_batch_shards(plan.mesh)
  rows = plan.config.batch_size // count
  width = plan.recipe.model.embed_dim
  if isinstance(objective, contrastive.Contrastive):
    sigmoid = objective.loss_type == "sigmoid"
    if sigmoid and ring.should_use_ring(objective.method, plan.mesh):
      return _ring(count, rows, width, _CONTRASTIVE_MARKS)
    return _gathered(count, rows, width)
  if isinstance(objective, grounding.Grounding):
    rows *= min(objective.regions, plan.fields["boxes"].shape[0])
    if ring.should_use_ring(objective.method, plan.mesh):
      return _ring(count, rows, width, _GROUNDING_MARKS)
    return _gathered(count, rows, width)
  if isinstance(objective, distillation.Distillation):
    if not objective.koleo_weight:
      return 0
    crops = plan.recipe.views[objective.view_global].count
    width = plan.recipe.model.image.embed_dim
    return crops * _ring(count, rows, width, _KOLEO_MARKS)
  return 0


def _ring(count: int, rows: int, width: int, marks: int) -> int:
  if count == 1:
    return 0
  chunk = _FLOAT32 * rows * width
  return (count - 1) * (chunk + marks * rows) + count * chunk


def _gathered(count: int, rows: int, width: int) -> int:
  return 2 * (count - 1) * _FLOAT32 * rows * width


def gradient_sizes(plan: Plan) -> collections.Counter[int]:
  """Reductions of gradients that a step has to make: {elements: how many}.

  The gradient of a parameter is reduced once for each encoding that uses it,
  that of stacked blocks block by block, that of prototypes chunk by chunk, and
  all once for each part of an accumulated batch. On a mesh with `fsdp` a chip
  may hand in the whole or only its part, and both are allowed for.
  """
  recipe, found = plan.recipe, collections.Counter()
  encodings = collections.Counter(
    e.tower for e in recipe.plan if e.weights == base.STUDENT
  )
  for name, leaf in flatten_with_names(plan.program.abstract.params):
    if name in recipe.frozen:
      continue
    where, kind = name.split("/")[:2]
    if where == "heads":
      parts, times = _of_head(recipe.objectives, kind, name, leaf)
    else:
      parts = leaf.shape[0] if kind == "blocks" else 1
      times = encodings[where]
    own = math.prod(leaf.sharding.shard_shape(leaf.shape))
    for size in {own, _without_fsdp(leaf)}:
      found[size // parts] += parts * times * plan.config.accumulate
  return found


def _of_head(objectives, head, name, leaf) -> tuple[int, int]:
  """In how many parts a head's parameter is reduced, and how often."""
  users = [o for o in objectives.values() if head in o.heads()]
  if "/last_layer/" not in name:
    return 1, len(users)
  if not name.endswith("kernel"):
    # Of the scale the gradient follows from that of the whole matrix.
    return 1, 0
  chunks = [
    o.chunk for o in users if isinstance(o, SelfDistillation) and o.chunk
  ]
  columns = leaf.shape[-1]
  return columns // min([*chunks, columns]), len(users)


def _without_fsdp(leaf) -> int:
  """Elements of a parameter on a chip once it is gathered over `fsdp`."""
  mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  names = [
    name
    for axes in spec
    for name in ((axes,) if isinstance(axes, str) else axes or ())
  ]
  split = math.prod(mesh.shape[name] for name in names if name != "fsdp")
  return math.prod(leaf.shape) // split


def gradients(
  rows: Sequence[hlo.Collective], sizes: collections.Counter[int]
) -> list[hlo.Collective]:
  """The part of a program's exchanges that reduces gradients.

  The compiler chooses the precision (block gradients go in bfloat16), joins
  reductions of many arrays in one, which then bears the name of one of them,
  and reshapes the arrays. So each operand counts by its number of elements,
  and no more operands than the recipe has gradients of that size: an
  activation that is as large as a parameter is found where it comes on top of
  them. What bears the name of a backward pass is taken first.

  Args:
    rows: from `hlo.collectives`.
    sizes: from `gradient_sizes`.

  Returns:
    The reductions, with only those bytes that belong to gradients.
  """
  left, found = collections.Counter(sizes), []
  reductions = [row for row in rows if row.kind in _REDUCTIONS]
  for row in sorted(reductions, key=lambda r: "transpose(" not in r.scope):
    mine, whole = 0.0, 0
    for operand in hlo_text.shapes(row.shape):
      whole += operand.bytes
      size = math.prod(operand.dims)
      taken = min(left[size], row.count)
      left[size] -= taken
      mine += operand.bytes * taken / row.count
    if mine:
      share = row.bytes * mine / whole
      found.append(dataclasses.replace(row, bytes=share))
  return found
