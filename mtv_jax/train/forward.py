"""The forward pass of a step: views, encodings, loss inputs, losses.

An objective declares the encodings that it reads. Each distinct encoding
(tower, view, weights) is computed once. From it, each objective computes its
loss inputs, which are small and per example. A loss sees the loss inputs of the
whole batch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from mtv_jax.augment.random import image_keys, row_keys, step_key
from mtv_jax.objectives import base
from mtv_jax.objectives.base import Batch
from mtv_jax.parallel.mesh import data_rows, num_batch_shards
from mtv_jax.parallel.rules import all_gather_params, constrain_batch
from mtv_jax.train.spec import StepSpec, TrainState
from mtv_jax.utils.tree import map_with_names, pytree_dataclass

# Gathered at use instead: vocabularies by row, blocks one by one in their loop.
EMBEDDING_TABLES = r"token_embedding$"
Loss = tuple[Float[Array, ""], dict[str, base.Terms]]


def total_loss(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | None = None,
) -> Loss:
  """The loss of the whole batch, as a function of all parameters."""
  params, state = gather_params(spec, params, state, mesh)
  keys = view_keys(spec, state.step, len(batch["image"]), mesh)
  loss_inputs = compute_loss_inputs(spec, params, state, batch, keys, mesh)
  return compute_losses(spec, params["heads"], state, loss_inputs, mesh)


def compute_loss_inputs(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """The loss inputs `[b, ...]` of each objective for b rows of a batch.

  `params` (the student's) and `state` are as `gather_params` returns them;
  reads the state's step, statistics and teachers, not its `params`. `batch` has
  fields `[b, ...]`. `keys` are random keys `[b]` by view, see `view_keys`.
  `mesh` shards the rows; None on one device.
  """
  batch = add_views(spec, batch, keys, mesh)
  encoded = encode(
    spec, params, state.fixed_params, batch, step=state.step, mesh=mesh
  )
  heads = bind_heads(spec, params["heads"], state, mesh)
  return {
    name: objective_inputs(spec, name, encoded, heads, state, batch, mesh)
    for name in spec.objectives
  }


def compute_losses(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  loss_inputs: Mapping[str, Any],
  mesh: Mesh | None = None,
) -> Loss:
  """The total loss of the global batch, and each objective's terms.

  `params` are the heads' parameters. `loss_inputs` are the results of
  `compute_loss_inputs` for all rows `[B, ...]`. `mesh` shards the rows; reads
  the state's step, statistics, balance and teacher heads.
  """
  heads = bind_heads(spec, params, state, mesh)
  weights = spec.loss_weights(state)
  total, terms = 0.0, {}
  if spec.has_balance:
    configured = spec.config_weights(state.step)
    total = spec.balance.penalty(configured, state.balance)
  for name, objective in spec.objectives.items():
    start = spec.weights[name].start
    context = base.Context(
      step=state.step - start,
      total_steps=spec.total_steps - start,
      statistics=state.statistics[name],
      mesh=mesh,
      in_lanes=spec.in_lanes,
      key=step_key(jax.random.key(spec.seed), f"loss/{name}", state.step),
    )
    with jax.named_scope(name):
      terms[name] = objective.loss(loss_inputs[name], heads, context)
    total = total + weights[name] * terms[name].loss.value()
  return total, terms


def gather_params(
  spec: StepSpec, params: PyTree, state: TrainState, mesh: Mesh | None
) -> tuple[PyTree, TrainState]:
  """Gathers parameters and teachers over `fsdp`; detaches frozen parameters.

  Merges adapters: everything that follows sees plain towers.
  """
  if spec.frozen:
    params = stop_gradient_frozen(spec, params)
  if spec.lora is not None:
    params = spec.merge_adapters(params)
    state = state.replace(teacher=spec.merge_adapters(state.teacher))
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params, state
  # One tree at a time: `keep` matches names from the tree's root.
  stacks = ["image/blocks", "text/blocks"]
  for name, head in spec.heads.items():
    stacks += (f"heads/{name}/{s}" for s in getattr(head.module, "stacks", ()))
  keep = rf"^({'|'.join(stacks)})/|{EMBEDDING_TABLES}"
  gather = functools.partial(all_gather_params, mesh=mesh, keep=keep)
  teachers = {name: gather(tree) for name, tree in state.teachers.items()}
  state = state.replace(teacher=gather(state.teacher), teachers=teachers)
  return gather(params), state


def stop_gradient_frozen(spec: StepSpec, params: PyTree) -> PyTree:
  """Stops the gradient of frozen parameters; `params` has full names.

  This removes the backward pass of a fully frozen tower.
  """

  def stop(name, leaf):
    return jax.lax.stop_gradient(leaf) if name in spec.frozen else leaf

  return map_with_names(stop, params)


def bind_heads(
  spec: StepSpec, params: PyTree, state: TrainState, mesh: Mesh | None
) -> base.BoundHeads:
  """Binds heads to the student's and the teacher's (fixed) parameters."""
  teacher = jax.lax.stop_gradient(state.teacher.get("heads", {}))
  return base.BoundHeads(spec.heads, params, teacher, mesh)


def objective_inputs(
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


def view_keys(
  spec: StepSpec, step: Array, size: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Random keys `[size]` for each view in the plan."""
  seed = jax.random.key(spec.seed)
  names = {e.view_name for e in spec.plan if e.tower == "image"}
  keys = {
    n: row_keys(seed, spec.views[n].crops_of or n, step, size)
    for n in sorted(names)
  }
  if mesh is None or mesh.size == 1:
    return keys
  # An example's crops don't depend on its device.
  order = data_rows(size, mesh)
  if (order != np.arange(size)).any():
    keys = jax.tree.map(lambda k: k[order], keys)
  return keys


def add_views(
  spec: StepSpec, batch: Batch, keys: Mapping[str, jax.Array], mesh: Mesh | None
) -> dict[str, Any]:
  """Returns the batch with `views` (`ViewBatch`es by name) and their `keys`."""
  views = {}
  for name, rngs in keys.items():
    with jax.named_scope(f"view({name})"):
      views[name] = spec.views[name](
        batch["image"], batch["image_size"], rngs, spec.dtype
      )
  return {**batch, "views": constrain_batch(views, mesh), "keys": keys}


def encode(
  spec: StepSpec,
  params: Mapping[str, PyTree],
  fixed: Mapping[str, Mapping[str, PyTree]],
  batch: Batch,
  *,
  plan: Mapping[base.Encoding, tuple[int, ...]] | None = None,
  step: Array | None = None,
  mesh: Mesh | None = None,
) -> dict[base.Encoding, Any]:
  """Runs every encoding of a plan (layers to return, by encoding).

  `params` are the student's by tower, `fixed` the teachers' by
  `Encoding.weights` and tower, without gradient. The batch has token ids,
  captions `[B, T]` or phrases `[B, M, T]`, and `views` by name. A view's `mask`
  hides patches from the student only, its `keep` from both. The student uses
  stochastic depth if the batch has random `keys` by view; `step` seeds its
  RoPE augmentation; None disables it.

  Returns `ImageOutput`s with arrays `[B, count, ...]` and `TextOutput`s with
  arrays `[B, ...]` or `[B, M, ...]`.
  """
  outputs = {}
  for encoding, layers in (spec.plan if plan is None else plan).items():
    if encoding.weights == base.STUDENT:
      weights = params[encoding.tower]
    else:
      # A teacher with heads only uses the student's encoder.
      weights = {**params, **fixed[encoding.weights]}[encoding.tower]
      weights = jax.lax.stop_gradient(weights)
    tower = spec.towers[encoding].clone(mesh=mesh)
    apply = functools.partial(tower.apply, {"params": weights})
    with jax.named_scope(str(encoding)):
      if encoding.tower == "image":
        apply = functools.partial(apply, layers=layers)
        outputs[encoding] = _encode_images(
          spec, encoding, apply, batch, step, mesh
        )
      elif encoding.distinct < 1:
        tokens, share = batch[encoding.view], encoding.distinct
        outputs[encoding] = _encode_distinct(apply, tokens, share, mesh)
      else:
        outputs[encoding] = _encode_text(apply, batch[encoding.view], mesh)
  return constrain_batch(outputs, mesh)


def _encode_images(
  spec: StepSpec,
  encoding: base.Encoding,
  apply: Callable[..., Any],
  batch: Batch,
  step: Array | None,
  mesh: Mesh | None,
) -> Any:
  """Runs an image tower on the crops of a view."""
  view, options = batch["views"][encoding.view_name], {}
  batch_shape, mask = view.images.shape[:2], None  # B, count
  if encoding.weights == base.STUDENT:
    mask, name = view.mask, encoding.view
    tower = spec.towers[encoding]
    rope = tower.spec.rope
    if step is not None and rope is not None and rope.is_random:
      seed = jax.random.key(spec.seed)
      options["rope_key"] = step_key(seed, f"rope/{name}", step)
    if tower.drop_path and "keys" in batch:
      options["drop_path_keys"] = image_keys(
        batch["keys"][name], "drop_path", batch_shape[1]
      )
  images, teacher = view.images, spec.teachers.get(encoding.weights)
  if teacher is not None and teacher.pixels is not None:
    images = teacher.pixels(images)
  images, mask, keep = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), (images, mask, view.keep)
  )  # [B count, ...]
  images, mask, keep = constrain_batch((images, mask, keep), mesh)
  output = apply(images, mask=mask, keep=keep, **options)
  return jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), output)


def _encode_text(
  apply: Callable[..., Any], tokens: Int[Array, "*rows t"], mesh: Mesh | None
) -> Any:
  """Runs the text tower on token ids `[B, T]` or `[B, M, T]`."""
  rows = constrain_batch(tokens.reshape(-1, tokens.shape[-1]), mesh)
  return jax.tree.map(
    lambda x: x.reshape(*tokens.shape[:-1], *x.shape[1:]), apply(rows)
  )


def _encode_distinct(
  apply: Callable[..., Any],
  tokens: Int[Array, "*rows t"],
  share: float,
  mesh: Mesh | None,
) -> Any:
  """Runs `_encode_text` once per distinct text on each device.

  If a device's distinct texts exceed `share` of its rows, all devices encode
  all their rows. Values and gradients are identical either way.
  """
  shards = 1 if mesh is None else num_batch_shards(mesh)
  rows = tokens.reshape(shards, -1, tokens.shape[-1])  # [S, R, T]
  rows = constrain_batch(rows, mesh)
  limit = math.ceil(share * rows.shape[1])  # K
  distinct_rows = jax.vmap(lambda r: find_distinct(r, limit=limit))(rows)

  # `cond` allocates the residuals of both branches; this branch saves none.
  @jax.checkpoint
  def encode_all(rows, distinct_rows):
    del distinct_rows
    return _encode_text(apply, rows, mesh)

  def encode_distinct(rows, distinct_rows):
    texts = jnp.take_along_axis(rows, distinct_rows.first[..., None], axis=1)
    encoded = _encode_text(apply, texts, mesh)  # [S, K, ...]
    return jax.tree.map(
      lambda x: jax.vmap(lambda y, slot: y[slot])(x, distinct_rows.slot),
      encoded,
    )

  # XLA puts the False branch first, so FLOPs are counted for the usual case.
  overflow = jnp.any(distinct_rows.count > limit)
  output = jax.lax.cond(
    overflow, encode_all, encode_distinct, rows, distinct_rows
  )
  return jax.tree.map(
    lambda x: x.reshape(*tokens.shape[:-1], *x.shape[2:]), output
  )


@pytree_dataclass
class DistinctRows:
  """Up to K distinct rows among R rows."""

  first: Int[Array, " k"]  # Row per distinct value; arbitrary from `count` on.
  slot: Int[Array, " r"]  # Each row's index in `first`.
  count: Int[Array, ""]  # If above K, the fields above are invalid.


def find_distinct(rows: Int[Array, "r t"], *, limit: int) -> DistinctRows:
  """Finds equal rows of ids by sorting their hashes.

  Neighbours in this order are compared in full, so a hash collision costs at
  most a repeated row.
  """
  powers = np.cumprod(np.full(rows.shape[1], 0x01000193, np.uint32))
  hashes = jnp.sum(rows.astype(jnp.uint32) * powers, axis=1)  # Modulo 2^32.
  order = jnp.argsort(hashes, stable=True)
  sorted_rows = rows[order]
  is_new = jnp.any(sorted_rows[1:] != sorted_rows[:-1], axis=1)
  is_new = jnp.concatenate([jnp.ones(1, bool), is_new])
  slots = jnp.cumsum(is_new) - 1
  first = jnp.zeros(limit, order.dtype)
  first = first.at[jnp.where(is_new, slots, limit)].set(order, mode="drop")
  slot = jnp.zeros_like(slots).at[order].set(slots)
  # Clipped to stay in bounds; slots are not read if there are more than K.
  return DistinctRows(first, jnp.minimum(slot, limit - 1), slots[-1] + 1)
