"""Losses and gradients, with exact gradient accumulation.

`accumulate_gradients` encodes the parts of a batch one by one to loss inputs,
which are small, differentiates the losses on all inputs at once, and encodes
each part again to pull the cotangents back (Gao et al. 2021, GradCache). For
one more forward pass the gradients are exactly those of the whole batch.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.augment.random import row_keys, step_key
from mtv_jax.objectives import base
from mtv_jax.parallel.constraints import all_gather_params, constrain_batch
from mtv_jax.parallel.mesh import data_rows
from mtv_jax.train import encodings
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import StepSpec
from mtv_jax.utils.tree import map_with_names

Batch = Mapping[str, Array]
# Not gathered whole: vocabularies by row, blocks one by one in their loop.
EMBEDDING_TABLES = r"token_embedding$"
_NOT_GATHERED = rf"^(image|text)/blocks/|{EMBEDDING_TABLES}"
Loss = tuple[Float[Array, ""], dict[str, base.Terms]]


def view_keys(
  spec: StepSpec, step: Array, size: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Random keys `[size]` for each view that is read."""
  seed = jax.random.key(spec.seed)
  names = {e.view for e in spec.plan if e.tower == "image"}
  keys = {
    n: row_keys(seed, spec.views[n].crops_of or n, step, size)
    for n in sorted(names)
  }
  if mesh is None:
    return keys
  # An example gets the same crops wherever it is on the mesh.
  order = data_rows(size, mesh)
  if (order != np.arange(size)).any():
    keys = jax.tree.map(lambda k: k[order], keys)
  return keys


def rope_keys(spec: StepSpec, step: Array) -> dict[str, jax.Array]:
  """A random key for each view that is read, the same for all rows."""
  seed = jax.random.key(spec.seed)
  names = {e.view for e in spec.plan if e.tower == "image"}
  return {n: step_key(seed, f"rope/{n}", step) for n in sorted(names)}


def stop_gradient_frozen(spec: StepSpec, params: PyTree) -> PyTree:
  """Stops the gradient of frozen parameters, given under their full names.

  A tower that is frozen whole then has no backward pass.
  """
  if not spec.frozen:
    return params
  return map_with_names(
    lambda name, leaf: (
      jax.lax.stop_gradient(leaf) if name in spec.frozen else leaf
    ),
    params,
  )


def _gather(
  spec: StepSpec, params: PyTree, state: TrainState, mesh: Mesh | None
) -> tuple[PyTree, TrainState]:
  """Parameters and teachers as the layers read them."""
  gather = functools.partial(all_gather_params, mesh=mesh, keep=_NOT_GATHERED)
  params = gather(stop_gradient_frozen(spec, params))
  teachers = {name: gather(tree) for name, tree in state.teachers.items()}
  return params, state.replace(teacher=gather(state.teacher), teachers=teachers)


def bind_heads(
  spec: StepSpec, params: PyTree, state: TrainState
) -> base.BoundHeads:
  """Heads with the student's parameters, and with the teacher's fixed ones."""
  teacher = jax.lax.stop_gradient(state.teacher.get("heads", {}))
  return base.BoundHeads(spec.heads, params, teacher)


def compute_loss_inputs(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """The loss inputs of each objective for some rows of a batch.

  `params` are the student's, `keys` the random keys of the rows' views.
  """
  params, state = _gather(spec, params, state, mesh)
  views = {}
  for name, rngs in keys.items():
    with jax.named_scope(f"view({name})"):
      views[name] = spec.views[name](
        batch["image"], batch["image_size"], rngs, spec.dtype
      )
  views = constrain_batch(views, mesh)
  encoded = encodings.encode(
    spec.plan,
    spec.tower_of,
    params,
    state.fixed_params,
    views,
    batch,
    mesh,
    keys,
    rope_keys(spec, state.step),
  )
  encoded = constrain_batch(encoded, mesh)
  heads = bind_heads(spec, params["heads"], state)
  loss_inputs = {}
  for name, objective in spec.objectives.items():
    with jax.named_scope(name):
      loss_inputs[name] = objective.loss_inputs(
        encoded, heads, {**batch, "views": views, "keys": keys}
      )
  return constrain_batch(loss_inputs, mesh)


def compute_losses(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  loss_inputs: Mapping[str, Any],
  mesh: Mesh | None = None,
) -> Loss:
  """The total loss over all inputs, and each objective's terms.

  `params` are those of the heads.
  """
  params, state = _gather(spec, {"heads": params}, state, mesh)
  heads = bind_heads(spec, params["heads"], state)
  total = spec.balance.penalty(spec.config_weights(state.step), state.balance)
  weights, terms = spec.loss_weights(state), {}
  for name, objective in spec.objectives.items():
    start = spec.weights[name].start
    context = base.Context(
      state.step - start,
      spec.total_steps - start,
      state.statistics[name],
      mesh,
    )
    with jax.named_scope(name):
      terms[name] = objective.loss(loss_inputs[name], heads, context)
    total = total + weights[name] * terms[name].loss.value()
  return total, terms


def total_loss(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None = None,
) -> Loss:
  """The whole batch's loss, as a function of all parameters."""
  keys = view_keys(spec, state.step, len(batch["image"]), mesh)
  loss_inputs = compute_loss_inputs(spec, params, state, batch, keys, mesh)
  return compute_losses(spec, params["heads"], state, loss_inputs, mesh)


def compute_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`((loss, terms), gradients)` of a batch that is sharded over the mesh."""
  if spec.balance.combines and len(spec.objectives) > 1:
    return combine_gradients(spec, state, batch, mesh)
  if spec.accumulate > 1:
    return accumulate_gradients(spec, state, batch, mesh)
  return jax.value_and_grad(
    lambda params: total_loss(spec, params, state, batch, mesh), has_aux=True
  )(state.params)


def combine_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`compute_gradients`, combined from those of each objective by itself."""
  total, terms, grads, keys = 0.0, {}, {}, {}
  seed = jax.random.key(spec.seed)
  for name in spec.objectives:
    (loss, term), grads[name] = compute_gradients(
      spec.only((name,)), state, batch, mesh
    )
    total, terms = total + loss, {**terms, **term}
    keys[name] = step_key(seed, f"balance/{name}", state.step)
  combined = spec.balance.combine_gradients(grads, spec.shared_modules, keys)
  return (total, terms), combined


def accumulate_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`compute_gradients` in `spec.accumulate` parts, one after the other."""
  params, count = state.params, spec.accumulate

  def split(x):
    # [B, ...] -> [count, B / count, ...]. Part i takes rows i, i + count, ...:
    # each device has its share of every part, and no rows move.
    return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  def encode(params, part):
    return compute_loss_inputs(spec, params, state, *part, mesh)

  # 1. The loss inputs of all parts.
  keys = view_keys(spec, state.step, len(batch["image"]), mesh)
  parts = jax.tree.map(split, (dict(batch), keys))  # [count, B / count, ...]
  inputs = jax.lax.map(lambda part: encode(params, part), parts)
  leaves, treedef = jax.tree.flatten(jax.tree.map(join, inputs))  # [B, ...]
  is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def floats(leaves):
    return list(itertools.compress(leaves, is_float))

  # 2. The losses of the whole batch, and their gradients for the inputs.
  def loss(heads, float_leaves):
    new, merged = iter(float_leaves), zip(leaves, is_float, strict=True)
    loss_inputs = jax.tree.unflatten(
      treedef, [next(new) if f else leaf for leaf, f in merged]
    )
    return compute_losses(spec, heads, state, loss_inputs, mesh)

  result, (head_grads, cotangents) = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(params["heads"], floats(leaves))

  # 3. Each part again, to pull these gradients back to the parameters.
  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents
    _, vjp = jax.vjp(lambda p: floats(jax.tree.leaves(encode(p, part))), params)
    return jax.tree.map(jnp.add, grads, vjp(cotangents)[0]), None

  grads, _ = jax.lax.scan(
    add_part,
    jax.tree.map(jnp.zeros_like, params),
    (parts, [split(c) for c in cotangents]),
  )
  heads = jax.tree.map(jnp.add, grads["heads"], head_grads)
  return result, {**grads, "heads": heads}


def encoder_grad_norms(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, Array]:
  """The gradient norm of each weighted objective on the image encoder."""
  norms = {}
  for name in spec.objectives:
    _, grads = compute_gradients(spec.only((name,)), state, batch, mesh)
    norms[name] = optax.tree.norm(grads["image"])
  return norms
