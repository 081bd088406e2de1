"""Pairwise losses around a ring of devices.

As in SigLIP's chunked loss (Zhai et al. 2023), a device compares its rows with
one device's columns at a time, then sends these to its neighbour: its logits
don't grow with the number of devices. The loss is a sum over pairs, so the
forward pass can compute gradients, and sends column gradients with the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from mtv_jax.parallel.mesh import BATCH_SPEC, num_batch_shards
from mtv_jax.utils.tree import pytree_dataclass

# "auto": the ring if the batch is sharded. All methods compute equal losses.
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


def should_use_ring(method: Method, mesh: Mesh | None) -> bool:
  """Whether to use the ring; `'auto'` uses it if the batch is sharded."""
  if mesh is None or method == "gathered":
    return False
  return method == "ring" or num_batch_shards(mesh) > 1


class _Grads(NamedTuple):
  """Gradients of the loss; `columns` belongs to the current chunk."""

  rows: Any
  columns: Any
  params: Any


class _RunningSum(NamedTuple):
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
) -> tuple[Float[Array, ""], PyTree]:
  """Sums a loss over all pairs, one device's chunk of columns at a time.

  Value and gradient equal `pair_loss_fn` on all rows and columns, up to the
  order of additions. Both sides are sharded like the batch; rows are never
  sent, chunks of columns are sent around the ring. Each of `n` devices sends
  `n - 1` column chunks and, with gradients, `n` gradient chunks. Devices along
  `tensor` repeat the computation. Also returns the diagnostics by row, not
  differentiated.
  """
  split, replicated = PartitionSpec(AXES), PartitionSpec()

  def run(
    with_grads,
    row_embeddings,
    column_embeddings,
    params,
    row_metadata,
    column_metadata,
  ):
    device_fn = functools.partial(
      _device_loss,
      pair_loss_fn=pair_loss_fn,
      merge_fn=merge_fn,
      num_devices=num_batch_shards(mesh),
      with_grads=with_grads,
    )
    grad_specs = _Grads(split, split, replicated) if with_grads else None
    in_specs, out_specs = (split, split, replicated), (split, split, grad_specs)
    mapped = jax.shard_map(
      device_fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs
    )
    rows = EmbeddingBatch(row_embeddings, row_metadata)
    columns = EmbeddingBatch(column_embeddings, column_metadata)
    losses, diagnostics, grads = mapped(rows, columns, params)
    return (jnp.sum(losses), diagnostics), grads

  @jax.custom_vjp
  def total_loss(*args):
    return run(False, *args)[0]

  def backward(grads, cotangents):
    scaled = jax.tree.map(lambda grad: cotangents[0] * grad, grads)
    return scaled.rows, scaled.columns, scaled.params, None, None

  total_loss.defvjp(functools.partial(run, True), backward)
  loss, diagnostics = total_loss(
    rows.embedding, columns.embedding, params, rows.metadata, columns.metadata
  )
  return loss, jax.lax.stop_gradient(diagnostics)


def _device_loss(
  rows, columns, params, *, pair_loss_fn, merge_fn, num_devices, with_grads
):
  """`(losses, diagnostics, grads)` of one device's rows."""
  perm = [(i, (i + 1) % num_devices) for i in range(num_devices)]
  # Sends a tree to the next device of the ring.
  send = functools.partial(jax.lax.ppermute, axis_name=AXES, perm=perm)
  # Sum gradients per device; reduce once at the end, not at every step.
  params = jax.lax.pcast(params, AXES, to="varying")

  def sum_losses(row, column, params, metadata):
    sides = EmbeddingBatch(row, rows.metadata), EmbeddingBatch(column, metadata)
    losses, diagnostics = pair_loss_fn(*sides, params)
    return jnp.sum(losses), (losses, diagnostics)

  def compare_chunk(columns):
    args = (rows.embedding, columns.embedding, params, columns.metadata)
    if not with_grads:
      return _RunningSum(*sum_losses(*args)[1])
    grad_fn = jax.grad(sum_losses, argnums=(0, 1, 2), has_aux=True)
    grads, aux = grad_fn(*args)
    return _RunningSum(*aux, _Grads(*grads))

  def add_chunk(total, columns):
    # Sending gradients and the next chunk does not wait for these logits.
    chunk, previous, grads = compare_chunk(columns), total.grads, None
    if with_grads:
      sent = _Grads(previous.rows, send(previous.columns), previous.params)
      grads = jax.tree.map(jnp.add, sent, chunk.grads)
    return _RunningSum(
      total.losses + chunk.losses,
      merge_fn(total.diagnostics, chunk.diagnostics),
      grads,
    )

  def scan_step(carry, _):
    columns, total = carry
    return (send(columns), add_chunk(total, columns)), None

  total = compare_chunk(columns)
  if num_devices > 1:
    carry = (send(columns), total)
    # The last chunk is not sent.
    (columns, total), _ = jax.lax.scan(scan_step, carry, length=num_devices - 2)
    total = add_chunk(total, columns)
  grads = total.grads
  if with_grads:
    params = jax.lax.psum(grads.params, AXES)
    grads = _Grads(grads.rows, send(grads.columns), params)
  return total.losses, total.diagnostics, grads
