"""Preprocessing of Depth Anything V2, on the host."""

import dataclasses

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from mtv_jax.convert import processors
from mtv_jax.data import canvas
from mtv_jax.encoder.preprocess import lower_bound_shape, nearest_multiple
from mtv_jax.utils.errors import InputError, check_choice

_PREPROCESSES = ("original", "huggingface", "square")
MEAN = np.float32(processors.IMAGENET_MEAN)
STD = np.float32(processors.IMAGENET_STD)


@dataclasses.dataclass(frozen=True)
class DepthPreprocess:
  """Resizes and normalises images, as one of the references does:

  original     the shorter side to at least `size`, bicubic on floats, four
               neighbours a dimension at any scale
  huggingface  the side that changes less to `size`, bicubic with Pillow's
               antialiasing on bytes: 512 x 384 becomes 518 x 392, and 686 x 518
               in the official code
  square       the whole image squashed to `size` x `size`, antialiased: one
               shape for all images, as labels are in the unit square

  The first two preserve the aspect ratio to a multiple of the patch, and each
  shape of image compiles a program. `max_aspect` bounds their number: 75 for
  `original` at size 518 and aspect 2.

  Attributes:
    preprocess: see above.
    size: in pixels.
    multiple: both sides are multiples of it; the patch.
    max_aspect: largest ratio of longer side to shorter; longer images are
      squeezed, unlike in the references.

  Raises:
    InputError: for an unknown choice or inconsistent numbers.
  """

  preprocess: str = "original"
  size: int = 518
  multiple: int = 14
  max_aspect: float | int = 2.0

  def __post_init__(self):
    check_choice("preprocess", self.preprocess, _PREPROCESSES)
    if self.size < self.multiple or self.size % self.multiple:
      near = max(1, round(self.size / self.multiple)) * self.multiple
      raise InputError(
        f"size={self.size} is not a multiple of the patch, {self.multiple}; "
        f"the nearest is {near}."
      )
    if self.max_aspect < 1:
      raise InputError(
        f"max_aspect={self.max_aspect}: longer side over shorter, at least 1."
      )

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """An image, resized and normalised."""
    height, width = self.resized_shape(*image.shape[:2])
    if self.preprocess == "original":
      pixels = image.astype(np.float32) / 255
      cubic = cv2.INTER_CUBIC
      pixels = cv2.resize(pixels, (width, height), interpolation=cubic)
      return (pixels - MEAN) / STD
    if self.preprocess == "square":
      pixels = canvas.squash(image, self.size)
    else:
      cubic = PIL.Image.Resampling.BICUBIC
      resized = PIL.Image.fromarray(image).resize((width, height), cubic)
      pixels = np.asarray(resized)
    # The order of operations of transformers.
    return (pixels.astype(np.float32) - MEAN * 255) / (STD * 255)

  def resized_shape(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a preprocessed image."""
    if self.preprocess == "square":
      return self.size, self.size
    if self.preprocess == "original":
      rows, columns = lower_bound_shape(
        height, width, size=self.size, multiple=self.multiple
      )
    else:
      scales = self.size / height, self.size / width
      # Ties go to the height, as in transformers.
      by_width = abs(1 - scales[1]) < abs(1 - scales[0])
      rows, columns = (
        nearest_multiple(scales[by_width] * side, self.multiple)
        for side in (height, width)
      )
    return self._bound(rows, columns), self._bound(columns, rows)

  def _bound(self, side: int, other: int) -> int:
    most = int(self.max_aspect * other) // self.multiple * self.multiple
    return min(side, max(most, self.multiple))
