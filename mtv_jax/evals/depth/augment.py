"""Augmentation of images with their depth, on the host.

toolbox   Monocular-Depth-Estimation-Toolbox's for NYUv2, which DINOv2 and
          DINOv3 train their probes with
probe3d   Probe3D's
flip      horizontal flip
none
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.utils.errors import ConfigError

# NYUv2's training images have a white border: rows and columns inside it.
NYU_SIZE = (480, 640)
_NYU_ROWS, _NYU_COLUMNS = (45, 472), (43, 608)
CROP = (416, 544)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class Example:
  """An image and its depth.

  Attributes:
    image: in 0..255.
    depth: metres, 0 where unknown.
  """

  image: Float32[np.ndarray, "h w 3"]
  depth: Float32[np.ndarray, "h w"]


def augment(example: Example, name: str, rng: np.random.Generator) -> Example:
  """Augments an example with one of `AUGMENTS`.

  Raises:
    ConfigError: for `toolbox` of an image that is not 480 x 640.
  """
  return AUGMENTS[name](example, rng)


def augmented_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns after `augment` of an image of `size`."""
  return CROP if name == "toolbox" else size


def _flip(example: Example, rng: np.random.Generator) -> Example:
  if rng.random() < 0.5:
    return example
  return Example(example.image[:, ::-1], example.depth[:, ::-1])


def _toolbox(example: Example, rng: np.random.Generator) -> Example:
  """Border crop, rotation, flip, crop of 416 x 544, colours."""
  if example.depth.shape != NYU_SIZE:
    raise ConfigError(
      f"augment='toolbox' crops NYUv2's images of 480 x 640 and this one is "
      f"{example.depth.shape[0]} x {example.depth.shape[1]}; use 'flip'"
    )
  rows, columns = slice(*_NYU_ROWS), slice(*_NYU_COLUMNS)
  example = Example(example.image[rows, columns], example.depth[rows, columns])
  if rng.random() < 0.5:
    example = rotate(example, rng.uniform(-2.5, 2.5))
  example = _flip(example, rng)
  top, left = (
    int(rng.integers(0, size - crop + 1))
    for size, crop in zip(example.depth.shape, CROP, strict=True)
  )
  part = (slice(top, top + CROP[0]), slice(left, left + CROP[1]))
  image = example.image[part]
  if rng.random() < 0.5:
    image = _jitter_gamma(image, rng)
  return Example(image, example.depth[part])


def rotate(example: Example, degrees: float) -> Example:
  """Rotates clockwise about the centre; pixels from outside are 0.

  Depth is interpolated by nearest neighbour, as the mean of two surfaces lies
  on neither of them.
  """
  height, width = example.depth.shape
  centre = ((width - 1) / 2, (height - 1) / 2)
  matrix = cv2.getRotationMatrix2D(centre, -degrees, 1.0)
  image, depth = (
    cv2.warpAffine(np.ascontiguousarray(x), matrix, (width, height), flags=flag)
    for x, flag in (
      (example.image, cv2.INTER_LINEAR),
      (example.depth, cv2.INTER_NEAREST),
    )
  )
  return Example(image, depth)


def _jitter_gamma(
  image: Float[np.ndarray, "h w 3"], rng: np.random.Generator
) -> Float32[np.ndarray, "h w 3"]:
  """Gamma on 0..255, brightness, and a gain for each channel."""
  gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25)
  gain = brightness * rng.uniform(0.9, 1.1, size=3)
  return np.clip(image**gamma * gain, 0, 255).astype(np.float32)


def _probe3d(example: Example, rng: np.random.Generator) -> Example:
  """Colour jitter (p = 0.8) and a random resized crop (p = 0.5)."""
  image = example.image
  if rng.random() < 0.8:
    image = _jitter(image, rng)
  if rng.random() < 0.5:
    return _resized_crop(Example(image, example.depth), rng)
  return Example(image, example.depth)


def _jitter(
  image: np.ndarray, rng: np.random.Generator, strength: float = 0.2
) -> np.ndarray:
  """torchvision's ColorJitter: four operations in random order."""
  gains = rng.uniform(1 - strength, 1 + strength, size=3)
  turn = rng.uniform(-strength, strength)
  for change in rng.permutation(4):
    if change == 0:
      image = image * gains[0]
    elif change == 1:
      image = gains[1] * image + (1 - gains[1]) * np.mean(image @ _GREY)
    elif change == 2:
      grey = (image @ _GREY)[..., None]
      image = gains[2] * image + (1 - gains[2]) * grey
    else:
      image = _rotate_hue(image, turn)
    image = np.clip(image, 0, 255).astype(np.float32)
  return image


def _rotate_hue(image: np.ndarray, turn: float) -> np.ndarray:
  hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0] + 360 * turn) % 360
  return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _resized_crop(example: Example, rng: np.random.Generator) -> Example:
  """torchvision's RandomResizedCrop, half to all of the area, nearest."""
  height, width = example.depth.shape
  for _ in range(10):
    area = rng.uniform(0.5, 1.0) * height * width
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if w <= width and h <= height:
      break
  else:
    w, h = width, height
  top = int(rng.integers(0, height - h + 1))
  left = int(rng.integers(0, width - w + 1))
  part = (slice(top, top + h), slice(left, left + w))
  image, depth = (
    cv2.resize(
      np.ascontiguousarray(x[part]),
      (width, height),
      interpolation=cv2.INTER_NEAREST,
    )
    for x in (example.image, example.depth)
  )
  return Example(image, depth)


AUGMENTS = {
  "none": lambda example, rng: example,
  "flip": _flip,
  "toolbox": _toolbox,
  "probe3d": _probe3d,
}
