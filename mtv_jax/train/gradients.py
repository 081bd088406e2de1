"""Gradients of the losses, with exact gradient accumulation.

`accumulate_gradients` encodes the parts of a batch one by one to loss inputs,
which are small, differentiates the losses on all inputs at once, and encodes
each part again to pull the cotangents back (GradCache, Gao et al. 2021). One
extra forward pass makes the gradients equal to full-batch gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from mtv_jax.augment.random import step_key
from mtv_jax.config import aliases
from mtv_jax.train.forward import (
  Batch,
  Loss,
  compute_loss_inputs,
  compute_losses,
  gather_params,
  total_loss,
  view_keys,
)
from mtv_jax.train.spec import StepSpec
from mtv_jax.train.state import TrainState


def compute_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`((loss, terms), gradients)` of a batch sharded over the mesh."""
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
  """`compute_gradients` if the balance combines per-objective gradients."""
  total, terms, grads, keys = 0.0, {}, {}, {}
  seed = jax.random.key(spec.seed)
  for name in spec.objectives:
    (loss, term), grads[name] = compute_gradients(
      spec.select_objectives((name,)), state, batch, mesh
    )
    total, terms = total + loss, {**terms, **term}
    folded = f"balance/{aliases.name_in_key(name)}"
    keys[name] = step_key(seed, folded, state.step)
  combined = spec.balance.combine_gradients(grads, spec.shared_modules, keys)
  return (total, terms), combined


def split_rows(x: Array, count: int) -> Array:
  """[B, ...] -> [count, B / count, ...].

  Part i has rows i, i + count, ..., so each device has its share of every part
  and rows don't move between devices.
  """
  return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def join_rows(x: Array) -> Array:
  """The inverse of `split_rows`."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def split_batch(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None
) -> PyTree:
  """Splits the batch and its view keys into `spec.accumulate` parts."""
  keys = view_keys(spec, state.step, len(batch["image"]), mesh)
  split = functools.partial(split_rows, count=spec.accumulate)
  return jax.tree.map(split, (dict(batch), keys))  # [count, B / count, ...]


def float_leaves(tree: PyTree) -> list[Array]:
  """The differentiable leaves."""
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def replace_float_leaves(tree: PyTree, floats: list[Array]) -> PyTree:
  """Replaces the tree's `float_leaves`."""
  new = iter(floats)
  return jax.tree.map(
    lambda x: next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
  )


def map_loss_inputs(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  parts: PyTree,
  mesh: Mesh | None,
) -> dict[str, Any]:
  """The loss inputs of all parts of a batch, computed one part at a time."""

  def loss_inputs(part):
    read, fixed = gather_params(spec, params, state, mesh)
    return compute_loss_inputs(spec, read, fixed, *part, mesh)

  return jax.tree.map(join_rows, jax.lax.map(loss_inputs, parts))  # [B, ...]


def accumulate_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`compute_gradients` in `spec.accumulate` parts, one at a time."""
  params = state.params
  # 1. The loss inputs of all parts.
  parts = split_batch(spec, state, batch, mesh)
  inputs = map_loss_inputs(spec, params, state, parts, mesh)

  # 2. The losses of the whole batch, and their gradients on the inputs.
  def loss(heads, floats):
    read, fixed = gather_params(spec, {"heads": heads}, state, mesh)
    loss_inputs = replace_float_leaves(inputs, floats)
    return compute_losses(spec, read["heads"], fixed, loss_inputs, mesh)

  result, (head_grads, cotangents) = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(params["heads"], float_leaves(inputs))

  # 3. Each part again, to pull these gradients back to the parameters.
  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents

    def loss_inputs(params):
      read, fixed = gather_params(spec, params, state, mesh)
      return float_leaves(compute_loss_inputs(spec, read, fixed, *part, mesh))

    _, vjp = jax.vjp(loss_inputs, params)
    return jax.tree.map(jnp.add, grads, vjp(cotangents)[0]), None

  grads, _ = jax.lax.scan(
    add_part,
    jax.tree.map(jnp.zeros_like, params),
    (parts, [split_rows(c, spec.accumulate) for c in cotangents]),
  )
  heads = jax.tree.map(jnp.add, grads["heads"], head_grads)
  return result, {**grads, "heads": heads}
