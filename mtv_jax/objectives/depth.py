"""MiDaS depth losses: scale-and-shift-invariant error and gradient matching.

Ranftl et al. 2020, with the weights and trimming of Depth Anything V2 (Yang et
al. 2024), on the inverse depth that a DPT head predicts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.augment import geometry
from mtv_jax.config import options
from mtv_jax.models.heads import dpt
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass

# Floor of the mean absolute deviation to divide by. The gradient of the
# normalisation grows with its inverse: without a floor, the constant map of an
# untrained head would give gradients of 1e4.
SCALE_FLOOR = 1e-3
# Weight of gradient matching relative to the SSI error.
GRADIENT_WEIGHT = 2.0


def _masked_mean(
  x: Float[Array, " b *n"], valid: Bool[Array, " b *n"]
) -> Float[Array, " b"]:
  """Mean over each row's valid entries; 0, without gradient, if none."""
  axes = tuple(range(1, x.ndim))
  count = jnp.sum(valid, axis=axes, dtype=jnp.float32)
  return jnp.sum(jnp.where(valid, x, 0.0), axis=axes) / jnp.maximum(count, 1.0)


def standardise(
  x: Float[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> tuple[Float[Array, "b h w"], Float[Array, " b"]]:
  """Removes the scale and the shift of each map (MiDaS, Equations 5 and 6).

      (x - t) / max(s, 1e-3),  t = median(x),  s = mean |x - t|

  over the valid pixels; 0 at other pixels. The median of an even number of
  pixels is the lower one. Also returns s.
  """
  flat, mask = (a.reshape(a.shape[0], -1) for a in (x, valid))  # [B, HW]
  # The sort gives the median's index; value and gradient come from the map.
  order = jnp.argsort(jax.lax.stop_gradient(jnp.where(mask, flat, jnp.inf)))
  middle = jnp.maximum(mask.sum(-1, keepdims=True) - 1, 0) // 2  # [B, 1]
  index = jnp.take_along_axis(order, middle, axis=1)
  centred = x - jnp.take_along_axis(flat, index, axis=1)[..., None]
  scale = _masked_mean(jnp.abs(centred), valid)
  floored = jnp.maximum(scale, SCALE_FLOOR)[:, None, None]
  return jnp.where(valid, centred / floored, 0.0), scale


def trimmed_error(
  residual: Float[Array, "b h w"], valid: Bool[Array, "b h w"], trim: float
) -> Float[Array, " b"]:
  """Trimmed mean absolute residual of each map.

  Averages the ceil((1 - trim) M) smallest residuals among M valid pixels. Depth
  Anything V2 trims the largest tenth, since the labels are an expert's
  predictions. The selection is not differentiated; ties at the threshold get
  fractional weights.
  """
  error = jnp.abs(residual).reshape(residual.shape[0], -1)  # [B, HW]
  mask = valid.reshape(error.shape)
  num_valid = mask.sum(-1, keepdims=True)  # [B, 1]
  # Rounded down; a float32 product may be just below an integer.
  trimmed = jnp.floor(num_valid * trim + 1e-4).astype(jnp.int32)
  count = num_valid - trimmed
  ranked = jax.lax.stop_gradient(jnp.where(mask, error, jnp.inf))
  last_index = jnp.maximum(count - 1, 0)
  threshold = jnp.take_along_axis(jnp.sort(ranked), last_index, axis=1)
  is_below, is_at = mask & (ranked < threshold), mask & (ranked == threshold)
  tie_weight = count - is_below.sum(-1, keepdims=True)
  tie_weight = tie_weight / jnp.maximum(is_at.sum(-1, keepdims=True), 1)
  weight = jnp.where(is_below, 1.0, jnp.where(is_at, tie_weight, 0.0))
  return jnp.sum(error * weight, axis=1) / jnp.maximum(count[:, 0], 1)


def gradient_error(
  residual: Float[Array, "b h w"], valid: Bool[Array, "b h w"], scales: int = 4
) -> Float[Array, " b"]:
  """Mean absolute differences of neighbouring residuals (MiDaS, Equation 11).

      sum_k (1/M_k) sum_i |R_k(y, x+1) - R_k(y, x)| + |R_k(y+1, x) - R_k(y, x)|

  R_k keeps every 2^k-th pixel and has M_k valid pixels. A difference counts if
  both pixels are valid.
  """
  total = jnp.zeros(residual.shape[0])
  for k in range(scales):
    r, m = (a[:, :: 2**k, :: 2**k] for a in (residual, valid))
    across = jnp.abs(r[:, :, 1:] - r[:, :, :-1])
    down = jnp.abs(r[:, 1:] - r[:, :-1])
    both_across, both_down = m[:, :, 1:] & m[:, :, :-1], m[:, 1:] & m[:, :-1]
    differences = jnp.sum(jnp.where(both_across, across, 0.0), axis=(1, 2))
    differences += jnp.sum(jnp.where(both_down, down, 0.0), axis=(1, 2))
    total += differences / jnp.maximum(m.sum((1, 2)), 1)
  return total


def affine_error(
  predicted: Float[Array, "b h w"],
  label: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
) -> Float[Array, " b"]:
  """Relative residual of the label under the best scale and shift, 0 to 1.

      sqrt(1 - corr(p, d)^2) = min_{a,b} rms(a p + b - d) / std(d)

  1 for an uncorrelated prediction. A diagnostic, not differentiated.
  """
  predicted, label = jax.lax.stop_gradient((predicted, label))
  p, d = (
    jnp.where(valid, x - _masked_mean(x, valid)[:, None, None], 0.0)
    for x in (predicted, label)
  )
  pp, dd, pd = (_masked_mean(x, valid) for x in (p * p, d * d, p * d))
  explained = pd * pd / jnp.maximum(pp * dd, 1e-20)
  return jnp.sqrt(jnp.clip(1.0 - explained, 0.0, 1.0))


@pytree_dataclass
class LossInputs:
  """Per example, sums over the view's labelled crops."""

  ssi: Float[Array, " b"]  # Trimmed errors, scale- and shift-invariant.
  gradient: Float[Array, " b"]  # Gradient-matching errors.
  error: Float[Array, " b"]  # Affine-invariant errors, for the report.
  labelled: Float[Array, " b"]  # Number of crops with a label.
  crops: Float[Array, " b"]  # Number of crops.


def map_errors(
  predicted: Float[Array, "b h w"],
  label: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
  *,
  trim: float = 0.1,
  scales: int = 4,
  min_pixels: int = 1,
) -> LossInputs:
  """Errors of each map; 0 for maps without a usable label.

  A label is unusable if it has fewer than `min_pixels` pixels, or is flat (mean
  absolute deviation below 1e-3 of the image's range): every standardised
  prediction is equally far from a flat label.
  """
  (p, _), (d, scale) = (standardise(x, valid) for x in (predicted, label))
  labelled = (valid.sum((1, 2)) >= min_pixels) & (scale >= SCALE_FLOOR)
  errors = (
    trimmed_error(p - d, valid, trim),
    gradient_error(p - d, valid, scales),
    affine_error(predicted, label, valid),
  )
  return LossInputs(
    *(jnp.where(labelled, error, 0.0) for error in errors),
    labelled=labelled.astype(jnp.float32),
    crops=jnp.ones(labelled.shape),
  )


@dataclasses.dataclass(frozen=True)
class Depth(base.Objective):
  """Trains a DPT head on the experts' relative inverse depth."""

  # The head's options share the config entry.
  head: PredictionHead = dpt.DepthHead()
  view: str = "image"
  # Whether `blocks` may mask patches of the view, to share it with iBOT.
  allow_masked: bool = False
  scales: options.NonNegativeInt = 4  # Number of gradient-matching scales.
  # Share of the pixels, with the largest residuals, that the SSI error trims.
  trim: Annotated[float, options.Range(min=0, max=0.99)] = 0.1
  # A crop with fewer labelled pixels counts as unlabelled.
  min_pixels: options.PositiveInt = 16

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> Depth:
    base.check_visible(
      "depth", self.view, views, self.allow_masked, has_option=True
    )
    return dataclasses.replace(self, head=self.head.resolve(spec))

  def needs(self) -> base.Needs:
    if self.head.taps is None:
      raise ConfigError("depth: set taps, or call resolve() first.")
    return base.Needs({self.image: self.head.taps}, fields=("depth",))

  def heads(self) -> dict[str, base.Head]:
    return base.Head.of(self.head)

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    output = encodings[self.image]
    b, count, patches, _ = output.patches.shape
    grid = math.isqrt(patches)  # Views are squares.
    # Not -1: a tower without CLS token and registers has a prefix of size 0.
    crops = jax.tree.map(lambda x: x.reshape(b * count, *x.shape[2:]), output)
    head = heads[self.head.params_key]
    predicted = self.head.predict(head, crops, (grid, grid))["depth"]
    label, valid = geometry.crop_depth(
      batch["depth"], batch["views"][self.view], predicted.shape[-1]
    )
    kwargs = {k: getattr(self, k) for k in ("trim", "scales", "min_pixels")}
    errors = map_errors(predicted, label, valid, **kwargs)
    return jax.tree.map(lambda x: x.reshape(b, count).sum(1), errors)

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    mean, sums = base.WeightedMean, jax.tree.map(jnp.sum, loss_inputs)
    names = ("ssi", "gradient", "error")
    report = {k: mean(getattr(sums, k), sums.labelled) for k in names}
    report["labelled"] = mean(sums.labelled, sums.crops)
    loss = sums.ssi + GRADIENT_WEIGHT * sums.gradient
    return base.Terms(loss=mean(loss, sums.labelled), report=report)
