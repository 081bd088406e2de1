"""Zero-shot relative depth: the pretraining head's, aligned to each image.

The head predicts inverse depth up to a scale and a shift, which least squares
finds for every image before it is scored (Ranftl et al. 2020, MiDaS). How
exactly changes the figures by about a tenth, so each of the published ways is
here under its name; `midas` is the default. Every step of it is an option, and
stands in the protocol of the result.

              alignment         resize            KITTI's crops     NYU's crop
  midas       disparity         bilinear          none              none
  depth_anything  disparity     bilinear_corners  kb, garg          nyu_eigen
  marigold    disparity_positive  bilinear        kb, kitti_eigen   nyu_eigen
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.examples import Data, DepthSet
from mtv_jax.evals.datasets import (
  registry,
  scenes,
)
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.depth import metrics as depth_metrics
from mtv_jax.evals.depth import sheet as depth_sheet
from mtv_jax.utils import plots
from mtv_jax.utils.errors import did_you_mean

ALIGNMENTS = {
  "disparity": (
    "least squares in inverse depth, inverse depth at least 1 / cap, inverted"
  ),
  "disparity_positive": (
    "least squares in inverse depth over pixels with a positive prediction, "
    "at least 0.001 / m, inverted, clipped to [low, cap]"
  ),
  "depth": "least squares in depth, clipped to [low, cap]",
  "disparity_space": "least squares in inverse depth, and scored there",
}
CUTS = ("none", "kb")
_RESIZES = ("bilinear", "bilinear_corners")
_CAP = {"nyu": 10.0, "kitti": 80.0, "scenes": scenes.MAX_DEPTH}
# The depth that Marigold's clip allows at least.
_LOW = {"nyu": 1e-3, "kitti": 1e-5, "scenes": 1e-3}
# The part of a KITTI image that its depth benchmark is about.
_KB = (352, 1216)


@dataclasses.dataclass(frozen=True)
class Rules:
  """A published way to score, by kind of data where that matters.

  Attributes:
    alignment: one of `ALIGNMENTS`.
    resize: of the prediction to the image, a method of `resizing`.
    cut: of the image before it is encoded.
    crop: of the evaluated pixels, see `depth_metrics.crop_mask`.
    limits: valid depths, the open interval in metres.
  """

  alignment: str
  resize: str
  cut: dict[str, str]
  crop: dict[str, str]
  limits: dict[str, tuple[float, float | None]]


_LIMITS = {"nyu": (1e-3, 10.0), "kitti": (1e-3, 80.0)}
PROTOCOLS = {
  "midas": Rules(
    "disparity", "bilinear", {}, {}, {"nyu": (0.0, 10.0), "kitti": (0.0, None)}
  ),
  "depth_anything": Rules(
    "disparity",
    "bilinear_corners",
    {"kitti": "kb"},
    {"nyu": "nyu_eigen", "kitti": "garg"},
    _LIMITS,
  ),
  "marigold": Rules(
    "disparity_positive",
    "bilinear",
    {"kitti": "kb"},
    {"nyu": "nyu_eigen", "kitti": "kitti_eigen"},
    _LIMITS,
  ),
}


@dataclasses.dataclass(frozen=True)
class RelativeDepth(Evaluator):
  """Zero-shot relative depth.

  What is None is the protocol's.

  Attributes:
    data: see `datasets/registry.py`; the test split is used.
    protocol: `midas`, `depth_anything` or `marigold`.
    alignment: one of `ALIGNMENTS`.
    resize: of predictions: `bilinear` or `bilinear_corners`.
    cut: `kb` cuts KITTI's images to their lower middle, 352 x 1216, before
      anything else; `none`.
    crop: of the evaluated pixels: `nyu_eigen`, `garg`, `kitti_eigen`, `none`.
    cap: largest depth of an aligned prediction, in metres.
    min_pixels: images with fewer valid pixels are skipped.
    count: images to use, evenly spaced; all by default.
    truth: NYUv2's `raw` or `filled` depth, where a layout has both.
    subset: of KITTI's list, `all`, `train` or `val` (MiDaS: val).
    batch_size: images a step.
    pictures: how many images a sheet shows.
  """

  data: Data = "scenes"
  protocol: str = "midas"
  alignment: str | None = None
  resize: str | None = None
  cut: str | None = None
  crop: str | None = None
  cap: float | int | None = None
  min_pixels: int = 10
  count: int | None = None
  truth: str | None = None
  subset: str = "all"
  batch_size: int = 16
  pictures: int = 0

  def __post_init__(self):
    for name, choices in (
      ("protocol", PROTOCOLS),
      ("alignment", ALIGNMENTS),
      ("resize", _RESIZES),
      ("cut", CUTS),
      ("crop", depth_metrics.CROPS),
    ):
      value = getattr(self, name)
      if value is not None and value not in choices:
        raise ValueError(
          f"relative_depth: {name}={value!r}. {did_you_mean(value, choices)}"
        )

  @functools.cached_property
  def _opened(self) -> dict[int, DepthSet]:
    return {}

  def _set(self, size: int) -> DepthSet:
    """The test split, opened once; `size` is that of scenes."""
    size = size if is_scenes(self.data) else 0
    if size not in self._opened:
      self._opened[size] = registry.open_depth(
        self.data,
        split="test",
        size=size,
        count=self.count,
        truth=self.truth,
        subset=self.subset,
      )
    return self._opened[size]

  def prepare(self) -> None:
    """Reads lists, so that missing files show."""
    self._set(96)

  def run(self, encoder: Encoder) -> Result:
    """AbsRel, delta and RMSE; `chance` is the best constant of each image."""
    _check_encoder(encoder)
    data = self._set(encoder.preprocess.size)
    rules = self._rules(data.kind)
    rows, floor, pictures = [], [], []
    for image, truth, predicted in self._predictions(encoder, data, rules):
      valid = depth_metrics.valid_mask(
        truth, low=rules.low, high=rules.high, crop=rules.crop
      )
      if valid.sum() < self.min_pixels:
        rows.append(None)
        floor.append(None)
        continue
      d, g = predicted[valid], truth[valid]
      rows.append(score(d, g, rules))
      floor.append(score(None, g, rules))
      if len(pictures) < self.pictures:
        pictures.append(_picture(image, truth, predicted, valid))
    summary = depth_metrics.summarise(rows)
    chance = depth_metrics.summarise(floor)
    units = {
      m: u for m, u in depth_metrics.UNITS.items() if m in chance.metrics
    }
    return Result(
      summary.metrics,
      self._protocol(encoder, data, rules, summary),
      chance.metrics,
      units=units,
      lower=tuple(units),
      pictures={"depth": plots.vstack(pictures)} if pictures else {},
    )

  def _rules(self, kind: str) -> Resolved:
    rules = PROTOCOLS[self.protocol]
    cap = self.cap or _CAP[kind]
    low, high = rules.limits.get(kind, (0.0, cap))
    return Resolved(
      alignment=self.alignment or rules.alignment,
      resize=self.resize or rules.resize,
      cut=self.cut or rules.cut.get(kind, "none"),
      crop=self.crop or rules.crop.get(kind, "none"),
      low=low,
      # A cap of one's own is also the limit of what is scored.
      high=self.cap if self.cap is not None and high is not None else high,
      cap=cap,
      least=_LOW[kind],
    )

  def _predictions(
    self, encoder: Encoder, data: DepthSet, rules: Resolved
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image, true depth and prediction at the image's size, in order."""
    count, block = len(data.images), 4 * self.batch_size
    for start in range(0, count, block):
      chosen = range(start, min(count, start + block))
      images = [cut(data.images[i], rules.cut) for i in chosen]
      found = encoder.depth(images, batch_size=self.batch_size)
      for i, image, small in zip(chosen, images, found, strict=True):
        truth = cut(data.depths[i], rules.cut)
        if truth.shape != image.shape[:2]:
          raise ValueError(
            f"{data.name}: image {i} has {image.shape[:2]} pixels and its "
            f"depth map {truth.shape}; expected the same"
          )
        large = resizing.resize_maps(small, truth.shape, method=rules.resize)
        yield image, truth, np.asarray(large)

  def _protocol(
    self,
    encoder: Encoder,
    data: DepthSet,
    rules: Resolved,
    summary: depth_metrics.Summary,
  ) -> dict[str, Any]:
    high = "no limit" if rules.high is None else f"{rules.high:g} m"
    return {
      **encoder.protocol(),
      "data": data.name,
      "data_hash": data.digest,
      "subset": self.subset if data.kind == "kitti" else "all",
      "images": summary.images,
      "images_skipped": summary.skipped,
      "depth": data.source,
      "protocol": self.protocol,
      "image_cut": rules.cut,
      "head": "pretraining's, inverse depth of the squashed image",
      "prediction_resize": rules.resize,
      "alignment": ALIGNMENTS[rules.alignment],
      "cap": rules.cap,
      "low": rules.least,
      "crop": rules.crop,
      "valid": f"{rules.low:g} m < depth < {high}",
      "min_pixels": self.min_pixels,
      "averaging": depth_metrics.AVERAGING,
      "chance": "the best constant of each image",
    }


@dataclasses.dataclass(frozen=True)
class Resolved:
  """The rules for one data set.

  Attributes:
    alignment, resize, cut, crop: see `Rules`.
    low, high: valid depths, the open interval in metres.
    cap: largest aligned depth.
    least: smallest aligned depth, where the alignment clips.
  """

  alignment: str
  resize: str
  cut: str
  crop: str
  low: float
  high: float | int | None
  cap: float | int
  least: float


def _check_encoder(encoder: Encoder) -> None:
  if not encoder.can_predict("depth"):
    raise NotApplicable(
      "this encoder has no depth head; a run that was trained with "
      "objectives.depth has. For other encoders there is depth_probe."
    )
  if encoder.preprocess.crop != "none":
    raise NotApplicable(
      "this encoder sees a central crop only, and depth is scored over the "
      "whole image: set preprocess.resize='squash', crop='none'."
    )


def cut(x: np.ndarray, name: str) -> np.ndarray:
  """An image or a map, or the lower middle 352 x 1216 of it.

  Raises:
    ValueError: for one that is smaller.
  """
  if name == "none":
    return x
  height, width = x.shape[:2]
  if height < _KB[0] or width < _KB[1]:
    raise ValueError(
      f"cut='kb' takes 352 x 1216 of KITTI's images, and this one has {height} "
      f"x {width}; use cut='none' for other data"
    )
  left = (width - _KB[1]) // 2
  return x[height - _KB[0] :, left : left + _KB[1]]


def aligned(
  predicted: Float[np.ndarray, " n"] | None,
  truth: Float[np.ndarray, " n"],
  *,
  alignment: str = "disparity",
  cap: float | int,
  least: float = 1e-3,
) -> Float64[np.ndarray, " n"]:
  """Depth in metres at the valid pixels, after the best scale and shift.

  Args:
    predicted: inverse depth up to scale and shift (or depth, with
      `alignment="depth"`); None for the best constant.
    truth: metres.
    alignment: one of `ALIGNMENTS`; `disparity_space` gives inverse depth.
    cap: largest depth.
    least: smallest depth, for the alignments that clip.
  """
  g = np.asarray(truth, np.float64)
  target = g if alignment == "depth" else 1 / g
  if predicted is None:
    fitted = np.full_like(g, target.mean())
  else:
    fit = predicted > 0 if alignment == "disparity_positive" else slice(None)
    affine = depth_metrics.fit_affine(predicted[fit], target[fit])
    fitted = affine(predicted)
  if alignment == "disparity_space":
    return fitted
  if alignment == "depth":
    return np.clip(fitted, least, cap)
  if alignment == "disparity_positive":
    return np.clip(1 / np.maximum(fitted, 1e-3), least, cap)
  return 1 / np.maximum(fitted, 1 / cap)


def score(
  predicted: Float[np.ndarray, " n"] | None,
  truth: Float[np.ndarray, " n"],
  rules: Resolved,
) -> dict[str, float]:
  """The metrics of one image; see `aligned`. RMSE only of depth."""
  found = aligned(
    predicted,
    truth,
    alignment=rules.alignment,
    cap=rules.cap,
    least=rules.least,
  )
  g = np.asarray(truth, np.float64)
  if rules.alignment == "disparity_space":
    g = 1 / g
  scores = {
    "abs_rel": depth_metrics.abs_rel(found, g),
    **{f"delta{k}": depth_metrics.delta(found, g, k) for k in (1, 2, 3)},
  }
  if rules.alignment != "disparity_space":
    scores["rmse"] = depth_metrics.rmse(found, g)
  return scores


def _picture(image, truth, predicted, valid):
  """The aligned prediction beside the truth, on its scale."""
  affine = depth_metrics.fit_affine(predicted[valid], 1 / truth[valid])
  inverse = np.maximum(affine(predicted), 1e-6)
  return depth_sheet.depth_row(image, truth, 1 / inverse, valid)
