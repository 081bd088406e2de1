"""Metrics of depth maps, and the affine alignment of a prediction.

Each image is scored over its valid pixels, then images are averaged, so that
images with few and with many valid pixels count the same. Sums are float64:
the closed form of the alignment cancels in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Float64

from mtv_jax.utils.errors import ConfigError, InputError, check_choice

_ERRORS = ("rmse", "abs_rel", "sq_rel", "rmse_log", "log10", "silog")
METRICS = (*_ERRORS, "delta1", "delta2", "delta3")
UNITS = dict.fromkeys(_ERRORS, "") | {"rmse": "m", "sq_rel": "m"}
AVERAGING = "per image over valid pixels, then mean over images"

# (top, bottom, left, right) of NYUv2's 480 x 640 (Eigen et al. 2014), and as
# fractions of KITTI's height and width (Garg et al. 2016; Eigen et al. 2014).
_NYU_SIZE, _NYU_EIGEN = (480, 640), (45, 471, 41, 601)
_FRACTIONS = {
  "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
  "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
CROPS = ("none", "nyu_eigen", *_FRACTIONS)


def crop_mask(
  shape: tuple[int, int], crop: str
) -> Bool[np.ndarray, "{shape[0]} {shape[1]}"]:
  """The evaluated pixels of a map.

  Args:
    shape: rows and columns of the map.
    crop: `none`; `nyu_eigen`, rows 45 to 471 and columns 41 to 601 of 480 x
      640; `garg` or `kitti_eigen`, fractions of the height and the width,
      rounded down.

  Raises:
    ConfigError: for an unknown crop, or `nyu_eigen` of another size.
  """
  check_choice("crop", crop, CROPS)
  height, width = shape
  if crop == "none":
    return np.ones(shape, bool)
  if crop == "nyu_eigen":
    if (height, width) != _NYU_SIZE:
      raise ConfigError(
        f"crop='nyu_eigen' is defined on maps of 480 x 640 and this one has "
        f"{height} x {width}; use crop='none' for other data"
      )
    top, bottom, left, right = _NYU_EIGEN
  else:
    y0, y1, x0, x1 = _FRACTIONS[crop]
    top, bottom = int(y0 * height), int(y1 * height)
    left, right = int(x0 * width), int(x1 * width)
  mask = np.zeros(shape, bool)
  mask[top:bottom, left:right] = True
  return mask


def valid_mask(
  depth: Float[np.ndarray, "h w"],
  *,
  low: float | int = 1e-3,
  high: float | int | None = None,
  crop: str = "none",
) -> Bool[np.ndarray, "h w"]:
  """Pixels in the crop with a true depth in the open interval (low, high).

  Args:
    depth: metres; 0 or NaN where unknown.
    low: metres.
    high: metres; None for no limit.
    crop: see `crop_mask`.
  """
  valid = np.isfinite(depth) & (depth > low)
  if high is not None:
    valid &= depth < high
  return valid & crop_mask(depth.shape, crop)


def abs_rel(
  predicted: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"]
) -> float:
  """mean |p - g| / g."""
  p, g = _float64(predicted, truth)
  return float(np.mean(np.abs(p - g) / g))


def delta(
  predicted: Float[np.ndarray, " n"],
  truth: Float[np.ndarray, " n"],
  power: int = 1,
) -> float:
  """Fraction with max(p / g, g / p) < 1.25^power; values <= 0 fail."""
  p, g = _float64(predicted, truth)
  positive = p > 0
  ratio = np.divide(p, g)
  inverse = np.divide(g, p, out=np.full_like(p, np.inf), where=positive)
  return float(np.mean(positive & (np.maximum(ratio, inverse) < 1.25**power)))


def rmse(
  predicted: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"]
) -> float:
  """sqrt(mean (p - g)^2), in metres."""
  p, g = _float64(predicted, truth)
  return float(np.sqrt(np.mean((p - g) ** 2)))


def image_metrics(
  predicted: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"]
) -> dict[str, float]:
  """The metrics of one image; see `METRICS`.

  With e = ln p - ln g: rmse_log = sqrt(mean e^2), log10 = mean |e| / ln 10,
  silog = 100 sqrt(mean e^2 - (mean e)^2) (Eigen et al. 2014); sq_rel =
  mean (p - g)^2 / g.

  Args:
    predicted: metres, positive, at the image's valid pixels.
    truth: metres, positive.

  Raises:
    InputError: without pixels, or for values that have no logarithm.
  """
  p, g = _float64(predicted, truth)
  if not g.size or (g <= 0).any() or (p <= 0).any():
    raise InputError(
      f"image_metrics needs positive depths at one pixel or more; got {g.size} "
      f"pixels, {int((g <= 0).sum())} true and {int((p <= 0).sum())} predicted "
      "ones of 0 or less. Mask invalid pixels, and clamp the prediction."
    )
  e = np.log(p) - np.log(g)
  return {
    "rmse": rmse(p, g),
    "abs_rel": abs_rel(p, g),
    "sq_rel": float(np.mean((p - g) ** 2 / g)),
    "rmse_log": float(np.sqrt(np.mean(e**2))),
    "log10": float(np.mean(np.abs(e)) / np.log(10)),
    # The mean of squared deviations, which rounding can't make negative.
    "silog": float(100 * np.sqrt(np.mean((e - e.mean()) ** 2))),
    **{f"delta{k}": delta(p, g, k) for k in (1, 2, 3)},
  }


@dataclasses.dataclass(frozen=True)
class Summary:
  """Means over images.

  Attributes:
    metrics: by name.
    images: number of averaged images.
    skipped: number of images with too few valid pixels.
  """

  metrics: dict[str, float]
  images: int
  skipped: int

  @property
  def units(self) -> dict[str, str]:
    """Units of the errors (lower is better), also of aligned predictions."""
    return {
      prefix + name: unit
      for prefix in ("", "si_")
      for name, unit in UNITS.items()
      if prefix + name in self.metrics
    }


def average(rows: Iterable[Mapping[str, float] | None]) -> Summary:
  """The mean of each metric over images.

  Args:
    rows: the metrics of each image, None for a skipped one.

  Raises:
    InputError: if every image was skipped.
  """
  rows = list(rows)
  scored = [row for row in rows if row is not None]
  if not scored:
    raise InputError(
      f"none of {len(rows)} images has enough pixels with a valid depth: the "
      "unit of the depth files, the limits or the crop don't fit this data"
    )
  metrics = {k: float(np.mean([row[k] for row in scored])) for k in scored[0]}
  return Summary(metrics, len(scored), len(rows) - len(scored))


@dataclasses.dataclass(frozen=True)
class Affine:
  """x -> scale x + shift."""

  scale: float
  shift: float

  def __call__(self, x: Float[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    return self.scale * np.asarray(x, np.float64) + self.shift


def fit_affine(
  predicted: Float[np.ndarray, " n"], target: Float[np.ndarray, " n"]
) -> Affine:
  """The least-squares scale and shift from `predicted` to `target`.

      (s, t) = argmin sum (s d + t - g)^2

  Scale and shift are 0 where the solution is not unique (no prediction, or
  all of them equal), as in MiDaS's evaluation (Ranftl et al. 2020). The
  equations are solved about the means, where the determinant
  n sum (d - mean d)^2 does not cancel.
  """
  d, g = _float64(predicted, target)
  if not d.size or d.min() == d.max():
    return Affine(0.0, 0.0)
  mean_d, mean_g = d.mean(), g.mean()
  centred = d - mean_d
  scale = float(np.sum(centred * (g - mean_g)) / np.sum(centred**2))
  return Affine(scale, float(mean_g - scale * mean_d))


def _float64(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
  return tuple(np.asarray(a, np.float64) for a in arrays)
