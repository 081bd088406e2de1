"""Balancing methods against NumPy, their options, and late objectives."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainings

from mtv_jax.augment.random import step_key
from mtv_jax.objectives.base import WeightedMean
from mtv_jax.train.balance import (
  Balance,
  GradNorm,
  GradNormMean,
  PCGrad,
  Uncertainty,
  projection_coefficients,
)
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec
from mtv_jax.train.train import check_balance_unchanged
from mtv_jax.utils.errors import ConfigError

NAMES = ("a", "b", "late")


def test_grad_norm_mean_factors_are_the_geometric_mean_over_the_norm():
  def factors(*norms, **options):
    state = dict(zip(NAMES, map(jnp.float32, norms), strict=False))
    return list(GradNormMean(**options).factors(state).values())

  np.testing.assert_allclose(factors(4, 1, 0), [0.5, 2, 1])
  # Bounded, and 1 before any measurement.
  bounded = factors(1e6, 1e-6, max_factor=10.0)
  np.testing.assert_allclose(bounded, [0.1, 10], rtol=1e-6)
  assert factors(0, 0) == [1, 1]


def test_measurements_enter_a_geometric_mean_without_weight_and_factor():
  balance = GradNormMean(decay=0.25, every_steps=10)
  weights, zeros = scalars(a=0.5, b=2), scalars(a=0, b=0, late=0)
  # Factors are 1.
  norms = balance.observe(zeros, scalars(a=8, b=2), weights, 0)
  assert norms == scalars(a=16, b=1, late=0)
  # Factors 1/4 and 4: raw norms of 4 and 1/2.
  early = balance.observe(norms, scalars(a=0.5, b=4), weights, 9)
  np.testing.assert_allclose(early["b"], 0.5**0.9, rtol=1e-6)
  norms = balance.observe(norms, scalars(a=0.5, b=4), weights, 500)
  expected = [16**0.25 * 4**0.75, 0.5**0.75, 0.0]
  np.testing.assert_allclose(list(norms.values()), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_batch_without_labels_changes_no_running_norm(value):
  old, ones = scalars(a=4, b=1, late=0), scalars(a=1, b=1, late=1)
  norms = scalars(a=value, b=1, late=value)
  new = GradNormMean(1).observe(old, norms, ones, 3)
  assert new["a"] == 4 and new["late"] == 0
  assert new["b"] != 1  # 1 / factor 2.
  unweighted = GradNormMean(1).observe(old, scalars(a=1), scalars(a=0), 3)
  assert unweighted["a"] == 4


def mean(value, count=4.0):
  return WeightedMean(jnp.float32(value * count), jnp.float32(count))


def scalars(**values):
  return {name: jnp.float32(value) for name, value in values.items()}


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class Adam:
  """Adam of one number, as Kingma and Ba (2015) give it."""

  def __init__(self, value, lr):
    self.value, self.lr = value, lr
    self.m = self.v = self.count = 0

  def step(self, gradient):
    self.count += 1
    self.m = 0.9 * self.m + 0.1 * gradient
    self.v = 0.999 * self.v + 0.001 * gradient**2
    m = self.m / (1 - 0.9**self.count)
    v = self.v / (1 - 0.999**self.count)
    self.value -= self.lr * m / (np.sqrt(v) + 1e-8)


def test_uncertainty_follows_equation_10():
  balance, weights = Uncertainty(lr=0.1), scalars(a=1.0, b=0.5)
  state = balance.init(NAMES)
  assert balance.loss_weights(weights, state) == weights
  assert balance.penalty(weights, state) == 0
  expected = {name: Adam(0.0, 0.1) for name in weights}
  update = jax.jit(balance.update)
  for losses in ({"a": 4.0, "b": 0.1}, {"a": 3.0, "b": 0.2}, {"a": 0.4}):
    terms = {name: mean(losses.get(name, 0), name in losses) for name in "ab"}
    state = update(state, terms, weights)
    for name, loss in losses.items():
      s = expected[name].value
      expected[name].step(float(weights[name]) * (0.5 - np.exp(-s) * loss))
    for name, adam in expected.items():
      actual = state[name]["log_variance"]
      np.testing.assert_allclose(actual, adam.value, rtol=1e-5)
  # An objective before its start is unchanged.
  assert_equal(state["late"], balance.init("x")["x"])
  s = {name: adam.value for name, adam in expected.items()}
  actual = balance.loss_weights(weights, state)
  expected = {"a": np.exp(-s["a"]), "b": 0.5 * np.exp(-s["b"])}
  assert actual == pytest.approx(expected, rel=1e-5)
  penalty = s["a"] / 2 + 0.5 * s["b"] / 2
  actual = balance.penalty(weights, state)
  np.testing.assert_allclose(actual, penalty, rtol=1e-5)


def test_uncertainty_descends_the_total_loss():
  """Its update follows autodiff's gradient of the total."""
  balance, weights = Uncertainty(lr=0.1), scalars(a=1.0, b=0.5)
  losses = {"a": 4.0, "b": 0.1}
  means = {name: mean(value) for name, value in losses.items()}
  state = balance.update(balance.init("ab"), means, weights)

  def total(s):
    entries = {name: {"log_variance": value} for name, value in s.items()}
    scaled = balance.loss_weights(weights, entries)
    weighted = sum(scaled[name] * losses[name] for name in losses)
    return weighted + balance.penalty(weights, entries)

  gradient = jax.grad(total)(scalars(a=0.0, b=0.0))
  for name, entry in state.items():
    moment = entry["opt_state"][0].mu
    np.testing.assert_allclose(moment, 0.1 * gradient[name], rtol=1e-5)


def test_uncertainty_is_bounded():
  balance = Uncertainty(lr=1.0, max_factor=10.0)
  state = balance.init("ab")
  for _ in range(4):
    losses = {"a": mean(1e4), "b": mean(-1.0)}
    state = balance.update(state, losses, scalars(a=1, b=1))
  weights = balance.loss_weights(scalars(a=1, b=1), state)
  np.testing.assert_allclose(list(weights.values()), [0.1, 10.0], rtol=1e-5)
  new = balance.update(state, {"a": mean(np.nan)}, scalars(a=1))
  assert_equal(new, state)


def gradnorm_step(adams, first, norms, losses, alpha):
  """A step of GradNorm in NumPy; factors after the renormalisation."""
  f = np.array([adam.value for adam in adams])
  ratio = losses / first
  target = (f * norms).mean() * (ratio / ratio.mean()) ** alpha
  gradients = np.sign(f * norms - target) * norms
  for adam, gradient in zip(adams, gradients, strict=True):
    adam.step(gradient)
  scale = f.sum() / sum(adam.value for adam in adams)
  for adam in adams:
    adam.value *= scale


def test_gradnorm_follows_equation_2():
  balance = GradNorm(lr=0.1, alpha=1.5)
  state, weights = balance.init(NAMES), scalars(a=1.0, b=0.5)
  adams = [Adam(1.0, 0.1), Adam(1.0, 0.1)]
  rng, first = np.random.default_rng(0), np.array([4.0, 2.0])
  for step in range(4):
    losses = first * rng.uniform(0.5, 1.0, 2) if step else first
    norms = rng.uniform(0.1, 5.0, 2)
    # Measured on w_i f_i L_i.
    f = np.array([adam.value for adam in adams])
    measured = scalars(**dict(zip("ab", [1, 0.5] * f * norms, strict=True)))
    state = balance.observe(state, measured, weights, step)
    terms = dict(zip("ab", map(mean, losses), strict=True))
    state = jax.jit(balance.update)(state, terms, weights)
    gradnorm_step(adams, first, norms, losses, 1.5)
    actual = [state[name]["factor"] for name in "ab"]
    expected = [adam.value for adam in adams]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    np.testing.assert_allclose(sum(actual), 2.0, rtol=1e-6)
    # Updates without a measurement change nothing.
    assert_equal(balance.update(state, terms, weights), state)
  actual = balance.loss_weights(weights, state)
  assert actual["b"] == 0.5 * state["b"]["factor"]


def test_gradnorm_with_late_objectives_and_missing_labels():
  balance = GradNorm(lr=0.1, alpha=0.0)
  weights, state = scalars(a=1, b=1, late=1), balance.init(NAMES)

  def step(state, norms, losses):
    state = balance.observe(state, scalars(**norms), weights, 0)
    terms = {n: mean(x, count=4.0 if x else 0.0) for n, x in losses.items()}
    return balance.update(state, terms, weights)

  state = step(state, dict(a=4.0, b=1.0), dict(a=4.0, b=2.0))
  factors = {name: float(entry["factor"]) for name, entry in state.items()}
  # alpha = 0: the larger gradient is lowered. Their sum stays.
  assert factors["a"] < 1 < factors["b"] and factors["late"] == 1
  assert factors["a"] + factors["b"] == pytest.approx(2)
  old = state["b"]
  norms, losses = dict(a=1.0, b=0.0, late=9.0), dict(a=3.0, b=0.0, late=5.0)
  state = step(state, norms, losses)
  # b lacks labels and is excluded from the step. late starts at this loss.
  assert_equal(state["b"], old)
  first = [float(state[name]["initial_loss"]) for name in NAMES]
  assert first == [4.0, 2.0, 5.0]
  assert sum(float(state[n]["factor"]) for n in NAMES) == pytest.approx(3)
  assert state["late"]["factor"] < 1
  # One that is not finite, and no labels at all.
  new = step(state, dict(a=np.nan, b=0.0), dict(a=1.0, b=0.0))
  assert_equal(new, state)


def test_gradnorm_makes_no_nan_between_measurements():
  # Most updates don't follow a measurement.
  balance, weights = GradNorm(every_steps=10), scalars(a=1, b=1)
  state = balance.init(("a", "b"))
  with jax.debug_nans(True):
    new = balance.update(state, {n: mean(2.0) for n in weights}, weights)
  assert_equal(new, state)


def project(gradients, orders):
  """Algorithm 1 of Yu et al. (2020) on the rows of `gradients`."""
  projected = gradients.copy()
  for i, order in enumerate(orders):
    for j in order:
      if j != i and (product := projected[i] @ gradients[j]) < 0:
        norm = gradients[j] @ gradients[j]
        projected[i] -= product / norm * gradients[j]
  return projected


def test_pcgrad_projects_as_algorithm_1():
  rng, count = np.random.default_rng(0), 5
  gradients = rng.normal(size=(count, 7)).astype(np.float32)
  gradients[3] = 0  # No labels.
  assert (np.triu(gradients @ gradients.T) < 0).sum() > 2
  keys = jax.random.split(jax.random.key(3), count)
  orders = np.stack([jax.random.permutation(key, count) for key in keys])
  assert len({tuple(order) for order in orders}) > 1
  products = jnp.asarray(gradients @ gradients.T)
  coefficients = projection_coefficients(products, keys)
  expected = project(gradients, orders)
  np.testing.assert_allclose(coefficients @ gradients, expected, atol=1e-5)
  # The order matters here, so that a wrong one would be seen.
  assert not np.allclose(project(gradients, orders[::-1]), expected, atol=1e-2)


@pytest.mark.parametrize("parameters", ["image", "shared"])
def test_pcgrad_combines_the_parameters_that_are_shared(parameters):
  rng = np.random.default_rng(1)

  def leaf(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  def tree():
    return {
      "image": {"kernel": leaf(3, 2), "bias": leaf(2)},
      "text": {"kernel": leaf(4)},
      "heads": {"own": {"x": leaf(3)}, "own_too": {"x": leaf(3)}},
    }

  gradients = {"a": tree(), "b": tree(), "c": tree()}
  modules = ("image",)
  if parameters == "shared":
    modules = ("image", "text", "heads/own")
  keys = {name: step_key(jax.random.key(0), name, 5) for name in gradients}
  combine = jax.jit(PCGrad(parameters).combine_gradients, static_argnums=1)
  actual = combine(gradients, frozenset(modules), keys)

  def vector(tree):
    leaves = [tree["image"]["bias"], tree["image"]["kernel"].ravel()]
    if parameters == "shared":
      leaves += [tree["text"]["kernel"], tree["heads"]["own"]["x"]]
    return np.concatenate(leaves)

  vectors = np.stack([vector(g) for g in gradients.values()])
  assert (vectors @ vectors.T < 0).any()
  orders = [jax.random.permutation(key, 3) for key in keys.values()]
  total = project(vectors, np.stack(orders)).sum(0)
  np.testing.assert_allclose(vector(actual), total, atol=1e-5)
  rest = sum(g["heads"]["own_too"]["x"] for g in gradients.values())
  np.testing.assert_allclose(actual["heads"]["own_too"]["x"], rest, atol=1e-6)


def read(section):
  return trainings.smallest(balance=section)


@pytest.mark.parametrize(
  ("section", "expected"),
  [
    (None, Balance()),
    (dict(method="fixed"), Balance()),
    ({}, GradNormMean()),
    (dict(every_percent=5), GradNormMean(every_steps=5)),
    # As a run's config.json gives it.
    (
      dict(every_steps=20, decay=0.5, max_factor=10.0),
      GradNormMean(20, 0.5, 10.0),
    ),
    (
      dict(method="gradnorm", alpha=0.5, every_steps=1),
      GradNorm(every_steps=1, alpha=0.5),
    ),
    (dict(method="uncertainty", lr=0.1), Uncertainty(lr=0.1)),
    (dict(method="pcgrad", parameters="shared"), PCGrad("shared")),
    (dict(method="grad_norm"), "config.balance.method is 'grad_norm'. Did you"),
    (dict(deacy=0.5), "balance has no option 'deacy'. Did you mean 'dec"),
    (dict(method="pcgrad", every_steps=5), "no option 'every_steps'"),
    (dict(method="uncertainty", alpha=1.0), "no option 'alpha'"),
    (dict(method="gradnorm", alpha=-1), "config.balance.alpha is -1, expected"),
    (dict(method="pcgrad", parameters="text"), "There are: image, shared"),
    (dict(every_steps=0), "config.balance.every_steps is 0, expected"),
  ],
)
def test_a_method_of_a_config_or_an_error_that_names_the_option(
  section, expected
):
  if isinstance(expected, Balance):
    assert build_spec(resolve(read(section)), 100).balance == expected
    return
  with pytest.raises(ValueError, match=re.escape(expected)):
    build_spec(resolve(read(section)), 100)


@pytest.mark.parametrize(
  ("recorded", "section", "expected"),
  [
    (dict(method="pcgrad"), None, ("fixed", "pcgrad")),
    (None, dict(method="pcgrad"), ("pcgrad", "fixed")),
    (dict(every_steps=5), dict(method="fixed"), ("fixed", "grad_norm_mean")),
    (dict(method="fixed"), None, None),
    (dict(every_steps=5), dict(method="grad_norm_mean"), None),
    (dict(method="pcgrad"), dict(method="pcgrad", parameters="shared"), None),
  ],
)
def test_a_run_resumes_with_its_method_alone(
  tmp_path, recorded, section, expected
):
  run = resolve(read(section))
  check_balance_unchanged(run, tmp_path)  # Nothing to resume.
  (tmp_path / "config.json").write_text(json.dumps(read(recorded).to_dict()))
  if expected is None:
    check_balance_unchanged(run, tmp_path)
    return
  new, old = expected
  with pytest.raises(ConfigError, match=f"is '{new}', but .* used '{old}'"):
    check_balance_unchanged(run, tmp_path)


@pytest.mark.parametrize(
  ("section", "rejected"),
  [
    (dict(interference=dict(every_steps=5)), "config.interference compares"),
    (dict(balance=dict(method="gradnorm")), "config.balance compares"),
    (dict(balance=dict(method="pcgrad")), "config.balance compares"),
    (dict(balance=dict(method="pcgrad", parameters="shared")), None),
    (dict(balance=dict(method="uncertainty")), None),
  ],
)
def test_gradients_of_a_frozen_encoder_are_not_compared(section, rejected):
  config = trainings.smallest(**section)

  def build(pattern):
    config.optim.rules = [(pattern, dict(lr=0.0))]
    return build_spec(resolve(config), 100)

  build("^image/blocks/")
  if rejected is None:
    build("^image/")
    return
  with pytest.raises(ConfigError, match=rejected):
    build("^image/")
