"""Which patches of a view are hidden (iBOT), or are all that is seen (MAE).

Shapes are static: the count of an image's masked patches has a bound known
when the program is built, so that losses can gather them without waste.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment import random as draws
from mtv_jax.utils.errors import ConfigError

# Rectangles tried for each mask. On 14 x 14 patches and up to half of them
# masked, 16 leave 0.4 of a patch on average and 3 at most to be filled one by
# one; the step pays for each with a few tiny operations for the whole batch.
PROPOSALS = 16
# DINOv2's rectangles: at least 4 patches, sides up to 1 : 3.3.
MIN_BLOCK = 4
MIN_ASPECT = 0.3


def patch_grid(op: str, size: int, patch: int) -> int:
  """Patches a side; raises ConfigError where the patch divides not the view."""
  draws.check_size(op, patch)
  if size % patch:
    raise ConfigError(
      f"{op}: patches of {patch} pixels don't divide a view of {size}; make "
      f"the view {round(size / patch) * patch or patch}, or set patch= to the "
      "model's patch size."
    )
  return size // patch


@dataclasses.dataclass(frozen=True)
class Blocks:
  """`blocks(min_ratio, max_ratio, p)`: masks of rectangles of patches.

  With probability `p` an image has exactly `round(r n)` of its `n` patches
  masked, `r` uniform from `min_ratio` to `max_ratio`, else none. Of a view of
  two images that are masked with probability 0.5 one is, see `chosen`. DINOv2's
  are the defaults (half of its whole batch is masked, with ratios spread over
  that half; here each row draws by itself, whatever its batch). SigLIP 2's is
  `blocks(0.5, 0.5, p=1)`.

  Attributes:
    min_ratio: smallest share of masked patches.
    max_ratio: largest share.
    p: share of the images that are masked.
    patch: the model's patch size, in pixels.
  """

  min_ratio: float | int = 0.1
  max_ratio: float | int = 0.5
  p: float | int = 0.5
  patch: int = 16

  def __post_init__(self):
    draws.check_range("blocks", "p", self.p, high=1.0)
    if not 0 < self.min_ratio <= self.max_ratio <= 1:
      raise ConfigError(
        f"blocks: ratios from {self.min_ratio} to {self.max_ratio}; expected "
        "0 < min_ratio <= max_ratio < 1."
      )

  def count(self, size: int) -> int:
    """The most masked patches of a view of `size` pixels."""
    patches = patch_grid("blocks", size, self.patch) ** 2
    count = round(self.max_ratio * patches)
    if count == patches:
      raise ConfigError(
        f"blocks: max_ratio={self.max_ratio} masks all {patches} patches of a "
        f"{size} pixel view and leaves none visible; lower max_ratio."
      )
    if round(self.min_ratio * patches) == 0:
      raise ConfigError(
        f"blocks: min_ratio={self.min_ratio} masks none of the {patches} "
        f"patches of a {size} pixel view; raise min_ratio, or lower p to leave "
        "more images whole."
      )
    return count

  def draws(self, size: int) -> int:
    """Uniform numbers needed."""
    return 1 + 4 * PROPOSALS + patch_grid("blocks", size, self.patch) ** 2

  def __call__(
    self, u: Float[Array, "draws"], masked: Bool[Array, ""], *, size: int
  ) -> Bool[Array, "patches"]:
    """A mask in row-major order, True where a patch is hidden.

    Args:
      u: uniform numbers.
      masked: whether the image is, from `chosen`.
      size: pixels of the view.
    """
    grid = patch_grid("blocks", size, self.patch)
    ratio = draws.between(u[0], self.min_ratio, self.max_ratio)
    count = jnp.round(ratio * grid**2).astype(jnp.int32)
    # float32 may round a hair beyond the static bound.
    count = jnp.minimum(count, self.count(size))
    count = jnp.where(masked, count, 0)
    return block_mask(u[1:], count, grid=grid).reshape(-1)


def most_chosen(shares: Sequence[float | int]) -> int:
  """How many `chosen` may choose."""
  return math.ceil(round(sum(shares), 6))


def chosen(
  u: Float[Array, ""], shares: Sequence[float | int]
) -> Bool[Array, "n"]:
  """Which of a row's images are masked: each with its share, together even.

  Systematic sampling: the shares lie end to end, and what a grid of ones with a
  random start falls on is chosen. The number chosen differs by one at most, so
  that a loss has little to fill up with.

  Args:
    u: a uniform number.
    shares: of each image, the probability.
  """
  ends = np.cumsum([0.0, *shares]).astype(np.float32)
  # Coarse, and off the whole numbers, so that no sum is rounded onto one.
  u = (jnp.floor(u * 2**16) + 0.5) / 2**16
  # Ends that rounding made a hair larger choose none more.
  passed = jnp.minimum(jnp.floor(ends + u), most_chosen(shares))
  return passed[1:] > passed[:-1]


@dataclasses.dataclass(frozen=True)
class Keep:
  """`keep(ratio)`: a random subset of patches is all the encoder sees (MAE).

  Attributes:
    ratio: share of the patches that stay; MAE's is a quarter.
    patch: the model's patch size, in pixels.
  """

  ratio: float | int = 0.25
  patch: int = 16

  def __post_init__(self):
    if not 0 < self.ratio <= 1:
      raise ConfigError(f"keep: ratio={self.ratio}; expected 0 < ratio <= 1.")

  def count(self, size: int) -> int:
    """The visible patches of a view of `size` pixels."""
    patches = patch_grid("keep", size, self.patch) ** 2
    count = round(self.ratio * patches)
    if count == 0:
      raise ConfigError(
        f"keep: ratio={self.ratio} leaves none of the {patches} patches of a "
        f"{size} pixel view visible; raise ratio."
      )
    return count

  def draws(self, size: int) -> int:
    """Uniform numbers needed."""
    return patch_grid("keep", size, self.patch) ** 2

  def __call__(
    self, u: Float[Array, "patches"], *, size: int
  ) -> Int[Array, "kept"]:
    """Indices of the visible patches in row-major order, ascending."""
    kept = jnp.argsort(u)[: self.count(size)]
    return jnp.sort(kept).astype(jnp.int32)


def block_mask(
  u: Float[Array, "draws"], count: Int[Array, ""], *, grid: int
) -> Bool[Array, "{grid} {grid}"]:
  """Random rectangles that together mask exactly `count` patches.

  As BEiT and DINOv2 draw them: a rectangle of a random area, up to what is
  still to be masked, joins where it fits. What is missing after `PROPOSALS`
  of them is filled with neighbours of masked patches.

  Args:
    u: uniform numbers, 4 for each proposal and one for each patch.
    count: patches to mask, at most `grid**2`.
    grid: patches a side.
  """
  rows, columns = jnp.arange(grid)[:, None], jnp.arange(grid)[None, :]

  def propose(mask, u):
    left = count - mask.sum()
    area = MIN_BLOCK + u[0] * jnp.maximum(left - MIN_BLOCK, 0)
    widest = -math.log(MIN_ASPECT)
    aspect = jnp.exp(draws.between(u[1], -widest, widest))
    height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    height, width = (jnp.clip(x, 1, grid) for x in (height, width))
    top = jnp.floor(u[2] * (grid - height + 1)).astype(jnp.int32)
    side = jnp.floor(u[3] * (grid - width + 1)).astype(jnp.int32)
    block = (rows >= top) & (rows < top + height)
    block &= (columns >= side) & (columns < side + width)
    joined = mask | block
    return jnp.where(joined.sum() <= count, joined, mask), None

  mask, _ = jax.lax.scan(
    propose,
    jnp.zeros((grid, grid), bool),
    u[: 4 * PROPOSALS].reshape(PROPOSALS, 4),
  )
  noise = u[4 * PROPOSALS :].reshape(grid, grid)
  return _fill(mask, count - mask.sum(), noise)


def _fill(
  mask: Bool[Array, "g g"], missing: Int[Array, ""], noise: Float[Array, "g g"]
) -> Bool[Array, "g g"]:
  """Masks `missing` more patches, those with most masked neighbours first."""
  padded = jnp.pad(mask, 1).astype(jnp.float32)
  neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1]
  neighbours += padded[1:-1, :-2] + padded[1:-1, 2:]
  score = jnp.where(mask, -1.0, neighbours + noise)
  rank = draws.ranks(-score.reshape(-1))
  return mask | (rank < missing).reshape(mask.shape)
