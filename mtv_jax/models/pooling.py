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
    x = _ProbeAttention(self.heads, self.dtype, name="attention")(probe, tokens)
    y = layers.norm(self.norm_eps, self.dtype, "norm")(x)
    mlp = layers.Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(y)


class _ProbeAttention(nn.Module):
  """Cross-attention of one query, the same for every example."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(
    self, probe: Float[Array, " d"], tokens: Float[Array, "b n d"]
  ) -> Float[Array, "b d"]:
    b, n, d = tokens.shape

    def dense(features, init, name):
      return layers.Dense(features, init, dtype=self.dtype, name=name)

    q = dense(d, layers.kernel_init, "q")(probe)
    # Columns ordered (head, k|v, dim), for the reason given at `Attention`.
    kv = dense(2 * d, layers.fused_init, "kv")(tokens)
    kv = kv.reshape(b, n, self.heads, 2, d // self.heads)
    # Not jax.nn.dot_product_attention: XLA for CPUs may fail to compile its
    # gradient for one query in bfloat16.
    q, k, v = q.reshape(self.heads, -1), kv[:, :, :, 0], kv[:, :, :, 1]
    logits = jnp.einsum(
      "hd,bnhd->bhn", q, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(self.dtype)
    y = jnp.einsum("bhn,bnhd->bhd", weights, v)
    return dense(d, layers.kernel_init, "out")(y.reshape(b, d))
