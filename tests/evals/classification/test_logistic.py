"""Logistic regression: its optimum, scikit-learn's, blocks and devices."""

import numpy as np
import pytest

import mtv_jax
from mtv_jax.evals.classification import logistic, probe_evaluators
from mtv_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 90).astype(np.int32)
  x = rng.normal(size=(3, 5))[labels] + rng.normal(size=(90, 5))
  return x.astype(np.float32), labels


@pytest.fixture(scope="module")
def models(data):
  mesh = make_mesh({"data": -1})
  return logistic.sweep(*data, (0.01, 1.0, 100.0), classes=3, mesh=mesh)


def probabilities(logits):
  p = np.exp(logits - logits.max(1, keepdims=True))
  return p / p.sum(1, keepdims=True)


def test_published_strengths():
  assert len(logistic.STRENGTHS) == 45
  assert logistic.STRENGTHS[0] == pytest.approx(1e-6)
  assert logistic.STRENGTHS[-1] == pytest.approx(1e5)


def test_the_gradient_is_zero_at_each_optimum(data, models):
  x, labels = data
  for model in models:
    p = probabilities(x.astype(float) @ model.kernel + model.bias)
    error = (p - np.eye(3)[labels]) / 90
    l2 = 1 / (model.strength * 90)
    gradient = x.T @ error + l2 * model.kernel
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    # The bias is not regularised.
    np.testing.assert_allclose(error.sum(0), 0, atol=1e-5)
    assert 0 < model.iterations < 1000
  norms = [np.abs(m.kernel).max() for m in models]
  assert norms[0] < 0.5 < norms[1] < norms[2]


@pytest.mark.slow
def test_blocks_and_devices_change_nothing(data, models, monkeypatch):
  # Seven rows per block; the last block is padded.
  monkeypatch.setattr(logistic, "_LOGIT_BYTES", 7 * 4 * 3)
  (model,) = logistic.sweep(*data, (1.0,), classes=3)
  np.testing.assert_allclose(model.kernel, models[1].kernel, atol=1e-4)
  np.testing.assert_allclose(model.bias, models[1].bias, atol=1e-4)


@pytest.mark.reference
def test_the_optimum_equals_scikit_learns(data, models):
  from sklearn.linear_model import LogisticRegression

  x, labels = data
  for model in models:
    oracle = LogisticRegression(C=model.strength, tol=1e-10, max_iter=10_000)
    oracle.fit(x.astype(float), labels)
    want = oracle.predict_proba(x)
    got = probabilities(model.scores(x))
    np.testing.assert_allclose(got, want, atol=2e-4)
    np.testing.assert_allclose(model.kernel.T, oracle.coef_, atol=2e-3)
    np.testing.assert_array_equal(got.argmax(1), oracle.predict(x))


def test_the_published_tenth_of_the_training_images():
  # torch.manual_seed(0); torch.randperm(47)[:4]
  got = probe_evaluators.permute_as_torch(47, 4)
  assert got.tolist() == [34, 28, 40, 39]
  published = logistic.Logistic(data="elsewhere")
  assert published._resolve_view() == "shortest"
  assert (published.normalize, published.select) == ("raw", "train_tenth")


@pytest.mark.slow
@pytest.mark.parametrize("select", ["val", "train_split", "train_tenth"])
def test_scenes(select):
  result = logistic.Logistic(
    count=16,
    train_count=80,
    strengths=(1e5, 1e-6),
    select=select,
    max_iter=20,
  ).run(mtv_jax.load("pixels:16/8"))
  assert result.errors.keys() == result.metrics.keys()
  assert result.protocol["strengths"] == [1e-6, 1e5]
  assert len(result.protocol["top1_where_selected"]) == 2
  ends = result.protocol["selection"].endswith
  assert ends("then all") == (select != "val")
  assert ends("as published") == (select == "val")
