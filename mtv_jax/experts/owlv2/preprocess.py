"""Preprocessing of OWLv2: padding to a grey square, resizing."""

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

_GREY = 0.5
# Radius of a Gaussian in standard deviations, as in SciPy.
_TRUNCATE = 4.0


def pad_to_square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> Float32[np.ndarray, "size size 3"]:
  """The image padded with grey below or to the right, resized to `size`.

  As in `skimage.transform.resize` with antialiasing, which the authors use: a
  Gaussian of (s - 1) / 2 pixels for shrinking by s, then linear interpolation.
  An enlarged image differs beyond the centres of its outermost pixels, where
  the edge is repeated (as in PyTorch) and not mirrored.

  Returns:
    Values from 0 to 1.
  """
  side = max(image.shape[:2])
  shrink = side / size
  sigma = max(shrink - 1, 0) / 2
  radius = int(_TRUNCATE * sigma + 0.5)
  # The difference from grey is 0 in the padding, of which only the part that
  # the blurred image reaches is allocated: a banner's square may be vast.
  margin = 2 * radius + math.ceil(shrink) + 2
  pad = [min(margin, side - n) for n in image.shape[:2]]
  pixels = np.zeros(
    (image.shape[0] + pad[0], image.shape[1] + pad[1], 3), np.float32
  )
  part = pixels[: image.shape[0], : image.shape[1]]
  np.multiply(image, np.float32(1 / 255), out=part)
  part -= _GREY
  if radius:
    pixels = cv2.GaussianBlur(
      pixels, (2 * radius + 1,) * 2, sigma, borderType=cv2.BORDER_REFLECT_101
    )
  square = np.full((size, size, 3), _GREY, np.float32)
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
