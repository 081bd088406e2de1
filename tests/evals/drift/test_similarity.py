"""Measures of similarity, against loops over their definitions."""

import numpy as np
import pytest

from mtv_jax.evals import drift


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 6)).astype(np.float32)
  mixed = x @ rng.normal(size=(6, 9)) + 0.5 * rng.normal(size=(40, 9))
  return x, mixed.astype(np.float32)


def test_neighbour_agreement(pair):
  def nearest(x, i, k):
    cos = [
      -np.dot(x[i], x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
      for j in range(len(x))
    ]
    others = [j for j in range(len(x)) if j != i]
    return {*sorted(others, key=lambda j: cos[j])[:k]}

  x, y = (a.astype(np.float64) for a in pair)
  want = [len(nearest(x, i, 5) & nearest(y, i, 5)) / 5 for i in range(40)]
  got = drift.neighbour_agreement(*pair, 5)
  np.testing.assert_allclose(got, want)
  assert 0.1 < got.mean() < 0.9
  equal = drift.neighbour_agreement(pair[0], 3 * pair[0], 5)
  np.testing.assert_array_equal(equal, 1)
  # Unrelated features agree by chance: k / (n - 1).
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 600, 8))
  chance = drift.neighbour_agreement(x, y, 12).mean()
  assert chance == pytest.approx(12 / 599, abs=0.004)


def test_linear_cka(pair):
  """By the HSIC of the Gram matrices (Kornblith et al. 2019, equation 3)."""

  def hsic(k, l):
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ l @ h)

  x, y = (a.astype(np.float64) for a in pair)
  k, l = x @ x.T, y @ y.T
  want = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
  assert drift.linear_cka(*pair) == pytest.approx(want, rel=1e-9)
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
  assert drift.linear_cka(x, 2 * x @ rotation + 3) == pytest.approx(1)
  assert drift.linear_cka(x, np.ones((40, 2))) == 0


def test_cosines(pair):
  x = pair[0]
  np.testing.assert_allclose(drift.cosines(x, -2 * x), -1)
  np.testing.assert_array_equal(drift.cosines(x, 0 * x), 0)
  y = x[::-1]
  want = [
    np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    for a, b in zip(x, y, strict=True)
  ]
  np.testing.assert_allclose(drift.cosines(x, y), want, rtol=1e-5)
