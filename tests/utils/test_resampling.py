"""Resampling matrices against PyTorch, in every method."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import positions
from mtv_jax.utils import resampling


@pytest.mark.parametrize("method", resampling.METHODS)
def test_resize_matrix(method):
  for old, new in ((4, 7), (7, 4), (14, 37), (16, 5)):
    matrix = resampling.resize_matrix(old, new, method)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    # Mirrored input gives mirrored output.
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
  np.testing.assert_array_equal(
    resampling.resize_matrix(5, 5, method), np.eye(5)
  )


@pytest.mark.reference
@pytest.mark.parametrize("method", resampling.METHODS)
def test_positions_equal_torch(method):
  torch = pytest.importorskip("torch")

  def resize(x, size):  # [h, w, d]
    y = torch.nn.functional.interpolate(
      torch.from_numpy(x).permute(2, 0, 1)[None],
      size=size,
      mode="bilinear" if "bilinear" in method else "bicubic",
      align_corners="corners" in method or None,
      antialias="antialiased" in method,
    )
    return y[0].permute(1, 2, 0).numpy()

  sizes = [(16, 32), (16, 7), (37, 16), (37, 21), (14, 18), (14, 4), (3, 1)]
  for old, new in sizes:
    # Two columns: torch 2.13 antialiases an image one pixel wide wrongly.
    columns = np.repeat(np.eye(old)[:, None], 2, axis=1)
    got = resampling.resize_matrix(old, new, method)
    want = resize(columns, (new, 2))[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-12)
  grid = np.random.default_rng(0).normal(size=(16, 16, 5)).astype(np.float32)
  got = positions.resize_grid(jnp.asarray(grid), (9, 21), method)
  np.testing.assert_allclose(got, resize(grid, (9, 21)), atol=1e-5)
