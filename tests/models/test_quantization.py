"""Matrix products in int8 and float8, by Qwix."""

import collections
import sys

import jax
import jax.extend.core as core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from step_samples import mesh_of

from mtv_jax.models import layers, linear, two_tower
from mtv_jax.models import stack as stack_lib
from mtv_jax.parallel.rules import tree_shardings
from mtv_jax.utils.errors import ConfigError

# Qwix names an alias of Flax that warns.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")
# The largest value of an operand; int8's last bucket is half a step wider.
LARGEST = {"int8": 127.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
DEPTH = 3


def rounded(x, axis, dtype):
  """x rounded to a type of 8 bits, with one scale along an axis."""
  scale = np.abs(x).max(axis, keepdims=True) / LARGEST[dtype]
  if dtype == "int8":
    return scale * np.clip(np.round(x / scale), -128, 127)
  number = (x / scale).astype(getattr(ml_dtypes, dtype))
  return scale * number.astype(np.float32)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_products_and_gradients_are_those_of_rounded_operands(name):
  """By NumPy; and near the products of floats, by the steps of the types."""
  dtype, grad_dtype = linear.DTYPES[name]
  rng = np.random.default_rng(0)
  # Positive maxima: the largest number is the edge of the last bucket, which
  # int8 has twice below zero.
  x, cotangent = rng.uniform(-1, 2, (2, 4, 6, 32)).astype(np.float32)
  cotangent = cotangent[..., :24]
  x[0, 0] = 0  # A row without a scale.
  dense = layers.Dense(24, linear_fn=linear.build_linear_fn(name))
  kernel = rng.uniform(-1, 2, (32, 24)).astype(np.float32)
  bias = rng.normal(size=24).astype(np.float32)
  params = {"params": {"kernel": kernel, "bias": bias}}

  def apply(params, x):
    return dense.apply(params, x)

  @jax.jit
  def compute(params, x, cotangent):
    y, pull = jax.vjp(apply, params, x)
    return y, pull(cotangent)

  y, (grads, dx) = jax.device_get(compute(params, x, cotangent))
  with np.errstate(invalid="ignore"):
    rounded_x = np.nan_to_num(rounded(x, -1, dtype))
  expected = rounded_x @ rounded(kernel, 0, dtype) + bias
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=5e-5)
  expected = rounded(cotangent, -1, grad_dtype) @ rounded(kernel, 1, dtype).T
  np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=5e-5)
  # The kernel's gradient is not rounded.
  expected = np.einsum("bnd,bne->de", x, cotangent)
  np.testing.assert_allclose(
    grads["params"]["kernel"], expected, rtol=1e-5, atol=5e-5
  )
  np.testing.assert_allclose(
    grads["params"]["bias"], cotangent.sum((0, 1)), rtol=1e-5, atol=5e-5
  )
  for actual, exact, limit in (
    (y, x @ kernel + bias, dict(int8=0.01, fp8=0.04)),
    (dx, cotangent @ kernel.T, dict(int8=0.01, fp8=0.08)),
  ):
    error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
    assert 0.1 * limit[name] < error < limit[name]


def products(jaxpr):
  """Types of the operands of each product, also in loops."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield tuple(str(var.aval.dtype) for var in eqn.invars)
    for inner in core.jaxprs_in_params(eqn.params):
      yield from products(inner)


def build_block(name):
  linear_fn = linear.build_linear_fn(name)
  return layers.Block(2, 64, mlp="swiglu", linear_fn=linear_fn, parent=None)


@pytest.fixture(scope="module")
def stack():
  params = stack_lib.stacked_init(build_block("none"), DEPTH, 32)
  x = jax.random.normal(jax.random.key(1), (8, 5, 32))
  return params(jax.random.key(0)), x


def gradient_fn(name, **options):
  block = build_block(name)

  def loss(stack, x):
    return jnp.square(stack_lib.run_stack(block, stack, x, **options)[0]).mean()

  return jax.grad(loss, (0, 1))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_product_of_a_block_with_weights_is_quantized(stack, remat):
  """q, k, v, out, gate, fc1, fc2: forward, and the input's gradient."""
  gradient = gradient_fn("int8", remat=remat)
  found = collections.Counter(products(jax.make_jaxpr(gradient)(*stack)))
  # Products whose results the backward pass reads are recomputed. The kernels'
  # gradients and attention are in float32.
  int8, float32 = (14, 7 + 6) if remat == "none" else (20, 7 + 8)
  assert found == {
    ("int8", "int8"): int8,
    ("float32", "float32"): float32,
  }


@pytest.mark.parametrize(
  "name", ["int8", pytest.param("fp8", marks=pytest.mark.long)]
)
def test_gradients_of_a_stack_keep_their_direction(stack, name):
  """Also sharded over a mesh with rematerialisation, within the roundings."""
  exact = jax.device_get(jax.jit(gradient_fn("none"))(*stack))
  single = jax.device_get(jax.jit(gradient_fn(name))(*stack))
  mesh = mesh_of((2, 2, 2))
  params, x = stack
  params = jax.device_put(
    params, tree_shardings({"blocks": params}, mesh)["blocks"]
  )
  sharded = gradient_fn(name, remat="full", mesh=mesh)
  sharded = jax.device_get(jax.jit(sharded)(params, x))

  def cosine(a, b):
    return np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)

  least = dict(int8=0.995, fp8=0.98)[name]
  leaves = jax.tree.leaves_with_path(exact)
  for (path, leaf), one, many in zip(
    leaves, jax.tree.leaves(single), jax.tree.leaves(sharded), strict=True
  ):
    assert np.isfinite(one).all() and np.isfinite(many).all()
    where = jax.tree_util.keystr(path)
    assert cosine(leaf, one) > least, where
    assert cosine(one, many) > 0.999, where


def test_towers_have_the_parameters_of_those_without():
  """So checkpoints and exports don't depend on it."""
  config = dict(
    variant="mu/8", image_size=16, text=dict(variant="mu", length=8)
  )
  spec = two_tower.ModelSpec.from_config(config)
  quantized = two_tower.ModelSpec.from_config(config | {"quantization": "int8"})
  assert quantized == spec
  for tower, example in (
    (two_tower.image_tower, jnp.zeros((1, 16, 16, 3))),
    (two_tower.text_tower, jnp.zeros((1, 8), jnp.int32)),
  ):
    plain, int8 = (
      jax.eval_shape(
        tower(spec, quantization=name).init, jax.random.key(0), example
      )
      for name in ("none", "int8")
    )
    assert plain == int8


def test_a_missing_library_and_unknown_values_are_errors(monkeypatch):
  spec = two_tower.ModelSpec.from_config(dict(variant="mu/8"))
  with pytest.raises(
    ConfigError, match="quantization is 'int4'.*There are: fp8, int8, none"
  ):
    two_tower.image_tower(spec, quantization="int4")
  linear.build_linear_fn.cache_clear()
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(
    ImportError, match=r"pip install 'mtv_jax\[quantization\]'"
  ):
    two_tower.image_tower(spec, quantization="fp8")
  two_tower.image_tower(spec, quantization="none")
