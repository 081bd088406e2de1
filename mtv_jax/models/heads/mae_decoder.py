"""MAE decoder (He et al. 2022)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.positions import sincos_positions


def visible_slots(
  keep: Int[Array, "b k"], patches: int
) -> tuple[Int[Array, "b {patches}"], Bool[Array, "b {patches}"]]:
  """Index of each patch among the visible patches.

  Compares instead of scattering, so that it stays local to the rows of a
  sharded batch.

  Returns:
    Each patch's index in `keep` (`k` if hidden), and whether it is visible.
  """
  match = keep[:, None, :] == jnp.arange(patches)[None, :, None]
  visible = match.any(-1)
  return jnp.where(visible, match.argmax(-1), keep.shape[1]), visible


class MaskedDecoder(nn.Module):
  """MAE decoder: predicts the pixels of all patches from the visible tokens.

  Embeds the encoded tokens, replaces each hidden patch by a learned mask token,
  and adds 2-D sine-cosine positions to the patches (not to CLS and registers,
  which also attend). Transformer blocks, a norm and a linear layer follow.
  Computes in the dtype of its input; parameters and norms are float32.
  """

  outputs: int  # Values per patch.
  width: int = 512
  depth: int = 8
  heads: int = 16
  mlp_ratio: int = 4
  remat: str = "none"  # remat, scan, mesh: see `stack.run_stack`.
  scan: bool = True
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b k d"],
    prefix: Float[Array, "b p d"],
    keep: Int[Array, "b k"],
    grid: tuple[int, int],
  ) -> Float[Array, "b n {self.outputs}"]:
    """Predicts all patches of a grid, row by row, in float32.

    Args:
      tokens: encoded visible patches, in the order of `keep`.
      prefix: encoded CLS and register tokens, if any.
      keep: indices of the visible patches.
      grid: rows and columns of patches.
    """
    dtype = tokens.dtype
    b, k, d = tokens.shape
    slots, _ = visible_slots(keep, grid[0] * grid[1])
    x = layers.Dense(self.width, dtype=dtype, name="embed")(
      jnp.concatenate([prefix, tokens], axis=1)
    )
    prefix, x = x[:, : prefix.shape[1]], x[:, prefix.shape[1] :]
    mask = self.param("mask_token", nn.initializers.normal(0.02), (self.width,))
    mask = jnp.broadcast_to(mask.astype(dtype), (b, 1, self.width))
    x = jnp.concatenate([x, mask], axis=1)  # [B, K + 1, D]
    x = jnp.take_along_axis(x, slots[:, :, None], axis=1)  # [B, N, D]
    x = x + jnp.asarray(sincos_positions(grid, self.width), dtype)
    x = jnp.concatenate([prefix, x], axis=1)  # [B, P + N, D]

    block = layers.Block(
      heads=self.heads,
      mlp_dim=self.mlp_ratio * self.width,
      gelu="exact",
      dtype=dtype,
      parent=None,
    )
    x, _ = stack_lib.run_stack(
      block,
      self.param(
        "blocks", stack_lib.stacked_init(block, self.depth, self.width)
      ),
      x,
      remat=self.remat,
      scan=self.scan,
      mesh=self.mesh,
    )
    x = layers.norm(1e-6, dtype, "norm")(x[:, prefix.shape[1] :])  # [B, N, D]
    y = layers.Dense(self.outputs, dtype=dtype, name="predict")(x)
    return y.astype(jnp.float32)
