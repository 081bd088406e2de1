"""Gradients of the losses, with exact gradient accumulation.

`accumulate_gradients` encodes the parts of a batch one by one to loss inputs,
which are small, differentiates the losses on all inputs at once, and encodes
each part again to pull the cotangents back (Gao et al. 2021, GradCache). For
one more forward pass the gradients are exactly those of the whole batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.augment.random import step_key
from mtv_jax.config import aliases
from mtv_jax.models.standardization import batch_moments
from mtv_jax.train.losses import (
  Batch,
  Loss,
  compute_loss_inputs,
  compute_losses,
  compute_statistics_features,
  float_leaves,
  linearize_encoder,
  replace_float_leaves,
  total_loss,
  view_keys,
)
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import StepSpec


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
      spec.select_objectives((name,)), state, batch, mesh
    )
    total, terms = total + loss, {**terms, **term}
    folded = f"balance/{aliases.name_in_key(name)}"
    keys[name] = step_key(seed, folded, state.step)
  combined = spec.balance.combine_gradients(grads, spec.shared_modules, keys)
  return (total, terms), combined


def _split_rows(x: Array, count: int) -> Array:
  """[B, ...] -> [count, B / count, ...].

  Part i has rows i, i + count, ...: each device has its share of every part,
  and no rows move.
  """
  return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def _join_rows(x: Array) -> Array:
  """The inverse of `_split_rows`."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _split_batch(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None
) -> PyTree:
  """The batch and the keys of its views, in `spec.accumulate` parts."""
  keys = view_keys(spec, state.step, len(batch["image"]), mesh)
  split = functools.partial(_split_rows, count=spec.accumulate)
  return jax.tree.map(split, (dict(batch), keys))  # [count, B / count, ...]


def _join_loss_inputs(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  parts: PyTree,
  mesh: Mesh | None,
) -> dict[str, Any]:
  """The loss inputs of all parts of a batch, one part after the other."""
  inputs = jax.lax.map(
    lambda part: compute_loss_inputs(spec, params, state, *part, mesh), parts
  )
  return jax.tree.map(_join_rows, inputs)  # [B, ...]


def accumulate_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`compute_gradients` in `spec.accumulate` parts, one after the other."""
  params = state.params
  # 1. The loss inputs of all parts.
  parts = _split_batch(spec, state, batch, mesh)
  inputs = _join_loss_inputs(spec, params, state, parts, mesh)

  # 2. The losses of the whole batch, and their gradients for the inputs.
  def loss(heads, floats):
    loss_inputs = replace_float_leaves(inputs, floats)
    return compute_losses(spec, heads, state, loss_inputs, mesh)

  result, (head_grads, cotangents) = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(params["heads"], float_leaves(inputs))

  # 3. Each part again, to pull these gradients back to the parameters.
  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents
    _, vjp = jax.vjp(
      lambda p: float_leaves(compute_loss_inputs(spec, p, state, *part, mesh)),
      params,
    )
    return jax.tree.map(jnp.add, grads, vjp(cotangents)[0]), None

  grads, _ = jax.lax.scan(
    add_part,
    jax.tree.map(jnp.zeros_like, params),
    (parts, [_split_rows(c, spec.accumulate) for c in cotangents]),
  )
  heads = jax.tree.map(jnp.add, grads["heads"], head_grads)
  return result, {**grads, "heads": heads}


def compute_feature_moments(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, dict[str, tuple[Array, Array, Array]]]:
  """Moments of the features whose statistics the objectives fit.

  Count `[parts]`, mean `[parts, d]` and covariance `[parts, d, d]` of each of
  the `spec.accumulate` parts of a batch, by objective and feature.
  """

  def moments(part):
    features = compute_statistics_features(spec, state, *part, mesh)
    return {
      name: {key: batch_moments(*pair) for key, pair in of_objective.items()}
      for name, of_objective in features.items()
    }

  return jax.lax.map(moments, _split_batch(spec, state, batch, mesh))


# ---------------------------------------------------------------------------
# Each objective by itself, on the image encoder.


def compute_objective_losses(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
  """Each objective's loss, without its weight; a forward pass in parts."""
  parts = _split_batch(spec, state, batch, mesh)
  inputs = _join_loss_inputs(spec, params, state, parts, mesh)
  _, terms = compute_losses(spec, params["heads"], state, inputs, mesh)
  return {name: term.loss.value() for name, term in terms.items()}


def compute_encoder_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[dict[str, Float[Array, ""]], dict[str, PyTree]]:
  """Each objective's loss and its gradient on the image encoder, unweighted.

  Encodings are computed once for all objectives, and each objective's gradient
  is pulled back through those that it reads. Takes the memory of a step and a
  copy of the encoder for each objective.
  """
  parts = _split_batch(spec, state, batch, mesh)
  if spec.accumulate == 1:
    part = jax.tree.map(_join_rows, parts)
    inputs, pullbacks = linearize_encoder(spec, state, *part, mesh)
  else:
    inputs = _join_loss_inputs(spec, state.params, state, parts, mesh)
  losses, cotangents = {}, {}
  for name in spec.objectives:

    def loss(floats, name=name):
      loss_inputs = {name: replace_float_leaves(inputs[name], floats)}
      heads, alone = state.params["heads"], spec.select_objectives((name,))
      _, terms = compute_losses(alone, heads, state, loss_inputs, mesh)
      return terms[name].loss.value()

    losses[name], cotangents[name] = jax.value_and_grad(loss)(
      float_leaves(inputs[name])
    )
  if spec.accumulate == 1:
    return losses, {n: pullbacks[n](c) for n, c in cotangents.items()}

  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents
    _, pullbacks = linearize_encoder(spec, state, *part, mesh)
    new = {name: pullbacks[name](c) for name, c in cotangents.items()}
    return jax.tree.map(jnp.add, grads, new), None

  zeros = jax.tree.map(jnp.zeros_like, state.params["image"])
  split = functools.partial(_split_rows, count=spec.accumulate)
  grads, _ = jax.lax.scan(
    add_part,
    dict.fromkeys(spec.objectives, zeros),
    (parts, jax.tree.map(split, cotangents)),
  )
  return losses, grads


def compute_encoder_grad_norms(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, Array]:
  """The gradient norm of each weighted objective on the image encoder."""
  _, grads = compute_encoder_gradients(spec, state, batch, mesh)
  weights = spec.loss_weights(state)
  return {n: weights[n] * optax.tree.norm(g) for n, g in grads.items()}
