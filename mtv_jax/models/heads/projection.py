"""Prototype head (DINO, iBOT), adaptor head (AM-RADIO), L2 normalisation.

The adaptor head, with three layers, is also LeJEPA's projector.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mtv_jax.models import layers

# DINO's; its trunc_normal_ truncates at +-2, a hundred standard deviations.
_mlp_init = nn.initializers.normal(0.02)


def unit(x: Float[Array, "*n"], axis: int = -1) -> Float[Array, "*n"]:
  """L2 normalisation over an axis, in float32.

  The norm is floored at 1e-6, inside the root, so that the gradient is finite
  at zero.
  """
  x = x.astype(jnp.float32)
  squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


class PrototypeHead(nn.Module):
  """DINO's projection head (Caron et al. 2021, appendix C).

  An MLP with GELU, a bottleneck of unit length, and a last layer without bias.
  The last layer's columns are the prototypes, with weight normalisation
  (Salimans and Kingma 2016): direction `last_layer/kernel`, and a learned
  length `last_layer/scale` that starts at 1, as in DINOv2.

  MLP and prototypes are called separately: the logits `head(x) @
  head.prototypes()` are far larger than both factors, so the loss computes them
  in chunks.
  """

  count: int  # Prototypes (K).
  hidden: int = 2048
  bottleneck: int = 256  # d.
  layers: int = 3  # Layers of the MLP.

  def setup(self):
    self.mlp = _Mlp(self.hidden, self.bottleneck, self.layers)
    self.last_layer = _Directions(self.count)

  def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b d"]:
    """Bottleneck vectors: float32, unit length.

    The MLP computes in the dtype of `x`, pooled vectors or patches.
    """
    if self.is_initializing():
      self.prototypes()
    return unit(self.mlp(x))

  def prototypes(self) -> Float[Array, "d k"]:
    """The last layer: one prototype per column."""
    return self.last_layer(self.bottleneck)


class Adaptor(nn.Module):
  """Adaptor head of AM-RADIO (Ranzinger et al. 2023, section 3.2).

  Linear, LayerNorm, GELU, linear, from the student's features to a teacher's.
  Later releases may insert residual blocks.
  """

  out: int  # Channels of the teacher's features (E).
  hidden: int
  norm_eps: float = 1e-6
  layers: int = 2  # Layers of the MLP.

  def setup(self):
    self.mlp = _Mlp(
      self.hidden,
      self.out,
      self.layers,
      norm_eps=self.norm_eps,
      kernel_init=layers.kernel_init,
    )

  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b {self.out}"]:
    """Predicted features, float32; computes in the dtype of `x`."""
    return self.mlp(x).astype(jnp.float32)


class _Mlp(nn.Module):
  """Layers fc1 .. fcN, with an optional norm and exact GELU between them."""

  hidden: int
  out: int
  layers: int
  norm_eps: float | None = None  # None: no norm.
  kernel_init: Callable = _mlp_init

  @nn.compact
  def __call__(self, x):
    for i in range(1, self.layers + 1):
      is_last = i == self.layers
      size = self.out if is_last else self.hidden
      dense = layers.Dense(
        size, kernel_init=self.kernel_init, dtype=x.dtype, name=f"fc{i}"
      )
      x = dense(x)
      if not is_last:
        if self.norm_eps is not None:
          x = layers.norm(self.norm_eps, x.dtype, f"norm{i}")(x)
        x = jax.nn.gelu(x, approximate=False)
    return x


class _Directions(nn.Module):
  """Weight-normalised columns: learned direction and length."""

  count: int

  @nn.compact
  def __call__(self, channels):
    # Only the kernel's direction matters, but its length sets how fast Adam
    # rotates it. Torch's default scale for linear layers, as in DINO.
    init = nn.initializers.normal((3 * channels) ** -0.5)
    kernel = self.param("kernel", init, (channels, self.count))
    scale = self.param("scale", nn.initializers.ones, (self.count,))
    return unit(kernel, axis=0) * scale
