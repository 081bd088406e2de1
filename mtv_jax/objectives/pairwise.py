"""Pairwise logits and losses of the contrastive objectives."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from mtv_jax.objectives import base
from mtv_jax.parallel import ring
from mtv_jax.utils.tree import pytree_dataclass


def sigmoid_losses(
  logits: Float[Array, "n m"], positive: Bool[Array, "n m"]
) -> Float[Array, "n m"]:
  """`-log sigmoid(y * logit)` per pair, y = 1 if positive, else -1.

  Binary classification of each pair (SigLIP; Zhai et al. 2023, Algorithm 1).
  """
  return -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))


@pytree_dataclass
class Affine:
  """Scale and bias of the logits `scale * cosine + bias`."""

  scale: Float[Array, ""]
  bias: Float[Array, ""]

  def report(self) -> dict[str, base.WeightedMean]:
    """Scale and bias as metrics."""
    ones = jnp.ones(())
    return {k: base.WeightedMean(v, ones) for k, v in vars(self).items()}


def logits(
  rows: Float[Array, "n d"], columns: Float[Array, "m d"], affine: Affine
) -> Float[Array, "n m"]:
  """`scale * cosine + bias` for unit rows and columns."""
  cosine = jnp.einsum("nd,md->nm", rows, columns, precision="highest")
  return affine.scale * cosine + affine.bias


def sum_losses(
  rows: ring.EmbeddingBatch,
  columns: ring.EmbeddingBatch,
  affine: Affine,
  *,
  pair_loss_fn: ring.PairLossFn,
  merge_fn: ring.MergeFn,
  method: ring.Method,
  mesh: Mesh | None,
  chunk: int | None = None,
) -> tuple[Float[Array, ""], PyTree]:
  """Sums the losses of all pairs; also returns each row's diagnostics.

  `chunk`: columns to compare at a time, except in the ring, so that only
  `[n, chunk]` logits exist, forward and backward. Columns are chunked, since
  rows are sharded over the devices.
  """
  if ring.should_use_ring(method, mesh):
    functions = dict(pair_loss_fn=pair_loss_fn, merge_fn=merge_fn)
    return ring.ring_pairwise_loss(
      rows, columns, affine, mesh=mesh, **functions
    )

  def compare(columns):
    losses, diagnostics = pair_loss_fn(rows, columns, affine)
    return losses.sum(), diagnostics

  if chunk is None or chunk >= len(columns.embedding):
    return compare(columns)
  # No CSE barrier needed: the loop separates recomputation from forward pass.
  compare = jax.checkpoint(compare, prevent_cse=False)
  chunks = jax.tree.map(lambda x: _strided_chunks(x, chunk), columns)
  losses, diagnostics = jax.lax.map(compare, chunks)
  parts = [
    jax.tree.map(lambda x, i=i: x[i], diagnostics) for i in range(len(losses))
  ]
  return losses.sum(), functools.reduce(merge_fn, parts)


def _strided_chunks(x: Array, chunk: int) -> Array:
  """Splits rows into strided `[chunks, chunk, ...]`, padded with zeros.

  A strided chunk has rows of every device, so that an iteration gathers one
  chunk. With contiguous chunks it would gather all rows.
  """
  chunks = -(-x.shape[0] // chunk)
  padding = chunks * chunk - x.shape[0]
  x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
  return jnp.moveaxis(x.reshape(chunk, chunks, *x.shape[1:]), 1, 0)


class Temperature(nn.Module):
  """Learned scale and bias of the logits.

  The parameter is the logarithm of the scale, which starts at 10 in SigLIP and
  1/0.07 in CLIP. None omits the bias. SigLIP's -10 predicts almost all pairs
  as negative, which is correct; log(1/B) balances the B pairs of a row.
  """

  init_scale: float
  init_bias: float | None

  @nn.compact
  def __call__(self) -> Affine:
    constant = nn.initializers.constant
    bias = jnp.zeros(())
    init = constant(math.log(self.init_scale))
    log_scale = self.param("logit_scale", init, ())
    if self.init_bias is not None:
      bias = self.param("logit_bias", constant(self.init_bias), ())
    return Affine(scale=jnp.exp(log_scale), bias=bias)
