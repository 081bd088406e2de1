"""Sliding-window segmentation: class maps at the size of the image.

An image is resized to the shorter side `short` and cut into overlapping square
windows, each of which has scores on its patch grid. These are upsampled to the
window, averaged where windows overlap and resized to the image, of which the
argmax is taken.

All of this but the argmax is linear and separable. So the patches of all
windows are concatenated to one mosaic, and two matrices resample it to the
image in one step: the same sums, in another order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
  """The windows, scales and flips of an image."""

  size: int  # side of the windows in pixels
  stride: int  # pixels from window to window; the last ends with the image
  short: int  # shorter side of the resized image
  # Factors of `short`; with several, the softmax of each is averaged.
  scales: tuple[float, ...] = (1.0,)
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

  def protocol(self) -> dict[str, Any]:
    """For JSON."""
    return {
      "window": self.size,
      "stride": self.stride,
      "short_side": self.short,
      "scales": list(self.scales),
      "flips": self.flips,
      "interpolation": f"{self.interpolation}, antialiased (Pillow)",
      "overlaps": f"mean of the {self.average} of windows",
      "upsampling": "bilinear, align_corners=False, to window, then image size",
      "views_average": "softmax at image size",
      "ties": "lowest class",
    }


def starts(length: int, *, window: int, stride: int) -> list[int]:
  """The first pixels of the windows on one axis.

  The grid of mmsegmentation, with the last window shifted inside the image.
  """
  count = max(length - window + stride - 1, 0) // stride + 1
  return [min(i * stride, max(length - window, 0)) for i in range(count)]


def resized(height: int, width: int, *, short: int) -> tuple[int, int]:
  """Height and width with the shorter side `short`, the longer rounded down."""
  if height <= width:
    return short, width * short // height
  return height * short // width, short


def resize_image(
  image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], interpolation: str
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Pillow's antialiased resize."""
  if image.shape[:2] == size:
    return image
  method = PIL.Image.Resampling[interpolation.upper()]
  return np.asarray(PIL.Image.fromarray(image).resize(size[::-1], method))


@dataclasses.dataclass(frozen=True)
class View:
  """An image at one scale, maybe mirrored, cut into windows row by row."""

  windows: list[np.ndarray]
  shape: tuple[int, int]  # height and width of the resized image
  mirrored: bool


def cut_views(
  image: UInt8[np.ndarray, "h w 3"],
  slide: Slide,
  *,
  fill: Float32[np.ndarray, "3"],
) -> list[View]:
  """Views of an image at all scales and flips; `fill` in 0..255 pads them."""
  views = []
  for scale in slide.scales:
    short = int(slide.short * scale + 0.5)
    shape = resized(*image.shape[:2], short=short)
    pixels = resize_image(image, shape, slide.interpolation)
    views.append(View(cut(pixels, slide, fill), shape, mirrored=False))
    if slide.flips == "both":
      flipped = cut(pixels[:, ::-1], slide, fill)
      views.append(View(flipped, shape, mirrored=True))
  return views


def cut(
  pixels: np.ndarray, slide: Slide, fill: np.ndarray | int
) -> list[np.ndarray]:
  """The windows of an image or map, row by row, padded where necessary."""
  rows, columns = (
    starts(side, window=slide.size, stride=slide.stride)
    for side in pixels.shape[:2]
  )
  return [
    pad(pixels[y : y + slide.size, x : x + slide.size], slide.size, fill)
    for y in rows
    for x in columns
  ]


def pad(pixels: np.ndarray, size: int, fill: np.ndarray | int) -> np.ndarray:
  """Pads to `size` x `size`, on the right and below.

  A padded image is float32, which represents the encoder's mean exactly: after
  normalisation the padding is zero.
  """
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  kind = np.float32 if pixels.ndim == 3 else pixels.dtype
  out = np.empty((size, size, *pixels.shape[2:]), kind)
  out[:] = fill
  out[:height, :width] = pixels
  return out


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
  scores: Sequence[Float32[np.ndarray, "_ h w k"]],
  views: Sequence[View],
  slide: Slide,
  *,
  size: tuple[int, int],
) -> UInt8[np.ndarray, "h2 w2"]:
  """The best class of every pixel of an image of `size`.

  `scores` are those of the windows of each view, on the patch grid.
  """
  if slide.average == "softmax":
    window = (slide.size, slide.size)
    scores = [_softmax(resizing.resize(s, window)) for s in scores]
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
  scores: np.ndarray, view: View, slide: Slide, size: tuple[int, int]
) -> Callable[[slice], np.ndarray]:
  """The function from a range of rows to full-size scores `[rows, W, K]`."""
  _, h, w, classes = scores.shape
  rows, columns = (
    axis_matrix(
      length, target, window=slide.size, stride=slide.stride, grid=grid
    )
    for length, target, grid in zip(view.shape, size, (h, w), strict=True)
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


Score = Callable[[list[np.ndarray]], Float32[np.ndarray, "n h w heads k"]]


def predict(
  images: Sequence[Any],
  score: Score,
  slide: Slide,
  *,
  fill: Float32[np.ndarray, "3"],
  batch_size: int,
) -> Iterator[list[UInt8[np.ndarray, "h w"]]]:
  """The class maps of images, in their order, one per head.

  Threads read images ahead and compute maps, while the caller's thread scores
  batches of windows across images, so that one shape is compiled.

  Args:
    images: of any sizes, read when they are needed.
    score: maps windows to the scores of every head on the patch grid.
    slide: windows, scales and flips.
    fill: colour of the padding, in 0..255.
    batch_size: windows to score at a time.
  """

  def read(i: int) -> _Job:
    image = images[i]
    return _Job(cut_views(image, slide, fill=fill), slide, image.shape[:2])

  def score_windows() -> Iterator[_Job]:
    windows = (
      (job, window)
      for job in dense.threaded_map(read, range(len(images)))
      for view in job.views
      for window in view.windows
    )
    while batch := list(itertools.islice(windows, batch_size)):
      scores = score([window for _, window in batch])
      for (job, _), window_scores in zip(batch, scores, strict=True):
        job.scores.append(window_scores)
        if len(job.scores) == sum(len(view.windows) for view in job.views):
          yield job

  return dense.threaded_map(_Job.class_maps, score_windows())


@dataclasses.dataclass
class _Job:
  """An image's views, with the scores computed so far."""

  views: list[View]
  slide: Slide
  size: tuple[int, int]
  scores: list[np.ndarray] = dataclasses.field(default_factory=list)

  def class_maps(self) -> list[np.ndarray]:
    """The class map of each head."""
    edges = np.cumsum([len(view.windows) for view in self.views])[:-1]
    parts = np.split(np.stack(self.scores), edges)
    return [
      class_map(
        [part[..., head, :] for part in parts],
        self.views,
        self.slide,
        size=self.size,
      )
      for head in range(parts[0].shape[-2])
    ]
