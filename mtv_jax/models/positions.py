"""Position embeddings: fixed ones, and their resampling to another grid.

Resampling is along each axis a product with a small matrix, computed on the
host from the two sizes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

from mtv_jax.utils.errors import InputError

RESIZES = ("bicubic", "antialiased")


@functools.lru_cache(maxsize=32)
def sincos_positions(
  grid: tuple[int, int], width: int
) -> Float32[np.ndarray, "n {width}"]:
  """Fixed 2-D sine-cosine position embeddings of a grid, row by row.

  Each axis has half of the channels, rows first: sines, then cosines, of
  `position / 10000^(i / m)` for `m` frequencies `i` (Vaswani et al. 2017). MAE
  (He et al. 2022) has the same with columns first.

  Raises:
    InputError: for a width that four does not divide.
  """
  if width % 4:
    raise InputError(
      f"2-D sine-cosine positions need a width that 4 divides, not {width}."
    )
  rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
  parts = []
  for axis in np.indices(grid).reshape(2, -1):
    angle = axis[:, None] * rates
    parts += [np.sin(angle), np.cos(angle)]
  table = np.concatenate(parts, axis=1).astype(np.float32)
  table.setflags(write=False)  # cached, so shared by every caller
  return table


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (1981), zero beyond a distance of 2."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_matrix(
  size: int, new_size: int, method: str = "bicubic"
) -> Float64[np.ndarray, "new old"]:
  """The matrix that resamples `size` values to `new_size`.

  Pixels are areas (align_corners=False). Rows sum to one. Equal to PyTorch's
  `interpolate`, which released models were evaluated with.

  The methods are 'bicubic' (a = -0.75, edge values repeated: PyTorch's default;
  SigLIP, DINOv2) and 'antialiased' (a = -0.5, the kernel widened when shrinking
  and cut at the edges: PyTorch's antialias=True, Pillow; DINOv2 with
  registers).
  """
  scale = size / new_size
  centre = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5
  matrix = np.zeros((new_size, size))
  rows = np.arange(new_size)[:, None]
  if method == "bicubic":
    taps = np.floor(centre).astype(int) + np.arange(-1, 3)
    weights = _cubic(taps - centre, -0.75)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights)
  else:
    widen = max(scale, 1.0)
    matrix[:] = _cubic((np.arange(size) - centre) / widen, -0.5)
    matrix /= matrix.sum(axis=1, keepdims=True)
  matrix.setflags(write=False)  # cached, so shared by every caller
  return matrix


def resize_grid(
  grid: Float[Array, "h w d"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Array, "h2 w2 d"]:
  """Resamples a grid of embeddings to `size` = (rows, columns), in float32."""
  if grid.shape[:2] == size:
    return grid
  rows, columns = (
    jnp.asarray(resize_matrix(a, b, method), jnp.float32)
    for a, b in zip(grid.shape[:2], size, strict=True)
  )
  # Small and sensitive: no bfloat16 passes.
  return jnp.einsum(
    "yh,xw,hwd->yxd",
    rows,
    columns,
    grid,
    precision=jax.lax.Precision.HIGHEST,
  )
