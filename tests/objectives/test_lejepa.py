"""LeJEPA against NumPy in float64 and a closed form of its statistic."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grounding_samples import gradients_of

from mtv_jax.augment.views import build_views
from mtv_jax.objectives import base, build_objective
from mtv_jax.objectives.lejepa import random_directions, sigreg
from mtv_jax.utils.errors import ConfigError

ROWS, GLOBAL, LOCAL, CHANNELS = 6, 2, 3, 4


def make(**options):
  options = dict(directions=5, knots=9, sigreg_weight=0.3) | options
  return build_objective("lejepa", options)


def compute_loss(objective, views, key):
  """The terms for projections [b, v, d], global views first."""
  parts = jnp.split(views, [GLOBAL], axis=1)
  encodings = {
    base.Encoding("image", name): types.SimpleNamespace(pooled=x)
    for name, x in zip(("global", "local"), parts, strict=True)
  }
  heads = {"lejepa": lambda x: x}
  inputs = objective.loss_inputs(encodings, heads, {})
  return objective.loss(inputs, heads, base.Context(7, 100, {}, key=key))


def reference(objective, views, directions):
  """The loss view by view, direction by direction, knot by knot."""
  target = views[:, :GLOBAL].mean(axis=1)
  errors = [np.square(views[:, v] - target) for v in range(GLOBAL + LOCAL)]
  t = np.linspace(0, 3, objective.knots)
  statistics = []
  for v in range(GLOBAL + LOCAL):
    for a in directions.T:
      empirical = [np.exp(1j * s * views[:, v] @ a).mean() for s in t]
      gap = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
      area = np.sum((gap[1:] + gap[:-1]) / 2 * np.diff(t))
      statistics.append(2 * len(views) * area)
  weight = objective.sigreg_weight
  return (1 - weight) * np.mean(errors) + weight * np.mean(statistics)


def test_loss_and_gradient_equal_numpy():
  objective, key = make(), jax.random.key(3)
  rng = np.random.default_rng(0)
  views = rng.normal(size=(ROWS, GLOBAL + LOCAL, CHANNELS)).astype(np.float32)
  directions = np.float64(random_directions(key, CHANNELS, 5))
  np.testing.assert_allclose(np.linalg.norm(directions, axis=0), 1, rtol=1e-6)

  @jax.jit
  def compute(views, key):
    def loss(views):
      terms = compute_loss(objective, views, key)
      return terms.loss.value(), terms.report

    return jax.value_and_grad(loss, has_aux=True)(views)

  (value, report), grads = compute(views, key)

  def expected(x):
    return reference(objective, np.float64(x), directions)

  np.testing.assert_allclose(value, expected(views), rtol=1e-5)
  (numeric,) = gradients_of(expected, views, step=1e-5)
  np.testing.assert_allclose(grads, numeric, rtol=1e-4, atol=1e-6)
  parts = 0.7 * report["prediction"].value() + 0.3 * report["sigreg"].value()
  np.testing.assert_allclose(parts, value, rtol=1e-6)
  assert report["labelled"].value() == 1
  # Another step has other directions.
  (other, _), _ = compute(views, jax.random.key(4))
  assert abs(other - value) > 1e-3


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0, 0), (3, 0), (1, 2)])
def test_statistic_equals_its_closed_form(scale, shift):
  """The integral over all t, by characteristic functions of the normal."""
  y = scale * np.random.default_rng(1).normal(size=300) + shift
  n = len(y)
  pairs = np.exp(-(np.subtract.outer(y, y) ** 2) / 2).sum() / n
  closed = pairs - np.sqrt(2) * np.exp(-(y**2) / 4).sum() + n / np.sqrt(3)
  closed *= np.sqrt(2 * np.pi)
  x = jnp.asarray(y[:, None, None], jnp.float32)
  value = float(sigreg(x, jnp.ones((1, 1))))
  # Beyond t = 3 are 0.27 % of the weight, and of equal rows 1.7 % of the value.
  np.testing.assert_allclose(value, closed, rtol=0.02)
  if (scale, shift) == (1, 0):
    assert value < 5
  else:
    assert value > 10


def test_a_single_view_is_refused():
  views = build_views({"global": dict(count=1, ops="resize(16)")})
  with pytest.raises(ConfigError, match="global.count=2, or name a view_local"):
    make(view_local=None).resolve(None, views)
  views = build_views({"global": dict(count=2, ops="resize(16)")})
  assert make(view_local=None).resolve(
    None, views
  ).needs().encodings.keys() == {base.Encoding("image", "global")}
