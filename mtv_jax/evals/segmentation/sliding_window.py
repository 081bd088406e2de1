"""Sliding-window segmentation: class maps at the size of the image.

An image is resized to the shorter side `short` and cut into overlapping square
windows, with scores on each one's patch grid. These are upsampled to the
window, averaged where windows overlap and resized to the image; the class of a
pixel is the argmax.

All of this but the argmax is linear and separable. So the patches of all
windows are concatenated to one mosaic, and two matrices resample it to the
image in one step: the same sums, in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from mtv_jax.evals.core import dense, resizing
from mtv_jax.utils.errors import ConfigError

# Bytes of full-size scores at a time, of each thread.
_BLOCK = 2**25


@dataclasses.dataclass(frozen=True)
class Slide:
  """The windows, scales and flips of an image.

  As in DINOv3's evaluation, a factor below 1 rounds the shorter side up to a
  multiple, and windows shrink to an image that is smaller, without padding.
  """

  size: int  # side of the windows in pixels
  stride: int  # pixels from window to window; the last ends with the image
  short: int  # shorter side of the resized image
  # Factors of `short`; with several, the softmax of each is averaged.
  scales: tuple[float, ...] = (1.0,)
  multiple: int = 32  # of a shorter side by a factor below 1
  # How the longer side is rounded: `nearest` (DINOv3), or `down` (TIPS).
  rounding: str = "nearest"
  flips: str = "none"  # `both` also averages with the mirrored image
  interpolation: str = "bilinear"  # or `bicubic`, Pillow's, antialiased
  # What is averaged where windows overlap, `scores` or their `softmax`.
  average: str = "scores"

  def __post_init__(self):
    if not self.scales:
      raise ConfigError("scales is empty, expected a factor")
    if self.stride > self.size:
      raise ConfigError(
        f"stride={self.stride} leaves gaps between windows of {self.size}"
      )

  def shape(
    self, height: int, width: int, *, scale: float = 1.0
  ) -> tuple[int, int]:
    """Height and width of a resized image."""
    short = int(self.short * scale)
    if scale < 1:
      short = math.ceil(short / self.multiple) * self.multiple
    return resized(height, width, short=short, rounding=self.rounding)

  def window(self, height: int, width: int) -> tuple[int, int]:
    """Height and width of the windows of a resized image.

    The square of its shorter side if both sides are smaller than a window, so
    that the patch divides it; else its own side where that is smaller.
    """
    side = self.size
    if max(height, width) < side:
      side = min(height, width)
    return min(side, height), min(side, width)

  def protocol(self) -> dict[str, Any]:
    """For JSON."""
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


def starts(length: int, *, window: int, stride: int) -> list[int]:
  """The first pixels of the windows on one axis.

  The grid of mmsegmentation, with the last window shifted inside the image. A
  window smaller than the stride is moved by its own length.
  """
  stride = min(stride, window)
  count = max(length - window + stride - 1, 0) // stride + 1
  return [min(i * stride, max(length - window, 0)) for i in range(count)]


def resized(
  height: int, width: int, *, short: int, rounding: str = "nearest"
) -> tuple[int, int]:
  """Height and width with the shorter side `short`.

  The longer side is rounded `down` or to the `nearest` pixel, halves up.
  """
  half = {"down": 0.0, "nearest": 0.5}[rounding]
  if height <= width:
    return short, int(short * width / height + half)
  return int(short * height / width + half), short


def resize_image(
  image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], interpolation: str
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Pillow's antialiased resize."""
  if image.shape[:2] == size:
    return image
  method = PIL.Image.Resampling[interpolation.upper()]
  return np.asarray(PIL.Image.fromarray(image).resize(size[::-1], method))


@dataclasses.dataclass(frozen=True)
class ScaledView:
  """An image at one scale, maybe mirrored, cut into windows row by row."""

  windows: list[np.ndarray]
  shape: tuple[int, int]  # height and width of the resized image
  mirrored: bool


def cut_views(
  image: UInt8[np.ndarray, "h w 3"], slide: Slide
) -> list[ScaledView]:
  """Views of an image at all scales and flips."""
  views = []
  for scale in slide.scales:
    shape = slide.shape(*image.shape[:2], scale=scale)
    pixels = resize_image(image, shape, slide.interpolation)
    views.append(ScaledView(cut(pixels, slide), shape, mirrored=False))
    if slide.flips == "both":
      flipped = cut(pixels[:, ::-1], slide)
      views.append(ScaledView(flipped, shape, mirrored=True))
  return views


def cut(pixels: np.ndarray, slide: Slide) -> list[np.ndarray]:
  """The windows of an image or map, row by row."""
  height, width = slide.window(*pixels.shape[:2])
  rows, columns = (
    starts(side, window=window, stride=slide.stride)
    for side, window in zip(pixels.shape, (height, width), strict=False)
  )
  return [pixels[y : y + height, x : x + width] for y in rows for x in columns]


@functools.lru_cache(maxsize=64)
def axis_matrix(
  length: int, target: int, *, window: int, stride: int, grid: int
) -> Float32[np.ndarray, "target cells"]:
  """The matrix from the cells of all windows of an axis to its pixels.

  `length` pixels of the resized image have windows of `grid` cells each;
  `target` are the pixels of the image itself.
  """
  begins = starts(length, window=window, stride=stride)
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


def class_map(
  scores: Sequence[Float32[np.ndarray, "_ _ _ k"]],
  views: Sequence[ScaledView],
  slide: Slide,
  *,
  size: tuple[int, int],
) -> UInt8[np.ndarray, "h2 w2"]:
  """The best class of every pixel of an image of `size`.

  `scores` are the window scores of each view, on the patch grid.
  """
  if slide.average == "softmax":
    scores = [
      _softmax(resizing.resize(s, slide.window(*view.shape)))
      for s, view in zip(scores, views, strict=True)
    ]
  resamplers = [
    _resampler(*pair, slide, size) for pair in zip(scores, views, strict=True)
  ]
  classes = scores[0].shape[-1]
  step = max(1, _BLOCK // (4 * size[1] * classes))
  parts = []
  for top in range(0, size[0], step):
    blocks = (resample(slice(top, top + step)) for resample in resamplers)
    if len(resamplers) == 1:
      total = next(blocks)
    else:
      total = sum(
        _softmax(b) if slide.average == "scores" else b for b in blocks
      )
    parts.append(np.argmax(total, axis=-1).astype(np.uint8))
  return np.concatenate(parts)


def _resampler(
  scores: np.ndarray, view: ScaledView, slide: Slide, size: tuple[int, int]
) -> Callable[[slice], np.ndarray]:
  """The function from a range of rows to full-size scores `[rows, W, K]`."""
  _, h, w, classes = scores.shape
  rows, columns = (
    axis_matrix(length, target, window=window, stride=slide.stride, grid=grid)
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
    half = rows[span] @ cells
    return np.matmul(columns, half.reshape(len(half), -1, classes))

  return resample


def _softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  x /= x.sum(axis=-1, keepdims=True)
  return x


# The scores of its view, to which its own are added, and its pixels.
_Window = tuple[list[np.ndarray], np.ndarray]
ClassMaps = list[UInt8[np.ndarray, "h w"]]  # of each head
Score = Callable[[list[np.ndarray]], Float32[np.ndarray, "n h w heads k"]]


def predict(
  images: Sequence[Any],
  score: Score,
  slide: Slide,
  *,
  batch_size: int,
  summarize: Callable[[int, ClassMaps], Any] = lambda i, maps: maps,
) -> Iterator[Any]:
  """The class maps of images, in their order, one per head.

  Threads read images ahead and compute maps, each process for its share of
  the images, while the caller's thread scores batches of windows of one shape
  across images, so that few shapes are compiled.
  """

  def read(i: int) -> _Job:
    image = images[i]
    return _Job(i, cut_views(image, slide), slide, image.shape[:2])

  def score_batch(batch: list[_Window]) -> Iterator[Any]:
    scores = score([pixels for _, pixels in batch])
    return zip((target for target, _ in batch), scores, strict=True)

  def score_windows() -> Iterator[_Job]:
    jobs: collections.deque[_Job] = collections.deque()

    def windows() -> Iterator[_Window]:
      for job in dense.shared_map(read, range(len(images))):
        jobs.append(job)
        for view, target in zip(job.views, job.scores, strict=True):
          yield from ((target, pixels) for pixels in view.windows)

    for target, window_scores in dense.map_by_group(
      score_batch,
      windows(),
      lambda window: window[1].shape,
      batch_size=batch_size,
    ):
      target.append(window_scores)
      if jobs[0].is_scored:
        yield jobs.popleft()

  return dense.shared_map(
    lambda job: summarize(job.index, job.class_maps()), score_windows()
  )


class _Job:
  """An image's views, with the scores of their windows computed so far."""

  def __init__(
    self,
    index: int,
    views: list[ScaledView],
    slide: Slide,
    size: tuple[int, int],
  ):
    self.index = index
    self.views, self.slide, self.size = views, slide, size
    self.scores: list[list[np.ndarray]] = [[] for _ in views]

  @property
  def is_scored(self) -> bool:
    """Whether all windows have scores."""
    pairs = zip(self.views, self.scores, strict=True)
    return all(len(view.windows) == len(scores) for view, scores in pairs)

  def class_maps(self) -> ClassMaps:
    """The class map of each head."""
    parts = [np.stack(scores) for scores in self.scores]
    return [
      class_map(
        [part[..., head, :] for part in parts],
        self.views,
        self.slide,
        size=self.size,
      )
      for head in range(parts[0].shape[-2])
    ]
