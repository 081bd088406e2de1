"""Texts that are encoded once: values, gradients, cost, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_samples import mesh_of

from mtv_jax.models.text import TextOutput
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops, hlo
from mtv_jax.train import forward

B, M, T, D = 16, 4, 6, 5


def make_tokens(distinct, seed=0):
  """`[B, M, T]` phrases, of so many distinct ones on any device."""
  rng = np.random.default_rng(seed)
  table = rng.integers(2, 50, (distinct, T), dtype=np.int32)
  return table[rng.integers(0, distinct, (B, M))]


def tower(params, tokens):
  """Something that depends on the order of tokens, and on each of them."""
  x = jnp.take(params["table"], tokens, axis=0) * params["position"][:, None]
  return TextOutput(tokens=x, pooled=jnp.tanh(x).sum(1) @ params["out"])


def make_params():
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = dict(table=(50, D), position=(T,), out=(D, D))
  return {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def loss(params, tokens, *, share, mesh=None):
  apply = functools.partial(tower, params)
  if share is None:
    output = forward._encode_text(apply, tokens, mesh)
  else:
    output = forward._encode_distinct(apply, tokens, share, mesh)
  weights = jnp.arange(B * M * D, dtype=jnp.float32).reshape(B, M, D)
  total = (output.pooled * weights / 100).sum() + (output.tokens**2).sum()
  return total, output


def value_and_grad(tokens, **options):
  function = jax.value_and_grad(
    functools.partial(loss, **options), has_aux=True
  )
  return jax.jit(function)(make_params(), tokens)


def assert_near(actual, expected):
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(near, actual, expected)


# 16 of 64 texts are encoded; 30 and 60 distinct ones exceed the limit.
@pytest.mark.parametrize("distinct", [1, 10, 30, 60])
def test_distinct_texts_are_exact(distinct):
  tokens = make_tokens(distinct)
  want = value_and_grad(tokens, share=None)
  assert_near(value_and_grad(tokens, share=0.25), want)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("distinct", [3, 60])
def test_distinct_texts_of_each_device(shape, distinct):
  mesh = mesh_of(shape)
  tokens = make_tokens(distinct)
  want = value_and_grad(tokens, share=None)
  sharded = shard_batch({"tokens": tokens}, mesh)["tokens"]
  assert_near(value_and_grad(sharded, share=0.5, mesh=mesh), want)


def test_texts_stay_on_their_device():
  mesh = mesh_of((8, 1, 1))
  apply = functools.partial(tower, make_params())

  def pooled(tokens):
    return forward._encode_distinct(apply, tokens, 0.5, mesh).pooled

  sharded = shard_batch({"tokens": make_tokens(3)}, mesh)["tokens"]
  compiled = jax.jit(pooled).lower(sharded).compile()
  # Whether any device has too many.
  moved = [r for r in hlo.list_collectives(compiled) if r.bytes > 64]
  assert moved == []


def test_the_cost_is_that_of_the_share():
  tokens = jnp.asarray(make_tokens(3))

  def cost(share):
    return flops.count(
      lambda params: loss(params, tokens, share=share)[0], make_params()
    ).flops

  assert cost(0.25) == cost(None) / 4


def test_the_other_branch_saves_nothing():
  """Bytes that a deep tower saves for its backward pass."""
  tokens = jnp.asarray(make_tokens(3))

  def deep(params, tokens):
    x = jnp.take(params["table"], tokens, axis=0)
    for _ in range(10):
      x = jnp.sin(x)  # Whose derivative reads its input.
    return TextOutput(tokens=x, pooled=x.sum(1))

  def saved(encode):
    _, pull = jax.eval_shape(
      lambda params: jax.vjp(lambda p: encode(p).pooled, params), make_params()
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

  def shared(params):
    apply = functools.partial(deep, params)
    return forward._encode_distinct(apply, tokens, 0.25, None)

  def whole(params):
    return forward._encode_text(functools.partial(deep, params), tokens, None)

  # A quarter of the ten arrays, the indices, and the output.
  assert saved(shared) < 0.5 * saved(whole)


@pytest.mark.parametrize("distinct", [1, 7, 40])
def test_distinct_rows(distinct):
  rows = make_tokens(distinct, seed=3).reshape(-1, T)
  unique = np.unique(rows, axis=0)
  found = forward.find_distinct(jnp.asarray(rows), limit=20)
  assert found.count == len(unique)
  if len(unique) <= 20:
    np.testing.assert_array_equal(rows[found.first][found.slot], rows)
    assert len({*np.asarray(found.first[: len(unique)]).tolist()}) == len(
      unique
    )


def test_rows_of_one_hash_are_told_apart():
  # 0x01000193 and its square are the weights of the two columns.
  power = 0x01000193
  rows = np.array([[power, 0], [0, 1], [power, 0], [0, 1]], np.int32)
  found = forward.find_distinct(jnp.asarray(rows), limit=4)
  np.testing.assert_array_equal(rows[found.first][found.slot], rows)
  assert 2 <= found.count <= 4
