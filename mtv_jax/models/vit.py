"""Image tower: a ViT (Dosovitskiy et al. 2021) with the options of `ViTSpec`.

Covers the towers of SigLIP, CLIP, DINOv2, DINOv3, AIMv2, RADIO, TIPS, EVA-02
and the Perception Encoder (PE).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from mtv_jax.config.options import PositiveFloat, Range, Side
from mtv_jax.models import layers as layers_lib
from mtv_jax.models import positions as positions_lib
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.layers import NumLayers, Width
from mtv_jax.parallel.rules import constrain_batch
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import pytree_dataclass

# How `pooled` is computed: attention pooling of the patches ('map', 'query'),
# the CLS token, or the mean over patches, all after the final norm, if any.
Pool = Literal["map", "query", "cls", "mean"]
# 'learned' or 'sincos' (fixed, not parameters; MAE), both stored for
# `image_size`. 'sincos_xy': fixed, for each image's own grid, columns first
# (AIMv2). 'rope': rotations of queries and keys (DINOv3). 'learned_rope':
# learned and rotary (PE, EVA-02).
Positions = Literal["learned", "sincos", "sincos_xy", "rope", "learned_rope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSpec:
  """Architecture of an image tower; raises InputError if inconsistent."""

  # Pixels per side of the stored positions; resampled for any other size.
  image_size: Side = 224
  patch_size: Side = 16
  width: Width = 768  # Channels of a token (D).
  depth: NumLayers = 12
  heads: Width = 12
  mlp_dim: Width = 3072  # For SwiGLU, the width of each half.
  pool: Pool = "map"
  # Prefix tokens that 'cls' concatenates (RADIO: several CLS tokens).
  pool_tokens: tuple[int, ...] = (0,)
  pool_prefix: bool = False  # Whether pooling includes the prefix (PE).
  pool_heads: Width | None = None  # Heads of the pooling; default: `heads`.
  pool_mlp_dim: Width | None = None  # MLP of 'map'; defaults to `mlp_dim`.
  pool_norm: bool = False  # Norm of `pooled`, without final_norm (EVA-02).
  positions: Positions = "learned"
  rope: positions_lib.Rope | None = None  # `Rope()` for rotary positions.
  cls_token: bool = False  # Has no position embedding.
  # Darcet et al. 2024.
  registers: Annotated[int, Range(min=0, max=1 << 10)] = 0
  layer_scale: float | None = None  # Initial value; None: no layer scale.
  pre_norm: bool = False  # Norm between embedding and blocks (CLIP).
  patch_norm: bool = False  # Norm before the positions are added (AIMv2).
  final_norm: bool = True  # Norm after the blocks; RADIO has none.
  norm_kind: layers_lib.NormKind = "layer"  # Or 'rms' (AIMv2).
  patch_bias: bool = True  # Bias of the patch embedding; CLIP has none.
  gelu: layers_lib.Gelu = "tanh"
  mlp: layers_lib.MlpKind = (
    "plain"  # Or 'swiglu' (DINOv2's giant, DINOv3's S+).
  )
  mlp_norm: bool = False  # Norm before the MLP's last layer (EVA-02).
  qkv_bias: layers_lib.QkvBias = "all"
  bias: bool = True  # In the blocks' other linear layers; AIMv2 has none.
  norm_eps: PositiveFloat = 1e-6
  projection: Width | None = None  # Output channels of a layer on `pooled`.
  mask_token: bool = False
  position_resize: positions_lib.ResizeMethod = "bicubic"

  def __post_init__(self):
    stack_lib.check_tower(self)
    if self.pool == "cls" and not self.cls_token:
      raise InputError("ViTSpec.pool 'cls' needs cls_token=True.")
    if not all(0 <= i < max(self.prefix, 1) for i in self.pool_tokens):
      raise InputError(
        f"ViTSpec.pool_tokens {self.pool_tokens}: expected indices below "
        f"{self.prefix}."
      )
    self.grid_of(self.image_size, self.image_size)
    if "rope" not in self.positions:
      if self.rope is not None:
        raise InputError("ViTSpec.rope is unused: set positions='rope'.")
    elif self.width // self.heads % 4:
      raise InputError(
        f"ViTSpec.positions {self.positions!r} needs a multiple of 4 channels "
        "per head."
      )
    elif self.rope is None:
      object.__setattr__(self, "rope", positions_lib.Rope())

  @functools.cached_property
  def grid(self) -> int:
    """Patches per side at `image_size`."""
    return self.image_size // self.patch_size

  @functools.cached_property
  def prefix(self) -> int:
    """Tokens before the patches: CLS, then registers."""
    return int(self.cls_token) + self.registers

  @property
  def embed_dim(self) -> int:
    """Channels of `pooled` (E)."""
    if self.projection:
      return self.projection
    return self.width * (len(self.pool_tokens) if self.pool == "cls" else 1)

  def grid_of(self, height: int, width: int) -> tuple[int, int]:
    """Patch rows and columns of an image of `height` x `width` pixels."""
    p = self.patch_size
    if height < p or width < p or height % p or width % p:
      y, x = (max(p, round(side / p) * p) for side in (height, width))
      raise InputError(
        f"An image of {height}x{width} pixels is not divisible into patches of "
        f"{p}x{p}; the nearest valid size is {y}x{x}."
      )
    return height // p, width // p


@pytree_dataclass
class ImageOutput:
  """Output of the image tower: P prefix tokens and N patches."""

  patches: Float[Array, "b n d"]  # Normed; row by row, or ordered as `keep`.
  prefix: Float[Array, "b p d"]  # CLS (if any), then registers; also normed.
  pooled: Float[Array, "b e"]  # Image embedding, float32, not normalised.
  intermediates: Mapping[int, Float[Array, "b p+n d"]]  # Before the final norm.


def check_images(images: Array) -> None:
  """Raises InputError unless the images are `[b, h, w, 3]`."""
  if images.ndim != 4 or images.shape[-1] != 3:
    raise InputError(
      f"Expected images [batch, height, width, 3], got {images.shape}. Repeat "
      "the channel of grey images; transpose images with channels first."
    )


def embed_pooled(
  spec: ViTSpec, pooled: Float[Array, "b d"]
) -> Float[Array, "b e"]:
  """Pooled tokens to an image tower's embedding: `pool_norm`, projection."""
  if spec.pool_norm:
    eps, kind = spec.norm_eps, spec.norm_kind
    pooled = layers_lib.norm(eps, jnp.float32, "pool_norm", kind)(pooled)
  return layers_lib.project(pooled, spec.projection)


def patchify(
  images: Float[Array, "b h w c"], patch_size: int
) -> Float[Array, "b n f"]:
  """Cuts images into patches, row by row; features ordered (y, x, channel)."""
  b, h, w, c = images.shape
  p = patch_size
  x = images.reshape(b, h // p, p, w // p, p, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)


class ViT(stack_lib.Tower):
  """The image tower."""

  spec: ViTSpec
  drop_path: float = 0.0  # Both: see `stack.drop_path_scales`.
  drop_path_uniform: bool = True

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b h w c"] | Float[Array, "b n f"],
    *,
    grids: Int[Array, "b 2"] | None = None,
    layers: Sequence[int] = (),
    mask: Bool[Array, "b n"] | None = None,
    keep: Int[Array, "b k"] | None = None,
    drop_path_keys: Key[Array, " b"] | None = None,
    rope_key: Key[Array, ""] | None = None,
  ) -> ImageOutput:
    """Encodes images.

    Args:
      images: normalised, three channels, any size divisible by the patch size;
        with `grids`, padded patches (see `patchify`).
      grids: rows and columns of patches per image. Patches beyond them are
        masked; ignore their outputs. Needs rotary positions, or learned ones
        resampled by 'bilinear_antialiased'.
      layers: layers whose output to return, from 0.
      mask: True where the mask token replaces a patch.
      keep: indices of the patches to encode, in this order; other patches are
        not computed. A `mask` refers to all N patches.
      drop_path_keys: one per image; None disables drop path.
      rope_key: key of the rotary augmentation; None disables it.
    """
    spec = self.spec
    x = self._embed(images, mask, grids)  # [B, N, D]
    if keep is not None:
      x = jnp.take_along_axis(x, keep[:, :, None], axis=1)  # [B, K, D]
    if spec.prefix:
      x = jnp.concatenate([*self._prefix(x.shape[0]), x], axis=1)  # [B, P+N, D]
    if spec.pre_norm:
      x = self._norm("pre_norm")(x)
    coordinates = valid = None
    if spec.rope is not None:
      coordinates = self._coordinates(images, grids, keep)
    if grids is not None:
      num_tokens = spec.prefix + grids.prod(axis=1)[:, None]
      valid = jnp.arange(x.shape[1]) < num_tokens  # [B, P + N]
    layer_inputs = {}
    if rope_key is not None and spec.rope is not None and spec.rope.is_random:
      layer_inputs["rope_draw"] = spec.rope.draw(rope_key, spec.depth)
    if self.drop_path and drop_path_keys is not None:
      scales = stack_lib.drop_path_scales(
        drop_path_keys, self.drop_path, spec.depth,
        uniform=self.drop_path_uniform,
      )  # fmt: skip
      scales = constrain_batch(scales, self.mesh)
      layer_inputs["drop_path"] = jnp.swapaxes(scales, 0, 1)  # [depth, B, 2]
    x, intermediates = self.run_blocks(
      x, layers=layers, layer_inputs=layer_inputs, context=(coordinates, valid)
    )
    return ImageOutput(
      patches=x[:, spec.prefix :],
      prefix=x[:, : spec.prefix],
      pooled=self._pool(x, valid),
      intermediates=intermediates,
    )

  def _norm(self, name):
    spec = self.spec
    return layers_lib.norm(spec.norm_eps, self.dtype, name, spec.norm_kind)

  def _embed(self, images, mask, grids):
    """Patch embedding, mask token, positions: [B, N, D]."""
    spec = self.spec
    if grids is None:
      check_images(images)
      grid = spec.grid_of(*images.shape[1:3])
      x = patchify(images.astype(self.dtype), spec.patch_size)
    else:
      x, grid = images.astype(self.dtype), None
    x = layers_lib.Dense(
      spec.width,
      use_bias=spec.patch_bias,
      dtype=self.dtype,
      # Default of Flax's `nn.Conv`, so big_vision's too; equal fan-in.
      kernel_init=nn.initializers.lecun_normal(),
      name="patch_embed",
    )(x)
    if spec.mask_token:
      # Zero, as in DINOv2. Declared even without a mask, so that the parameters
      # don't depend on the arguments of the first call. A variable: `param`
      # would consume a key and change the initial values of later parameters.
      shape = (spec.width,)
      token = self.variable("params", "mask_token", jnp.zeros, shape).value
    if mask is not None:
      if not spec.mask_token:
        raise InputError("A mask needs a mask token: set mask_token=True.")
      if mask.shape != x.shape[:2]:
        raise InputError(
          f"The mask has shape {mask.shape}, expected {x.shape[:2]} (images, "
          "patches)."
        )
      x = jnp.where(mask[:, :, None], token.astype(x.dtype), x)
    if spec.patch_norm:
      x = self._norm("patch_norm")(x)
    if spec.positions == "rope":
      return x
    return x + self._positions(grid, grids, x.shape[1]).astype(x.dtype)

  def _positions(self, grid, grids, length):
    """Position embedding, float32: [N, D] for `grid`, [B, N, D] for `grids`."""
    spec = self.spec
    resizing = (spec.positions, spec.position_resize)
    if grids is not None and resizing != ("learned", "bilinear_antialiased"):
      raise InputError(
        "Images of different grids need positions 'rope', or 'learned' with "
        f"position_resize 'bilinear_antialiased'; this tower has {resizing}."
      )
    if spec.positions == "sincos_xy":
      table = positions_lib.sincos_positions(grid, spec.width)
      rows, columns = np.split(table, 2, axis=1)
      return jnp.concatenate([columns, rows], axis=1)
    if spec.positions == "sincos":
      size = (spec.grid, spec.grid)
      table = jnp.asarray(positions_lib.sincos_positions(size, spec.width))
    else:
      table = self.param(
        "position_embedding",
        nn.initializers.normal(spec.width**-0.5),  # big_vision's
        (spec.grid**2, spec.width),
      )
    stored = table.reshape(spec.grid, spec.grid, spec.width)
    if grids is not None:
      return positions_lib.resize_grids(stored, grids, length)
    if grid != (spec.grid, spec.grid):
      stored = positions_lib.resize_grid(stored, grid, spec.position_resize)
    return stored.reshape(-1, spec.width)

  def _prefix(self, batch):
    """CLS and register tokens, each [B, n, D], in that order."""
    spec = self.spec
    tokens = []
    # MAE's 0.02 for both. Registers must differ at initialisation: nothing
    # else distinguishes them.
    init = nn.initializers.normal(0.02)
    if spec.cls_token:
      tokens.append(self.param("cls_token", init, (spec.width,))[None])
    if spec.registers:
      shape = (spec.registers, spec.width)
      tokens.append(self.param("registers", init, shape))
    tokens = [token.astype(self.dtype) for token in tokens]
    return [jnp.broadcast_to(x, (batch, *x.shape)) for x in tokens]

  def _coordinates(self, images, grids, keep):
    """Patch coordinates for rotary positions: [#B, N, 2]."""
    spec = self.spec
    if grids is not None:
      return spec.rope.grid_coordinates(grids, images.shape[1])  # [B, N, 2]
    grid = spec.grid_of(*images.shape[1:3])
    coordinates = jnp.asarray(spec.rope.coordinates(grid))  # [N, 2]
    return coordinates[None] if keep is None else coordinates[keep]  # [B, K, 2]

  def _pool(self, x, valid):
    """Pools all tokens: float32 [B, E]."""
    spec = self.spec
    start = 0 if spec.pool_prefix else spec.prefix
    if valid is not None:
      valid = valid[:, start:]
    if spec.pool in layers_lib.ATTENTION_POOLS:
      pooled = layers_lib.build_pool(spec, self.dtype)(x[:, start:], valid)
    elif spec.pool == "cls":
      pooled = x[:, np.array(spec.pool_tokens)].reshape(x.shape[0], -1)
    else:
      weights = None if valid is None else valid[..., None]
      pooled = x[:, start:].mean(axis=1, dtype=jnp.float32, where=weights)
    return embed_pooled(spec, pooled)
