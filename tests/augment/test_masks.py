"""Block masks and visible subsets: counts, shapes, coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.augment import masks
from mtv_jax.utils.errors import ConfigError


def sample(op, size, count, seed=0):
  """The op's masks or indices for `count` images."""
  rng = np.random.default_rng(seed)
  u = jnp.asarray(rng.random((count, op.num_uniforms(size)), np.float32))
  share = op.p if op.field == "mask" else 0.0

  def mask(u, start):
    masked = masks.sample_masked_images(start, [share])[0]
    return op(u, masked, size=size)

  starts = jnp.asarray(rng.random(count, np.float32))
  return np.asarray(jax.jit(jax.vmap(mask))(u, starts))


def mean_masked_neighbours(mask):
  """Mean share of a masked patch's neighbours that are masked too."""
  padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
  neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1].astype(int)
  neighbours = neighbours + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
  return neighbours[mask].mean() / 4


@pytest.mark.parametrize("size, ratio", [(224, 0.5), (96, 0.3), (64, 0.9)])
def test_a_fixed_ratio_masks_that_share_exactly(size, ratio):
  op = masks.BlockMasking(ratio, ratio, p=1.0)
  mask = sample(op, size, 256)
  patches = (size // 16) ** 2
  assert mask.shape == (256, patches)
  assert set(mask.sum(1)) == {round(ratio * patches)} == {op.count(size)}
  # Every patch is masked sometimes; rectangles cover corners least.
  assert mask.mean(0).min() > 0.1 * ratio and mask.mean(0).max() < 1


def test_ratios_are_uniform_and_half_of_the_images_are_unmasked():
  op = masks.BlockMasking()
  counts = sample(op, 224, 2000).sum(1)
  assert op.count(224) == 98
  assert abs((counts == 0).mean() - 0.5) < 0.04
  masked = counts[counts > 0]
  assert masked.min() in (20, 21) and masked.max() in (97, 98)
  # Uniform from 10 to 50 %.
  for share in (0.25, 0.5, 0.75):
    expected = 196 * (0.1 + 0.4 * share)
    assert abs(np.quantile(masked, share) - expected) < 4


@pytest.mark.parametrize(
  "shares",
  [[0.5, 0.5], [1.0] * 8, [0.0] * 3, [0.3] * 4, [0.1] * 10, [1.0, 0.25, 0.0]],
  ids=str,
)
def test_each_image_is_masked_with_its_share_and_rows_are_balanced(shares):
  u = np.concatenate([np.linspace(0, 1, 9973), [1 - 2**-23, 1 - 2**-24]])
  u = jnp.asarray(u[u < 1], jnp.float32)
  selected = np.asarray(
    jax.vmap(lambda u: masks.sample_masked_images(u, shares))(u)
  )
  np.testing.assert_allclose(selected.mean(0), shares, atol=1e-3)
  counts = set(selected.sum(1))
  # With 4 shares of 0.3 one or two images, with 10 of 0.1 always one.
  total = round(sum(shares), 6)
  assert counts <= {int(np.floor(total)), masks.max_masked_images(shares)}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_masks_are_contiguous_blocks(ratio):
  grid, count = 14, 400
  mask = sample(masks.BlockMasking(ratio, ratio, p=1.0), grid * 16, count)
  mask = mask.reshape(-1, grid, grid)
  rng = np.random.default_rng(0)
  scattered = rng.permuted(mask.reshape(count, -1), axis=1)
  scattered = scattered.reshape(mask.shape)
  assert mean_masked_neighbours(mask) > mean_masked_neighbours(scattered) + 0.3
  # Nearly no masked patch is isolated.
  padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
  beside = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1]
  beside |= padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
  assert beside[mask].mean() > 0.98


def test_patches_next_to_the_blocks_fill_the_mask():
  # All proposals cover one corner: 4 patches are masked, 3 are missing.
  u = jnp.concatenate(
    [
      jnp.tile(jnp.array([0.0, 0.5, 0.0, 0.0]), masks.PROPOSALS),
      jnp.linspace(0.0, 0.9, 36),
    ]
  )
  mask = np.asarray(masks.block_mask(u, jnp.asarray(7), grid=6))
  assert mask.sum() == 7 and mask[:2, :2].all()
  assert mask[:3, :3].sum() == 7 and not mask[2, 2]


def test_the_visible_subset_is_unique_sorted_and_uniform():
  op = masks.Keep(0.25)
  visible = sample(op, 224, 2000)
  assert visible.shape == (2000, 49) and op.count(224) == 49
  assert visible.dtype == np.int32
  assert (np.diff(visible, axis=1) > 0).all()
  assert visible.min() == 0 and visible.max() == 195
  share = np.bincount(visible.ravel(), minlength=196) / 2000
  # Five standard deviations around a quarter.
  assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.parametrize(
  "op, size, message",
  [
    (masks.BlockMasking(0.5, 1.0), 224, "leaves no patch visible"),
    (masks.BlockMasking(0.5, 0.99), 64, "leaves no patch visible"),
    (masks.BlockMasking(0.001, 0.5), 224, "masks none.*raise min_ratio"),
    (masks.Keep(0.001), 224, "visible"),
    (masks.Keep(0.25, patch=14), 240, "set patch="),
    (masks.BlockMasking(patch=14), 240, "set patch=.*view of 240"),
  ],
)
def test_masks_that_do_not_fit_the_view_are_rejected(op, size, message):
  with pytest.raises(ConfigError, match=message):
    op.count(size)
