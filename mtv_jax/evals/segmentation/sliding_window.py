"""Sliding-window segmentation: class maps at image size.

An image is resized to the shorter side `short` and cut into overlapping square
windows, which are scored on their patch grids. Scores are upsampled to the
window, averaged over overlaps, and resized to the image; a pixel's class is the
argmax.

With one view and averaged scores, everything before the argmax is linear and
separable. So all windows' patches form one mosaic, and two matrices resample it
to the image in one step, with sums in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from mtv_jax.evals.core import dense, resizing
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils.errors import ConfigError

# Bytes of full-size scores per block and thread.
_BLOCK_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class Slide:
  """Windows, scales and flips of an image.

  As in DINOv3's evaluation, scales below 1 round the shorter side up to
  `multiple`, and windows shrink to smaller images, without padding.
  """

  size: int  # window side in pixels
  stride: int  # pixels between windows; the last window ends at the border
  short: int  # shorter side of the resized image
  # Factors of `short`; the softmax is averaged over several scales.
  scales: tuple[float, ...] = (1.0,)
  multiple: int = 32  # divisor of the shorter side for scales below 1
  # Rounding of the longer side: `nearest` (DINOv3) or `down` (TIPS).
  rounding: str = "nearest"
  flips: str = "none"  # `both` also averages with the mirrored image
  interpolation: str = "bilinear"  # or `bicubic`; Pillow's, antialiased
  # Averaged over overlapping windows: `scores` or their `softmax`.
  average: str = "scores"

  def __post_init__(self):
    if not self.scales:
      raise ConfigError("scales is empty; expected a factor")
    if self.stride > self.size:
      raise ConfigError(
        f"stride={self.stride} leaves gaps between windows of {self.size}"
      )

  def shape(
    self, height: int, width: int, *, scale: float = 1.0
  ) -> tuple[int, int]:
    """Height and width of the resized image."""
    short = int(self.short * scale)
    if scale < 1:
      short = math.ceil(short / self.multiple) * self.multiple
    return resized_shape(height, width, short=short, rounding=self.rounding)

  def window(self, height: int, width: int) -> tuple[int, int]:
    """Height and width of the windows of a resized image.

    If both image sides are below `size`, windows are squares of the shorter
    side, which the patch size divides; else of `size`, clipped to the image.
    """
    side = self.size
    if max(height, width) < side:
      side = min(height, width)
    return min(side, height), min(side, width)

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    return {
      "window": self.size,
      "stride": self.stride,
      "short_side": self.short,
      "scales": list(self.scales),
      "scales_below_1": f"shorter side rounded up to {self.multiple}, windows "
      "of at most the image",
      "longer_side": f"rounded {self.rounding}",
      "flips": self.flips,
      "interpolation": f"{self.interpolation}, antialiased (Pillow)",
      "overlaps": f"mean of the {self.average} of windows",
      "upsampling": "bilinear, align_corners=False, to window, then image size",
      "views_average": "softmax at image size",
      "ties": "lowest class",
    }


def window_starts(length: int, *, window: int, stride: int) -> list[int]:
  """First pixels of the windows along an axis.

  mmsegmentation's grid, with the last window shifted inside the image. The
  stride is capped at the window.
  """
  stride = min(stride, window)
  count = max(length - window + stride - 1, 0) // stride + 1
  return [min(i * stride, max(length - window, 0)) for i in range(count)]


def resized_shape(
  height: int, width: int, *, short: int, rounding: str = "nearest"
) -> tuple[int, int]:
  """Height and width after resizing the shorter side to `short`.

  The longer side is rounded `down`, or to the `nearest` integer (halves up).
  """
  half = {"down": 0.0, "nearest": 0.5}[rounding]
  if height <= width:
    return short, int(short * width / height + half)
  return int(short * height / width + half), short


def resize_image(
  image: UInt8[np.ndarray, "h w 3"],
  size: tuple[int, int],
  interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Resizes with Pillow, antialiased."""
  if image.shape[:2] == size:
    return image
  method = PIL.Image.Resampling[interpolation.upper()]
  return np.asarray(PIL.Image.fromarray(image).resize(size[::-1], method))


class ScaledView(NamedTuple):
  """Windows of an image at one scale, row by row, optionally mirrored."""

  windows: list[np.ndarray]
  shape: tuple[int, int]  # height and width of the resized image
  mirrored: bool


def _cut_views(image: np.ndarray, slide: Slide) -> list[ScaledView]:
  views = []
  for scale in slide.scales:
    shape = slide.shape(*image.shape[:2], scale=scale)
    pixels = resize_image(image, shape, slide.interpolation)
    views.append(ScaledView(cut_windows(pixels, slide), shape, mirrored=False))
    if slide.flips == "both":
      flipped = cut_windows(pixels[:, ::-1], slide)
      views.append(ScaledView(flipped, shape, mirrored=True))
  return views


def cut_windows(pixels: np.ndarray, slide: Slide) -> list[np.ndarray]:
  """Cuts an image or map into windows, row by row."""
  height, width = slide.window(*pixels.shape[:2])
  rows, columns = (
    window_starts(side, window=window, stride=slide.stride)
    for side, window in zip(pixels.shape, (height, width), strict=False)
  )
  return [pixels[y : y + height, x : x + width] for y in rows for x in columns]


@functools.lru_cache(maxsize=64)
def _axis_matrix(
  length: int, target: int, *, window: int, stride: int, grid: int
) -> np.ndarray:
  """`[target, cells]` matrix that maps all windows' cells on an axis to pixels.

  The resized image has `length` pixels, each window `grid` cells, the original
  image `target` pixels.
  """
  begins = window_starts(length, window=window, stride=stride)
  upsample = resizing.matrix(grid, window)
  matrix, count = np.zeros((length, len(begins) * grid)), np.zeros(length)
  for i, begin in enumerate(begins):
    span = min(window, length - begin)
    matrix[begin : begin + span, i * grid : (i + 1) * grid] = upsample[:span]
    count[begin : begin + span] += 1
  matrix /= count[:, None]
  if length != target:
    matrix = resizing.matrix(length, target) @ matrix
  matrix = matrix.astype(np.float32)
  matrix.setflags(write=False)  # cached, so shared by every caller
  return matrix


def _class_map(
  scores: Sequence[np.ndarray],
  views: Sequence[ScaledView],
  slide: Slide,
  size: tuple[int, int],
) -> np.ndarray:
  """Argmax class of every pixel of an image of `size`.

  `scores` are the window scores `[n, h, w, K]` of each view.
  """
  resamplers = []
  for part, view in zip(scores, views, strict=True):
    if slide.average == "softmax":
      part = _softmax(resizing.resize(part, slide.window(*view.shape)))
    resamplers.append(_resampler(part, view, slide, size))
  classes = scores[0].shape[-1]
  step = max(1, _BLOCK_BYTES // (4 * size[1] * classes))
  class_rows = []
  for top in range(0, size[0], step):
    blocks = (resample(slice(top, top + step)) for resample in resamplers)
    if len(resamplers) > 1 and slide.average == "scores":
      blocks = map(_softmax, blocks)
    total = functools.reduce(np.add, blocks)
    class_rows.append(np.argmax(total, axis=-1).astype(np.uint8))
  return np.concatenate(class_rows)


def _resampler(
  scores: np.ndarray, view: ScaledView, slide: Slide, size: tuple[int, int]
) -> Callable[[slice], np.ndarray]:
  """Returns a function from a row range to full-size scores `[rows, W, K]`."""
  _, h, w, classes = scores.shape
  rows, columns = (
    _axis_matrix(length, target, window=window, stride=slide.stride, grid=grid)
    for length, target, window, grid in zip(
      view.shape, size, slide.window(*view.shape), (h, w), strict=True
    )
  )
  tiles = scores.reshape(rows.shape[1] // h, -1, h, w, classes)
  cells = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3, 4))
  cells = cells.reshape(rows.shape[1], -1)  # [R, C K]
  if view.mirrored:
    columns = columns[::-1]

  def resample(span: slice) -> np.ndarray:
    row_scores = rows[span] @ cells
    return np.matmul(columns, row_scores.reshape(len(row_scores), -1, classes))

  return resample


def _softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  x /= x.sum(axis=-1, keepdims=True)
  return x


ClassMaps = list[UInt8[np.ndarray, "h w"]]  # one per head
Score = Callable[[list[np.ndarray]], Float32[np.ndarray, "n h w heads k"]]


def predict(
  images: Sequence[Any],
  score: Score,
  slide: Slide,
  *,
  batch_size: int,
  summarize: Callable[[int, ClassMaps], Any] = lambda i, maps: maps,
) -> Iterator[Any]:
  """Yields each image's class maps, one per head, through `summarize`.

  Each process reads and resamples its share of the images in threads. The
  caller's thread scores batches of equally shaped windows across images, so
  that few shapes are compiled.
  """
  jobs: collections.deque = collections.deque()

  def read(i: int) -> tuple[int, tuple[int, int], list[ScaledView]]:
    image = images[i]
    return i, image.shape[:2], _cut_views(image, slide)

  def windows() -> Iterator[np.ndarray]:
    for job in shared_map(read, range(len(images))):
      jobs.append(job)
      for view in job[-1]:
        yield from view.windows

  def score_jobs() -> Iterator[tuple]:
    scores = []  # In the order of the windows.
    for window_scores in dense.map_by_group(
      score, windows(), np.shape, batch_size=batch_size
    ):
      scores.append(window_scores)
      if len(scores) == sum(len(view.windows) for view in jobs[0][-1]):
        yield *jobs.popleft(), scores
        scores = []

  def resample(job: tuple) -> Any:
    i, size, views, scores = job
    scores = iter(scores)
    parts = [np.stack([next(scores) for _ in view.windows]) for view in views]
    heads = range(parts[0].shape[-2])
    parts = [[part[..., head, :] for part in parts] for head in heads]
    return summarize(i, [_class_map(p, views, slide, size) for p in parts])

  return shared_map(resample, score_jobs())
