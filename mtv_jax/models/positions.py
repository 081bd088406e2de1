"""Position embeddings: learned and resampled, fixed, rotary.

Resampling to another grid multiplies each axis by a small matrix, computed on
the host from the two sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from mtv_jax.config import options
from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.resampling import resize_matrix

# Resampling methods of towers; 'crop': resample bilinearly to a square, then
# crop its top-left part (RADIO).
ResizeMethod = Literal["bicubic", "antialiased", "bilinear_antialiased", "crop"]


@functools.lru_cache(maxsize=32)
def sincos_positions(
  grid: tuple[int, int], width: int
) -> Float32[np.ndarray, "n {width}"]:
  """Fixed 2-D sine-cosine position embeddings of a grid, row by row.

  The first half of the channels encodes the row, the second the column: sines,
  then cosines, of `position / 10000^(i / m)` for i < m = width / 4 (Vaswani et
  al. 2017). MAE (He et al. 2022) encodes the column first.
  """
  if width % 4:
    raise InputError(f"Positions need a width divisible by 4, not {width}.")
  rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
  parts = []
  for axis in np.indices(grid).reshape(2, -1):
    angle = axis[:, None] * rates
    parts += [np.sin(angle), np.cos(angle)]
  table = np.concatenate(parts, axis=1).astype(np.float32)
  table.setflags(write=False)  # Cached, so shared by all callers.
  return table


def resize_grid(
  grid: Float[Array, "*b h w d"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Array, "*b h2 w2 d"]:
  """Resamples a grid of embeddings to `size` = (rows, columns), in float32."""
  if method == "crop":
    square = resize_grid(grid, (max(size),) * 2, "bilinear")
    return square[..., : size[0], : size[1], :]
  if grid.shape[-3:-1] == size:
    return grid
  matrices = (
    jnp.asarray(resize_matrix(a, b, method), jnp.float32)
    for a, b in zip(grid.shape[-3:-1], size, strict=True)
  )
  # Small and sensitive to rounding: no bfloat16 passes.
  equation = "yh,xw,...hwd->...yxd"
  return jnp.einsum(equation, *matrices, grid, precision="highest")


def resize_patches(
  patches: Float[Array, "*b p d"], count: int, method: str = "bicubic"
) -> Float[Array, "*b {count} d"]:
  """Resamples a square grid of patches to a square grid of `count`.

  Defaults to DINOv3's resize for the Gram teacher: torch's `interpolate`,
  bicubic (a = -0.75) without antialiasing.
  """
  old, new = (round(n**0.5) for n in (patches.shape[-2], count))
  if old == new:
    return patches
  *lead, _, width = patches.shape
  grid = patches.astype(jnp.float32).reshape(*lead, old, old, width)
  return resize_grid(grid, (new, new), method).reshape(*lead, count, width)


def resize_grids(
  grid: Float[Array, "h w d"], sizes: Int[Array, "b 2"], length: int
) -> Float[Array, "b {length} d"]:
  """`resize_grid` by 'bilinear_antialiased' to each image's own size.

  Row by row, padded to `length` with finite values.
  """
  index = jnp.arange(length)[None]
  coordinates = index // sizes[:, 1:], index % sizes[:, 1:]  # [B, N] each
  weights = []
  for axis, coordinate in enumerate(coordinates):
    old, new = grid.shape[axis], sizes[:, axis, None]
    scale = old / new.astype(jnp.float32)  # [B, 1]
    coordinate = jnp.minimum(coordinate, new - 1)
    centre = (coordinate + 0.5) * scale - 0.5  # [B, N]
    distance = jnp.arange(old) - centre[..., None]  # [B, N, old]
    weight = 1 - jnp.abs(distance) / jnp.maximum(scale, 1)[..., None]
    weight = jnp.maximum(weight, 0)
    weights.append(weight / weight.sum(-1, keepdims=True))
  return jnp.einsum("bny,bnx,yxd->bnd", *weights, grid, precision="highest")


def sinusoidal_positions(
  length: int, width: int
) -> Float32[np.ndarray, "{length} {width}"]:
  """Fixed 1-D sinusoidal positions (Vaswani et al. 2017), as in TIPS.

  Tensor2Tensor's layout: sines, then cosines, of
  `position / 10000^(i / (m - 1))`, m = width / 2.
  """
  half = width // 2
  rates = 10_000.0 ** -(np.arange(half) / (half - 1))
  angles = np.arange(length)[:, None] * rates
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Axial rotary position embedding (DINOv3: arXiv 2508.10104, section 3.2).

  A patch's centre has coordinates (y, x) in [-1, 1]. Queries and keys of a head
  of d channels are rotated by angles 2 pi y / p_k, then 2 pi x / p_k, with the
  periods p_k = base^(4 k / d), k = 0 .. d / 4 - 1: channel i of the first half
  together with channel i of the second.

  In training the coordinates c become (c + shift) * jitter * rescale; the
  teacher and evaluations use c. DINOv3 samples these in every block of every
  forward pass, once for all images of a device; we sample once for all images
  of a view, on any mesh.
  """

  base: PositiveFloat = 100.0
  # Divide each axis by its own length ('separate'), or both by the shorter or
  # longer one. 'index' (Perception Encoder): coordinates are
  # `(i + offset) * reference / length`, and angles omit the factor 2 pi.
  normalize: Literal["separate", "min", "max", "index"] = "separate"
  reference: PositiveInt | None = None  # Pretraining grid side, for 'index'.
  offset: float = 0.0
  shift: PositiveFloat | None = None  # Per axis, uniform in +-shift.
  # Factors, log-uniform in 1 / value .. value.
  jitter: PositiveFloat | None = None  # A factor per axis.
  rescale: PositiveFloat | None = None  # A factor shared by both axes.

  def __post_init__(self):
    options.check_fields(self)

  @property
  def is_random(self) -> bool:
    """Whether coordinates are augmented in training."""
    return bool(self.shift or self.jitter or self.rescale)

  def coordinates(self, grid: tuple[int, int]) -> Float32[np.ndarray, "n 2"]:
    """Coordinates (y, x) of a grid's patches, row by row."""
    indices = np.indices(grid).reshape(2, -1).T
    return self._to_coordinates(indices, np.array(grid)).astype(np.float32)

  def grid_coordinates(
    self, grids: Int[Array, "b 2"], length: int
  ) -> Float[Array, "b {length} 2"]:
    """`coordinates` of each image's own grid, padded to `length`."""
    index = jnp.arange(length)[None]
    indices = [index // grids[:, 1:], index % grids[:, 1:]]  # [B, N] each
    return self._to_coordinates(
      jnp.stack(indices, axis=-1), grids[:, None].astype(jnp.float32)
    )

  def _to_coordinates(self, indices: Any, lengths: Any) -> Any:
    """Coordinates of `indices` (row, column) in grids of shape `lengths`."""
    if self.normalize == "index":
      scale = (self.reference or lengths) / lengths
      return (indices + self.offset) * scale / (2 * np.pi)
    if self.normalize == "min":
      lengths = lengths.min(-1, keepdims=True)
    elif self.normalize == "max":
      lengths = lengths.max(-1, keepdims=True)
    return 2 * (indices + 0.5) / lengths - 1

  def draw(self, key: Key[Array, ""], depth: int) -> Float[Array, "depth 2 2"]:
    """Samples each layer's augmentation: factors of (y, x), then offsets."""

    def uniform(stream, axes):
      u = jax.random.uniform(jax.random.fold_in(key, stream), (depth, axes))
      return 2 * u - 1

    def factor(stream, axes, limit):
      return jnp.exp(uniform(stream, axes) * np.log(limit or 1.0))

    factors = factor(1, 2, self.jitter) * factor(2, 1, self.rescale)
    offsets = factors * uniform(0, 2) * (self.shift or 0.0)
    return jnp.stack([factors, offsets], axis=1)

  def angles(
    self, coordinates: Float[Array, "*n 2"], channels: int
  ) -> Float[Array, "*n {channels//2}"]:
    """Rotation angles for a head of `channels`: for y, then for x."""
    quarter = channels // 4
    rates = 2 * np.pi * self.base ** -(np.arange(quarter) / quarter)
    angles = coordinates[..., None] * jnp.asarray(rates, jnp.float32)
    return angles.reshape(*angles.shape[:-2], 2 * quarter)  # [..., N, d / 2]


def rotate(
  x: Float[Array, "b n h d"], angles: Float[Array, "#b n d//2"]
) -> Float[Array, "b n h d"]:
  """Rotates pairs of channels (i, i + d / 2), in float32."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
