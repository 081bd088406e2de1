"""Losses and gradients of a batch: whole, in parts, and of each objective.

A batch is encoded to loss inputs, which are small, and the losses see those of
all of it. `accumulated` cuts there: it encodes the parts of a batch one
after the other, differentiates the losses on all their inputs at once, and
encodes each part again to pull those cotangents through. One forward more, and
the gradients are those of the whole batch, for contrast, Sinkhorn and KoLeo
too (Gao et al. 2021, GradCache, for contrast).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.augment.random import row_keys
from mtv_jax.objectives import base
from mtv_jax.parallel import constraints, sharding
from mtv_jax.train import encodings
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import Recipe
from mtv_jax.utils import tree as trees

Batch = Mapping[str, Array]
# Of a vocabulary only the rows that are looked up are gathered, and blocks one
# by one by their loop.
LOOKED_UP = r"token_embedding$"
_LEFT = rf"^(image|text)/blocks/|{LOOKED_UP}"
Loss = tuple[Float[Array, ""], dict[str, base.Terms]]


def view_keys(
  recipe: Recipe, step: Array, size: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Keys `[size]` of the views that are read, one for each row."""
  seed = jax.random.key(recipe.seed)
  names = {e.view for e in recipe.plan if e.tower == "image"}
  keys = {n: row_keys(seed, n, step, size) for n in sorted(names)}
  if mesh is None:
    return keys
  # An example gets the same crops wherever on the mesh it lies.
  order = sharding.data_rows(size, mesh)
  if (order != np.arange(size)).any():
    keys = jax.tree.map(lambda k: k[order], keys)
  return keys


def held(recipe: Recipe, params: PyTree) -> PyTree:
  """The parameters, those that are frozen without a gradient.

  A tower that is frozen whole then has no backward pass at all.

  Args:
    params: all of them, under their names.
  """
  if not recipe.frozen:
    return params

  def hold(name, leaf):
    return jax.lax.stop_gradient(leaf) if name in recipe.frozen else leaf

  return trees.map_with_names(hold, params)


def bound_heads(
  recipe: Recipe, params: PyTree, state: TrainState
) -> base.BoundHeads:
  """The heads with these parameters, the teacher's held still."""
  teacher = jax.lax.stop_gradient(state.teacher.get("heads", {}))
  return base.BoundHeads(recipe.heads, params, teacher)


def compute_loss_inputs(
  recipe: Recipe,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """What each objective takes from some rows of a batch; see `base`.

  Args:
    recipe: whose objectives.
    params: all of them.
    state: with the teacher.
    batch: its rows, split over the mesh.
    keys: of the rows' views.
    mesh: that they are split over; None on one device.
  """
  params = constraints.in_use(held(recipe, params), mesh, keep=_LEFT)
  state = state.replace(
    teacher=constraints.in_use(state.teacher, mesh, keep=_LEFT)
  )
  views = {}
  for name, of_rows in keys.items():
    with jax.named_scope(f"view({name})"):
      views[name] = recipe.views[name](
        batch["image"], batch["image_size"], of_rows, recipe.dtype
      )
  views = constraints.by_rows(views, mesh)
  encoded = encodings.encode(
    recipe.plan, recipe.towers, params, state.teacher, views, batch, mesh
  )
  encoded = constraints.by_rows(encoded, mesh)
  heads = bound_heads(recipe, params["heads"], state)
  loss_inputs = {}
  for name, objective in recipe.objectives.items():
    with jax.named_scope(name):
      loss_inputs[name] = objective.loss_inputs(
        encoded, heads, {**batch, "views": views}
      )
  return constraints.by_rows(loss_inputs, mesh)


def losses_of(
  recipe: Recipe,
  params: PyTree,
  state: TrainState,
  loss_inputs: Mapping[str, Any],
  mesh: Mesh | None = None,
) -> Loss:
  """The weighted sum of the losses on all inputs, and each one's terms.

  Args:
    params: of the heads.
    mesh: that the loss inputs are split over; None on one device.
  """
  params = constraints.in_use(held(recipe, {"heads": params}), mesh, keep=_LEFT)
  state = state.replace(
    teacher=constraints.in_use(state.teacher, mesh, keep=_LEFT)
  )
  heads = bound_heads(recipe, params["heads"], state)
  total, terms = jnp.zeros(()), {}
  for name, objective in recipe.objectives.items():
    start = recipe.weights[name].start
    context = base.Context(
      state.step - start,
      recipe.total_steps - start,
      state.statistics[name],
      mesh,
    )
    with jax.named_scope(name):
      terms[name] = objective.loss(loss_inputs[name], heads, context)
    weight = recipe.weights[name](state.step)
    total = total + weight * terms[name].loss.value()
  return total, terms


def total_loss(
  recipe: Recipe,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None = None,
) -> Loss:
  """The loss of a whole batch, as a function of all parameters."""
  keys = view_keys(recipe, state.step, len(batch["image"]), mesh)
  loss_inputs = compute_loss_inputs(recipe, params, state, batch, keys, mesh)
  return losses_of(recipe, params["heads"], state, loss_inputs, mesh)


def compute(
  recipe: Recipe, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`((loss, terms), gradients)` of a batch, in as many parts as asked for.

  Args:
    recipe: what is computed.
    state: at whose parameters.
    batch: placed over the mesh.
    mesh: that the batch is split over; None on one device.
  """
  if recipe.accumulate > 1:
    return accumulated(recipe, state, batch, mesh)
  return jax.value_and_grad(
    lambda params: total_loss(recipe, params, state, batch, mesh), has_aux=True
  )(state.params)


def accumulated(
  recipe: Recipe, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`compute`, encoding `recipe.accumulate` parts one after the other."""
  count = recipe.accumulate

  def split(x):
    # Part i takes rows i, i + count, ...: whatever device holds a stretch of
    # the batch holds its share of every part, and nothing moves.
    return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  def encode(params, part):
    return compute_loss_inputs(recipe, params, state, *part, mesh)

  params = state.params
  keys = view_keys(recipe, state.step, len(batch["image"]), mesh)
  parts = jax.tree.map(split, (dict(batch), keys))
  mapped = jax.lax.map(lambda part: encode(params, part), parts)
  leaves, tree = jax.tree.flatten(jax.tree.map(join, mapped))
  real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def reals(loss_inputs):
    found = jax.tree.leaves(loss_inputs)
    return [leaf for leaf, r in zip(found, real, strict=True) if r]

  def loss(heads, differentiable):
    given = iter(differentiable)
    whole = [next(given) if r else x for x, r in zip(leaves, real, strict=True)]
    loss_inputs = jax.tree.unflatten(tree, whole)
    return losses_of(recipe, heads, state, loss_inputs, mesh)

  result, (of_heads, cotangents) = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(params["heads"], [x for x, r in zip(leaves, real, strict=True) if r])

  def pull(gradients, given):
    part, cotangent = given
    _, vjp = jax.vjp(lambda p: reals(encode(p, part)), params)
    return jax.tree.map(jnp.add, gradients, vjp(cotangent)[0]), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  gradients, _ = jax.lax.scan(
    pull, zeros, (parts, [split(c) for c in cotangents])
  )
  heads = jax.tree.map(jnp.add, gradients["heads"], of_heads)
  return result, {**gradients, "heads": heads}


def encoder_norms(
  recipe: Recipe, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, Array]:
  """The norm of each weighted objective's gradient on the image encoder.

  Each is pulled through its own encodings alone. Their ratio says which
  objective drives the encoder.
  """
  norms = {}
  for name in recipe.objectives:
    _, slopes = compute(recipe.only((name,)), state, batch, mesh)
    norms[name] = optax.tree.norm(slopes["image"])
  return norms
