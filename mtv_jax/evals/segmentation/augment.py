"""Augmentation of images and class maps.

mmsegmentation's ADE20K pipeline with the ranges of DINOv3's linear probe:
scale, crop, flip, photometric distortion, padding.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.evals.segmentation import sliding_window

PROTOCOL = {
  "scale": "short side int(size * U(0.5, 2)), as evaluation resizes",
  "crop": "size x size, redrawn up to 10 times until no class has 0.75",
  "flip": 0.5,
  "distortion": (
    "each p=0.5: brightness +-32, contrast 0.5-1.5 (first or last), "
    "saturation 0.5-1.5 and hue +-0.5 of a turn in HSV"
  ),
  "padding": "right and below; pixels 0 after normalisation, labels ignored",
}
_MAX_TRIES = 10
_MAX_SHARE = 0.75


def augment(
  image: UInt8[np.ndarray, "h w 3"],
  labels: UInt8[np.ndarray, "h w"],
  rng: np.random.Generator,
  *,
  size: int,
  fill: Float32[np.ndarray, "3"],
) -> tuple[np.ndarray, np.ndarray]:
  """Random `size` x `size` crop of an image and its map, see `PROTOCOL`.

  Padding has the colour `fill` in 0..255 and makes the crop float32.
  """
  short = int(size * rng.uniform(0.5, 2.0))
  shape = sliding_window.resized(*image.shape[:2], short=short)
  image = sliding_window.resize_image(image, shape)
  labels = resizing.resize_maps(labels, shape, method="nearest")
  top, left = _corner(labels, rng, size)
  box = np.s_[top : top + size, left : left + size]
  image, labels = image[box], labels[box]
  if rng.random() < 0.5:
    image, labels = image[:, ::-1], labels[:, ::-1]
  return pad(distort(image, rng), size, fill), pad(labels, size, IGNORE)


def pad(pixels: np.ndarray, size: int, fill: np.ndarray | int) -> np.ndarray:
  """Pads to `size` x `size`, on the right and below.

  Padded images are float32, which represents the encoder's mean exactly:
  padding normalises to zero.
  """
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  kind = np.float32 if pixels.ndim == 3 else pixels.dtype
  out = np.empty((size, size, *pixels.shape[2:]), kind)
  out[:] = fill
  out[:height, :width] = pixels
  return out


def _corner(
  labels: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[int, int]:
  """Random crop corner (top, left), with every class below 75 % of pixels."""
  room = np.maximum(np.array(labels.shape) - size, 0)
  for _ in range(_MAX_TRIES):
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
  """Random brightness, contrast, saturation and hue, each with p = 0.5."""
  contrast_first = rng.random() < 0.5
  apply = rng.random(4) < 0.5
  brightness, hue = rng.uniform(-32, 32), rng.uniform(-0.5, 0.5)
  contrast, saturation = np.where(apply[1:3], rng.uniform(0.5, 1.5, 2), 1.0)
  image = _affine(image, 1.0, brightness * apply[0])
  if contrast_first:
    image = _affine(image, contrast, 0.0)
  if apply[2] or apply[3]:
    image = _adjust_hue(image, saturation=saturation, hue=hue * apply[3])
  if not contrast_first:
    image = _affine(image, contrast, 0.0)
  return np.ascontiguousarray(image)


def _affine(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
  scaled = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(scaled, 0, 255).astype(np.uint8)


def _adjust_hue(
  image: np.ndarray, *, saturation: float, hue: float
) -> np.ndarray:
  hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
  # OpenCV's hue is in steps of two degrees.
  hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(180 * hue)) % 180
  hsv[..., 1] = _affine(hsv[..., 1], saturation, 0.0)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
