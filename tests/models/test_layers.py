"""Transformer layers and stacks of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import layers, linear
from mtv_jax.models import stack as stack_lib
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings
from mtv_jax.utils import xla_flags


@pytest.mark.parametrize(
  ("remat", "dtype"),
  [
    ("none", "bfloat16"),
    ("dots", "float32"),
    ("full", "bfloat16"),
    ("qkv,mlp_hidden", "float32"),
  ],
)
def test_gathered_parameters_are_not_saved_for_the_backward_pass(remat, dtype):
  """Parameters sharded along fsdp are saved as shards and gathered again."""
  mesh = make_mesh(dict(fsdp=8))
  block, depth = layers.Block(heads=2, mlp_dim=64, dtype=jnp.dtype(dtype)), 3
  x = jnp.ones((8, 5, 32))
  keys = jax.random.split(jax.random.key(0), depth)
  stack = jax.vmap(lambda key: block.init(key, x)["params"])(keys)
  stack = jax.device_put(stack, tree_shardings(stack, mesh))

  def loss(stack, x):
    y, _ = stack_lib.run_stack(block, stack, x, remat=remat, mesh=mesh)
    return y.astype(jnp.float32).sum()

  program = jax.jit(jax.grad(loss)).lower(stack, x.astype(dtype)).compile()
  text = program.as_text()
  for shape, part in (("32,96", "4,96"), ("32,64", "4,64"), ("64,32", "64,4")):
    # One layer's parameter is gathered; the stack stays sharded.
    assert f"[{shape}]" in text and f"[{depth},{part}]" in text
    assert f"[{depth},{shape}]" not in text


@pytest.mark.parametrize("uniform", [True, False])
def test_drop_path_rates(uniform):
  """Each layer and branch drops its share; the mean of a scale is 1."""
  rows, depth, rate = 20_000, 4, 0.4
  keys = jax.random.split(jax.random.key(0), rows)
  scales = jax.device_get(
    jax.jit(
      lambda keys: stack_lib.drop_path_scales(
        keys, rate, depth, uniform=uniform
      )
    )(keys)
  )
  assert scales.shape == (rows, depth, 2)
  rates = [rate] * depth if uniform else [0, 0.4 / 3, 0.8 / 3, 0.4]
  rates = np.asarray(rates)[:, None]
  error = 4 * np.sqrt(rates * (1 - rates) / rows)
  assert (np.abs((scales == 0).mean(0) - rates) <= error).all()
  assert (np.abs(scales.mean(0) - 1) <= error / (1 - rates) + 1e-6).all()
  kept = scales.max(0)
  np.testing.assert_allclose(kept, np.broadcast_to(1 / (1 - rates), (depth, 2)))
  # Layers and branches are independent of each other.
  dropped = (scales == 0).reshape(rows, -1)[:, 0 if uniform else 2 :]
  correlation = np.corrcoef(dropped.T) - np.eye(dropped.shape[1])
  assert np.abs(correlation).max() < 4 / np.sqrt(rows)


def test_drop_path_of_a_block_is_its_formula():
  block = layers.Block(heads=2, mlp_dim=16, layer_scale=0.5)
  x = jax.random.normal(jax.random.key(1), (4, 3, 8))
  params = block.init(jax.random.key(0), x)["params"]
  scales = jnp.array([[0, 0], [0, 2], [2, 0], [1, 1]], jnp.float32)
  apply = jax.jit(lambda x, s: block.apply({"params": params}, x, drop_path=s))
  out, plain = apply(x, scales), block.apply({"params": params}, x)
  np.testing.assert_array_equal(out[0], x[0])
  np.testing.assert_allclose(out[3], plain[3], rtol=1e-5, atol=1e-6)
  # Each branch alone: zero the other branch's scale.
  zero = jnp.zeros_like(params["scale1"])
  attention = block.apply({"params": {**params, "scale2": zero}}, x)
  mlp = block.apply({"params": {**params, "scale1": zero}}, x)
  np.testing.assert_allclose(out[1], (2 * mlp - x)[1], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    out[2], (2 * attention - x)[2], rtol=1e-5, atol=1e-6
  )


def test_biases_of_keys_are_fixed_at_zero():
  """With 'query_value' the fused bias has a part that nothing depends on."""
  module = layers.Attention(heads=2, qkv_bias="query_value")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)), "float32")
  params = module.init(jax.random.key(0), x)["params"]
  grads = jax.grad(lambda p: module.apply({"params": p}, x).sum())(params)
  parts = grads["qkv"]["bias"].reshape(2, 3, 4)
  assert np.abs(parts[:, 2]).min() > 0
  np.testing.assert_array_equal(parts[:, 1], 0)
  module = layers.Attention(heads=2, qkv_bias="none", out_bias=False)
  params = module.init(jax.random.key(0), x)["params"]
  assert [*params["qkv"], *params["out"]] == ["kernel", "kernel"]


def test_tokens_that_are_not_valid_change_nothing():
  module = layers.Attention(heads=2)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), "float32")
  params = module.init(jax.random.key(0), x)
  valid = jnp.arange(5) < jnp.asarray([[3], [5]])
  masked = module.apply(params, x, None, valid)
  np.testing.assert_allclose(
    masked[0, :3], module.apply(params, x[:1, :3])[0], atol=1e-6
  )
  np.testing.assert_allclose(masked[1], module.apply(params, x)[1], atol=1e-6)


# Linear layers against the plain formula, in value and gradient.


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_linear_gradients_equal_plain_gradients(lead):
  rng = np.random.default_rng(0)
  x, kernel, bias, weights = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((*lead, 4), (4, 6), (6,), (*lead, 6))
  )

  def loss(layer):
    return lambda *args: (jnp.sin(layer(*args)) * weights).sum()

  def grads(layer, *args):
    return jax.grad(loss(layer), argnums=tuple(range(len(args))))(*args)

  result = grads(linear.linear, x, kernel, bias)
  result += grads(linear.linear, x, kernel)
  expected = grads(lambda x, k, b: x @ k + b, x, kernel, bias)
  expected += grads(lambda x, k: x @ k, x, kernel)
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


# Pooling by attention.


TOKENS = jax.random.normal(jax.random.key(0), (2, 5, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_map_pool_gradients_compile_with_the_step_options(dtype):
  """One query's gradient in bfloat16 used a product that CPUs lack."""
  pool = layers.MapPool(heads=2, mlp_dim=8, dtype=jnp.dtype(dtype))
  variables = pool.init(jax.random.key(1), TOKENS)

  def loss(variables, tokens):
    return jnp.square(pool.apply(variables, tokens)).sum()

  options = xla_flags.compiler_options(None)
  grad = jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)
  result = jax.tree.leaves(grad(variables, TOKENS))
  assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in result)


def test_map_pool_attention_equals_jax():
  """Without its MLP, it is the library's attention of one query."""
  pool = layers.MapPool(heads=2, mlp_dim=8)
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
