"""MAE decoder: positions, order and visibility of the patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models.heads import mae_decoder


def test_slots_invert_keep():
  keep = jnp.array([[4, 0, 2], [1, 2, 3]])
  slots, visible = mae_decoder.visible_slots(keep, 5)
  np.testing.assert_array_equal(slots, [[1, 3, 2, 3, 0], [3, 0, 1, 2, 3]])
  np.testing.assert_array_equal(visible, np.asarray(slots) < 3)


@pytest.fixture(scope="module")
def decoder():
  module = mae_decoder.MaskedDecoder(outputs=12, width=16, depth=2, heads=2)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
  prefix = jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32)
  keep = jnp.array([[0, 2, 5], [1, 3, 4]], jnp.int32)
  init = jax.jit(module.init, static_argnums=4)
  params = init(jax.random.key(0), tokens, prefix, keep, (2, 3))
  apply = jax.jit(module.apply, static_argnums=4)
  return params, apply, tokens, prefix, keep


def test_order_of_visible_patches_does_not_matter(decoder):
  params, apply, tokens, prefix, keep = decoder
  expected = apply(params, tokens, prefix, keep, (2, 3))
  assert expected.shape == (2, 6, 12)
  order = jnp.array([2, 0, 1])
  shuffled = apply(params, tokens[:, order], prefix, keep[:, order], (2, 3))
  np.testing.assert_allclose(shuffled, expected, atol=1e-5)


def test_hidden_patches_depend_on_position_and_prefix(decoder):
  params, apply, tokens, prefix, keep = decoder
  result = apply(params, tokens, prefix, keep, (2, 3))
  assert np.abs(result[0, 1] - result[0, 3]).max() > 1e-3
  other = apply(params, tokens, prefix + 1.0, keep, (2, 3))
  assert np.abs(other - result).max(axis=(1, 2)).min() > 1e-3


def test_without_prefix_and_in_bfloat16(decoder):
  params, apply, tokens, prefix, keep = decoder
  none = prefix[:, :0]
  exact = apply(params, tokens, none, keep, (2, 3))
  half = (x.astype(jnp.bfloat16) for x in (tokens, none))
  rough = apply(params, *half, keep, (2, 3))
  assert rough.dtype == jnp.float32
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05
