"""Gradients of the losses, with exact gradient accumulation.

`accumulate_gradients` encodes the parts of a batch one by one to loss inputs,
which are small, differentiates the losses on all inputs at once, and encodes
each part again to pull the cotangents back (GradCache, Gao et al. 2021). One
extra forward pass makes the gradients equal to full-batch gradients.

`compute_encoder_gradients` separates the objectives' gradients on the image
encoder, for measurements and for balancing methods. Gradients are clipped by
the optimizer, see `optim/optimizer.py`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.augment.random import step_key
from mtv_jax.objectives import base
from mtv_jax.objectives.base import Batch
from mtv_jax.train.forward import (
  Loss,
  add_views,
  bind_heads,
  compute_loss_inputs,
  compute_losses,
  encode,
  gather_params,
  objective_inputs,
  total_loss,
  view_keys,
)
from mtv_jax.train.spec import StepSpec, TrainState


def compute_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[Loss, PyTree]:
  """`((loss, terms), gradients)` of a batch `[B, ...]` sharded over the mesh.

  `loss` is a scalar, `terms` are by objective, `gradients` have the shapes of
  `state.params`.
  """
  if spec.balance.combines_gradients and len(spec.objectives) > 1:
    return compute_combined_gradients(spec, state, batch, mesh)
  if spec.accumulate > 1:
    return accumulate_gradients(spec, state, batch, mesh)
  return jax.value_and_grad(
    lambda params: total_loss(spec, params, state, batch, mesh), has_aux=True
  )(state.params)


def compute_combined_gradients(
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
    keys[name] = step_key(seed, f"balance/{name}", state.step)
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
    full, fixed = gather_params(spec, params, state, mesh)
    return compute_loss_inputs(spec, full, fixed, *part, mesh)

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
    full, fixed = gather_params(spec, {"heads": heads}, state, mesh)
    loss_inputs = replace_float_leaves(inputs, floats)
    return compute_losses(spec, full["heads"], fixed, loss_inputs, mesh)

  result, (head_grads, cotangents) = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(params["heads"], float_leaves(inputs))

  # 3. Each part again, to pull these gradients back to the parameters.
  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents

    def loss_inputs(params):
      full, fixed = gather_params(spec, params, state, mesh)
      return float_leaves(compute_loss_inputs(spec, full, fixed, *part, mesh))

    _, vjp = jax.vjp(loss_inputs, params)
    return jax.tree.map(jnp.add, grads, vjp(cotangents)[0]), None

  grads, _ = jax.lax.scan(
    add_part,
    jax.tree.map(jnp.zeros_like, params),
    (parts, [split_rows(c, spec.accumulate) for c in cotangents]),
  )
  heads = jax.tree.map(jnp.add, grads["heads"], head_grads)
  return result, {**grads, "heads": heads}


def compute_encoder_grad_norms(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, Array]:
  """The gradient norm of each weighted objective on the image encoder."""
  _, grads = compute_encoder_gradients(spec, state, batch, mesh)
  weights = spec.loss_weights(state)
  return {n: weights[n] * optax.tree.norm(g) for n, g in grads.items()}


def compute_objective_losses(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
  """Each objective's unweighted loss; one forward pass, in parts."""
  parts = split_batch(spec, state, batch, mesh)
  inputs = map_loss_inputs(spec, params, state, parts, mesh)
  params, state = gather_params(spec, params, state, mesh)
  _, terms = compute_losses(spec, params["heads"], state, inputs, mesh)
  return {name: term.loss.value() for name, term in terms.items()}


def compute_encoder_gradients(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> tuple[dict[str, Float[Array, ""]], dict[str, PyTree]]:
  """Each objective's loss and its gradient on the image encoder, unweighted.

  Encodings are computed once for all objectives, and each objective's gradient
  is pulled back through the encodings that it reads. Takes the memory of a step
  plus one copy of the encoder per objective.
  """
  parts = split_batch(spec, state, batch, mesh)
  if spec.accumulate == 1:
    part = jax.tree.map(join_rows, parts)
    inputs, pullbacks = _linearize(spec, state, *part, mesh)
  else:
    inputs = map_loss_inputs(spec, state.params, state, parts, mesh)
  params, fixed = gather_params(spec, state.params, state, mesh)

  def loss(floats, name):
    loss_inputs = {name: replace_float_leaves(inputs[name], floats)}
    single = spec.select_objectives((name,))
    _, terms = compute_losses(single, params["heads"], fixed, loss_inputs, mesh)
    return terms[name].loss.value()

  losses, cotangents = {}, {}
  for name in spec.objectives:
    value_and_grad = jax.value_and_grad(loss)(float_leaves(inputs[name]), name)
    losses[name], cotangents[name] = value_and_grad
  if spec.accumulate == 1:
    return losses, {n: pullbacks[n](c) for n, c in cotangents.items()}

  def add_part(grads, part_and_cotangents):
    part, cotangents = part_and_cotangents
    _, pullbacks = _linearize(spec, state, *part, mesh)
    new = {name: pullbacks[name](c) for name, c in cotangents.items()}
    return jax.tree.map(jnp.add, grads, new), None

  zeros = jax.tree.map(jnp.zeros_like, state.params["image"])
  split = functools.partial(split_rows, count=spec.accumulate)
  grads, _ = jax.lax.scan(
    add_part,
    dict.fromkeys(spec.objectives, zeros),
    (parts, jax.tree.map(split, cotangents)),
  )
  return losses, grads


def _linearize(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None,
) -> tuple[dict[str, Any], dict[str, Callable[[list[Array]], PyTree]]]:
  """`compute_loss_inputs`, and its VJP with respect to the image encoder.

  Each encoding is computed and linearized once for all objectives. An
  objective's VJP takes cotangents of the `float_leaves` of its loss inputs.
  """
  params, fixed = gather_params(spec, state.params, state, mesh)
  batch = add_views(spec, batch, keys, mesh)
  encoded, encoder_vjps = _linearize_encodings(
    spec, state.params["image"], params, fixed, batch, mesh
  )
  heads = bind_heads(spec, params["heads"], fixed, mesh)

  def linearize(name):
    needs = spec.objectives[name].needs().encodings
    encodings = {e: encoded[e] for e in encoder_vjps if e in needs}

    def loss_inputs(encodings):
      inputs = objective_inputs(
        spec, name, {**encoded, **encodings}, heads, state, batch, mesh
      )
      return float_leaves(inputs), inputs

    _, vjp, inputs = jax.vjp(loss_inputs, encodings, has_aux=True)

    def pull_back(cotangents):
      (encoding_cotangents,) = vjp(cotangents)
      grads = jax.tree.map(jnp.zeros_like, state.params["image"])
      for encoding, cotangent in encoding_cotangents.items():
        (grad,) = encoder_vjps[encoding](cotangent)
        grads = jax.tree.map(jnp.add, grads, grad)
      return grads

    return inputs, pull_back

  inputs, pullbacks = {}, {}
  for name in spec.objectives:
    inputs[name], pullbacks[name] = linearize(name)
  return inputs, pullbacks


def _linearize_encodings(
  spec: StepSpec,
  image: PyTree,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None,
) -> tuple[
  dict[base.Encoding, Any], dict[base.Encoding, Callable[[Any], tuple[PyTree]]]
]:
  """All encodings, and the student's VJPs with respect to the image encoder.

  `image` are the encoder's parameters; `params` and `state` are as
  `gather_params` returns them.
  """
  encoded, vjps = {}, {}
  for encoding, layers in spec.plan.items():

    def run_encoding(image, encoding=encoding, layers=layers):
      tower, _ = gather_params(spec, {"image": image}, state, mesh)
      weights, fixed = {**params, **tower}, state.fixed_params
      plan, step = {encoding: layers}, state.step
      outputs = encode(
        spec, weights, fixed, batch, plan=plan, step=step, mesh=mesh
      )
      return outputs[encoding]

    if encoding.tower == "image" and encoding.weights == base.STUDENT:
      encoded[encoding], vjps[encoding] = jax.vjp(run_encoding, image)
    else:
      encoded[encoding] = run_encoding(image)
  return encoded, vjps
