"""The objectives' losses, as functions of the parameters.

Views, encodings, loss inputs by objective and row, losses of the whole batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
  names = {e.view_name for e in spec.plan if e.tower == "image"}
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


def _gather_params(spec: StepSpec, params: PyTree, mesh: Mesh | None) -> PyTree:
  """The student's parameters as the layers read them."""
  params = stop_gradient_frozen(spec, params)
  return all_gather_params(params, mesh, keep=_NOT_GATHERED)


def _gather_state(
  spec: StepSpec, params: PyTree, state: TrainState, mesh: Mesh | None
) -> tuple[PyTree, TrainState]:
  """Parameters and teachers as the layers read them."""
  gather = functools.partial(all_gather_params, mesh=mesh, keep=_NOT_GATHERED)
  params = _gather_params(spec, params, mesh)
  teachers = {name: gather(tree) for name, tree in state.teachers.items()}
  return params, state.replace(teacher=gather(state.teacher), teachers=teachers)


def bind_heads(
  spec: StepSpec, params: PyTree, state: TrainState
) -> base.BoundHeads:
  """Heads with the student's parameters, and with the teacher's fixed ones."""
  teacher = jax.lax.stop_gradient(state.teacher.get("heads", {}))
  return base.BoundHeads(spec.heads, params, teacher)


def _make_views(
  spec: StepSpec,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None,
) -> dict[str, Any]:
  """The views that the objectives read: `ViewBatch`es of B rows by name."""
  views = {}
  for name, rngs in keys.items():
    with jax.named_scope(f"view({name})"):
      views[name] = spec.views[name](
        batch["image"], batch["image_size"], rngs, spec.dtype
      )
  return constrain_batch(views, mesh)


def compute_loss_inputs(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """The loss inputs of each objective for b rows of a batch.

  Args:
    spec: of the objectives to compute.
    params: the student's, by which the result is differentiated.
    state: its teachers and statistics; its other parameters are not read.
    batch: batch fields `[b, ...]`.
    keys: random keys `[b]` of the rows by view, see `view_keys`.
    mesh: over which the rows are sharded; None on one device.

  Returns:
    By objective, trees of arrays `[b, ...]`.
  """
  params, state = _gather_state(spec, params, state, mesh)
  batch = {**batch, "views": _make_views(spec, batch, keys, mesh), "keys": keys}
  encoded = _encode(spec, spec.plan, params, state, batch, mesh)
  heads = bind_heads(spec, params["heads"], state)
  return {
    name: _compute_loss_inputs_of(
      spec, name, encoded, heads, state, batch, mesh
    )
    for name in spec.objectives
  }


def compute_statistics_features(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, dict[str, tuple[Array, Array]]]:
  """`Objective.statistics_features` of each objective; arguments as above."""
  params, state = _gather_state(spec, state.params, state, mesh)
  plan = {
    e: taps for e, taps in spec.plan.items() if e.weights in spec.teachers
  }
  batch = {**batch, "views": _make_views(spec, batch, keys, mesh), "keys": keys}
  encoded = _encode(spec, plan, params, state, batch, mesh)
  return {
    name: objective.statistics_features(encoded, batch)
    for name, objective in spec.objectives.items()
  }


def _encode(
  spec: StepSpec,
  plan: Mapping[base.Encoding, tuple[int, ...]],
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None,
) -> dict[base.Encoding, Any]:
  """The encodings of a plan; the batch has `views` and their `keys`."""
  encoded = encodings.encode(
    plan,
    spec.tower_of,
    params,
    state.fixed_params,
    batch["views"],
    batch,
    mesh,
    batch["keys"],
    rope_keys(spec, state.step),
    spec.convert_pixels,
  )
  return constrain_batch(encoded, mesh)


def _compute_loss_inputs_of(
  spec: StepSpec,
  name: str,
  encoded: base.Encodings,
  heads: base.BoundHeads,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None,
) -> Any:
  """The loss inputs of one objective."""
  batch = {**batch, "statistics": state.statistics[name]}
  with jax.named_scope(name):
    inputs = spec.objectives[name].loss_inputs(encoded, heads, batch)
  return constrain_batch(inputs, mesh)


def float_leaves(tree: PyTree) -> list[Array]:
  """The leaves that have a gradient."""
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def replace_float_leaves(tree: PyTree, floats: list[Array]) -> PyTree:
  """A tree with other values of `float_leaves`."""
  new = iter(floats)
  return jax.tree.map(
    lambda x: next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
  )


def linearize_encoder(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None,
) -> tuple[dict[str, Any], dict[str, Callable[[list[Array]], PyTree]]]:
  """`compute_loss_inputs`, and its derivative for the image encoder.

  Each encoding is computed and linearized once for all objectives.

  Returns:
    The loss inputs by objective, and by objective a function from cotangents of
    the `float_leaves` of its loss inputs to a gradient on the image encoder.
  """
  params, fixed = _gather_state(spec, state.params, state, mesh)
  batch = {**batch, "views": _make_views(spec, batch, keys, mesh), "keys": keys}
  encoded, encoder_vjps = _linearize_encodings(
    spec, state.params["image"], params, fixed, batch, mesh
  )
  heads = bind_heads(spec, params["heads"], state)

  def linearize(name):
    needs = spec.objectives[name].needs().encodings
    read = {e: encoded[e] for e in encoder_vjps if e in needs}

    def loss_inputs(read):
      inputs = _compute_loss_inputs_of(
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
  """All encodings, and the VJPs of the student's for the image encoder.

  `image` are the encoder's parameters, `params` and `state` the others as the
  layers read them.
  """
  encoded, vjps = {}, {}
  for encoding, taps in spec.plan.items():

    def encode(image, encoding=encoding, taps=taps):
      tower = _gather_params(spec, {"image": image}, mesh)
      student = {**params, **tower}
      plan = {encoding: taps}
      return _encode(spec, plan, student, state, batch, mesh)[encoding]

    if encoding.tower == "image" and encoding.weights == base.STUDENT:
      encoded[encoding], vjps[encoding] = jax.vjp(encode, image)
    else:
      encoded[encoding] = encode(image)
  return encoded, vjps


def compute_losses(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  loss_inputs: Mapping[str, Any],
  mesh: Mesh | None = None,
) -> Loss:
  """The total loss of the global batch, and each objective's terms.

  Args:
    spec: of the objectives to compute.
    params: those of the heads.
    state: its step, statistics, balance and the teacher's heads.
    loss_inputs: results of `compute_loss_inputs` for all rows `[B, ...]`.
    mesh: as in `compute_loss_inputs`.
  """
  params, state = _gather_state(spec, {"heads": params}, state, mesh)
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
