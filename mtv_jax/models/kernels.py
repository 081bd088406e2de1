"""Matrix products and attention, formulated for each platform.

`linear` and `attention` are what `layers.Dense` and `layers.Attention` compute
by default. Both equal the plain formula in value and gradient: accelerators
run that formula, CPUs one that XLA compiles to faster code, and long sequences
are computed in blocks of queries.

An image of 960 pixels in patches of 16 has 3601 tokens, whose logits take 0.6
GB per layer and image in float32. Every query sees all keys at once, so blocks
of queries need no online softmax; memory grows with the tokens instead of their
square, and the backward pass recomputes each block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Sequence lengths from which attention runs in blocks; queries per block. A
# CPU gains long before memory is short: a block's logits stay in its cache.
CPU_BLOCKWISE_LENGTH = 512
BLOCKWISE_LENGTH = 2048
CPU_BLOCK = 64
BLOCK = 512
# Blocks are multiples of a CPU's lanes and of a TPU's tiles.
MULTIPLE = 16


def _plain_linear(x, kernel, bias):
  y = x @ kernel
  return y if bias is None else y + bias


@jax.custom_vjp
def linear(
  x: Float[Array, "*b d"],
  kernel: Float[Array, "d e"],
  bias: Float[Array, " e"] | None = None,
) -> Float[Array, "*b e"]:
  """x kernel + bias, with gradients that are fast on CPUs too.

  XLA for CPUs copies one operand of a product of three-dimensional arrays, and
  sums the gradient of a bias value by value, in three times the time of a
  product with a row of ones. Forward-mode differentiation is not supported.
  """
  return _plain_linear(x, kernel, bias)


def _linear_forward(x, kernel, bias):
  return _plain_linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(residuals, cotangent):
  def cpu(x, kernel, bias, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])  # [B, e]
    if bias is not None:
      bias = (jnp.ones((1, len(rows)), rows.dtype) @ rows)[0]
    return (
      (rows @ kernel.T).reshape(x.shape),
      x.reshape(-1, x.shape[-1]).T @ rows,
      bias,
    )

  def default(x, kernel, bias, cotangent):
    return jax.vjp(_plain_linear, x, kernel, bias)[1](cotangent)

  return jax.lax.platform_dependent(
    *residuals, cotangent, cpu=cpu, default=default
  )


linear.defvjp(_linear_forward, _linear_backward)


def attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
  *,
  causal: bool = False,
) -> Float[Array, "b n h d"]:
  """softmax(q k^T / sqrt(d)) v, the softmax in float32.

  With `causal`, where a token sees only itself and those before it, always by
  `jax.nn.dot_product_attention`.
  """
  plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
  n = q.shape[1]
  if causal or n < CPU_BLOCKWISE_LENGTH:
    return plain(q, k, v)
  default = blockwise_attention if n >= BLOCKWISE_LENGTH else plain
  return jax.lax.platform_dependent(q, k, v, cpu=cpu_attention, default=default)


def blockwise_attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
) -> Float[Array, "b n h d"]:
  """Attention of `BLOCK` queries at a time, of all heads."""
  block = _save_only_args(jax.nn.dot_product_attention)
  blocks = jnp.moveaxis(_split_blocks(q, BLOCK), 1, 0)  # [c, b, s, h, d]
  out = jax.lax.map(lambda queries: block(queries, k, v), blocks)
  return _join_blocks(jnp.moveaxis(out, 0, 1), q.shape[1])


def cpu_attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
) -> Float[Array, "b n h d"]:
  """Attention of `CPU_BLOCK` queries of a head at a time, each a column.

  XLA for CPUs vectorises sums and maxima over a leading dimension, not over the
  last one: so the keys, which softmax sums over, come first.
  """
  width = q.shape[-1]

  @_save_only_args
  def block(queries, keys, values):
    logits = jnp.einsum(
      "bnd,bds->bns", keys, queries, preferred_element_type=jnp.float32
    )
    logits *= width**-0.5
    # The maximum only prevents an overflow of exp.
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

  queries = _split_blocks(q, CPU_BLOCK).transpose(3, 1, 0, 4, 2)  # h c b d s
  keys = k.transpose(2, 0, 1, 3)  # h b n d
  values = v.transpose(2, 0, 3, 1)  # h b d n
  out = jax.lax.map(lambda x: head(*x), (queries, keys, values))
  return _join_blocks(out.transpose(2, 1, 4, 0, 3), q.shape[1])


def _save_only_args(function: Callable[..., Array]) -> Callable[..., Array]:
  """A function whose backward pass saves its arguments and recomputes the rest.

  Not by `jax.checkpoint`: a policy of the block around it that saves matrix
  products would save those in here too.
  """
  wrapped = jax.custom_vjp(function)

  def forward(*args):
    return function(*args), args

  def backward(args, cotangent):
    return jax.vjp(function, *args)[1](cotangent)

  wrapped.defvjp(forward, backward)
  return wrapped


def _split_blocks(x: Array, block: int) -> Array:
  """[b, n, ...] as [b, count, size, ...], padded with zeros."""
  n = x.shape[1]
  count = -(-n // block)
  size = -(-n // (count * MULTIPLE)) * MULTIPLE
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, count * size - n)
  return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:])


def _join_blocks(x: Array, n: int) -> Array:
  """The inverse of `_split_blocks`."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]
