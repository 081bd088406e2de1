"""Augmentation of images and class maps.

DINOv3's pipeline (mmsegmentation's for ADE20K with another distortion):
scale, crop, flip, photometric distortion, padding.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.evals.segmentation import sliding_window

_DISTORTION = "each p=0.5: brightness +-32, contrast 0.5-1.5 (first or last), "
PROTOCOL = {
  "scale": "short side int(size * U(0.5, 2)), as evaluation resizes",
  "crop": "size x size, redrawn up to 10 times until no class has 0.75",
  "flip": 0.5,
  "distortion": _DISTORTION
  + "saturation 0.5-1.5 by blending with grey, hue +-0.5 of a turn",
  "padding": "right and below; pixels 0 after normalisation, labels ignored",
}
_HSV = "saturation 0.5-1.5 and hue +-0.1 of a turn in 8-bit HSV"
PROTOCOLS = {
  "official": PROTOCOL,
  "mmseg": PROTOCOL | {"distortion": _DISTORTION + _HSV},
  "none": "none",
}
_MAX_TRIES = 10
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)
_MAX_SHARE = 0.75


def augment(
  image: UInt8[np.ndarray, "h w 3"],
  labels: UInt8[np.ndarray, "h w"],
  rng: np.random.Generator,
  *,
  size: int,
  fill: Float32[np.ndarray, "3"],
  mmseg: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Random `size` x `size` crop of an image and its map, see `PROTOCOL`.

  Padding has the colour `fill` in 0..255 and makes the crop float32. `mmseg`
  distorts colours as mmsegmentation does.
  """
  short = int(size * rng.uniform(0.5, 2.0))
  shape = sliding_window.resized_shape(*image.shape[:2], short=short)
  image = sliding_window.resize_image(image, shape)
  labels = resizing.resize_maps(labels, shape, method="nearest")
  top, left = _draw_corner(labels, rng, size)
  box = np.s_[top : top + size, left : left + size]
  image, labels = image[box], labels[box]
  if rng.random() < 0.5:
    image, labels = image[:, ::-1], labels[:, ::-1]
  image = distort(image, rng, mmseg=mmseg)
  return pad(image, size, fill), pad(labels, size, IGNORE)


def pad(pixels: np.ndarray, size: int, fill: np.ndarray | int) -> np.ndarray:
  """Pads to `size` x `size`, on the right and below.

  Padded images are float32, which represents the encoder's mean exactly:
  padding normalises to zero.
  """
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  dtype = np.float32 if pixels.ndim == 3 else pixels.dtype
  padded = np.empty((size, size, *pixels.shape[2:]), dtype)
  padded[:] = fill
  padded[:height, :width] = pixels
  return padded


def _draw_corner(
  labels: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[int, int]:
  """Random crop corner (top, left); redrawn while one class dominates."""
  max_corner = np.maximum(np.array(labels.shape) - size, 0)
  for _ in range(_MAX_TRIES):
    top, left = (int(x) for x in rng.integers(0, max_corner + 1))
    crop = labels[top : top + size, left : left + size]
    counts = np.bincount(crop.ravel(), minlength=256)[:IGNORE]
    is_mixed = np.count_nonzero(counts) > 1
    if is_mixed and counts.max() < _MAX_SHARE * counts.sum():
      break
  return top, left


def distort(
  image: UInt8[np.ndarray, "h w 3"],
  rng: np.random.Generator,
  *,
  mmseg: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
  """Random brightness, contrast, saturation and hue, each with p = 0.5."""
  contrast_first = rng.random() < 0.5
  applies = rng.random(4) < 0.5
  max_turn = 0.1 if mmseg else 0.5
  brightness, hue = rng.uniform(-32, 32), rng.uniform(-max_turn, max_turn)
  contrast, saturation = np.where(applies[1:3], rng.uniform(0.5, 1.5, 2), 1.0)
  image = _rescale(image, 1.0, brightness * applies[0])
  if contrast_first:
    image = _rescale(image, contrast, 0.0)
  if mmseg and (applies[2] or applies[3]):
    image = _adjust_hsv(image, saturation=saturation, hue=hue * applies[3])
  if applies[2] and not mmseg:
    image = blend_with_grey(image, saturation)
  if applies[3] and not mmseg:
    image = shift_hue(image, hue)
  if not contrast_first:
    image = _rescale(image, contrast, 0.0)
  return np.ascontiguousarray(image)


def _rescale(image: np.ndarray, factor: float, shift: Any) -> np.ndarray:
  scaled = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(scaled, 0, 255).astype(np.uint8)


def blend_with_grey(
  image: UInt8[np.ndarray, "h w 3"], saturation: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Saturation as in torchvision: a blend with the grey image."""
  grey = (image.astype(np.float32) @ _GREY).astype(np.uint8)[..., None]
  return _rescale(image, saturation, np.float32(1 - saturation) * grey)


def shift_hue(
  image: UInt8[np.ndarray, "h w 3"], turn: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Hue as in torchvision, in float32 HSV; `turn` is a fraction of a circle."""
  pixels = np.ascontiguousarray(image, np.float32) / 255
  hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0] + 360 * turn) % 360
  rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
  return (rgb * np.float32(255.999)).astype(np.uint8)


def _adjust_hsv(
  image: np.ndarray, *, saturation: float, hue: float
) -> np.ndarray:
  hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
  # OpenCV's hue is in steps of two degrees.
  hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(180 * hue)) % 180
  hsv[..., 1] = _rescale(hsv[..., 1], saturation, 0.0)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
