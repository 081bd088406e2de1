"""PHI-S and whitening: unit variance, invertible, against definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import standardization
from mtv_jax.models.standardization import Moments, fit_standardization
from mtv_jax.utils.errors import InputError


def features(count=4000, width=24):
  """Correlated features of very different scales."""
  rng = np.random.default_rng(0)
  rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
  mixing = rotation * np.geomspace(0.1, 30, width)
  return rng.normal(size=(count, width)) @ mixing.T + rng.normal(size=width)


def moments_of(x):
  return Moments(float(len(x)), x.mean(0), np.cov(x.T, bias=True))


@pytest.mark.parametrize("method", ["phi_s", "whiten", "standardize"])
def test_unit_variance_and_invertible(method):
  x = features()
  mean, matrix = fit_standardization(moments_of(x), method)
  y = np.asarray(
    standardization.standardize(
      *(jnp.asarray(a, jnp.float32) for a in (x, mean, matrix))
    ),
    np.float64,
  )
  np.testing.assert_allclose(y.mean(0), 0, atol=2e-4)
  np.testing.assert_allclose(y.var(0), 1, rtol=2e-3)
  back = np.linalg.solve(matrix, y.T).T + mean
  np.testing.assert_allclose(back, x, atol=1e-4 * x.std())
  covariance = np.cov(y.T)
  if method == "whiten":
    np.testing.assert_allclose(covariance, np.eye(24), atol=5e-3)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9)
  if method == "phi_s":
    # A rotation and one scalar: all distances shrink equally.
    scalar = np.trace(moments_of(x).covariance) / 24
    np.testing.assert_allclose(
      matrix @ matrix.T, np.eye(24) / scalar, atol=1e-9
    )


def test_moments_of_parts_are_those_of_the_whole():
  x = jnp.asarray(features(999), jnp.float32)
  weights = jnp.asarray(np.arange(999) % 3 > 0, jnp.float32)
  parts = [
    Moments(*map(np.float64, standardization.batch_moments(x[i], weights[i])))
    for i in (slice(0, 5), slice(5, 999))
  ]
  got, want = (
    parts[0].merge(parts[1]),
    moments_of(np.float64(x)[np.asarray(weights) > 0]),
  )
  assert got.count == want.count
  np.testing.assert_allclose(got.mean, want.mean, rtol=1e-4)
  np.testing.assert_allclose(
    got.covariance, want.covariance, atol=1e-5 * want.covariance.max()
  )
  empty = Moments(0.0, np.ones(24), np.ones((24, 24)))
  assert empty.merge(empty) is empty
  np.testing.assert_allclose(empty.merge(got).mean, got.mean)


def test_features_without_variance_stay_finite():
  x = features()
  x[:, 3] = 7.0
  for method in ("phi_s", "whiten", "standardize"):
    _, matrix = fit_standardization(moments_of(x), method)
    assert np.isfinite(matrix).all()


@pytest.mark.parametrize(
  "size", [1, 2, 4, 12, 20, 48, 192, 384, 768, 1024, 1152, 1280, 1408, 1536]
)
def test_hadamard_matrices_are_orthogonal_of_equal_entries(size):
  matrix = standardization.hadamard(size)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
  np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-12)


def test_a_width_without_a_hadamard_matrix_is_rejected():
  for size in (3, 6, 36, 50):
    with pytest.raises(InputError, match=f"order {size}"):
      standardization.hadamard(size)
