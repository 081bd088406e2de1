"""Attention in blocks is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import attention


def inputs(n, seed=0):
  rng = np.random.default_rng(seed)
  made = rng.normal(size=(3, 2, n, 3, 8)).astype(np.float32)
  made[0, 0, 3 % n] *= 100  # exp of its logits would overflow.
  return list(jnp.asarray(made))


def in_numpy(q, k, v):
  logits = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / np.sqrt(8)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("how", [attention.on_cpu, attention.in_blocks])
def test_blocks_are_attention(how, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", 32)
  monkeypatch.setattr(attention, "BLOCK_ON_CPU", 32)
  q, k, v = inputs(77)
  np.testing.assert_allclose(how(q, k, v), in_numpy(q, k, v), atol=1e-5)


@pytest.mark.parametrize("how", [attention.on_cpu, attention.in_blocks])
def test_no_policy_around_them_keeps_logits(how, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", 32)
  monkeypatch.setattr(attention, "BLOCK_ON_CPU", 32)
  q, k, v = inputs(77)
  kept = jax.checkpoint(how, policy=jax.checkpoint_policies.everything_saveable)
  residuals = jax.eval_shape(lambda *qkv: jax.vjp(kept, *qkv)[1], q, k, v)
  largest = max(leaf.size for leaf in jax.tree.leaves(residuals))
  assert q.size <= largest < 2 * q.size  # Blocks of 32 fill up.


@pytest.mark.slow
def test_gradients_are_those_of_plain_attention(monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", 32)
  monkeypatch.setattr(attention, "BLOCK_ON_CPU", 32)
  q, k, v = inputs(77)
  q = q / 100  # Theirs and ours round alike only where nothing is vast.
  target = inputs(77, seed=1)[1]

  def gradients(how):
    def loss(*qkv):
      return jnp.sum(how(*qkv) * target)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  expected = gradients(jax.nn.dot_product_attention)
  for how in (attention.on_cpu, attention.in_blocks):
    for ours, plain in zip(gradients(how), expected, strict=True):
      np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_few_tokens_are_left_alone():
  text = jax.jit(attention.attend).lower(*inputs(8)).as_text()
  assert "while" not in text
