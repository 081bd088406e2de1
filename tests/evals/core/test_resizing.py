"""Resizing by the rules of PyTorch, on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.evals.core import resizing

SIZES = [((7, 5), (16, 12)), ((16, 12), (7, 5)), ((6, 9), (6, 4))]


def test_nearest_takes_what_torch_takes():
  np.testing.assert_array_equal(resizing.indices(16, 4), [0, 4, 8, 12])
  exact = resizing.indices(16, 4, "nearest_exact")
  np.testing.assert_array_equal(exact, [2, 6, 10, 14])
  labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
  small = resizing.resize_maps(labels, (2, 2), method="nearest")
  assert small.dtype == np.uint8
  np.testing.assert_array_equal(small, [[0, 2], [8, 10]])


def test_matrices_by_hand():
  areas = resizing.matrix(2, 4, "bilinear")
  np.testing.assert_allclose(
    areas, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
  )
  corners = resizing.matrix(2, 3, "bilinear_corners")
  np.testing.assert_allclose(corners, [[1, 0], [0.5, 0.5], [0, 1]])
  # Shrinking fourfold reads two values, or (antialiased) averages all.
  np.testing.assert_allclose(resizing.matrix(4, 1, "bilinear")[0, 1:3], 0.5)
  smooth = resizing.matrix(4, 1, "bilinear_antialiased")
  np.testing.assert_allclose(smooth, [np.array([5, 7, 7, 5]) / 24])


@pytest.mark.parametrize("method", resizing.LINEAR)
def test_rows_sum_to_one_and_equal_sizes_change_nothing(method):
  np.testing.assert_allclose(
    resizing.matrix(9, 13, method).sum(axis=1), 1, atol=1e-6
  )
  np.testing.assert_allclose(
    resizing.matrix(9, 9, method), np.eye(9), atol=1e-6
  )


@pytest.mark.parametrize("method", resizing.METHODS)
def test_host_and_device_agree(method):
  x = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
  host = resizing.resize(x, (9, 4), method=method)
  with jax.disable_jit():
    device = resizing.resize(jnp.asarray(x), (9, 4), method=method)
  assert host.shape == device.shape == (2, 9, 4, 3)
  assert host.dtype == np.float32
  np.testing.assert_allclose(host, device, atol=1e-6)
  maps = resizing.resize_maps(x[..., 0], (9, 4), method=method)
  np.testing.assert_allclose(maps, host[..., 0], atol=1e-6)


def test_under_jit_the_matrices_are_constants():
  x = jnp.arange(6.0).reshape(1, 6, 1)
  resizing.matrix.cache_clear()
  make = jax.jit(
    lambda x: resizing.resize(x, (1, 3), method="bilinear_antialiased")
  )
  host = resizing.resize(np.asarray(x), (1, 3), method="bilinear_antialiased")
  np.testing.assert_allclose(make(x), host, atol=1e-6)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="bicubic"):
    resizing.resize(np.zeros((2, 2, 1)), (1, 1), method="bicubik")
  with pytest.raises(ValueError, match="resizing method is 'bilinear'"):
    resizing.indices(4, 2, "bilinear")


TORCH = {
  "bilinear": {"mode": "bilinear", "align_corners": False},
  "bilinear_corners": {"mode": "bilinear", "align_corners": True},
  "bilinear_antialiased": {"mode": "bilinear", "antialias": True},
  "bicubic": {"mode": "bicubic", "align_corners": False},
  "bicubic_corners": {"mode": "bicubic", "align_corners": True},
  "bicubic_antialiased": {"mode": "bicubic", "antialias": True},
  "nearest": {"mode": "nearest"},
  "nearest_exact": {"mode": "nearest-exact"},
}


@pytest.mark.reference
@pytest.mark.parametrize("method", resizing.METHODS)
@pytest.mark.parametrize(("old", "new"), SIZES)
# PyTorch rounds its weights to the type of the values.
@pytest.mark.parametrize(("kind", "limit"), [("f8", 1e-6), ("f4", 2e-6)])
def test_as_torch(method, old, new, kind, limit):
  import torch

  x = np.random.default_rng(1).uniform(-1, 1, (2, *old, 3)).astype(kind)
  planes = torch.from_numpy(x).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.interpolate(planes, size=new, **TORCH[method])
  theirs = theirs.permute(0, 2, 3, 1).numpy()
  ours = resizing.resize(x, new, method=method)
  np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0)


@pytest.mark.reference
@pytest.mark.parametrize("method", resizing.NEAREST)
def test_every_index_as_torch(method):
  import torch

  for old in range(1, 70, 3):
    values = torch.arange(old, dtype=torch.float32)[None, None]
    for new in range(1, 130, 5):
      theirs = torch.nn.functional.interpolate(
        values, size=new, **TORCH[method]
      )
      ours = resizing.indices(old, new, method)
      np.testing.assert_array_equal(ours, theirs[0, 0].numpy(), f"{old} {new}")
