"""Per-objective gradients on the image encoder.

Used by measurements and by balancing methods that read gradient norms. The
train step itself computes only the gradient of the weighted sum.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.objectives import base
from mtv_jax.train.forward import (
  Batch,
  add_views,
  bind_heads,
  compute_losses,
  encode,
  gather_params,
  objective_inputs,
)
from mtv_jax.train.gradients import (
  float_leaves,
  join_rows,
  map_loss_inputs,
  replace_float_leaves,
  split_batch,
  split_rows,
)
from mtv_jax.train.spec import StepSpec
from mtv_jax.train.state import TrainState


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
  losses, cotangents = {}, {}
  for name in spec.objectives:

    def loss(floats, name=name):
      loss_inputs = {name: replace_float_leaves(inputs[name], floats)}
      alone = spec.select_objectives((name,))
      _, terms = compute_losses(
        alone, params["heads"], fixed, loss_inputs, mesh
      )
      return terms[name].loss.value()

    losses[name], cotangents[name] = jax.value_and_grad(loss)(
      float_leaves(inputs[name])
    )
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

  Each encoding is computed and linearized once for all objectives.

  Returns:
    By objective: the loss inputs, and functions from cotangents of the
    `float_leaves` of its loss inputs to a gradient on the image encoder.
  """
  params, fixed = gather_params(spec, state.params, state, mesh)
  batch = add_views(spec, batch, keys, mesh)
  encoded, encoder_vjps = _linearize_encodings(
    spec, state.params["image"], params, fixed, batch, mesh
  )
  heads = bind_heads(spec, params["heads"], fixed)

  def linearize(name):
    needs = spec.objectives[name].needs().encodings
    read = {e: encoded[e] for e in encoder_vjps if e in needs}

    def loss_inputs(read):
      inputs = objective_inputs(
        spec, name, {**encoded, **read}, heads, state, batch, mesh
      )
      return float_leaves(inputs), inputs

    _, vjp, inputs = jax.vjp(loss_inputs, read, has_aux=True)

    def pull_back(cotangents):
      (encoding_cotangents,) = vjp(cotangents)
      grads = jax.tree.map(jnp.zeros_like, state.params["image"])
      for encoding, cotangent in encoding_cotangents.items():
        (grad,) = encoder_vjps[encoding](cotangent)
        grads = jax.tree.map(jnp.add, grads, grad)
      return grads

    return inputs, pull_back

  pairs = {name: linearize(name) for name in spec.objectives}
  inputs, pullbacks = (
    {n: pair[i] for n, pair in pairs.items()} for i in (0, 1)
  )
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

    def run(image, encoding=encoding, layers=layers):
      tower, _ = gather_params(spec, {"image": image}, state, mesh)
      outputs = encode(
        spec,
        {**params, **tower},
        state.fixed_params,
        batch,
        plan={encoding: layers},
        step=state.step,
        mesh=mesh,
      )
      return outputs[encoding]

    if encoding.tower == "image" and encoding.weights == base.STUDENT:
      encoded[encoding], vjps[encoding] = jax.vjp(run, image)
    else:
      encoded[encoding] = run(image)
  return encoded, vjps
