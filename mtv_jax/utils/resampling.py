"""Resampling of one axis as a small matrix product, on the host."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float64

METHODS = (
  "bicubic",
  "bicubic_corners",
  "antialiased",
  "bilinear",
  "bilinear_antialiased",
  "bilinear_corners",
)


def _cubic_kernel(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (1981), zero beyond a distance of 2."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_matrix(
  size: int, new_size: int, method: str = "bicubic"
) -> Float64[np.ndarray, "new old"]:
  """Returns the matrix that resamples `size` values to `new_size`.

  Pixels are areas (align_corners=False). Rows sum to one. Equal to PyTorch's
  `interpolate`, with which released models were evaluated.

  The methods:
    bicubic: a = -0.75, edge values repeated; PyTorch's default, OpenCV's
      INTER_CUBIC (SigLIP, DINOv2).
    bicubic_corners: as bicubic, with align_corners=True.
    antialiased: bicubic with a = -0.5, the kernel widened when shrinking and
      truncated at the edges; PyTorch's antialias=True, Pillow (DINOv2 with
      registers).
    bilinear: interpolates the two nearest values, without antialiasing when
      shrinking.
    bilinear_antialiased: Pillow's BILINEAR (SigLIP 2 NaFlex, TIPS).
    bilinear_corners: keeps the first and last value (align_corners=True).
  """
  rows = np.arange(new_size)[:, None]
  scale = size / new_size
  centre = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5
  matrix = np.zeros((new_size, size))
  corners = rows * (size - 1) / max(new_size - 1, 1)
  if method in ("bicubic", "bicubic_corners"):
    centre = corners if method == "bicubic_corners" else centre
    taps = np.floor(centre).astype(int) + np.arange(-1, 3)
    weights = _cubic_kernel(taps - centre, -0.75)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights)
  elif method in ("bilinear", "bilinear_corners"):
    position = np.clip(centre, 0, size - 1)
    if method == "bilinear_corners":
      position = corners
    low = np.minimum(np.floor(position).astype(int), size - 1)
    np.add.at(matrix, (rows, low), 1 - (position - low))
    high = np.minimum(low + 1, size - 1)
    np.add.at(matrix, (rows, high), position - low)
  else:
    distance = (np.arange(size) - centre) / max(scale, 1.0)
    if method == "antialiased":
      matrix[:] = _cubic_kernel(distance, -0.5)
    else:
      matrix[:] = np.maximum(1 - np.abs(distance), 0)
    matrix /= matrix.sum(axis=1, keepdims=True)
  matrix.setflags(write=False)  # Cached, so shared by all callers.
  return matrix
