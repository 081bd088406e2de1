"""MAE pixel reconstruction loss (He et al. 2022).

The encoder sees a subset of the patches; a decoder predicts the pixels of the
hidden patches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment import masks
from mtv_jax.config import options
from mtv_jax.models import layers, vit
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.positions import sincos_positions
from mtv_jax.models.remat import build_policy
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


def normalize_patches(pixels: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
  """MAE's per-patch pixel normalisation.

  (x - mean) / sqrt(var + 1e-6),  var unbiased, over all values of a patch
  """
  centred = pixels - pixels.mean(axis=-1, keepdims=True)
  var = jnp.square(centred).sum(-1, keepdims=True) / (pixels.shape[-1] - 1)
  return centred * jax.lax.rsqrt(var + 1e-6)


def patch_errors(
  predicted: Float[Array, "b n f"],
  target: Float[Array, "b n f"],
  hidden: Bool[Array, "b n"],
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """Sum of the hidden patches' MSE per image, and their number."""
  errors = jnp.square(predicted - target).mean(axis=-1)
  weights = hidden.astype(jnp.float32)
  return jnp.sum(errors * weights, axis=-1), jnp.sum(weights, axis=-1)


def visible_slots(
  keep: Int[Array, "b k"], patches: int
) -> tuple[Int[Array, "b {patches}"], Bool[Array, "b {patches}"]]:
  """Index of each patch among the visible patches.

  Returns the index in `keep` (`k` if hidden), and whether a patch is visible.
  Compares instead of scattering, so that it stays local to the rows of a
  sharded batch.
  """
  match = keep[:, None, :] == jnp.arange(patches)[None, :, None]
  visible = match.any(-1)
  return jnp.where(visible, match.argmax(-1), keep.shape[1]), visible


class MaskedDecoder(nn.Module):
  """MAE decoder: predicts the pixels of all patches from the visible tokens.

  Embeds the encoded tokens, replaces each hidden patch with a learned mask
  token, and adds 2-D sine-cosine positions to the patches (not to CLS and
  registers, which also attend). Transformer blocks, a norm and a linear layer
  follow. Computes in the dtype of its input; parameters and norms are float32.
  """

  outputs: int  # Values per patch.
  width: int = 512
  depth: int = 8
  heads: int = 16
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

    `tokens` are the encoded visible patches, in the order of `keep`, their
    indices; `prefix` are the encoded CLS and register tokens, if any.
    """
    dtype = tokens.dtype
    b = len(tokens)
    slots, _ = visible_slots(keep, grid[0] * grid[1])
    embed = layers.Dense(self.width, dtype=dtype, name="embed")
    x = embed(jnp.concatenate([prefix, tokens], axis=1))
    prefix, x = x[:, : prefix.shape[1]], x[:, prefix.shape[1] :]
    mask = self.param("mask_token", nn.initializers.normal(0.02), (self.width,))
    mask = jnp.broadcast_to(mask.astype(dtype), (b, 1, self.width))
    x = jnp.concatenate([x, mask], axis=1)  # [B, K + 1, D]
    x = jnp.take_along_axis(x, slots[:, :, None], axis=1)  # [B, N, D]
    x = x + jnp.asarray(sincos_positions(grid, self.width), dtype)
    x = jnp.concatenate([prefix, x], axis=1)  # [B, P + N, D]

    block = layers.Block(
      self.heads, 4 * self.width, gelu="exact", dtype=dtype, parent=None
    )
    init = stack_lib.stacked_init(block, self.depth, self.width)
    runtime = dict(remat=self.remat, scan=self.scan, mesh=self.mesh)
    x, _ = stack_lib.run_stack(block, self.param("blocks", init), x, **runtime)
    x = layers.norm(1e-6, dtype, "norm")(x[:, prefix.shape[1] :])  # [B, N, D]
    y = layers.Dense(self.outputs, dtype=dtype, name="predict")(x)
    return y.astype(jnp.float32)


@pytree_dataclass
class LossInputs:
  """Per example, sums over the view's crops."""

  error: Float[Array, " b"]  # Mean squared errors of the hidden patches.
  hidden: Float[Array, " b"]  # Number of hidden patches.
  patches: Float[Array, " b"]  # Number of all patches.


@dataclasses.dataclass(frozen=True)
class MAE(base.Objective):
  """MAE loss: squared pixel errors of hidden patches."""

  group = "ssl"

  view: str = "mae"  # Its ops end in `keep(ratio)`.
  patch: options.PositiveInt | None = None  # None: the model's.
  norm_pixels: bool = True  # Whether to apply `normalize_patches` to targets.
  decoder_width: options.PositiveInt = 512
  decoder_depth: options.PositiveInt = 8
  decoder_heads: options.PositiveInt = 16
  remat: str = "none"  # One choice of `models.remat`; not 'auto'.
  scan: bool = True

  def __post_init__(self):
    build_policy(self.remat, where="MAE.remat")
    width, heads = self.decoder_width, self.decoder_heads
    if width % heads or width % 4:
      raise ConfigError(
        f"decoder_width is {width}, expected a multiple of 4 and {heads} heads."
      )

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> MAE:
    patch = spec.image.patch_size
    if self.patch not in (None, patch):
      raise ConfigError(f"mae: patch is {self.patch}, the model's is {patch}.")
    for pipeline in views[self.view].pipelines if self.view in views else ():
      op, where = pipeline.mask, f"config.views.{self.view}"
      if not isinstance(op, masks.Keep):
        raise ConfigError(f"{where} drops no patch for mae: add keep(0.25).")
      if op.patch != patch:
        raise ConfigError(f"{where}: expected keep({op.ratio}, patch={patch}).")
      if op.count(pipeline.size) >= (pipeline.size // patch) ** 2:
        raise ConfigError(f"{where} keeps all patches: lower keep()'s ratio.")
    return dataclasses.replace(self, patch=patch)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self.image: ()})

  def heads(self) -> dict[str, base.Head]:
    if self.patch is None:
      raise ConfigError("mae: set patch=16, or call resolve() first.")
    module = MaskedDecoder(
      outputs=3 * self.patch**2,
      width=self.decoder_width,
      depth=self.decoder_depth,
      heads=self.decoder_heads,
      remat=self.remat,
      scan=self.scan,
    )

    return {"mae_decoder": base.Head(module, _example_inputs)}

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    view = batch["views"][self.view]
    b, count, size = view.images.shape[:3]
    grid = size // self.patch
    output = encodings[self.image]
    tokens, prefix, keep, images = (
      x.reshape(b * count, *x.shape[2:])  # [b * count, ...]
      for x in (output.patches, output.prefix, view.keep, view.images)
    )
    predicted = heads["mae_decoder"](tokens, prefix, keep, (grid, grid))
    target = vit.patchify(images.astype(jnp.float32), self.patch)
    if self.norm_pixels:
      target = normalize_patches(target)
    _, visible = visible_slots(keep, grid**2)
    error, hidden = patch_errors(predicted, target, ~visible)
    return LossInputs(
      error=error.reshape(b, count).sum(1),
      hidden=hidden.reshape(b, count).sum(1),
      patches=jnp.full((b,), float(count * grid**2)),
    )

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    hidden = jnp.sum(loss_inputs.hidden)
    # Every image is its own label.
    images = jnp.float32(loss_inputs.hidden.size)
    return base.Terms(
      loss=base.WeightedMean(jnp.sum(loss_inputs.error), hidden),
      report={
        "hidden": base.WeightedMean(hidden, jnp.sum(loss_inputs.patches)),
        "labelled": base.WeightedMean(images, images),
      },
    )


def _example_inputs(spec: Any) -> tuple:
  """Arguments that initialise the decoder: one visible patch of four."""
  shapes = (
    (1, 1, spec.image.width),
    (1, spec.image.prefix, spec.image.width),
  )
  tokens, prefix = (jax.ShapeDtypeStruct(s, "float32") for s in shapes)
  return tokens, prefix, jax.ShapeDtypeStruct((1, 1), "int32"), (2, 2)
