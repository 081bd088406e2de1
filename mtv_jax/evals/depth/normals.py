"""Surface-normal probe: normals from frozen features (NYUv2).

Probe3D's (El Banani et al. 2024): its DPT head over four blocks predicts a
normal and a concentration for every pixel, trained with the angular loss with
uncertainty (Bae et al. 2021).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from mtv_jax.evals.core.examples import NormalSet
from mtv_jax.evals.depth import metrics
from mtv_jax.evals.depth.depth_probe import DepthProbe
from mtv_jax.evals.depth.training import Setup
from mtv_jax.utils import plots

# Metrics in degrees, where lower is better.
ANGLES = ("rmse", "mean", "median")
THRESHOLDS = (11.25, 22.5, 30.0)
# Cosines are clipped to this distance from -1 and 1, where the gradient of the
# angle is infinite.
_EPS = 1e-4


@dataclasses.dataclass(frozen=True)
class NormalsTarget:
  """A normal and its concentration, see `training.DepthTarget`."""

  outputs, max_depth = 4, None

  def decode(self, logits: Float[Array, "b h w 4"]) -> Float[Array, "b 4 h w"]:
    return jnp.moveaxis(logits, -1, 1)

  def loss(self, maps, truth, protocol, step):
    valid = jnp.isfinite(truth).all(-1)
    return angular_loss(jnp.moveaxis(maps, 1, -1), truth, valid)

  def finish(self, maps: np.ndarray) -> np.ndarray:
    return _normalize(np.moveaxis(maps[:3], 0, -1), np)


@dataclasses.dataclass(frozen=True)
class NormalsProbe(DepthProbe):
  """Surface-normal probe; options as in `DepthProbe`.

  Attributes:
    truth: `raw` or `filled` depth, for NYUv2 layouts with both, if normals are
      computed from depth.
  """

  protocol: Literal["probe3d"] = "probe3d"
  augment: Literal["probe3d", "none"] | None = None
  tta: Literal["none"] | None = None

  title = "surface normals"
  _units: ClassVar[dict[str, str]] = dict.fromkeys(ANGLES, "degrees")
  _kind: ClassVar[str] = "normals"

  def _valid_mask(self, truth, *, high=None, crop="none"):
    mask = metrics.crop_mask(truth.shape[:2], crop)
    return mask & np.isfinite(truth).all(-1)

  def _draw_row(self, image, truth, predicted, valid) -> np.ndarray:
    colours = [
      (127.5 * (np.nan_to_num(x, nan=-1) + 1)).astype(np.uint8)
      for x in (np.where(valid[..., None], truth, np.nan), predicted)
    ]
    image = image.astype(np.uint8)
    return plots.image_with_maps(image, colours, height=plots.THIRD)

  def _make_target(self, kind: str) -> NormalsTarget:
    return NormalsTarget()

  def _score_fn(self, mean: np.ndarray) -> Callable[..., dict[str, float]]:
    return functools.partial(score, mean=mean)

  def _target_protocol(self, setup: Setup, test: NormalSet) -> dict[str, Any]:
    return {
      "normals": test.source,
      "train_normals": self._set("train", setup.encoder.preprocess.size).source,
      "loss": "angle with uncertainty (Bae et al. 2021), elu + 1.01",
      "valid": "pixels with a normal",
      "chance": "the mean normal of training images, everywhere",
    }


def _normalize(x, xnp):
  squares = xnp.square(x).sum(-1, keepdims=True)
  return x / xnp.sqrt(xnp.maximum(squares, 1e-16))


def angular_loss(
  predicted: Float[Array, "b h w 4"],
  truth: Float[Array, "b h w 3"],
  valid: Bool[Array, "b h w"],
) -> Float[Array, ""]:
  """Angular loss with uncertainty (Bae et al. 2021, equation 4).

      mean ln(1 + exp(-pi k)) - ln(k^2 + 1) + k angle

  over the valid pixels, with k = elu(predicted[..., 3]) + 1.01 as in Probe3D;
  0 if no pixel is valid.
  """
  truth = jnp.where(valid[..., None], truth, 0.0)
  normals = _normalize(predicted[..., :3], jnp)
  cosine = (normals * _normalize(truth, jnp)).sum(-1)
  angle = jnp.arccos(jnp.clip(cosine, _EPS - 1, 1 - _EPS))
  k = jax.nn.elu(predicted[..., 3]) + 1.01
  loss = jnp.log1p(jnp.exp(-jnp.pi * k)) - jnp.log1p(jnp.square(k)) + k * angle
  total = jnp.where(valid, loss, 0.0).sum()
  return total / jnp.maximum(valid.sum(), 1)


def score(
  predicted: Float[np.ndarray, "n 3"] | None,
  truth: Float[np.ndarray, "n 3"],
  *,
  mean: Float64[np.ndarray, "3"],
) -> dict[str, float]:
  """Angular errors in degrees over the valid pixels of one image.

  `within_11.25` is the fraction of pixels with a smaller error. If `predicted`
  is None, the direction of `mean` is scored.
  """
  predicted = np.asarray([mean]) if predicted is None else predicted
  normals = _normalize(predicted.astype(np.float64), np)
  cosine = (normals * _normalize(truth.astype(np.float64), np)).sum(-1)
  error = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
  values = (np.sqrt(np.mean(error**2)), error.mean(), np.median(error))
  angles = dict(zip(ANGLES, map(float, values), strict=True))
  return angles | {
    f"within_{limit:g}": float(np.mean(error < limit)) for limit in THRESHOLDS
  }
