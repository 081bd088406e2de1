"""DPT: resampling, layers, and Depth Anything V2's shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_trees import fill

from mtv_jax.models.heads import dpt
from mtv_jax.utils import xla_flags
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import flatten_with_names


@pytest.mark.parametrize(
  ("depth", "layers"),
  [
    (12, (2, 5, 8, 11)),
    (24, (4, 11, 17, 23)),
    (40, (9, 19, 29, 39)),
    (27, (6, 13, 20, 26)),
    (2, (0, 0, 1, 1)),
  ],
)
def test_quarter_layers(depth, layers):
  assert dpt.quarter_layers(depth) == layers


def test_default_channels_equal_depth_anything():
  assert dpt.default_shape(768) == (128, (96, 192, 384, 768))
  assert dpt.default_shape(1024) == (256, (256, 512, 1024, 1024))
  assert dpt.default_shape(64) == (16, (8, 16, 32, 64))


@pytest.mark.parametrize(
  ("old", "new"), [(3, 7), (7, 3), (4, 4), (1, 5), (5, 1)]
)
@pytest.mark.parametrize("by", ["products", "neighbours"])
def test_resize_aligns_corners(old, new, by):
  values = jnp.arange(old * 2.0).reshape(1, old, 1, 2)
  resized = dpt.resize_corners(values, (new, 1), by=by)
  expected = np.linspace(0, 2 * old - 2, new)  # The first alone, for one row.
  np.testing.assert_allclose(resized[0, :, 0, 0], expected, atol=1e-5)


def _stages(rng, width, grid):
  return [
    jnp.asarray(rng.normal(size=(2, *grid, width)), jnp.float32)
    for _ in range(dpt.STAGES)
  ]


def _params(head, stages, size):
  init = functools.partial(head.init, size=size)
  return fill(jax.eval_shape(init, jax.random.key(0), stages)["params"])


def test_prediction_is_float32_and_each_stage_has_a_norm():
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16), upsample=1)
  stages = _stages(np.random.default_rng(0), 16, (2, 2))
  params = _params(head, stages, (8, 8))
  assert {f"norm{i}" for i in range(1, 5)} < set(params)
  half = [x.astype(jnp.bfloat16) for x in stages]
  run = jax.jit(head.apply, static_argnums=2)
  exact = run({"params": params}, stages, (8, 8))
  rough = run({"params": params}, half, (8, 8))
  assert rough.dtype == jnp.float32
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05
  # The size of a stage's tokens makes no difference.
  scaled = run({"params": params}, [100 * x for x in stages], (8, 8))
  np.testing.assert_allclose(scaled, exact, rtol=1e-3, atol=1e-4)


def test_every_parameter_has_a_gradient():
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16))
  stages = _stages(np.random.default_rng(1), 16, (2, 4))
  params = _params(head, stages, (8, 16))
  grads = jax.jit(
    jax.grad(
      lambda p: jnp.square(head.apply({"params": p}, stages, (8, 16))).sum()
    )
  )(params)
  for name, grad in flatten_with_names(grads):
    assert np.abs(grad).max() > 0, name


@pytest.mark.parametrize(
  ("fields", "count", "error", "match"),
  [
    ({}, 3, InputError, "DPT reads 4 stages, got 3"),
    ({}, 5, InputError, "DPT reads 4 stages, got 5"),
    ({"activation": "relo"}, 4, ConfigError, "mean 'relu'"),
    ({"tap_norm": "layr"}, 4, ConfigError, "mean 'layer'"),
  ],
)
def test_wrong_stages_and_options(fields, count, error, match):
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16), **fields)
  stages = [jax.ShapeDtypeStruct((1, 2, 2, 16), "float32")] * count
  init = functools.partial(head.init, size=(8, 8))
  with pytest.raises(error, match=match):
    jax.eval_shape(init, jax.random.key(0), stages)


def test_initial_kernels_equal_flax_defaults(monkeypatch):
  """Drawn as matrices, by programs that XLA optimizes less."""
  monkeypatch.delenv("XLA_FLAGS")  # The tests' level, already read by XLA.
  once = xla_flags.compiler_options(None, runs_once=True)
  default = dict.fromkeys(once, "3")
  flax_init = nn.initializers.lecun_normal()
  actual, expected = (
    jax.jit(lambda key, f=f: f(key, (3, 3, 5, 7)), compiler_options=o)
    for f, o in ((dpt.kernel_init, once), (flax_init, default))
  )
  key = jax.random.key(3)
  np.testing.assert_array_equal(actual(key), expected(key))
