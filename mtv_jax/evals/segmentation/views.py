"""What a segmentation head is trained on: augmented crops, or fixed windows.

The augmentation is mmsegmentation's for ADE20K, with the ranges of DINOv3's
linear probe: scale, crop, mirror, distort the colours, pad.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8

from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.examples import IGNORE, SegmentationSet
from mtv_jax.evals.segmentation import sliding

AUGMENTATION = {
  "scale": "short side int(size * U(0.5, 2)), as evaluation resizes",
  "crop": "size x size, drawn anew up to 10 times until no class has 0.75",
  "flip": 0.5,
  "distortion": (
    "each p=0.5: brightness +-32, contrast 0.5-1.5 (first or last), "
    "saturation 0.5-1.5 and hue +-0.5 of a turn in HSV"
  ),
  "padding": "right and below; pixels 0 after normalisation, labels ignored",
}
_SCALES = (0.5, 2.0)
_TRIES = 10
_MAX_SHARE = 0.75


def augment(
  image: UInt8[np.ndarray, "h w 3"],
  labels: UInt8[np.ndarray, "h w"],
  rng: np.random.Generator,
  *,
  size: int,
  fill: Float32[np.ndarray, "3"],
  interpolation: str = "bilinear",
) -> tuple[
  Shaped[np.ndarray, "{size} {size} 3"], UInt8[np.ndarray, "{size} {size}"]
]:
  """A random crop of an image and of its map.

  Args:
    image: of any size.
    labels: of the image's size.
    rng: decides.
    size: pixels a side of the crop.
    fill: colour of the padding, in 0..255.
    interpolation: of the image; the map takes nearest labels.

  Returns:
    Pixels in 0..255 (float32 where they were padded) and labels.
  """
  short = int(size * rng.uniform(*_SCALES))
  shape = sliding.resized(*image.shape[:2], short=short)
  image = sliding.resize_image(image, shape, interpolation)
  labels = resizing.resize_maps(labels, shape, method="nearest")
  top, left = _corner(labels, rng, size)
  box = np.s_[top : top + size, left : left + size]
  image, labels = image[box], labels[box]
  if rng.random() < 0.5:
    image, labels = image[:, ::-1], labels[:, ::-1]
  image = distort(image, rng)
  return sliding.pad(image, size, fill), sliding.pad(labels, size, IGNORE)


def _corner(
  labels: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[int, int]:
  """Where to crop so that not one class has nearly all of it."""
  room = np.maximum(np.array(labels.shape) - size, 0)
  for _ in range(_TRIES):
    top, left = (int(x) for x in rng.integers(0, room + 1))
    crop = labels[top : top + size, left : left + size]
    counts = np.bincount(crop.ravel(), minlength=256)[:IGNORE]
    mixed = np.count_nonzero(counts) > 1
    if mixed and counts.max() < _MAX_SHARE * counts.sum():
      break
  return top, left


def distort(
  image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
  """Brightness, contrast, saturation and hue, each changed half the time."""
  contrast_first = rng.random() < 0.5
  chosen = rng.random(4) < 0.5
  brightness, hue = rng.uniform(-32, 32), rng.uniform(-0.5, 0.5)
  contrast, saturation = rng.uniform(0.5, 1.5, 2)
  if chosen[0]:
    image = _linear(image, 1.0, brightness)
  if chosen[1] and contrast_first:
    image = _linear(image, contrast, 0.0)
  if chosen[2] or chosen[3]:
    image = _recolour(
      image,
      saturation=saturation if chosen[2] else 1.0,
      hue=hue if chosen[3] else 0.0,
    )
  if chosen[1] and not contrast_first:
    image = _linear(image, contrast, 0.0)
  return np.ascontiguousarray(image)


def _linear(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
  scaled = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(scaled, 0, 255).astype(np.uint8)


def _recolour(
  image: np.ndarray, *, saturation: float, hue: float
) -> np.ndarray:
  hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
  # OpenCV's hue is in steps of two degrees.
  turned = (hsv[..., 0].astype(np.int32) + round(180 * hue)) % 180
  hsv[..., 0] = turned.astype(np.uint8)
  hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class Crops:
  """Augmented crops by step, prepared one step ahead by threads.

  The crops of a step depend on the seed, the step and the row alone.
  """

  def __init__(
    self,
    data: SegmentationSet,
    indices: Callable[[int], Int[np.ndarray, " b"]],
    *,
    size: int,
    fill: Float32[np.ndarray, "3"],
    interpolation: str,
    seed: int,
  ):
    self._data, self._indices, self._seed = data, indices, seed
    self._options = {"size": size, "fill": fill, "interpolation": interpolation}
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self._next: tuple[int, list[concurrent.futures.Future]] = (-1, [])

  def __enter__(self) -> Crops:
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(cancel_futures=True)

  def __call__(
    self, step: int
  ) -> tuple[list[np.ndarray], UInt8[np.ndarray, "b s s"]]:
    """Images and labels of a step."""
    at, pending = self._next
    pending = pending if at == step else self._start(step)
    self._next = (step + 1, self._start(step + 1))
    images, labels = zip(*(f.result() for f in pending), strict=True)
    return list(images), np.stack(labels)

  def _start(self, step: int) -> list[concurrent.futures.Future]:
    items = enumerate(self._indices(step).tolist())
    return [self._pool.submit(self._crop, step, row, i) for row, i in items]

  def _crop(self, step: int, row: int, index: int) -> tuple:
    image, labels = read_pair(self._data, index)
    rng = np.random.default_rng((self._seed, step, row))
    return augment(image, labels, rng, **self._options)


def read_pair(
  data: SegmentationSet, index: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
  """An image and its map.

  Raises:
    ValueError: if their sizes differ.
  """
  image, labels = data.images[index], data.maps[index]
  if image.shape[:2] != labels.shape:
    raise ValueError(
      f"{data.name}: image {index} is {image.shape[0]}x{image.shape[1]} and "
      f"its map {labels.shape[0]}x{labels.shape[1]}; expected the same size"
    )
  return image, labels


def windows(
  data: SegmentationSet,
  index: int,
  slide: sliding.Slide,
  *,
  fill: Float32[np.ndarray, "3"],
) -> tuple[list[np.ndarray], list[UInt8[np.ndarray, "s s"]]]:
  """An image and its map cut as evaluation cuts them, without augmentation."""
  image, labels = read_pair(data, index)
  shape = sliding.resized(*image.shape[:2], short=slide.short)
  labels = resizing.resize_maps(labels, shape, method="nearest")
  pixels = sliding.resize_image(image, shape, slide.interpolation)
  return sliding.cut(pixels, slide, fill), sliding.cut(labels, slide, IGNORE)
