"""Transformer layers of both towers: attention, MLP, block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mtv_jax.config.options import Range
from mtv_jax.models import attention as attention_lib
from mtv_jax.models import positions
from mtv_jax.models.linear import linear

# Limits of tower sizes. A malformed file with larger sizes would exhaust memory
# before the check against its tensors.
Width = Annotated[int, Range(min=1, max=1 << 17)]  # Channels, or heads.
NumLayers = Annotated[int, Range(min=1, max=1 << 10)]
Length = Annotated[int, Range(min=1, max=1 << 16)]  # Tokens.
VocabularySize = Annotated[int, Range(min=1, max=1 << 24)]

# Attention projections with a bias: all, none, or queries and values (BEiT,
# DINOv3).
QkvBias = Literal["all", "query_value", "none"]
_QKV_BIASES = {
  "all": (True, True, True),
  "query_value": (True, False, True),
  "none": (False, False, False),
}
NormKind = Literal["layer", "rms"]
# 'tanh': approximated (SigLIP, big_vision); 'exact': by the error function
# (DINOv2); 'quick': x * sigmoid(1.702 x) (CLIP); a plain 'relu' (TIPS' text).
Gelu = Literal["tanh", "exact", "quick", "relu"]
MlpKind = Literal["plain", "swiglu"]

# Glorot and Bengio 2010; MLP biases start as in big_vision's ViT.
kernel_init = nn.initializers.xavier_uniform()
mlp_bias_init = nn.initializers.normal(1e-6)


def fused_init(
  key: Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
  """Xavier-uniform for a fused kernel `[D, n*D]` of n projections.

  The fan-out is D, as for one projection. With n*D, as in `xavier_uniform` of
  the fused kernel, attention would start sqrt((n + 1) / 2) times too small.
  """
  limit = np.sqrt(6 / (2 * shape[0]))
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def gelu(x: Float[Array, "*n"], kind: Gelu) -> Float[Array, "*n"]:
  """GELU (Hendrycks and Gimpel 2016); for `kind`, see `Gelu`."""
  if kind == "relu":
    return jax.nn.relu(x)
  if kind == "quick":
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=kind == "tanh")


def norm(
  eps: float, dtype: Any, name: str, kind: NormKind = "layer"
) -> nn.LayerNorm | nn.RMSNorm:
  """LayerNorm or RMSNorm with statistics in float32 for any compute dtype.

  The variance is computed from centred values: E[x^2] - E[x]^2 cancels in the
  few channels in which CLIP and DINOv2 have activations in the hundreds.
  """
  if kind == "rms":
    return nn.RMSNorm(eps, dtype=dtype, name=name)
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def project(
  pooled: Float[Array, "b d"], features: int | None, *, bias: bool = False
) -> Float[Array, "b e"]:
  """Projects pooled vectors with the calling module's layer `projection`.

  The identity if `features` is None. In float32: the product is small, and the
  embeddings are divided by a temperature later.
  """
  pooled = pooled.astype(jnp.float32)
  if features is None:
    return pooled
  return nn.Dense(features, use_bias=bias, name="projection")(pooled)


class Dense(nn.Module):
  """Linear layer x W + b; W starts Xavier-uniform by default."""

  features: int
  kernel_init: Callable = kernel_init
  bias_init: Callable = nn.initializers.zeros
  dtype: Any = jnp.float32  # Computation dtype; parameters are float32.
  use_bias: bool = True
  linear_fn: Callable[..., Array] = linear  # (x, W, b) -> x W + b

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    shape = (x.shape[-1], self.features)
    arrays = [x, self.param("kernel", self.kernel_init, shape)]
    if self.use_bias:
      arrays.append(self.param("bias", self.bias_init, (self.features,)))
    return self.linear_fn(*(a.astype(self.dtype) for a in arrays))


class FusedDense(nn.Module):
  """Several linear layers with one kernel: QKV, or keys and values.

  Columns are ordered (head, q|k|v, dim), so that sharding them splits whole
  heads and adds no communication. Each layer is a separate product: TPUs would
  copy a joint result to split it.
  """

  features: int  # Per layer.
  heads: int
  use_bias: tuple[bool, ...]  # Per layer; False fixes its bias at 0.
  dtype: Any = jnp.float32
  linear_fn: Callable[..., Array] = linear  # See `Dense`.

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n e"]
  ) -> tuple[Float[Array, "b n h d"], ...]:
    shape = (self.heads, len(self.use_bias), self.features // self.heads)
    width = math.prod(shape)
    kernel = self.param("kernel", fused_init, (x.shape[-1], width))
    kernel = kernel.astype(self.dtype).reshape(-1, *shape)  # [E, H, 3, d]
    if any(self.use_bias):
      bias = self.param("bias", nn.initializers.zeros, (width,))
      bias = bias.astype(self.dtype).reshape(shape)  # [H, 3, d]
    x = x.astype(self.dtype)
    outputs = []
    for i, has_bias in enumerate(self.use_bias):
      arrays = [kernel[:, :, i].reshape(-1, self.features)]
      if has_bias:
        arrays.append(bias[:, i].reshape(-1))
      y = checkpoint_name(self.linear_fn(x, *arrays), "qkv")
      outputs.append(y.reshape(*x.shape[:-1], self.heads, -1))  # [B, N, H, d]
    return tuple(outputs)


class Attention(nn.Module):
  """Multi-head self-attention with a fused projection, see `FusedDense`."""

  heads: int
  causal: bool = False  # A token attends to itself and earlier tokens.
  qkv_bias: QkvBias = "all"
  out_bias: bool = True
  dtype: Any = jnp.float32
  # (q, k, v, causal=, valid=) -> softmax(q k^T / sqrt(d)) v, checkpoint-named.
  attention_fn: Callable[..., Array] = attention_lib.attention
  linear_fn: Callable[..., Array] = linear  # See `Dense`.

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    angles: Float[Array, "#b n a"] | None = None,
    valid: Bool[Array, "b n"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Attends to the tokens, or to the `valid` ones.

    `angles` rotate queries and keys, see `positions.rotate`.
    """
    b, n, d = x.shape
    kwargs = dict(dtype=self.dtype, linear_fn=self.linear_fn)
    biases = _QKV_BIASES[self.qkv_bias]
    q, k, v = FusedDense(d, self.heads, biases, name="qkv", **kwargs)(x)
    if angles is not None:
      q, k = positions.rotate(q, angles), positions.rotate(k, angles)
    masks = {} if valid is None else {"valid": valid}
    y = self.attention_fn(q, k, v, causal=self.causal, **masks)  # [B, N, H, d]
    out = Dense(d, use_bias=self.out_bias, name="out", **kwargs)
    return checkpoint_name(out(y.reshape(b, n, d)), "attention_out")


class CrossAttention(nn.Module):
  """Multi-head cross-attention to tokens, whose width may differ."""

  heads: int
  dtype: Any
  # (q [..., H, d], k and v [B, N, H, d]) -> [B, ..., H, d]
  attention_fn: Callable[..., Array]
  # If False, queries are not projected, and keys and values lack biases.
  projects_queries: bool = True

  @nn.compact
  def __call__(
    self, queries: Float[Array, "*q d"], tokens: Float[Array, "b n e"]
  ) -> Float[Array, "b *y d"]:
    d = queries.shape[-1]
    q = queries.astype(self.dtype)
    if self.projects_queries:
      q = Dense(d, dtype=self.dtype, name="q")(queries)
    q = checkpoint_name(q, "qkv")
    q = q.reshape(*q.shape[:-1], self.heads, -1)  # [..., H, d]
    biases = (self.projects_queries,) * 2
    kv = FusedDense(d, self.heads, biases, dtype=self.dtype, name="kv")
    y = self.attention_fn(q, *kv(tokens))  # [B, ..., H, d]
    y = checkpoint_name(y.reshape(*y.shape[:-2], d), "attention")
    out = Dense(d, dtype=self.dtype, name="out")
    return checkpoint_name(out(y), "attention_out")


class Mlp(nn.Module):
  """MLP with GELU, or SwiGLU (Shazeer 2020).

  SwiGLU is fc2(silu(gate(x)) * fc1(x)), with separate kernels for both halves,
  so that a device shard has matching hidden units. `norm_fn` builds a norm of
  the input of fc2 (EVA-02).
  """

  dim: int
  gelu: str = "tanh"
  kind: str = "plain"
  dtype: Any = jnp.float32
  use_bias: bool = True
  norm_fn: Callable[..., nn.Module] | None = None
  linear_fn: Callable[..., Array] = linear  # See `Dense`.

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    dense = functools.partial(
      Dense, bias_init=mlp_bias_init, dtype=self.dtype,
      use_bias=self.use_bias, linear_fn=self.linear_fn,
    )  # fmt: skip
    y = checkpoint_name(dense(self.dim, name="fc1")(x), "mlp_hidden")
    if self.kind == "swiglu":
      gate = checkpoint_name(dense(self.dim, name="gate")(x), "mlp_hidden")
      y = jax.nn.silu(gate) * y
    else:
      y = gelu(y, self.gelu)
    if self.norm_fn is not None:
      y = self.norm_fn(name="norm")(y)
    return checkpoint_name(dense(x.shape[-1], name="fc2")(y), "mlp_out")


class Block(nn.Module):
  """Pre-norm transformer block, with optional layer scale.

  x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)); layer scale
  as in CaiT (Touvron et al. 2021). Drop path scales each example's branches,
  see `drop_path_scales`.
  """

  heads: int
  mlp_dim: int
  causal: bool = False
  gelu: str = "tanh"
  mlp: str = "plain"
  mlp_norm: bool = False
  layer_scale: float | None = None
  norm_eps: float = 1e-6
  rope: positions.Rope | None = None
  qkv_bias: QkvBias = "all"
  bias: bool = True  # In the other linear layers.
  norm_kind: NormKind = "layer"
  dtype: Any = jnp.float32
  attention_fn: Callable[..., Array] = attention_lib.attention
  linear_fn: Callable[..., Array] = linear  # See `Dense`.

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    coordinates: Float[Array, "#b k 2"] | None = None,
    valid: Bool[Array, "b n"] | None = None,
    *,
    drop_path: Float[Array, "b 2"] | None = None,
    rope_draw: Float[Array, "2 2"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Runs the block on the tokens.

    `rope` rotates the last k tokens, at (y, x) `coordinates`, which `rope_draw`
    augments (`Rope.draw`). `valid`: tokens to attend to; all by default.
    """

    def scale_branch(y, branch):
      if self.layer_scale is not None:
        init = nn.initializers.constant(self.layer_scale)
        scale = self.param(f"scale{branch}", init, (x.shape[-1],))
        y = y * scale.astype(y.dtype)
      if drop_path is None:
        return y
      # In float32: 1 / keep rounded to bfloat16 would bias the expectation.
      return (y * drop_path[:, branch - 1, None, None]).astype(y.dtype)

    kwargs = dict(dtype=self.dtype, linear_fn=self.linear_fn)
    attention = Attention(
      self.heads, self.causal, self.qkv_bias, self.bias,
      attention_fn=self.attention_fn, name="attention", **kwargs,
    )  # fmt: skip
    norm_fn = functools.partial(
      norm, self.norm_eps, self.dtype, kind=self.norm_kind
    )
    mlp = Mlp(
      self.mlp_dim, self.gelu, self.mlp, use_bias=self.bias,
      norm_fn=norm_fn if self.mlp_norm else None, name="mlp", **kwargs,
    )  # fmt: skip
    angles = None
    if self.rope is not None and coordinates is not None:
      angles = self._compute_angles(x, coordinates, rope_draw)
    y = norm_fn(name="norm1")(x)
    x = x + scale_branch(attention(y, angles, valid), 1)
    y = norm_fn(name="norm2")(x)
    return x + scale_branch(mlp(y), 2)

  def _compute_angles(self, x, coordinates, draw):
    """Angles of all tokens; zero for the prefix, which lacks coordinates."""
    if draw is not None:
      coordinates = coordinates * draw[0] + draw[1]
    angles = self.rope.angles(coordinates, x.shape[-1] // self.heads)
    prefix = x.shape[1] - angles.shape[1]
    return jnp.pad(angles, ((0, 0), (prefix, 0), (0, 0)))


ATTENTION_POOLS = ("map", "query")  # Values of `ViTSpec.pool`.


class MapPool(nn.Module):
  """Multi-head attention pooling of the (`valid`) tokens by a learned probe.

  In SigLIP (Zhai et al. 2022) x + mlp(norm(x)) follows. AIMv2 (`mlp_dim=None`)
  lacks the MLP, the query projection, and the biases of keys and values.
  """

  heads: int
  mlp_dim: int | None
  gelu: str = "tanh"
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "b n d"], valid: Bool[Array, "b n"] | None = None
  ) -> Float[Array, "b d"]:
    # As in big_vision: xavier_uniform of a [1, 1, D] array.
    shape = (1, tokens.shape[-1])
    probe = self.param("probe", lambda key: kernel_init(key, shape)[0])
    attend = functools.partial(_attend, valid=valid)
    has_mlp = self.mlp_dim is not None
    x = CrossAttention(
      self.heads, self.dtype, attend, has_mlp, name="attention"
    )(probe, tokens)
    if not has_mlp:
      return x
    mlp = Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(norm(self.norm_eps, self.dtype, "norm")(x))


def build_pool(spec: Any, dtype: Any) -> MapPool:
  """Builds the module `pool` of an image tower with attention pooling."""
  heads = spec.pool_heads or spec.heads
  mlp_dim = spec.pool_mlp_dim or spec.mlp_dim
  if spec.pool == "query":
    mlp_dim = None
  return MapPool(heads, mlp_dim, spec.gelu, spec.norm_eps, dtype, name="pool")


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
