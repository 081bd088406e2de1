"""MAE pixel reconstruction loss (He et al. 2022).

The encoder sees a subset of the patches; a decoder predicts the pixels of the
hidden patches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.augment import masks
from mtv_jax.config import options
from mtv_jax.models import vit
from mtv_jax.models.heads import mae_decoder
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
  count = hidden.astype(jnp.float32)
  return jnp.sum(errors * count, axis=-1), jnp.sum(count, axis=-1)


@pytree_dataclass
class LossInputs:
  """Per example, sums over the view's crops."""

  error: Float[Array, " b"]  # Mean squared errors of the hidden patches.
  hidden: Float[Array, " b"]  # Number of hidden patches.
  patches: Float[Array, " b"]  # Number of all patches.


@dataclasses.dataclass(frozen=True)
class MAE(base.Objective):
  """MAE loss: squared pixel errors of hidden patches."""

  view: str = "mae"  # Its ops end in `keep(ratio)`.
  patch: options.PositiveInt | None = None  # None: the model's.
  norm_pixels: bool = True  # See `normalize_patches`; else the encoder's input.
  decoder_width: options.PositiveInt = 512
  decoder_depth: options.PositiveInt = 8
  decoder_heads: options.PositiveInt = 16
  remat: str = "none"  # See `models.remat`, without 'auto' and encodings.
  scan: bool = True

  def __post_init__(self):
    build_policy(self.remat, where="MAE.remat")
    width, heads = self.decoder_width, self.decoder_heads
    if width % heads or width % 4:
      raise ConfigError(
        f"decoder_width is {width}; expected a multiple of "
        f"decoder_heads ({heads}) and of 4, which 2-D positions need."
      )

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> MAE:
    patch = spec.image.patch_size
    if self.patch not in (None, patch):
      raise ConfigError(
        f"mae: patch is {self.patch}, the model's is {patch}. Leave it out."
      )
    for pipeline in views[self.view].pipelines if self.view in views else ():
      op = pipeline.mask
      if not isinstance(op, masks.Keep):
        raise ConfigError(
          f"mae reads the view {self.view!r}, which hides no patch "
          "from the encoder. End its ops in keep(0.25), or name another view."
        )
      if op.patch != patch:
        raise ConfigError(
          f"config.views.{self.view}: keep() makes patches of {op.patch} "
          f"pixels, the model's are {patch}: write keep({op.ratio}, "
          f"patch={patch})."
        )
      patches = (pipeline.size // patch) ** 2
      if op.count(pipeline.size) >= patches:
        raise ConfigError(
          f"mae: the view {self.view!r} keeps all {patches} patches, "
          "which leaves none to predict; lower the ratio of keep(0.25)."
        )
    return dataclasses.replace(self, patch=patch)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self.image: ()})

  def heads(self) -> dict[str, base.Head]:
    if self.patch is None:
      raise ConfigError(
        "mae: the patch size is not known; give patch=16, or "
        "resolve() it with the model."
      )
    module = mae_decoder.MaskedDecoder(
      outputs=3 * self.patch**2,
      width=self.decoder_width,
      depth=self.decoder_depth,
      heads=self.decoder_heads,
      remat=self.remat,
      scan=self.scan,
    )
    return {"mae_decoder": base.Head(module, example=_example)}

  def loss_inputs(
    self, encodings: base.Encodings, heads: base.BoundHeads, batch: base.Batch
  ) -> LossInputs:
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
    _, visible = mae_decoder.visible_slots(keep, grid**2)
    error, hidden = patch_errors(predicted, target, ~visible)
    return LossInputs(
      error=error.reshape(b, count).sum(1),
      hidden=hidden.reshape(b, count).sum(1),
      patches=jnp.full((b,), float(count * grid**2)),
    )

  def loss(
    self, loss_inputs: LossInputs, heads: base.BoundHeads, context: base.Context
  ) -> base.Terms:
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


def _example(spec: Any) -> tuple:
  """Arguments that initialise the decoder: one visible patch of four."""
  width, prefix = spec.image.width, spec.image.prefix
  return (
    jax.ShapeDtypeStruct((1, 1, width), "float32"),
    jax.ShapeDtypeStruct((1, prefix, width), "float32"),
    jax.ShapeDtypeStruct((1, 1), "int32"),
    (2, 2),
  )
