"""RankMe and LiDAR of features with known ranks, and of an encoder."""

import numpy as np
import pytest
from colour_encoder import ColourEncoder

from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core.base import build_evaluator
from mtv_jax.evals.feature_rank import effective_rank, lidar, rankme
from mtv_jax.utils.errors import InputError


def rotate(x, seed=0):
  """Rotates the last axis."""
  draws = np.random.default_rng(seed).normal(size=(x.shape[-1],) * 2)
  return x @ np.linalg.qr(draws)[0]


def test_rankme_of_known_singular_values():
  values = np.array([4.0, 2.0, 1.0, 1.0])
  p = values / 8
  expected = np.prod(p**-p)
  assert effective_rank(values) == pytest.approx(expected, rel=1e-5)
  # Orthonormal columns, scaled and rotated.
  basis = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 4)))[0]
  features = rotate(basis * values)
  assert rankme(features) == pytest.approx(expected, rel=1e-5)
  assert rankme(np.ones((9, 5))) == pytest.approx(1, abs=1e-4)
  assert rankme(np.zeros((9, 5))) == pytest.approx(1, abs=1e-4)


def test_lidar_counts_the_directions_that_views_share():
  """Directions of noise add to RankMe, not to LiDAR."""
  rng = np.random.default_rng(0)
  n, q, shared, d = 400, 8, 3, 12
  x = 0.01 * rng.normal(size=(n, q, d))
  x[..., :shared] += rng.normal(size=(n, 1, shared))
  x[..., shared:] += rng.normal(size=(n, q, d - shared))
  x = rotate(x)
  assert lidar(x) == pytest.approx(shared, rel=0.05)
  assert rankme(x[:, 0]) > 0.9 * d
  # Per-direction ratios, for independent directions.
  y = np.concatenate([x @ np.eye(d), np.zeros((n, q, 1))], axis=2)
  means = y.mean(1)
  between, within = np.cov(means.T), np.zeros((d + 1, d + 1))
  for rows, mean in zip(y, means, strict=True):
    within += (rows - mean).T @ (rows - mean) / (n * (q - 1))
  within += 1e-4 * np.eye(d + 1)
  ratios = np.linalg.eigvals(np.linalg.inv(within) @ between).real
  assert lidar(y) == pytest.approx(effective_rank(np.abs(ratios)), rel=1e-6)


class CropEncoder(ColourEncoder):
  """Mean colours of crops, too."""

  preprocess = Preprocess(size=8)

  def dense(self, images, **options):
    self.crops = np.stack([images[i] for i in range(len(images))])
    return self.image(images, **options)


def test_evaluator():
  data = dict(type="scenes", size=16, length=6)
  options = dict(data=data, count=6, views=4)
  results, encoders = [], [CropEncoder() for _ in range(3)]
  for encoder, seed in zip(encoders, (0, 0, 1), strict=True):
    evaluator = build_evaluator("feature_rank", options | {"seed": seed})
    evaluator.prepare()
    result = evaluator.run(encoder)
    results.append(result.metrics)
  # Crops of 6 images depend on the seed.
  first, again, other = (encoder.crops for encoder in encoders)
  assert first.shape == (24, 8, 8, 3)
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() and results[0]["lidar"] != results[2]["lidar"]
  assert results[0] == results[1]
  views = first.reshape(6, 4, -1, 3).mean(2) / np.float32(255)
  assert results[0]["lidar"] == pytest.approx(lidar(views), rel=1e-4)
  images = [evaluator._set.images[i].reshape(-1, 3).mean(0) for i in range(6)]
  expected = rankme(np.stack(images) / 255)
  assert results[0]["rankme"] == pytest.approx(expected, rel=1e-4)
  assert all(0 < result.errors[name] < 1 for name in ("rankme", "lidar"))
  with pytest.raises(InputError, match="scenes has 2 images"):
    build_evaluator("feature_rank", options | {"count": 2}).prepare()
