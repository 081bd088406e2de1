"""The prototype head: shapes, formula and initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from mtv_jax.models.heads.projection import PrototypeHead, unit


@pytest.fixture(scope="module")
def head():
  return PrototypeHead(count=24, hidden=64, bottleneck=8)


@pytest.fixture(scope="module")
def params(head):
  return head.init(jax.random.key(0), jnp.zeros((1, 12)))["params"]


def test_parameter_tree(params):
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == {
    "mlp": {
      "fc1": {"kernel": (12, 64), "bias": (64,)},
      "fc2": {"kernel": (64, 64), "bias": (64,)},
      "fc3": {"kernel": (64, 8), "bias": (8,)},
    },
    "last_layer": {"kernel": (8, 24), "scale": (24,)},
  }
  np.testing.assert_array_equal(params["last_layer"]["scale"], 1.0)
  np.testing.assert_allclose(
    params["mlp"]["fc2"]["kernel"].std(), 0.02, rtol=0.1
  )


def test_bottleneck_and_prototypes_equal_numpy(head, params):
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  x = rng.normal(size=(2, 3, 12))
  y = x
  for i in (1, 2, 3):
    layer = params["mlp"][f"fc{i}"]
    y = y @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    if i < 3:
      y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
  y /= np.linalg.norm(y, axis=-1, keepdims=True)
  result = head.apply({"params": params}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(result, y, rtol=1e-4, atol=1e-5)

  last = jax.tree.map(np.float64, params["last_layer"])
  columns = last["kernel"] / np.linalg.norm(last["kernel"], axis=0)
  matrix = head.apply({"params": params}, method="prototypes")
  np.testing.assert_allclose(matrix, columns * last["scale"], rtol=1e-5)


def test_prototype_gradients_are_tangential(head, params):
  def logit(params):
    return head.apply({"params": params}, method="prototypes")[0].sum()

  gradient = jax.grad(logit)(params)["last_layer"]["kernel"]
  along = (gradient * params["last_layer"]["kernel"]).sum(0)
  np.testing.assert_allclose(along, 0.0, atol=1e-5)
  assert np.abs(gradient).max() > 0.1


def test_mlp_computes_in_the_dtype_of_its_input(head, params):
  x = jax.random.normal(jax.random.key(1), (4, 12))
  exact = head.apply({"params": params}, x)
  rough = head.apply({"params": params}, x.astype(jnp.bfloat16))
  assert exact.dtype == rough.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(rough, axis=1), 1.0, rtol=1e-5)
  error = np.abs(exact - rough).max()
  assert 1e-4 < error < 0.1


def test_unit_of_zero_is_finite_with_a_finite_gradient():
  gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), 0.0)
