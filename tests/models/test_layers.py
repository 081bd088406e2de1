"""What towers are made of, piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import layers
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_the_gradients_of_a_linear_layer(lead):
  rng = np.random.default_rng(0)
  x, kernel, bias, weights = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((*lead, 4), (4, 6), (6,), (*lead, 6))
  )

  def loss(layer):
    return lambda *args: (jnp.sin(layer(*args)) * weights).sum()

  found = jax.grad(loss(layers.linear), argnums=(0, 1, 2))(x, kernel, bias)
  expected = jax.grad(loss(lambda x, k, b: x @ k + b), argnums=(0, 1, 2))(
    x, kernel, bias
  )
  found += jax.grad(loss(layers.linear), argnums=(0, 1))(x, kernel)
  expected += jax.grad(loss(lambda x, k: x @ k), argnums=(0, 1))(x, kernel)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_elsewhere_its_gradients_are_what_jax_makes_of_it(biased):
  """A TPU's program is that of x @ kernel + bias, whatever a CPU's is."""
  sizes = ((2, 3, 4), (4, 6), (6,))[: 2 + biased]
  shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in sizes]

  def lowered(layer):
    def slopes(*args):
      y, vjp = jax.vjp(layer, *args)
      return vjp(y)

    exported = jax.export.export(jax.jit(slopes), platforms=["tpu"])(*shapes)
    text = exported.mlir_module()
    return [
      op
      for op in ("dot_general", "reduce", "transpose", "reshape")
      for _ in range(text.count(f"stablehlo.{op}"))
    ]

  plain = lowered((lambda x, k, b: x @ k + b) if biased else jnp.matmul)
  assert lowered(layers.linear) == plain
  assert plain.count("dot_general") == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gathered_parameter_is_kept_for_the_backward_pass(remat, dtype):
  """What lies in parts along fsdp is kept in parts, and gathered again."""
  mesh = make_mesh(dict(fsdp=8))
  block, depth = layers.Block(heads=2, mlp_dim=64, dtype=jnp.dtype(dtype)), 3
  x = jnp.ones((8, 5, 32))
  keys = jax.random.split(jax.random.key(0), depth)
  stack = jax.vmap(lambda key: block.init(key, x)["params"])(keys)
  stack = jax.device_put(stack, tree_shardings(stack, mesh))

  def loss(stack, x):
    y, _ = layers.run_stack(block, stack, x, remat=remat, mesh=mesh)
    return y.astype(jnp.float32).sum()

  program = jax.jit(jax.grad(loss)).lower(stack, x.astype(dtype)).compile()
  text = program.as_text()
  for shape, part in (("32,96", "4,96"), ("32,64", "4,64"), ("64,32", "64,4")):
    # A layer's is gathered, and all layers' are only there in parts.
    assert f"[{shape}]" in text and f"[{depth},{part}]" in text
    assert f"[{depth},{shape}]" not in text
