"""Parameters gathered at use; see also `models/test_layers.py`."""

import jax
import jax.numpy as jnp
import pytest

from mtv_jax.parallel.constraints import (
  all_gather_params,
  check_param_rules,
  constrain_batch,
)
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings


def test_check_param_rules():
  """If `fsdp` is gathered, `tensor` must be laid out as the layers use it."""
  name = "image/blocks/mlp/fc1/kernel"
  abstract = {name: jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)}
  both = make_mesh(dict(data=2, fsdp=2, tensor=2))
  moved = [("mlp/fc1/kernel$", (None, ("fsdp", "tensor")))]
  check_param_rules(abstract, both, moved)
  odd = [("mlp/fc1/kernel$", ("tensor", "fsdp"))]
  with pytest.raises(ValueError, match=r"fc1/kernel over tensor as .*fsdp=1"):
    check_param_rules(abstract, both, odd)
  check_param_rules(abstract, both, odd, keep="fc1")
  for shape in (dict(fsdp=8), dict(tensor=8)):
    check_param_rules(abstract, make_mesh(shape), odd)


def test_constrain_batch_and_all_gather_params():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  params = {
    "mlp/fc1/kernel": jnp.ones((16, 64)),
    "stack/mlp/fc1/kernel": jnp.ones((16, 64)),
    "norm/scale": jnp.ones(16),
  }
  params = jax.device_put(params, tree_shardings(params, mesh))

  @jax.jit
  def used(params, rows):
    sharded = all_gather_params(
      params, mesh, keep="^stack/", dtype=jnp.bfloat16
    )
    return sharded, constrain_batch(rows, mesh)

  sharded, rows = used(params, jnp.ones((8, 6)))
  kernel = sharded["mlp/fc1/kernel"]
  assert kernel.dtype == jnp.bfloat16
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 32)
  assert sharded["norm/scale"].dtype == jnp.float32
  left = sharded["stack/mlp/fc1/kernel"]
  assert left.dtype == jnp.float32
  assert left.sharding.shard_shape(left.shape) == (8, 32)
  assert rows.sharding.shard_shape(rows.shape) == (2, 6)
