"""Linear layers against the plain formula, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import linear


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_linear_gradients_equal_plain_gradients(lead):
  rng = np.random.default_rng(0)
  x, kernel, bias, weights = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((*lead, 4), (4, 6), (6,), (*lead, 6))
  )

  def loss(layer):
    return lambda *args: (jnp.sin(layer(*args)) * weights).sum()

  result = jax.grad(loss(linear.linear), argnums=(0, 1, 2))(x, kernel, bias)
  expected = jax.grad(loss(lambda x, k, b: x @ k + b), argnums=(0, 1, 2))(
    x, kernel, bias
  )
  result += jax.grad(loss(linear.linear), argnums=(0, 1))(x, kernel)
  expected += jax.grad(loss(lambda x, k: x @ k), argnums=(0, 1))(x, kernel)
  for a, b in zip(result, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_gradients_on_tpus_lower_to_the_plain_program(biased):
  """On TPUs the program equals x @ kernel + bias."""
  sizes = ((2, 3, 4), (4, 6), (6,))[: 2 + biased]
  shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in sizes]

  def lowered(layer):
    def grads(*args):
      y, vjp = jax.vjp(layer, *args)
      return vjp(y)

    exported = jax.export.export(jax.jit(grads), platforms=["tpu"])(*shapes)
    text = exported.mlir_module()
    return [
      op
      for op in ("dot_general", "reduce", "transpose", "reshape")
      for _ in range(text.count(f"stablehlo.{op}"))
    ]

  plain = lowered((lambda x, k, b: x @ k + b) if biased else jnp.matmul)
  assert lowered(linear.linear) == plain
  assert plain.count("dot_general") == 3
