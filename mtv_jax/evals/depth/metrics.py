"""Depth metrics, affine alignment, and the base class of depth evaluators.

Metrics are averaged over an image's valid pixels, then over images, so that
every image has equal weight. Sums are float64, since the closed form of the
alignment would cancel in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import Data, DenseSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils import plots
from mtv_jax.utils.errors import ConfigError, InputError

Pixels = Float[np.ndarray, " n"]

AVERAGING = "per image over valid pixels, then mean over images"

# (top, bottom, left, right) of NYUv2's 480 x 640 (Eigen et al. 2014), and as
# fractions of KITTI's height and width (Garg et al. 2016; Eigen et al. 2014).
_NYU_EIGEN = (45, 471, 41, 601)
_FRACTIONS = {
  "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
  "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
CropName = Literal["none", "nyu_eigen", "garg", "kitti_eigen"]


def crop_mask(shape: tuple[int, int], crop: CropName) -> np.ndarray:
  """Mask of the evaluated pixels of a map of `shape`.

  `nyu_eigen` is rows 45 to 471 and columns 41 to 601 of 480 x 640; `garg` and
  `kitti_eigen` are fractions of height and width, rounded down.
  """
  height, width = shape
  if crop == "none":
    return np.ones(shape, bool)
  if crop == "nyu_eigen":
    if shape != (480, 640):
      raise ConfigError(
        f"crop='nyu_eigen' is defined on maps of 480 x 640, but this one is "
        f"{height} x {width}; use crop='none'"
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
  crop: CropName = "none",
) -> Bool[np.ndarray, "h w"]:
  """Pixels in the crop with true depth in the open interval (low, high).

  Depth and limits are in metres; unknown depth is 0 or NaN.
  """
  valid = np.isfinite(depth) & (depth > low)
  if high is not None:
    valid &= depth < high
  return valid & crop_mask(depth.shape, crop)


def _rms(x):
  return np.sqrt(np.mean(x**2))


def _log_error(p, g):
  return np.log(p) - np.log(g)


def _delta(p, g, power):
  inverse = np.divide(g, p, out=np.full_like(p, np.inf), where=p > 0)
  return np.mean((p > 0) & (np.maximum(p / g, inverse) < 1.25**power))


# Functions of predicted and true depth in metres, as float64.
METRICS = {
  "rmse": lambda p, g: _rms(p - g),
  "abs_rel": lambda p, g: np.mean(np.abs(p - g) / g),
  "sq_rel": lambda p, g: np.mean((p - g) ** 2 / g),
  "rmse_log": lambda p, g: _rms(_log_error(p, g)),
  "log10": lambda p, g: np.mean(np.abs(_log_error(p, g))) / np.log(10),
  # As a standard deviation, since rounding can't make it negative.
  "silog": lambda p, g: 100 * np.std(_log_error(p, g)),
  "delta1": lambda p, g: _delta(p, g, 1),
  "delta2": lambda p, g: _delta(p, g, 2),
  "delta3": lambda p, g: _delta(p, g, 3),
}
DELTAS = ("delta1", "delta2", "delta3")
# Units of metrics where lower is better, also for aligned predictions.
UNITS = {name: "" for name in METRICS if name not in DELTAS}
UNITS |= {"rmse": "m", "sq_rel": "m", "si_rmse": "m"}


def image_metrics(
  predicted: Pixels, truth: Pixels, names: Iterable[str] = tuple(METRICS)
) -> dict[str, float]:
  """Metrics over the valid pixels of one image.

  With e = ln p - ln g: rmse_log = sqrt(mean e^2), log10 = mean |e| / ln 10,
  silog = 100 sqrt(mean e^2 - (mean e)^2) (Eigen et al. 2014); abs_rel =
  mean |p - g| / g, sq_rel = mean (p - g)^2 / g; delta1, 2, 3 are the fractions
  with max(p / g, g / p) < 1.25, 1.25^2, 1.25^3; p <= 0 never counts.
  """
  p, g = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
  if "silog" in names and (not g.size or (g <= 0).any() or (p <= 0).any()):
    raise InputError(
      f"image_metrics got {g.size} pixels, {(g <= 0).sum()} true and "
      f"{(p <= 0).sum()} predicted depths of 0 or less; expected some > 0"
    )
  return {name: float(METRICS[name](p, g)) for name in names}


def average(rows: Sequence[Mapping], *, skipped: int = 0) -> Estimate:
  """Mean of each metric over images; InputError if all were skipped."""
  if not rows:
    raise InputError(
      f"none of {skipped} images has enough pixels with a valid depth; check "
      "the unit of the depth files, the limits and the crop"
    )
  return bootstrap.means(
    {k: np.asarray([row[k] for row in rows]) for k in rows[0]}
  )


class ScaleAndShift(NamedTuple):
  """The affine map x -> scale * x + shift."""

  scale: float
  shift: float

  def __call__(self, x: np.ndarray) -> Float64[np.ndarray, "..."]:
    return self.scale * np.asarray(x, np.float64) + self.shift


def fit_affine(predicted: Pixels, target: Pixels) -> ScaleAndShift:
  """Least-squares scale and shift from `predicted` to `target`.

      (s, t) = argmin sum (s d + t - g)^2

  Returns zeros if the solution isn't unique (empty or constant prediction), as
  in MiDaS's evaluation (Ranftl et al. 2020). Inputs are centred first, so that
  the determinant n sum (d - mean d)^2 doesn't cancel.
  """
  d, g = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
  if not d.size or d.min() == d.max():
    return ScaleAndShift(0.0, 0.0)
  mean_d, mean_g = d.mean(), g.mean()
  centred = d - mean_d
  scale = float(np.sum(centred * (g - mean_g)) / np.sum(centred**2))
  return ScaleAndShift(scale, float(mean_g - scale * mean_d))


# Image in 0..255, true depth in metres (0: unknown), predicted map.
Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DepthEvaluator(Evaluator):
  """Base class of the depth evaluators.

  Attributes:
    truth: `raw` or `filled` depth, for NYUv2 layouts with both.
  """

  data: Data = "scenes"
  count: PositiveInt | None = None
  truth: str | None = None
  pictures: NonNegativeInt = 0  # Test images on the sheet.

  # Units of metrics where lower is better, and the kind of map that
  # `registry.open_{_kind}` opens.
  _units: ClassVar[dict[str, str]] = UNITS
  _kind: ClassVar[str] = "depth"

  def _valid_mask(self, truth: np.ndarray, **limits: Any) -> np.ndarray:
    return valid_mask(truth, **limits)

  def _draw_row(self, image, truth, predicted, valid) -> np.ndarray:
    """Row of the sheet: image, true and predicted map, both of inverse depth.

    Colours span the truth's range; invalid pixels of the truth are black.
    """
    inverse = np.divide(1, truth, where=valid, out=np.zeros_like(truth))
    limits = float(inverse[valid].min()), float(inverse[valid].max())
    maps = [
      plots.colour_depth(inverse, valid=valid, limits=limits),
      plots.colour_depth(1 / predicted, limits=limits),
    ]
    return plots.image_with_maps(
      image.astype(np.uint8), maps, height=plots.THIRD
    )

  @functools.cached_property
  def _splits(self) -> dict[tuple[str, int], DenseSet]:
    return {}

  def open_split(self, split: str, size: int, **options) -> DenseSet:
    """Opens a split, cached; `size` applies to scenes, see `open_depth`."""
    key = split, size if is_scenes(self.data) else 0
    if key not in self._splits:
      open_data = getattr(registry, f"open_{self._kind}")
      self._splits[key] = open_data(
        self.data, split=split, size=key[1], truth=self.truth, **options
      )
    return self._splits[key]

  def _opened(self) -> list[Any]:
    # Scenes are rendered at the encoder's size, once an encoder runs.
    return [] if is_scenes(self.data) else [*self._splits.values()]

  def _score_images(
    self,
    predictions: Iterable[Prediction],
    score: Callable[[np.ndarray | None, np.ndarray], dict[str, float]],
    protocol: dict[str, Any],
    *,
    to_metres: Callable[..., np.ndarray] = lambda predicted, *_: predicted,
    min_pixels: int = 1,
    **limits: Any,
  ) -> Result:
    """Returns means over images, chance, and the sheet.

    `score` computes metrics from predicted (None: the best constant) and true
    values of the pixels that are valid within `limits` (`valid_mask`);
    images with fewer than `min_pixels` are skipped. `to_metres` computes the
    sheet's depth from predicted map, true map and valid mask.
    """
    scores, chance, rows, skipped = [], [], [], 0
    for image, truth, predicted in predictions:
      valid = self._valid_mask(truth, **limits)
      if valid.sum() < min_pixels:
        skipped += 1
        continue
      scores.append(score(predicted[valid], truth[valid]))
      chance.append(score(None, truth[valid]))
      if len(rows) < self.pictures:
        depth = to_metres(predicted, truth, valid)
        rows.append(self._draw_row(image, truth, depth, valid))
    means = average(scores, skipped=skipped)
    units = {k: u for k, u in self._units.items() if k in means.metrics}
    titles = ("image", f"true {self._kind}", f"predicted {self._kind}")
    return Result.from_estimate(
      means,
      protocol | {"images": len(scores), "images_skipped": skipped},
      average(chance).metrics,
      units=units,
      lower=tuple(units),
      sheets={self._kind: plots.stack_rows(rows, titles)} if rows else {},
    )
