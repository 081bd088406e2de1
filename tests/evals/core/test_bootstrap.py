"""Standard errors against closed forms and against fresh samples."""

import numpy as np
import pytest

from mtv_jax.evals.core import bootstrap


def test_error_of_a_mean_is_that_of_fresh_samples():
  rng = np.random.default_rng(0)
  draws = rng.random((4000, 50)) < 0.3
  spread = draws.mean(axis=1).std()
  got = [bootstrap.means({"x": d}).errors["x"] for d in draws[:400]]
  assert np.mean(got) == pytest.approx(spread, rel=0.04)
  x = np.array([1.0, 2.0, 4.0])
  got = bootstrap.means({"x": x})
  assert got.metrics["x"] == pytest.approx(7 / 3)
  # Deviations -4/3, -1/3, 5/3: variance 42 / 18.
  assert got.errors["x"] == pytest.approx(np.sqrt(42 / 18 / 3))


def test_resampling_a_mean_equals_the_closed_form():
  x = np.random.default_rng(1).random(200) < 0.2
  closed = bootstrap.means({"x": x})
  drawn = bootstrap.estimate(lambda w: {"x": w @ x / w.sum()}, len(x))
  assert drawn.metrics == closed.metrics
  # The error of a standard deviation of 400 values is 3.5 %.
  assert drawn.errors["x"] == pytest.approx(closed.errors["x"], rel=0.12)
  again = bootstrap.estimate(lambda w: {"x": w @ x / w.sum()}, len(x))
  assert again == drawn


@pytest.mark.parametrize("count", [3, 8])
def test_errors_of_few_items_are_not_low(count):
  """A bootstrap's variance has the factor (n - 1) / n."""
  x = np.arange(count) ** 2.0
  closed = bootstrap.means({"x": x})
  drawn = bootstrap.means({"x": x}, groups=np.arange(count))
  error = closed.errors["x"]
  assert drawn.errors["x"] == pytest.approx(error, rel=0.06)
  assert np.std(closed.resamples["x"]) == pytest.approx(error, rel=0.06)


def test_error_of_a_ratio_is_that_of_fresh_samples():
  """Five captions of an image are right or wrong together."""
  rng = np.random.default_rng(2)

  def sample(images=80):
    right = np.repeat(rng.random(images) < 0.4, 5)
    return np.repeat(np.arange(images), 5), right

  spread = np.std([sample()[1].mean() for _ in range(3000)])
  pairs = [sample() for _ in range(12)]
  got = [bootstrap.means({"x": v}, groups=g).errors["x"] for g, v in pairs]
  assert np.mean(got) == pytest.approx(spread, rel=0.08)
  # As if captions were independent, it would be smaller by sqrt(5).
  alone = bootstrap.means({"x": pairs[0][1]}).errors["x"]
  assert got[0] / alone == pytest.approx(np.sqrt(5), rel=0.15)


def test_jackknife_of_a_mean_equals_the_closed_form():
  x = np.random.default_rng(3).normal(size=9)
  without = np.array([np.delete(x, i).mean() for i in range(9)])
  want = bootstrap.means({"x": x}).errors["x"]
  assert bootstrap.jackknife_error(without) == pytest.approx(want)


def test_errors_where_nothing_varies():
  right = bootstrap.means({"all": np.ones(8), "none": np.zeros(8)})
  assert right.errors == {"all": 1 / 8, "none": 1 / 8}
  # The formula's error of one wrong item.
  one = bootstrap.means({"x": np.arange(8) > 0}).errors["x"]
  assert one == pytest.approx(1 / 8)
  assert bootstrap.means({"x": np.array([0.3])}).errors == {}
  drawn = bootstrap.estimate(lambda w: {"x": w.sum() / 8}, 8)
  assert (drawn.metrics, drawn.errors) == ({"x": 1.0}, {"x": 1 / 8})


def test_metrics_that_a_resample_lacks_are_left_out():
  def metrics(w):
    return {"a": w[0] / 4, **({"b": w[1] / w[:2].sum()} if w[:2].any() else {})}

  got = bootstrap.estimate(metrics, 4)
  assert got.metrics == {"a": 0.25, "b": 0.5}
  assert 0 < got.errors["b"] < 0.5
  renamed = (got | bootstrap.means({"c": np.ones(2)})).rename("x_{}")
  assert list(renamed.metrics) == ["x_a", "x_b", "x_c"]
  assert list(renamed.errors) == ["x_a", "x_b", "x_c"]
