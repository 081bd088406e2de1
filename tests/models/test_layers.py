"""Transformer layers and stacks of blocks."""

import jax
import jax.numpy as jnp
import pytest

from mtv_jax.models import layers
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gathered_parameters_are_not_saved_for_the_backward_pass(remat, dtype):
  """Parameters sharded along fsdp are saved as shards and gathered again."""
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
    # One layer's parameter is gathered; that of all layers stays sharded.
    assert f"[{shape}]" in text and f"[{depth},{part}]" in text
    assert f"[{depth},{shape}]" not in text
