"""Attention pooling, as in SigLIP (MAP) and AIMv2."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mtv_jax.models import layers

KINDS = ("map", "query")  # `ViTSpec.pool` values for attention pooling.


class MapPool(nn.Module):
  """Multi-head attention pooling (Zhai et al. 2022), as in SigLIP.

  A learned probe attends to the tokens; x + mlp(norm(x)) follows.
  """

  heads: int
  mlp_dim: int
  gelu: str = "tanh"
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b n d"],
    valid: Bool[Array, "b n"] | None = None,
  ) -> Float[Array, "b d"]:
    """Pools the tokens, or the `valid` ones."""
    x = layers.CrossAttention(
      self.heads,
      self.dtype,
      functools.partial(_attend, valid=valid),
      name="attention",
    )(_probe(self, tokens), tokens)
    y = layers.norm(self.norm_eps, self.dtype, "norm")(x)
    mlp = layers.Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(y)


class QueryPool(nn.Module):
  """Attention with a learned query, then a linear layer (AIMv2).

  No query projection, no bias for keys and values, no MLP.
  """

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b n d"],
    valid: Bool[Array, "b n"] | None = None,
  ) -> Float[Array, "b d"]:
    """Pools the tokens, or the `valid` ones."""
    return layers.CrossAttention(
      self.heads,
      self.dtype,
      functools.partial(_attend, valid=valid),
      projects_queries=False,
      name="attention",
    )(_probe(self, tokens), tokens)


def build(spec: Any, dtype: Any) -> MapPool | QueryPool:
  """Builds the module `pool` of an image tower with attention pooling."""
  heads = spec.pool_heads or spec.heads
  if spec.pool == "query":
    return QueryPool(heads, dtype, name="pool")
  mlp_dim = spec.pool_mlp_dim or spec.mlp_dim
  return MapPool(heads, mlp_dim, spec.gelu, spec.norm_eps, dtype, name="pool")


def _probe(module: nn.Module, tokens: Array) -> Float[Array, " d"]:
  # big_vision's: xavier_uniform of a [1, 1, D] array.
  init, shape = nn.initializers.xavier_uniform(), (1, tokens.shape[-1])
  return module.param("probe", lambda key: init(key, shape, jnp.float32)[0])


def _attend(
  q: Float[Array, "h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
  *,
  valid: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b h d"]:
  """Attention with one query, shared by all examples."""
  # Not jax.nn.dot_product_attention: XLA for CPUs may fail to compile its
  # gradient for one bfloat16 query.
  logits = jnp.einsum("hd,bnhd->bhn", q, k, preferred_element_type=jnp.float32)
  if valid is not None:
    logits = jnp.where(valid[:, None], logits, jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
  return jnp.einsum("bhn,bnhd->bhd", weights, v)
