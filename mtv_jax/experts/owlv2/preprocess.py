"""Preprocessing of OWLv2: padding to a grey square, resizing."""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

GREY = 0.5
# A Gaussian ends after so many deviations, as in SciPy.
_TRUNCATE = 4.0


def in_square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> Float32[np.ndarray, "size size 3"]:
  """The image, padded with grey below or to the right, at `size` pixels.

  As the authors resize (`skimage.transform.resize` with antialiasing): a
  Gaussian of (s - 1) / 2 pixels where it shrinks by s, then linear
  interpolation. Only what lies beyond the centres of the outermost pixels
  differs, where it grows: there the edge is repeated, as PyTorch does, instead
  of mirrored.

  Args:
    image: of any size and shape.
    size: of the square.

  Returns:
    Values from 0 to 1.
  """
  side = max(image.shape[:2])
  shrink = side / size
  sigma = max(shrink - 1, 0) / 2
  radius = int(_TRUNCATE * sigma + 0.5)
  # The difference from grey, which is 0 in the padding: of which only as much
  # is made as the image can leak into, since a banner's square may be vast.
  margin = 2 * radius + math.ceil(shrink) + 2
  pad = [min(margin, side - n) for n in image.shape[:2]]
  pixels = np.zeros(
    (image.shape[0] + pad[0], image.shape[1] + pad[1], 3), np.float32
  )
  part = pixels[: image.shape[0], : image.shape[1]]
  np.multiply(image, np.float32(1 / 255), out=part)
  part -= GREY
  if radius:
    pixels = cv2.GaussianBlur(
      pixels, (2 * radius + 1,) * 2, sigma, borderType=cv2.BORDER_REFLECT_101
    )
  square = np.full((size, size, 3), GREY, np.float32)
  if shrink != 1:
    pixels = cv2.resize(
      pixels,
      None,
      fx=1 / shrink,
      fy=1 / shrink,
      interpolation=cv2.INTER_LINEAR,
    )
  pixels = pixels[:size, :size]
  square[: pixels.shape[0], : pixels.shape[1]] += pixels
  return square
