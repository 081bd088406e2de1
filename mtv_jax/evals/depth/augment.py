"""Augmentation of images and depth maps, on the host.

toolbox   Monocular-Depth-Estimation-Toolbox's for NYUv2, used by the probes of
          DINOv2 and DINOv3
probe3d   Probe3D's for NYUv2
flip      horizontal flip
none
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32

from mtv_jax.utils.errors import ConfigError

NYU_SIZE = (480, 640)
# NYUv2's training images have a white border.
_NYU_INSIDE = np.s_[45:472, 43:608]
_CROP = (416, 544)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


class DepthExample(NamedTuple):
  """An image in 0..255, and its depth in metres (0: unknown).

  `probe3d` and `none`, which neither flip nor rotate, also accept normals in
  place of depth.
  """

  image: Float32[np.ndarray, "h w 3"]
  depth: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "h w 3"]

  @property
  def size(self) -> tuple[int, int]:
    """Rows and columns."""
    return self.image.shape[:2]


def augmented_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of an augmented image of `size`."""
  return _CROP if name == "toolbox" else size


def _flip(example: DepthExample, rng: np.random.Generator) -> DepthExample:
  if rng.random() < 0.5:
    return example
  return DepthExample(*(x[:, ::-1] for x in example))


def _toolbox(example: DepthExample, rng: np.random.Generator) -> DepthExample:
  """Border removal, rotation, flip, 416 x 544 crop, colour jitter."""
  if example.depth.shape != NYU_SIZE:
    raise ConfigError(
      f"augment='toolbox' crops NYUv2's images of 480 x 640, but this one is "
      f"{example.depth.shape[0]} x {example.depth.shape[1]}; use 'flip'"
    )
  example = DepthExample(*(x[_NYU_INSIDE] for x in example))
  if rng.random() < 0.5:
    example = rotate(example, rng.uniform(-2.5, 2.5))
  image, depth = _random_crop(_flip(example, rng), _CROP, rng)
  if rng.random() < 0.5:
    # Gamma on 0..255, brightness, and a gain per channel.
    gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25)
    gain = brightness * rng.uniform(0.9, 1.1, size=3)
    image = np.clip(image**gamma * gain, 0, 255).astype(np.float32)
  return DepthExample(image, depth)


def _random_crop(
  example: DepthExample, size: tuple[int, int], rng: np.random.Generator
) -> DepthExample:
  top, left = (
    int(rng.integers(0, length - side + 1))
    for length, side in zip(example.size, size, strict=True)
  )
  crop = np.s_[top : top + size[0], left : left + size[1]]
  return DepthExample(*(x[crop] for x in example))


def rotate(example: DepthExample, degrees: float) -> DepthExample:
  """Rotates clockwise about the centre; pixels from outside are 0.

  Depth is resampled by nearest neighbour: a mean of two surfaces is on neither.
  """
  height, width = example.depth.shape
  centre = ((width - 1) / 2, (height - 1) / 2)
  matrix = cv2.getRotationMatrix2D(centre, -degrees, 1.0)
  methods = (cv2.INTER_LINEAR, cv2.INTER_NEAREST)
  return DepthExample(
    *(
      cv2.warpAffine(np.ascontiguousarray(x), matrix, (width, height), flags=m)
      for x, m in zip(example, methods, strict=True)
    )
  )


def _probe3d(example: DepthExample, rng: np.random.Generator) -> DepthExample:
  """Colour jitter (p = 0.8) and a random resized crop (p = 0.5)."""
  if rng.random() < 0.8:
    example = example._replace(image=_jitter_colours(example.image, rng))
  return _random_resized_crop(example, rng) if rng.random() < 0.5 else example


def _jitter_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """torchvision's ColorJitter(0.2): four operations in random order."""
  gains, turn = rng.uniform(0.8, 1.2, size=3), rng.uniform(-0.2, 0.2)
  for operation in rng.permutation(4):
    if operation == 0:
      image = image * gains[0]
    elif operation == 1:
      image = gains[1] * image + (1 - gains[1]) * np.mean(image @ _GREY)
    elif operation == 2:
      grey = (image @ _GREY)[..., None]
      image = gains[2] * image + (1 - gains[2]) * grey
    else:
      hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
      hsv[..., 0] = (hsv[..., 0] + 360 * turn) % 360
      image = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    image = np.clip(image, 0, 255).astype(np.float32)
  return image


def _random_resized_crop(
  example: DepthExample, rng: np.random.Generator
) -> DepthExample:
  """Albumentations' RandomResizedCrop(scale=(0.5, 1), ratio=(1, 1)), nearest.

  A crop that doesn't fit is drawn again, at most ten times.
  """
  height, width = example.size
  for _ in range(10):
    side = round(np.sqrt(rng.uniform(0.5, 1.0) * height * width))
    if side <= min(height, width):
      break
  else:
    side = min(height, width)
  options = {"interpolation": cv2.INTER_NEAREST}
  return DepthExample(
    *(
      cv2.resize(np.ascontiguousarray(x), (width, height), **options)
      for x in _random_crop(example, (side, side), rng)
    )
  )


# Functions of an example and a generator.
AUGMENTS = {
  "none": lambda example, rng: example,
  "flip": _flip,
  "toolbox": _toolbox,
  "probe3d": _probe3d,
}
