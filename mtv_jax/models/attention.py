"""Attention without its whole matrix of logits where there are many tokens.

An image of 960 pixels in patches of 16 has 3601 tokens: their logits take 0.6
GB a layer and image in float32. In blocks of queries, softmax needs no trick
(every query sees all keys at once), and memory grows with the tokens instead of
their square; backwards, each block is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# From so many tokens on, on a CPU and elsewhere. A CPU gains long before
# memory is short: a block's logits stay in its cache.
LONG_ON_CPU = 512
LONG = 2048
# Queries of a block.
BLOCK_ON_CPU = 64
BLOCK = 512
# Blocks are multiples of it: of the lanes of a CPU, and of a TPU's tiles.
MULTIPLE = 16


def attend(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
  *,
  causal: bool = False,
) -> Float[Array, "b n h d"]:
  """softmax(q k^T / sqrt(d)) v, the softmax in float32.

  Args:
    q: queries of each head.
    k: keys.
    v: values.
    causal: whether a token sees only itself and those before it; then, and
      with few tokens, it is `jax.nn.dot_product_attention`.
  """

  def plain(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

  n = q.shape[1]
  if causal or n < LONG_ON_CPU:
    return plain(q, k, v)
  elsewhere = in_blocks if n >= LONG else plain
  return jax.lax.platform_dependent(q, k, v, cpu=on_cpu, default=elsewhere)


def in_blocks(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
) -> Float[Array, "b n h d"]:
  """`BLOCK` queries at a time, of all heads."""

  block = _recomputed(jax.nn.dot_product_attention)
  blocks = jnp.moveaxis(_cut(q, BLOCK), 1, 0)
  out = jax.lax.map(lambda queries: block(queries, k, v), blocks)
  return _joined(jnp.moveaxis(out, 0, 1), q.shape[1])


def on_cpu(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
) -> Float[Array, "b n h d"]:
  """`BLOCK_ON_CPU` queries of a head at a time, each a column.

  XLA for CPUs makes vector code of sums and maxima over a leading dimension,
  not over the last one: so the keys, which softmax sums over, come first.
  """
  width = q.shape[-1]

  @_recomputed
  def block(queries, keys, values):
    logits = jnp.einsum(
      "bnd,bds->bns", keys, queries, preferred_element_type=jnp.float32
    )
    logits *= width**-0.5
    # The largest is only there to keep exp from overflowing.
    top = jax.lax.stop_gradient(logits.max(1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(1, keepdims=True)
    out = jnp.einsum(
      "bdn,bns->bds",
      values,
      weights.astype(values.dtype),
      preferred_element_type=jnp.float32,
    )
    return (out / total).astype(values.dtype)

  def head(queries, keys, values):
    return jax.lax.map(lambda x: block(x, keys, values), queries)

  queries = _cut(q, BLOCK_ON_CPU).transpose(3, 1, 0, 4, 2)  # h c b d s
  keys = k.transpose(2, 0, 1, 3)  # h b n d
  values = v.transpose(2, 0, 3, 1)  # h b d n
  out = jax.lax.map(lambda x: head(*x), (queries, keys, values))
  return _joined(out.transpose(2, 1, 4, 0, 3), q.shape[1])


def _recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
  """A function of which the backward pass keeps its arguments alone.

  Not by `jax.checkpoint`: a policy of the block around it, that keeps matrix
  products, would keep those in here as well.
  """
  made = jax.custom_vjp(function)

  def forward(*args):
    return function(*args), args

  def backward(args, cotangent):
    return jax.vjp(function, *args)[1](cotangent)

  made.defvjp(forward, backward)
  return made


def _cut(x: Array, block: int) -> Array:
  """[b, n, ...] as [b, count, size, ...], padded with zeros."""
  n = x.shape[1]
  count = -(-n // block)
  size = -(-n // (count * MULTIPLE)) * MULTIPLE
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, count * size - n)
  return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:])


def _joined(x: Array, n: int) -> Array:
  """The inverse of `_cut`."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]
