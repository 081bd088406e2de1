"""Few-shot least squares: NumPy, scikit-learn's Ridge, the draw of shots."""

import numpy as np
import pytest

import mtv_jax
from mtv_jax.evals.classification import few_shot
from mtv_jax.evals.core.base import NotApplicable


@pytest.fixture(scope="module", params=[40, 9])
def data(request):
  """More and fewer images than features."""
  rng = np.random.default_rng(0)
  x = rng.normal(2, 3, (request.param, 12)).astype(np.float32)
  x[:, 4] = 1.5  # a feature that does not vary
  return x, rng.integers(0, 3, request.param), rng.normal(2, 3, (25, 12))


def standardize(x, rows):
  mean, std = x.mean(0, dtype=float), x.std(0, dtype=float)
  z = (rows - mean) / (std + 1e-5)
  return np.concatenate([z, np.full((len(z), 1), 100.0)], axis=1)


def test_weights_solve_the_regularised_equations(data):
  x, labels, tested = data
  model = few_shot.fit(x, labels, classes=4, l2=3.0)
  z, y = standardize(x, x), 2 * np.eye(4)[labels] - 1
  # The gradient of |zW - y|^2 + 3 |W|^2 is zero.
  gradient = z.T @ (z @ model.weights - y) + 3 * model.weights
  np.testing.assert_allclose(gradient, 0, atol=1e-8)
  np.testing.assert_allclose(
    model.scores(tested), standardize(x, tested) @ model.weights, atol=1e-10
  )
  assert model.weights.shape == (13, 4)


@pytest.mark.reference
def test_weights_are_those_of_ridge(data):
  from sklearn.linear_model import Ridge

  x, labels, tested = data
  for l2 in (0.5, 1024.0):
    model = few_shot.fit(x, labels, classes=3, l2=l2)
    oracle = Ridge(alpha=l2, fit_intercept=False)
    oracle.fit(standardize(x, x), 2 * np.eye(3)[labels] - 1)
    want = oracle.predict(standardize(x, tested))
    np.testing.assert_allclose(model.scores(tested), want, atol=1e-9)


def test_sample_shots():
  labels = np.array([0, 2, 2, 0, 2, 0, 2, 2, 0, 0])
  items = few_shot.sample_shots(labels, shots=4, seed=1)
  assert items.shape == (2, 4)
  assert (labels[items] == [[0], [2]]).all()
  assert all(len(set(row)) == 4 for row in items)
  # One generator draws a permutation per class, in order.
  rng = np.random.default_rng(1)
  want = [rng.permutation(np.flatnonzero(labels == c))[:4] for c in (0, 2)]
  np.testing.assert_array_equal(items, want)
  assert (
    items.tolist() != few_shot.sample_shots(labels, shots=4, seed=2).tolist()
  )


@pytest.fixture
def folder(tmp_path, write_classes):
  write_classes(tmp_path / "train", 6)
  write_classes(tmp_path / "test", 2)
  return str(tmp_path)


def test_only_the_shots_are_encoded(folder, colours):
  encoded = []

  class Counting(type(colours)):
    def image(self, images, **kwargs):
      encoded.append(len(images))
      return super().image(images, **kwargs)

  options = dict(data=folder, view="encoder")
  result = few_shot.FewShot(**options, shots=(1,), seeds=(0, 1)).run(Counting())
  assert result.metrics == {"top1_1shot": 1.0}
  assert result.protocol["top1_of_seeds"] == {"top1_1shot": [1.0, 1.0]}
  assert encoded[0] <= 6 and encoded[1] == 6
  # All images are encoded if most are used, to share the features.
  encoded.clear()
  result = few_shot.FewShot(**options).run(Counting())
  assert result.errors.keys() == result.metrics.keys()
  assert encoded == [18, 6]
  # No class has ten images.
  assert list(result.metrics) == ["top1_1shot", "top1_5shot"]
  with pytest.raises(NotApplicable, match="class 0 of .* has 6 training"):
    few_shot.FewShot(**options, shots=(10,)).run(colours)


@pytest.mark.slow
def test_scenes():
  result = few_shot.FewShot(count=16, train_count=60, shots=(1,)).run(
    mtv_jax.load("pixels:16/8")
  )
  assert len(result.protocol["top1_of_seeds"]["top1_1shot"]) == 3
  assert result.chance["top1_1shot"] == 0.05
