"""Prompter and locator, against a full layer in NumPy, and their learning."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy_transformer import NumpyTransformer
from random_trees import fill

from mtv_jax.models.heads import prompter
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings

WIDTH, FEATURES = 16, 6


def random_params(module, *example):
  make = functools.partial(module.init, jax.random.key(0))
  return fill(jax.eval_shape(lambda: make(*example))["params"])


def sample(images=2, regions=3, patches=9, seed=0):
  rng = np.random.default_rng(seed)
  corners = np.sort(rng.uniform(size=(images, regions, 2, 2)), axis=2)
  return (
    jnp.asarray(rng.normal(size=(images, patches, WIDTH)), jnp.float32),
    jnp.asarray(corners.reshape(images, regions, 4), jnp.float32),
  )


@pytest.fixture(scope="module")
def params():
  return random_params(prompter.Prompter(1), *sample(), FEATURES)


@functools.partial(jax.jit, static_argnames="heads")
def embed(params, patches, boxes, heads=1):
  module = prompter.Prompter(heads)
  return module.apply({"params": params}, patches, boxes, FEATURES)


@jax.jit
def locate(params, patches, texts):
  return prompter.Locator(1).apply({"params": params}, patches, texts)


def transformer(heads=1):
  return NumpyTransformer(
    types.SimpleNamespace(width=WIDTH, heads=heads, gelu="tanh", norm_eps=1e-6)
  )


def whole_layer(p, tokens, heads=1):
  """A pre-norm transformer layer over all tokens [T, D]."""
  t = transformer(heads)
  y = t.norm(p["norm1"], tokens)
  q = t.dense(p["attention"]["q"], y)
  k, v = t.split(t.dense(p["attention"]["kv"], y), 2)
  x = tokens + t.dense(p["attention"]["out"], t.heads(q, k, v))
  return x + t.mlp(p["mlp"], t.norm(p["norm2"], x))


def numpy_sinusoids(coordinates, features):
  count = features // (2 * len(coordinates))
  waves = []
  for x in coordinates:
    periods = 0.25 * 64 ** (np.arange(count) / (count - 1))
    waves += [*np.sin(2 * np.pi * x * periods)]
    waves += [*np.cos(2 * np.pi * x * periods)]
  return np.array(waves)


def numpy_prompter(params, patches, box, heads=1):
  code = numpy_sinusoids(np.float64(box), 2 * WIDTH)
  t = transformer()
  corners = t.dense(params["embed"], code).reshape(2, WIDTH)
  tokens = np.concatenate([corners, np.float64(patches)])
  out = whole_layer(params["layer"], tokens, heads)[:2]
  return t.dense(params["projection"], t.norm(params["norm"], out).mean(0))


@pytest.mark.parametrize("heads", [1, 4])
def test_prompter_equals_a_full_layer_per_box(params, heads):
  patches, boxes = sample()
  result = embed(params, patches, boxes, heads=heads)
  for i, m in np.ndindex(2, 3):
    expected = numpy_prompter(params, patches[i], boxes[i, m], heads)
    np.testing.assert_allclose(result[i, m], expected, rtol=2e-5, atol=2e-5)


def test_a_region_does_not_depend_on_the_others(params):
  patches, boxes = sample(regions=4)
  result = embed(params, patches, boxes)
  np.testing.assert_allclose(
    embed(params, patches, boxes[:, 1:2])[:, 0], result[:, 1], atol=1e-6
  )


def test_a_tenth_of_a_patch_changes_the_embedding(
  params,
):
  patches, _ = sample(images=1)
  box = np.array([0.2, 0.3, 0.6, 0.8], np.float32)
  boxes = box + np.concatenate([np.zeros((1, 4)), 0.1 / 14 * np.eye(4)])
  result = embed(params, patches, jnp.asarray(boxes[None], jnp.float32))[0]
  gaps = np.linalg.norm(result[1:] - result[:1], axis=-1)
  assert (gaps > 1e-3 * np.linalg.norm(result[0])).all()


@pytest.mark.slow
def test_prompter_learns_the_content_of_a_box():
  """Patches encode their position and the content of their quarter."""
  module, classes = prompter.Prompter(1), 4
  rows, columns = np.divmod(np.arange(16), 4)
  quarter = rows // 2 * 2 + columns // 2
  corners = np.array([[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]], np.float32)
  boxes = jnp.tile(np.concatenate([corners, corners + 0.5], 1), (32, 1, 1))
  where = jnp.tile(jnp.eye(16), (32, 1, 1))

  def loss(params, key):
    what = jax.random.randint(key, (32, 4), 0, classes)
    seen = jax.nn.one_hot(what[:, quarter], 16)
    patches = jnp.concatenate([where, seen], -1)
    logits = module.apply({"params": params}, patches, boxes, classes)
    return optax.softmax_cross_entropy_with_integer_labels(logits, what).mean()

  tx = optax.adam(1e-2)

  def step(carry, key):
    value, gradient = jax.value_and_grad(loss)(carry[0], key)
    updates, state = tx.update(gradient, carry[1])
    return (optax.apply_updates(carry[0], updates), state), value

  @jax.jit
  def train(key):
    patches = jnp.zeros((32, 16, 32))
    params = module.init(key, patches, boxes, classes)["params"]
    keys = jax.random.split(key, 60)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

  history = np.asarray(train(jax.random.key(0)))
  # Without the box, the best guess mixes four quarters: over one nat.
  assert history[:3].mean() > 1.2
  assert history[-5:].mean() < 0.3


def test_sinusoids_differ_between_the_ends_of_the_image():
  positions = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
  code = np.asarray(prompter.sinusoids(jnp.asarray(positions), 32), np.float64)
  gaps = np.linalg.norm(code[:, None] - code[None], axis=-1)
  apart = ~np.eye(101, dtype=bool)
  assert gaps[apart].min() > 0.5
  np.testing.assert_allclose((code**2).sum(-1), 16, rtol=1e-5)


def test_invalid_channels_and_heads_raise():
  with pytest.raises(ValueError, match="multiple of 8"):
    prompter.sinusoids(jnp.zeros((1, 4)), 20)
  with pytest.raises(ValueError, match="width 16 is not divisible by 3 heads"):
    random_params(prompter.Prompter(3), *sample(), FEATURES)


def test_bfloat16_patches_give_float32_embeddings(params):
  patches, boxes = sample()
  exact = embed(params, patches, boxes)
  result = embed(params, jnp.asarray(patches, jnp.bfloat16), boxes)
  assert result.dtype == jnp.float32
  assert np.linalg.norm(result - exact) < 0.05 * np.linalg.norm(exact)


def test_sharding_rules_match_the_prompter_kernels(params):
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  placed = tree_shardings({"heads": {"prompter": params}}, mesh)
  layer = placed["heads"]["prompter"]["layer"]
  assert layer["attention"]["q"]["kernel"].spec == P("fsdp", "tensor")
  assert layer["attention"]["kv"]["kernel"].spec == P("fsdp", "tensor")
  assert layer["attention"]["out"]["kernel"].spec == P("tensor", "fsdp")
  assert layer["mlp"]["fc1"]["kernel"].spec == P("fsdp", "tensor")


@functools.cache
def locator_sample():
  patches, _ = sample()
  rng = np.random.default_rng(3)
  return patches, jnp.asarray(rng.normal(size=(2, 3, FEATURES)), jnp.float32)


@pytest.mark.slow
def test_locator_starts_in_the_centre_and_has_gradients():
  patches, texts = locator_sample()
  make = jax.jit(prompter.Locator(1).init)
  params = make(jax.random.key(0), patches, texts)["params"]
  located = locate(params, patches, texts)
  np.testing.assert_array_equal(located, np.full((2, 3, 4), 0.5))
  gradient = jax.grad(lambda p: locate(p, patches, texts)[..., 0].sum())(params)
  assert np.abs(gradient["fc2"]["kernel"]).max() > 1e-3


def test_locator_equals_a_full_layer_per_text():
  patches, texts = locator_sample()
  params, t = random_params(prompter.Locator(1), patches, texts), transformer()
  result = locate(params, patches, texts)
  for i, m in np.ndindex(2, 3):
    query = t.dense(params["embed"], np.float64(texts[i, m]))[None]
    tokens = np.concatenate([query, np.float64(patches[i])])
    x = t.norm(params["norm"], whole_layer(params["layer"], tokens)[0])
    x = t.dense(params["fc2"], t.activation(t.dense(params["fc1"], x)))
    np.testing.assert_allclose(result[i, m], 1 / (1 + np.exp(-x)), rtol=2e-5)
