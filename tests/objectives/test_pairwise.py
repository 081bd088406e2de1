"""Pairwise sigmoid losses and the temperature."""

import jax
import jax.numpy as jnp
import numpy as np

from mtv_jax.objectives import pairwise


def test_sigmoid_losses_are_binary_cross_entropies():
  logits = np.array([[-3.0, 0.0, 2.0], [1e4, -1e4, 0.5]], np.float32)
  positive = np.array([[True, False, True], [False, False, True]])
  chance = np.where(positive, logits, -logits).astype(np.float64)
  result = pairwise.sigmoid_losses(jnp.asarray(logits), jnp.asarray(positive))
  np.testing.assert_allclose(result, np.logaddexp(0, -chance), rtol=1e-6)
  gradient = jax.grad(
    lambda l: pairwise.sigmoid_losses(l, jnp.asarray(positive)).sum()
  )(jnp.asarray(logits))
  sigmoid = np.where(logits > 0, 1, np.exp(np.minimum(logits, 0)))
  sigmoid = sigmoid / (1 + np.exp(-np.abs(logits)))
  np.testing.assert_allclose(gradient, sigmoid - positive, atol=1e-6)


def test_temperature_is_a_logarithm_with_optional_bias():
  module = pairwise.Temperature(init_scale=7.0, init_bias=None)
  params = module.init(jax.random.key(0))["params"]
  assert set(params) == {"logit_scale"}
  affine = module.apply({"params": params})
  np.testing.assert_allclose(affine.scale, 7.0, rtol=1e-6)
  assert affine.bias == 0
