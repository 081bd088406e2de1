"""Random resized crops and flips on the host, for probes.

"Inception" crops (Szegedy et al. 2015) with torchvision's constants: an area
of 8 to 100 % of the image, of an aspect ratio between 3/4 and 4/3 (uniform in
its logarithm), brought to a square with antialiased bicubic resampling; then a
flip, every other time.
"""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
from jaxtyping import UInt8

PROTOCOL = "random crop (area 0.08..1, ratio 3/4..4/3, bicubic), flip 0.5"
_ATTEMPTS = 10


def box(
  height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """A crop (left, top, right, bottom) in pixels.

  After ten draws of an area and a ratio that don't fit, the middle of the image
  at the nearest allowed ratio.
  """
  area = height * width
  for _ in range(_ATTEMPTS):
    target = area * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = round(math.sqrt(target * ratio))
    h = round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_crop(
  image: UInt8[np.ndarray, "h w 3"], *, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
  """A random `size` x `size` crop of an image, flipped half the time."""
  height, width = image.shape[:2]
  crop = PIL.Image.fromarray(image).crop(box(height, width, rng))
  crop = np.asarray(crop.resize((size, size), PIL.Image.Resampling.BICUBIC))
  return crop[:, ::-1] if rng.random() < 0.5 else crop
