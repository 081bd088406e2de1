"""The text tower against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import NumpyTransformer
from random_trees import fill

from mtv_jax.config import options
from mtv_jax.models.text import TextSpec, TextTower

SIGLIP = TextSpec(
  vocab_size=40, length=9, width=32, depth=2, heads=2, mlp_dim=48,
  projection=24,
)  # fmt: skip
CLIP = dataclasses.replace(
  SIGLIP,
  pool="eos", causal=True, gelu="quick", norm_eps=1e-5, projection_bias=False,
  eos_id=39,
)  # fmt: skip
# These tests compile more than they compute.
FAST = {"xla_backend_optimization_level": 0}


def tokens_of(length=9):
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.integers(3, 38, size=(3, length)), jnp.int32)


@pytest.fixture(scope="module")
def params_of():
  @functools.cache
  def make(spec):
    init = TextTower(spec).init
    abstract = jax.eval_shape(init, jax.random.key(0), tokens_of())
    return fill(abstract["params"])

  return make


@functools.cache
def jitted(spec, runtime):
  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, tokens):
    return TextTower(spec, **dict(runtime)).apply({"params": params}, tokens)

  return run


def encode(spec, params, tokens, **runtime):
  return jitted(spec, tuple(runtime.items()))(params, tokens)


@pytest.mark.parametrize("spec", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_equals_numpy(spec, params_of):
  params = params_of(spec)
  tokens = tokens_of(7)
  tokens = tokens.at[:, 4].set(39).at[:, 6].set(39)
  out = encode(spec, params, tokens)
  transformer = NumpyTransformer(spec)
  for i in range(3):
    x = np.float64(params["token_embedding"])[np.asarray(tokens[i])]
    x = x + np.float64(params["position_embedding"])[:7]
    x = transformer.norm(
      params["norm"], transformer.blocks(params["blocks"], x)[-1]
    )
    pooled = x[-1] if spec.pool == "last" else x[4]
    pooled = transformer.dense(params["projection"], pooled)
    np.testing.assert_allclose(out.tokens[i], x, atol=2e-5)
    np.testing.assert_allclose(out.pooled[i], pooled, atol=2e-5)


def test_pools(params_of):
  """Every pool reads its tokens."""
  params = params_of(SIGLIP)
  tokens = tokens_of().at[0, 2].set(39).at[0, 5].set(39).at[2, 8].set(39)
  for pool, eos_id, want in (
    ("first", 1, [[0]] * 3),
    ("last", 1, [[8]] * 3),
    ("mean", 1, [range(9)] * 3),
    # Row 1 lacks the token: argmax over nothing is the first, as in
    # transformers.
    ("eos", 39, [[2], [0], [8]]),
    # CLIP's first configurations pool at the highest id.
    ("eos", 2, [[2], [int(jnp.argmax(tokens[1]))], [8]]),
  ):
    spec = dataclasses.replace(SIGLIP, pool=pool, eos_id=eos_id)
    out = encode(spec, params, tokens)
    x = np.float64(out.tokens)
    pooled = np.stack([x[i, list(at)].mean(0) for i, at in enumerate(want)])
    projection = params["projection"]
    want = pooled @ np.float64(projection["kernel"]) + projection["bias"]
    np.testing.assert_allclose(out.pooled, want, atol=1e-5)
    assert out.pooled.shape == (3, 24)
    assert out.pooled.dtype == jnp.float32


def test_an_id_outside_the_vocabulary_is_nan(params_of):
  tokens = tokens_of().at[1, 3].set(40)
  pooled = encode(SIGLIP, params_of(SIGLIP), tokens).pooled
  assert np.isnan(pooled).all(axis=1).tolist() == [False, True, False]


def test_too_long(params_of):
  tokens = jnp.ones((1, 10), jnp.int32)
  with pytest.raises(ValueError, match="10 tokens.*1 to 9.*length=10"):
    encode(SIGLIP, params_of(SIGLIP), tokens)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"heads": 3}, "width 32 is not divisible by its 3 heads"),
    ({"pool": "eot"}, "Did you mean 'eos'"),
    ({"gelu": "swish"}, "quick"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"mlp_dim": -4}, "mlp_dim is -4"),
  ],
)
def test_bad_specs(fields, message):
  with pytest.raises(ValueError, match=message):
    options.build(
      TextSpec, {**dataclasses.asdict(SIGLIP), **fields}, where="spec"
    )
