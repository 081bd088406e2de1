"""Multi-head attention pooling (MAP)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mtv_jax.models import layers


class MapPool(nn.Module):
  """Multi-head attention pooling (Zhai et al. 2022), as in SigLIP.

  A learnt probe attends to the tokens; then x + mlp(norm(x)).
  """

  heads: int
  mlp_dim: int
  gelu: str = "tanh"
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    d = tokens.shape[-1]
    # big_vision's: xavier_uniform of a [1, 1, D] array.
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", lambda key: init(key, (1, d), jnp.float32)[0])
    x = layers.CrossAttention(
      self.heads, self.dtype, _attend, name="attention"
    )(probe, tokens)
    y = layers.norm(self.norm_eps, self.dtype, "norm")(x)
    mlp = layers.Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(y)


def _attend(
  q: Float[Array, "h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b h d"]:
  """Attention of one query, the same for every example."""
  # Not jax.nn.dot_product_attention: XLA for CPUs may fail to compile its
  # gradient for one query in bfloat16.
  logits = jnp.einsum("hd,bnhd->bhn", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
  return jnp.einsum("bhn,bnhd->bhd", weights, v)
