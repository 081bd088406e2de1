"""Preprocessing of Depth Anything V2, on the host.

The official code and `transformers` bring an image to different sizes:

original     the shorter side to at least `size`, bicubic on floats, four
             neighbours a dimension however much the image shrinks
huggingface  whichever side needs the smaller change to `size`, bicubic with
             Pillow's antialiasing on bytes: an image of 512 x 384 becomes
             518 x 392, where the official code sees 686 x 518
square       the whole image squashed to `size` x `size`, antialiased: one
             shape for all images, which a label in the unit square allows

The first two keep the aspect ratio to a multiple of the patch, so that each
shape of image is a program of its own. Their number is bounded by squeezing
images that are longer than `max_aspect` to it: with a size of 518 and an
aspect of 2, to 75 for `original`.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from mtv_jax.data import canvas
from mtv_jax.utils.errors import InputError, check_choice

PREPROCESSES = ("original", "huggingface", "square")
# ImageNet's.
MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Resizes and normalises images.

  Attributes:
    preprocess: "original", "huggingface" or "square", see above.
    size: in pixels, that a side is brought to.
    multiple: of both sides; the patch.
    max_aspect: of what comes out, longer side over shorter; longer images are
      squeezed. The references have no such bound.

  Raises:
    InputError: for a choice that there is not, or numbers that don't fit.
  """

  preprocess: str = "original"
  size: int = 518
  multiple: int = 14
  max_aspect: float | int = 2.0

  def __post_init__(self):
    check_choice("preprocess", self.preprocess, PREPROCESSES)
    if self.size < self.multiple or self.size % self.multiple:
      near = max(1, round(self.size / self.multiple)) * self.multiple
      raise InputError(
        f"size={self.size} is no multiple of the patch, {self.multiple}; the "
        f"nearest is {near}."
      )
    if self.max_aspect < 1:
      raise InputError(
        f"max_aspect={self.max_aspect}: longer side over shorter, at least 1."
      )

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """An image, resized and normalised."""
    height, width = self.size_of(*image.shape[:2])
    if self.preprocess == "original":
      pixels = image.astype(np.float32) / 255
      cubic = cv2.INTER_CUBIC
      pixels = cv2.resize(pixels, (width, height), interpolation=cubic)
      return (pixels - MEAN) / STD
    if self.preprocess == "square":
      pixels = canvas.squash(image, self.size)
    else:
      picture = PIL.Image.fromarray(image)
      cubic = PIL.Image.Resampling.BICUBIC
      pixels = np.asarray(picture.resize((width, height), resample=cubic))
    # In this order, as transformers does it.
    return (pixels.astype(np.float32) - MEAN * 255) / (STD * 255)

  def size_of(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns that an image of these has after `__call__`."""
    if self.preprocess == "square":
      return self.size, self.size
    scales = self.size / height, self.size / width
    if self.preprocess == "original":
      scale, least = max(scales), self.size
    else:
      # Ties go to the height, as theirs.
      by_width = abs(1 - scales[1]) < abs(1 - scales[0])
      scale, least = scales[by_width], self.multiple
    rows, columns = (
      self._fit(scale * side, least=least) for side in (height, width)
    )
    return self._bounded(rows, columns), self._bounded(columns, rows)

  def _fit(self, side: float, *, least: int) -> int:
    """The nearest multiple, but for one that is less than `least`."""
    fitted = round(side / self.multiple) * self.multiple
    if fitted < least:
      fitted = math.ceil(side / self.multiple) * self.multiple
    return max(fitted, self.multiple)

  def _bounded(self, side: int, other: int) -> int:
    most = int(self.max_aspect * other) // self.multiple * self.multiple
    return min(side, max(most, self.multiple))
