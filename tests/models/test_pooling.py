"""Pooling by attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models.pooling import MapPool
from mtv_jax.utils import xla_flags

TOKENS = jax.random.normal(jax.random.key(0), (2, 5, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_map_pool_gradients_compile_with_the_step_options(dtype):
  """One query's gradient in bfloat16 used a product that CPUs lack."""
  pool = MapPool(heads=2, mlp_dim=8, dtype=jnp.dtype(dtype))
  variables = pool.init(jax.random.key(1), TOKENS)

  def loss(variables, tokens):
    return jnp.square(pool.apply(variables, tokens)).sum()

  options = xla_flags.compiler_options(None)
  grad = jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)
  result = jax.tree.leaves(grad(variables, TOKENS))
  assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in result)


def test_map_pool_attention_equals_jax():
  """Without its MLP, it is the library's attention of one query."""
  pool = MapPool(heads=2, mlp_dim=8)
  variables = pool.init(jax.random.key(1), TOKENS)
  params = jax.tree.map(lambda x: x + 0.1, variables["params"])
  params["mlp"] = jax.tree.map(jnp.zeros_like, params["mlp"])
  at = params["attention"]

  def dense(name, x):
    return x @ at[name]["kernel"] + at[name]["bias"]

  q = jnp.broadcast_to(dense("q", params["probe"]).reshape(2, 8), (2, 1, 2, 8))
  kv = dense("kv", TOKENS).reshape(2, 5, 2, 2, 8)
  y = jax.nn.dot_product_attention(q, kv[:, :, :, 0], kv[:, :, :, 1])
  expected = dense("out", y.reshape(2, 16))
  result = pool.apply({"params": params}, TOKENS)
  np.testing.assert_allclose(result, expected, atol=1e-5)
