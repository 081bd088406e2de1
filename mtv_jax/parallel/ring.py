"""Pairwise losses around a ring of devices.

In the chunked loss of SigLIP (Zhai et al. 2023) a device has the columns of one
device at a time and sends them to its neighbour in the ring: its logits don't
grow with the number of devices. The loss is a sum over pairs, so gradients are
computed in the forward pass, and those of columns are sent with the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from mtv_jax.parallel.mesh import BATCH_SPEC, num_batch_shards
from mtv_jax.utils.tree import pytree_dataclass

# How a loss compares all pairs: with gathered columns, around the ring, or
# 'auto', a ring if the batch is split. The result is the same.
Method = Literal["auto", "gathered", "ring"]
AXES = BATCH_SPEC[0]


@pytree_dataclass
class EmbeddingBatch:
  """One side of a comparison: images or texts, regions or phrases."""

  embedding: Float[Array, "n d"]  # Of unit length.
  metadata: PyTree  # `[n, ...]` without gradient, such as which are valid.


# (rows [n], columns [c], parameters) -> losses [n], summed over columns, and a
# tree [n, ...] of diagnostics.
PairLossFn = Callable[
  [EmbeddingBatch, EmbeddingBatch, PyTree], tuple[Array, PyTree]
]
# Diagnostics over two sets of columns -> over their union.
MergeFn = Callable[[PyTree, PyTree], PyTree]


@pytree_dataclass
class PairwiseLoss:
  """Sum of the losses of all pairs."""

  loss: Float[Array, ""]
  diagnostics: PyTree  # Of `pair_loss_fn` by row, without gradient.


def should_use_ring(method: Method, mesh: Mesh | None) -> bool:
  """Whether to use the ring; `'auto'` uses it if the batch is split."""
  if mesh is None or method == "gathered":
    return False
  return method == "ring" or num_batch_shards(mesh) > 1


@pytree_dataclass
class _Grads:
  """Gradients of the loss; those of `columns` belong to the current chunk."""

  rows: Any
  columns: Any
  params: Any


@pytree_dataclass
class _RunningSum:
  """Losses, diagnostics and gradients over the chunks compared so far."""

  losses: Any
  diagnostics: Any
  grads: Any = None


def ring_pairwise_loss(
  rows: EmbeddingBatch,
  columns: EmbeddingBatch,
  params: PyTree,
  *,
  pair_loss_fn: PairLossFn,
  merge_fn: MergeFn,
  mesh: Mesh,
) -> PairwiseLoss:
  """Sums a loss over all pairs, one device's chunk of columns at a time.

  Equal to `pair_loss_fn` of all rows and columns in value and gradient, up to
  the order of additions. Each of `n` devices sends `n - 1` chunks of columns
  and, with gradients, `n` of those. Devices along `tensor` repeat it.

  Args:
    rows: split over the devices as the batch is; they are not sent.
    columns: as many; their chunks are sent around the ring.
    params: the loss's parameters, such as temperature and bias.
    pair_loss_fn: losses and diagnostics of rows against a chunk of columns.
    merge_fn: merges the diagnostics of two chunks.
    mesh: splits the rows over `data` and `fsdp`.
  """
  split, whole = PartitionSpec(AXES), PartitionSpec()

  def run(with_grads, row, column, params, row_metadata, column_metadata):
    device_fn = functools.partial(
      _device_loss,
      pair_loss_fn=pair_loss_fn,
      merge_fn=merge_fn,
      count=num_batch_shards(mesh),
      with_grads=with_grads,
    )
    grad_specs = _Grads(split, split, whole) if with_grads else None
    losses, diagnostics, grads = jax.shard_map(
      device_fn,
      mesh=mesh,
      in_specs=(split, split, whole),
      out_specs=(split, split, grad_specs),
    )(
      EmbeddingBatch(row, row_metadata),
      EmbeddingBatch(column, column_metadata),
      params,
    )
    return (jnp.sum(losses), diagnostics), grads

  @jax.custom_vjp
  def total(*args):
    return run(False, *args)[0]

  def backward(grads, cotangents):
    scaled = jax.tree.map(lambda grad: cotangents[0] * grad, grads)
    return scaled.rows, scaled.columns, scaled.params, None, None

  total.defvjp(functools.partial(run, True), backward)
  loss, diagnostics = total(
    rows.embedding, columns.embedding, params, rows.metadata, columns.metadata
  )
  return PairwiseLoss(loss, jax.lax.stop_gradient(diagnostics))


def _device_loss(
  rows, columns, params, *, pair_loss_fn, merge_fn, count, with_grads
):
  """One device's part: `(losses, diagnostics, grads)` of its rows."""
  send = _send(count)
  # Per-device sums until the end, instead of one reduction per step.
  params = jax.lax.pcast(params, AXES, to="varying")

  def sum_losses(row, column, params, metadata):
    losses, diagnostics = pair_loss_fn(
      EmbeddingBatch(row, rows.metadata),
      EmbeddingBatch(column, metadata),
      params,
    )
    return jnp.sum(losses), (losses, diagnostics)

  def compare(columns):
    args = (rows.embedding, columns.embedding, params, columns.metadata)
    if not with_grads:
      return _RunningSum(*sum_losses(*args)[1])
    grad_fn = jax.grad(sum_losses, argnums=(0, 1, 2), has_aux=True)
    grads, aux = grad_fn(*args)
    return _RunningSum(*aux, _Grads(*grads))

  def add(total, columns):
    # Neither the gradients sent here nor the next chunk wait for these logits.
    chunk, old, grads = compare(columns), total.grads, None
    if with_grads:
      sent = _Grads(old.rows, send(old.columns), old.params)
      grads = jax.tree.map(jnp.add, sent, chunk.grads)
    return _RunningSum(
      total.losses + chunk.losses,
      merge_fn(total.diagnostics, chunk.diagnostics),
      grads,
    )

  def step(carry, _):
    columns, total = carry
    return (send(columns), add(total, columns)), None

  total = compare(columns)
  if count > 1:
    carry = (send(columns), total)
    # The last chunk is not sent on.
    (columns, total), _ = jax.lax.scan(step, carry, length=count - 2)
    total = add(total, columns)
  grads = total.grads
  if with_grads:
    grads = _Grads(
      rows=grads.rows,
      columns=send(grads.columns),
      params=jax.lax.psum(grads.params, AXES),
    )
  return total.losses, total.diagnostics, grads


def _send(count: int) -> Callable[[PyTree], PyTree]:
  """Sends a tree to the next device of the ring."""
  pairs = [(i, (i + 1) % count) for i in range(count)]
  return functools.partial(jax.lax.ppermute, axis_name=AXES, perm=pairs)
