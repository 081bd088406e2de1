"""Padding of images to the patch grid, and restoring of predictions.

An image is resized to the input size and padded on all sides, with the
encoder's mean colour, to a multiple of the patch size. Predictions are
upsampled over the padded input and then cropped, so that patches and pixels
stay aligned.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mtv_jax.evals.core import resizing
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class PaddedView:
  """Resized and padded encoder input for images of one size."""

  size: tuple[int, int]  # rows and columns of the image
  input_size: tuple[int, int]  # after resizing, before padding
  patch: int
  resize: str = "bilinear"  # how predictions are resized, see `resizing`
  # Mean of the encoder's normalisation, in 0..1; padding normalises to zero.
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

  @property
  def padded(self) -> tuple[int, int]:
    """Rows and columns with padding."""
    h, w = (-(-side // self.patch) * self.patch for side in self.input_size)
    return h, w

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return self.padded[0] // self.patch, self.padded[1] // self.patch

  def pad(
    self, image: Float[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """Resizes and pads an image in 0..255."""
    if image.shape[:2] != self.size:
      raise InputError(
        f"an image of {image.shape[0]} x {image.shape[1]} among images of "
        f"{self.size[0]} x {self.size[1]}: all of them must have one size"
      )
    height, width = self.input_size
    if self.size != self.input_size:
      shrinks = height * width < self.size[0] * self.size[1]
      method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
      image = cv2.resize(
        np.ascontiguousarray(image), (width, height), interpolation=method
      )
    padded = np.empty((*self.padded, 3), np.float32)
    padded[:] = 255 * np.float32(self.mean)
    top, left = _margin(height, self.patch), _margin(width, self.patch)
    padded[top : top + height, left : left + width] = image
    return padded

  def restore(
    self, maps: Float[Array, "b gh gw"] | Float[np.ndarray, "b gh gw"]
  ) -> Float[Array, "b h w"] | Float[np.ndarray, "b h w"]:
    """Resamples maps of the padded input to image pixels."""
    rows, columns = (
      restoring_matrix(
        maps.shape[i + 1], self.input_size[i], side, self.patch, self.resize
      )
      for i, side in enumerate(self.size)
    )
    if isinstance(maps, np.ndarray):
      return rows @ maps @ columns.T
    precise = functools.partial(jnp.matmul, precision="highest")
    return precise(precise(jnp.asarray(rows), maps), jnp.asarray(columns.T))


def _margin(side: int, patch: int) -> int:
  """Padding before; if odd, the extra pixel goes after."""
  return -side % patch // 2


@functools.lru_cache(maxsize=64)
def restoring_matrix(
  grid: int, input_side: int, side: int, patch: int, method: str
) -> Float32[np.ndarray, "side grid"]:
  """One axis: upsamples to the padded input, crops, resizes to `side`."""
  if input_side % patch == 0:
    # In one step, since interpolating twice smooths twice.
    matrix = resizing.matrix(grid, side, method)
  else:
    padded, top = -(-input_side // patch) * patch, _margin(input_side, patch)
    matrix = resizing.matrix(grid, padded, method)[top : top + input_side]
    if input_side != side:
      matrix = resizing.matrix(input_side, side, method) @ matrix
  matrix = matrix.astype(np.float32)
  matrix.setflags(write=False)  # cached, so shared by all callers
  return matrix
