"""Zero-shot relative depth of the pretraining head, aligned per image.

The head predicts inverse depth up to scale and shift, which are fitted to each
image by least squares before scoring (Ranftl et al. 2020, MiDaS). Results
under the published protocols differ by about a tenth. `protocol` selects one
(default `midas`); each step is also an option.

              alignment         resize            KITTI's crops     NYU's crop
  midas       disparity         bilinear          none              none
  depth_anything  disparity     bilinear_corners  kb, garg          nyu_eigen
  marigold    disparity_positive  bilinear        kb, kitti_eigen   nyu_eigen
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import lower_bound_shape
from mtv_jax.evals.core import base, dense, resizing
from mtv_jax.evals.core.base import NotApplicable, Result
from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.datasets import scenes
from mtv_jax.evals.depth import metrics
from mtv_jax.evals.depth.metrics import DepthEvaluator, Prediction
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils.errors import ConfigError

ALIGNMENTS = {
  "disparity": (
    "least squares in inverse depth, inverse depth at least 1 / cap, inverted"
  ),
  "disparity_positive": (
    "least squares in inverse depth (over positive pixels of a prediction "
    "without negative ones), at least 0.001 / m, inverted, clipped to "
    "[low, cap]"
  ),
  "depth": "least squares in depth, clipped to [low, cap]",
  "disparity_space": "least squares in inverse depth, and scored there",
}
_CAP = {"nyu": 10.0, "kitti": 80.0, "scenes": scenes.MAX_DEPTH}
_MIN_DEPTH = {"nyu": 1e-3, "kitti": 1e-5, "scenes": 1e-3}  # Marigold's clip
_KEEP_ASPECT = (
  "shorter side at least input_size, aspect ratio kept to a multiple of the "
  "patch"
)
_KB_SIZE = (352, 1216)  # the crop of KITTI's depth benchmark
_CROPS = {
  "midas": {},
  "depth_anything": {"nyu": "nyu_eigen", "kitti": "garg"},
  "marigold": {"nyu": "nyu_eigen", "kitti": "kitti_eigen"},
}


@dataclasses.dataclass(frozen=True)
class AlignmentProtocol:
  """Scoring protocol for one data kind; see the options of `RelativeDepth`."""

  alignment: str
  resize: str
  cut: str
  crop: str
  low: float  # lower bound of valid depth, in metres
  high: float | None  # upper bound of valid depth
  cap: float  # largest aligned depth
  min_depth: float  # smallest aligned depth, for alignments that clip


def published_protocol(name: str, kind: str) -> AlignmentProtocol:
  """A published protocol for `nyu`, `kitti` or `scenes`."""
  is_midas, cap = name == "midas", _CAP[kind]
  return AlignmentProtocol(
    alignment="disparity_positive" if name == "marigold" else "disparity",
    resize="bilinear_corners" if name == "depth_anything" else "bilinear",
    cut="kb" if kind == "kitti" and not is_midas else "none",
    crop=_CROPS[name].get(kind, "none"),
    low=0.0 if is_midas or kind == "scenes" else 1e-3,
    high=None if is_midas and kind == "kitti" else cap,
    cap=cap,
    min_depth=_MIN_DEPTH[kind],
  )


@dataclasses.dataclass(frozen=True)
class RelativeDepth(DepthEvaluator):
  """Zero-shot relative depth of the test split.

  None means the protocol's value.

  Attributes:
    aspect: encoder input. `squash` squashes images to a square, as in our
      heads' training; `keep` keeps the aspect ratio, both sides multiples of
      the patch size, bicubic without antialiasing, as in Depth Anything.
      Defaults to `keep` for Depth Anything's heads, which predict every input
      pixel, and to `squash` for ours.
    input_size: side of the square, or minimum shorter side, in pixels; defaults
      to the encoder's size.
    alignment: see `ALIGNMENTS`.
    resize: how predictions are resized, see `resizing`.
    cut: `kb` first crops KITTI's images to their bottom centre, 352 x 1216.
    crop: evaluated pixels, see `metrics.crop_mask`.
    cap: largest depth of aligned predictions, in metres, and of evaluated
      pixels if the protocol limits them.
    min_pixels: images with fewer valid pixels are skipped.
    subset: subset of KITTI's list, `all`, `train` or `val` (MiDaS: val).
  """

  requires = frozenset({"depth"})

  protocol: Literal["midas", "depth_anything", "marigold"] = "midas"
  aspect: Literal["squash", "keep"] | None = None
  input_size: PositiveInt | None = None
  alignment: (
    Literal["disparity", "disparity_positive", "depth", "disparity_space"]
    | None
  ) = None
  resize: Literal["bilinear", "bilinear_corners"] | None = None
  cut: Literal["none", "kb"] | None = None
  crop: metrics.CropName | None = None
  cap: PositiveFloat | None = None
  min_pixels: PositiveInt = 10
  subset: str = "all"
  batch_size: PositiveInt = 16

  def _set(self, size: int) -> DepthSet:
    return self.open_split("test", size, count=self.count, subset=self.subset)

  def prepare(self) -> None:
    """Opens the data, so that missing files fail early."""
    self._set(96)

  def run(self, encoder: Encoder) -> Result:
    """Returns AbsRel, delta and RMSE; chance is each image's best constant."""
    if not encoder.can_predict("depth"):
      raise NotApplicable(
        "this encoder has no depth head; use a run that was trained with "
        "objectives.depth, or depth_probe"
      )
    data = self._set(encoder.preprocess.size)
    protocol = self._resolve_protocol(data.kind)
    head = encoder.prediction_heads.get("depth")
    is_dense = getattr(head, "scale", None) is not None
    aspect = self.aspect or ("keep" if is_dense else "squash")
    if aspect == "squash":
      encoder = self._with_input_size(encoder)
    return self._score_images(
      self._predict_depth(encoder, data, protocol, aspect),
      lambda predicted, truth: score(predicted, truth, protocol),
      self._protocol(encoder, data, protocol, aspect),
      to_metres=_align_map,
      min_pixels=self.min_pixels,
      low=protocol.low,
      high=protocol.high,
      crop=protocol.crop,
    )

  def _resolve_protocol(self, kind: str) -> AlignmentProtocol:
    protocol = published_protocol(self.protocol, kind)
    names = ("alignment", "resize", "cut", "crop", "cap")
    values = {name: getattr(self, name) for name in names}
    options = {k: value for k, value in values.items() if value is not None}
    if self.cap is not None and protocol.high is not None:
      options["high"] = self.cap
    return dataclasses.replace(protocol, **options)

  def _with_input_size(self, encoder: Encoder) -> Encoder:
    preprocess = encoder.preprocess
    if preprocess.crop != "none":
      raise NotApplicable(
        "this encoder sees a central crop only, but depth is scored over the "
        "whole image: set preprocess.resize='squash', crop='none', or "
        "aspect='keep' here"
      )
    if self.input_size is None:
      return encoder
    side = self.input_size
    encoder.spec.image.grid_of(side, side)
    return encoder.with_preprocess(
      dataclasses.replace(preprocess, size=side, resize_size=None, drop=0)
    )

  def _predict_depth(
    self,
    encoder: Encoder,
    data: DepthSet,
    protocol: AlignmentProtocol,
    aspect: str,
  ) -> Iterator[Prediction]:
    """Yields predictions at image size, in order."""

    def read(i: int) -> tuple[np.ndarray, ...]:
      image, truth = (cut(x, protocol.cut) for x in data.read_pair(i))
      if aspect != "keep":
        return image, truth, image
      size = self.input_size or encoder.preprocess.size
      multiple = encoder.spec.image.patch_size
      pixels = resize_keeping_aspect_ratio(image, size=size, multiple=multiple)
      return image, truth, pixels

    pairs: collections.deque[tuple[np.ndarray, ...]] = collections.deque()

    def inputs() -> Iterator[np.ndarray]:
      for *pair, pixels in shared_map(read, range(len(data.images))):
        pairs.append(pair)
        yield pixels

    maps = predict_maps(
      encoder, inputs(), resize=aspect != "keep", batch_size=self.batch_size
    )
    for inverse in maps:
      image, truth = pairs.popleft()
      yield (
        image,
        truth,
        resizing.resize_maps(inverse, truth.shape, method=protocol.resize),
      )

  def _protocol(
    self,
    encoder: Encoder,
    data: DepthSet,
    protocol: AlignmentProtocol,
    aspect: str,
  ) -> dict[str, Any]:
    is_squashed = aspect == "squash"
    size = self.input_size or encoder.preprocess.size
    inputs = {
      "input_size": size,
      "preprocess": base.preprocess_protocol(
        encoder, resize=_KEEP_ASPECT, interpolation="bicubic a=-0.75"
      ),
    }
    high = "no limit" if protocol.high is None else f"{protocol.high:g} m"
    return {
      **encoder.protocol(),
      **({} if is_squashed else inputs),
      "aspect": aspect,
      "data": data.name,
      "data_hash": data.digest,
      "subset": self.subset if data.kind == "kitti" else "all",
      "depth": data.source,
      "protocol": self.protocol,
      "image_cut": protocol.cut,
      "head": "pretraining's, inverse depth of the "
      + ("squashed image" if is_squashed else "image at its aspect ratio"),
      "prediction_resize": protocol.resize,
      "alignment": ALIGNMENTS[protocol.alignment],
      "cap": protocol.cap,
      "low": protocol.min_depth,
      "crop": protocol.crop,
      "valid": f"{protocol.low:g} m < depth < {high}",
      "min_pixels": self.min_pixels,
      "averaging": metrics.AVERAGING,
      "chance": "the best constant of each image",
    }


def resize_keeping_aspect_ratio(
  image: UInt8[np.ndarray, "_ _ 3"], *, size: int, multiple: int
) -> Float32[np.ndarray, "_ _ 3"]:
  """Resizes an image at its aspect ratio, as in Depth Anything.

  The shorter side is at least `size`; both are divisible by `multiple`.
  """
  shape = lower_bound_shape(*image.shape[:2], size=size, multiple=multiple)
  pixels = image.astype(np.float32)
  return cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_CUBIC)


def predict_maps(
  encoder: Encoder,
  images: Iterable[np.ndarray],
  *,
  resize: bool,
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Yields inverse depth of images, in order."""
  options = {} if resize else {"resize": False}
  return dense.map_by_group(
    functools.partial(encoder.depth, batch_size=batch_size, **options),
    images,
    (lambda image: None) if resize else np.shape,
    # Larger batches, so that resizing runs ahead of the devices.
    batch_size=4 * batch_size if resize else batch_size,
  )


def _align_map(predicted, truth, valid) -> np.ndarray:
  """Depth in metres from the least-squares fit of inverse depth."""
  affine = metrics.fit_affine(predicted[valid], 1 / truth[valid])
  return 1 / np.maximum(affine(predicted), 1e-6)


def cut(x: np.ndarray, name: str) -> np.ndarray:
  """Crops an image or map: `kb` is the bottom centre 352 x 1216."""
  if name == "none":
    return x
  (height, width), (rows, columns) = x.shape[:2], _KB_SIZE
  if height < rows or width < columns:
    raise ConfigError(
      "cut='kb' takes 352 x 1216 of KITTI's images, but this one is "
      f"{height} x {width}; use cut='none'"
    )
  left = (width - columns) // 2
  return x[height - rows :, left : left + columns]


def align(
  predicted: metrics.Pixels | None,
  truth: metrics.Pixels,
  *,
  alignment: str = "disparity",
  cap: float | int,
  min_depth: float = 1e-3,
) -> np.ndarray:
  """Depth in metres at valid pixels, after least-squares alignment.

  `predicted` is inverse depth up to scale and shift (or depth, with
  `alignment="depth"`); None for the best constant. `disparity_space` returns
  inverse depth; `min_depth` is the lower limit of the alignments that clip.
  """
  g = np.asarray(truth, np.float64)
  target = g if alignment == "depth" else 1 / g
  if predicted is None:
    fitted = np.full_like(g, target.mean())
  else:
    # Marigold's maps are in 0..1, and 0 means missing. A head without a ReLU
    # has an arbitrary zero, so all pixels are predictions.
    only_positive = alignment == "disparity_positive" and predicted.min() >= 0
    pixels = predicted > 0 if only_positive else slice(None)
    fitted = metrics.fit_affine(predicted[pixels], target[pixels])(predicted)
  if alignment == "disparity_space":
    return fitted
  if alignment == "depth":
    return np.clip(fitted, min_depth, cap)
  if alignment == "disparity_positive":
    return np.clip(1 / np.maximum(fitted, 1e-3), min_depth, cap)
  return 1 / np.maximum(fitted, 1 / cap)


def score(
  predicted: np.ndarray | None, truth: np.ndarray, protocol: AlignmentProtocol
) -> dict[str, float]:
  """Metrics of one image, see `align`; RMSE unless in inverse depth."""
  names = ("alignment", "cap", "min_depth")
  options = {name: getattr(protocol, name) for name in names}
  depth = align(predicted, truth, **options)
  names = ("abs_rel", *metrics.DELTAS)
  if protocol.alignment == "disparity_space":
    inverse = 1 / np.asarray(truth, np.float64)
    return metrics.image_metrics(depth, inverse, names)
  return metrics.image_metrics(depth, truth, (*names, "rmse"))
