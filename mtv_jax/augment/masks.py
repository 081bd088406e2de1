"""Patch masks of a view: block masks (iBOT) and visible subsets (MAE).

Shapes are static: an image's number of masked patches has a bound at trace
time, so that losses can gather them without waste.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment.op import ViewOp, check_ascending
from mtv_jax.augment.random import ranks, uniform
from mtv_jax.config.options import Fraction, PositiveFraction, PositiveInt
from mtv_jax.utils.errors import ConfigError

# Rectangles proposed per mask. On 14 x 14 patches with up to half of them
# masked, 16 proposals leave 0.4 patches on average, 3 at most, for `_fill`. A
# proposal costs a few tiny operations for the whole batch.
PROPOSALS = 16
# DINOv2's rectangles: at least 4 patches, sides up to 1 : 3.3.
MIN_BLOCK = 4
MIN_ASPECT = 0.3


def patch_grid(op: str, size: int, patch: int) -> int:
  """Patches per side; raises ConfigError unless the patch divides the view."""
  if size % patch:
    raise ConfigError(
      f"{op}: set patch=: patches of {patch} don't divide a view of {size}."
    )
  return size // patch


@dataclasses.dataclass(frozen=True)
class MaskOp(ViewOp):
  """Base class of ops that mask patches."""

  stage = "masks"
  field: ClassVar[str]  # The `ViewBatch` field to set: `mask` or `keep`.

  def count(self, size: int) -> int:
    """Maximum masked patches (`mask`), or number of visible ones (`keep`)."""
    raise NotImplementedError

  def check(self, size: int) -> None:
    self.count(size)

  def __call__(
    self, u: Float[Array, " uniforms"], masked: Bool[Array, ""], *, size: int
  ) -> Array:
    """Samples the `field` of one image, patches in row-major order.

    `masked`: see `sample_masked_images`.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BlockMasking(MaskOp, name="blocks"):
  """`blocks(min_ratio, max_ratio, p)`: block masks (iBOT, DINOv2).

  With probability `p`, exactly `round(r n)` of `n` patches are masked, `r`
  uniform from `min_ratio` to `max_ratio`. In a view of two images with p = 0.5
  exactly one is masked, see `sample_masked_images`. Defaults are DINOv2's,
  which samples ratios over the batch; here rows are independent. SigLIP 2 uses
  `blocks(0.5, 0.5, p=1)`.
  """

  field = "mask"

  min_ratio: PositiveFraction = 0.1
  max_ratio: PositiveFraction = 0.5
  p: Fraction = 0.5
  patch: PositiveInt = 16

  def __post_init__(self):
    check_ascending("ratios", self.min_ratio, self.max_ratio)

  def count(self, size: int) -> int:
    patches = patch_grid("blocks", size, self.patch) ** 2
    count = round(self.max_ratio * patches)
    if count == patches:
      raise ConfigError("blocks leaves no patch visible: lower max_ratio.")
    if round(self.min_ratio * patches) == 0:
      raise ConfigError("blocks masks none of the patches: raise min_ratio.")
    return count

  def num_uniforms(self, size: int) -> int:
    return 1 + 4 * PROPOSALS + patch_grid("blocks", size, self.patch) ** 2

  def __call__(self, u, masked, *, size) -> Bool[Array, " patches"]:
    grid = patch_grid("blocks", size, self.patch)
    ratio = uniform(u[0], self.min_ratio, self.max_ratio)
    count = jnp.round(ratio * grid**2).astype(jnp.int32)
    # float32 may round above the static bound.
    count = jnp.where(masked, jnp.minimum(count, self.count(size)), 0)
    return block_mask(u[1:], count, grid=grid).reshape(-1)


def max_masked_images(probs: Sequence[float | int]) -> int:
  """Maximum number of images that `sample_masked_images` selects."""
  return math.ceil(round(sum(probs), 6))


def sample_masked_images(
  u: Float[Array, ""], probs: Sequence[float | int]
) -> Bool[Array, " n"]:
  """Samples which of a row's images are masked, by systematic sampling.

  The images' probabilities (`probs`) are consecutive intervals. An image is
  masked if its interval contains a point of a grid with spacing 1 and a random
  start. The number of masked images varies by at most one, which limits the
  padding of a loss.
  """
  ends = np.cumsum([0.0, *probs]).astype(np.float32)
  # Coarse and away from integers: no sum below rounds to an integer.
  u = (jnp.floor(u * 2**16) + 0.5) / 2**16
  # Clipped: rounding may push an end past an integer.
  num_points = jnp.minimum(jnp.floor(ends + u), max_masked_images(probs))
  return num_points[1:] > num_points[:-1]


@dataclasses.dataclass(frozen=True)
class Keep(MaskOp, name="keep"):
  """`keep(ratio)`: a random subset of visible patches (MAE).

  `ratio` is the share of visible patches; MAE uses a quarter.
  """

  field = "keep"

  ratio: PositiveFraction = 0.25
  patch: PositiveInt = 16

  def count(self, size: int) -> int:
    patches = patch_grid("keep", size, self.patch) ** 2
    count = round(self.ratio * patches)
    if count == 0:
      raise ConfigError("keep leaves no patch visible: raise ratio.")
    return count

  def num_uniforms(self, size: int) -> int:
    return patch_grid("keep", size, self.patch) ** 2

  def __call__(self, u, masked, *, size) -> Int[Array, " visible"]:
    del masked
    visible = jnp.argsort(u)[: self.count(size)]
    return jnp.sort(visible).astype(jnp.int32)


def block_mask(
  u: Float[Array, " uniforms"], count: Int[Array, ""], *, grid: int
) -> Bool[Array, "{grid} {grid}"]:
  """Random rectangles that together mask exactly `count` patches.

  Sampling of BEiT and DINOv2: adds a rectangle of random area, at most the
  number of patches left to mask, if the mask stays within `count`. After
  `PROPOSALS` rectangles, neighbours of masked patches fill the rest.

  `u` has 4 numbers per proposal and one per patch of the `grid` x `grid` map.
  """
  rows, columns = jnp.arange(grid)[:, None], jnp.arange(grid)[None, :]

  def propose(mask, u):
    remaining = count - mask.sum()
    area = MIN_BLOCK + u[0] * jnp.maximum(remaining - MIN_BLOCK, 0)
    max_log = -math.log(MIN_ASPECT)
    aspect = jnp.exp(uniform(u[1], -max_log, max_log))
    height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    height, width = (jnp.clip(x, 1, grid) for x in (height, width))
    top = jnp.floor(u[2] * (grid - height + 1)).astype(jnp.int32)
    left = jnp.floor(u[3] * (grid - width + 1)).astype(jnp.int32)
    block = (rows >= top) & (rows < top + height)
    block &= (columns >= left) & (columns < left + width)
    union = mask | block
    return jnp.where(union.sum() <= count, union, mask), None

  proposals = u[: 4 * PROPOSALS].reshape(PROPOSALS, 4)
  mask, _ = jax.lax.scan(propose, jnp.zeros((grid, grid), bool), proposals)
  noise = u[4 * PROPOSALS :].reshape(grid, grid)
  return _fill(mask, count - mask.sum(), noise)


def _fill(
  mask: Bool[Array, "g g"], count: Int[Array, ""], noise: Float[Array, "g g"]
) -> Bool[Array, "g g"]:
  """Masks `count` more patches, with the most masked neighbours first."""
  padded = jnp.pad(mask, 1).astype(jnp.float32)
  neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1]
  neighbours += padded[1:-1, :-2] + padded[1:-1, 2:]
  score = jnp.where(mask, -1.0, neighbours + noise)
  rank = ranks(-score.reshape(-1))
  return mask | (rank < count).reshape(mask.shape)
