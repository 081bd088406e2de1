"""Pairwise losses around a ring of devices.

As in SigLIP's chunked loss (Zhai et al. 2023), a device compares its rows with
one device's columns at a time, then sends these to its neighbour: its logits
don't grow with the number of devices. The loss is a sum over pairs, so the
forward pass computes gradients, and sends column gradients with the columns.
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

# How to compare all pairs, with equal results: gathered columns, the ring, or
# 'auto': the ring if the batch is sharded.
Method = Literal["auto", "gathered", "ring"]
AXES = BATCH_SPEC[0]


@pytree_dataclass
class EmbeddingBatch:
  """One side of a comparison: images or texts, regions or phrases."""

  embedding: Float[Array, "n d"]  # Unit length.
  metadata: PyTree  # `[n, ...]`, not differentiated, such as a mask.


# (rows [n], columns [c], parameters) -> losses [n], summed over columns, and a
# tree [n, ...] of diagnostics.
PairLossFn = Callable[
  [EmbeddingBatch, EmbeddingBatch, PyTree], tuple[Array, PyTree]
]
# Merges diagnostics over two sets of columns.
MergeFn = Callable[[PyTree, PyTree], PyTree]


@pytree_dataclass
class PairwiseLoss:
  """Sum of the losses of all pairs."""

  loss: Float[Array, ""]
  diagnostics: PyTree  # From `pair_loss_fn`, by row, not differentiated.


def should_use_ring(method: Method, mesh: Mesh | None) -> bool:
  """Whether to use the ring; `'auto'` uses it if the batch is sharded."""
  if mesh is None or method == "gathered":
    return False
  return method == "ring" or num_batch_shards(mesh) > 1


@pytree_dataclass
class _Grads:
  """Gradients of the loss; `columns` belongs to the current chunk."""

  rows: Any
  columns: Any
  params: Any


@pytree_dataclass
class _RunningSum:
  """Losses, diagnostics and gradients, summed over the chunks so far."""

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

  Value and gradient equal `pair_loss_fn` on all rows and columns, up to the
  order of additions. Each of `n` devices sends `n - 1` column chunks and, with
  gradients, `n` gradient chunks. Devices along `tensor` repeat the computation.

  Args:
    rows: sharded like the batch; never sent.
    columns: sharded like `rows`; chunks are sent around the ring.
    params: the loss's parameters, such as temperature and bias.
    pair_loss_fn: losses and diagnostics of rows against a chunk of columns.
    merge_fn: merges the diagnostics of two chunks.
    mesh: shards the rows over `data` and `fsdp`.
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
  # Sum per device and reduce once at the end, not at every step.
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
    # Sending gradients and the next chunk does not wait for these logits.
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
    # The last chunk is not sent.
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
