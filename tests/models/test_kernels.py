"""Kernels against the plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import kernels


def inputs(n, seed=0):
  rng = np.random.default_rng(seed)
  qkv = rng.normal(size=(3, 2, n, 3, 8)).astype(np.float32)
  qkv[0, 0, 3 % n] *= 100  # exp of its logits would overflow.
  return list(jnp.asarray(qkv))


def attention_in_numpy(q, k, v):
  logits = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / np.sqrt(8)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize(
  "how", [kernels.cpu_attention, kernels.blockwise_attention]
)
def test_blockwise_attention_equals_numpy(how, monkeypatch):
  monkeypatch.setattr(kernels, "BLOCK", 32)
  monkeypatch.setattr(kernels, "CPU_BLOCK", 32)
  q, k, v = inputs(77)
  expected = attention_in_numpy(q, k, v)
  np.testing.assert_allclose(how(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize(
  "how", [kernels.cpu_attention, kernels.blockwise_attention]
)
def test_logits_are_not_saved_under_any_remat_policy(how, monkeypatch):
  monkeypatch.setattr(kernels, "BLOCK", 32)
  monkeypatch.setattr(kernels, "CPU_BLOCK", 32)
  q, k, v = inputs(77)
  saving = jax.checkpoint(
    how, policy=jax.checkpoint_policies.everything_saveable
  )
  residuals = jax.eval_shape(lambda *qkv: jax.vjp(saving, *qkv)[1], q, k, v)
  largest = max(leaf.size for leaf in jax.tree.leaves(residuals))
  assert q.size <= largest < 2 * q.size  # Blocks of 32 are padded.


@pytest.mark.slow
def test_gradients_equal_plain_attention(monkeypatch):
  monkeypatch.setattr(kernels, "BLOCK", 32)
  monkeypatch.setattr(kernels, "CPU_BLOCK", 32)
  q, k, v = inputs(77)
  q = q / 100  # Large logits round differently.
  target = inputs(77, seed=1)[1]

  def gradients(how):
    def loss(*qkv):
      return jnp.sum(how(*qkv) * target)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  expected = gradients(jax.nn.dot_product_attention)
  for how in (kernels.cpu_attention, kernels.blockwise_attention):
    for ours, plain in zip(gradients(how), expected, strict=True):
      np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_short_sequences_use_plain_attention():
  text = jax.jit(kernels.attention).lower(*inputs(8)).as_text()
  assert "while" not in text


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_linear_gradients_equal_plain_gradients(lead):
  rng = np.random.default_rng(0)
  x, kernel, bias, weights = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((*lead, 4), (4, 6), (6,), (*lead, 6))
  )

  def loss(layer):
    return lambda *args: (jnp.sin(layer(*args)) * weights).sum()

  result = jax.grad(loss(kernels.linear), argnums=(0, 1, 2))(x, kernel, bias)
  expected = jax.grad(loss(lambda x, k, b: x @ k + b), argnums=(0, 1, 2))(
    x, kernel, bias
  )
  result += jax.grad(loss(kernels.linear), argnums=(0, 1))(x, kernel)
  expected += jax.grad(loss(lambda x, k: x @ k), argnums=(0, 1))(x, kernel)
  for a, b in zip(result, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_gradients_on_tpus_lower_to_the_plain_program(biased):
  """On TPUs the program is that of x @ kernel + bias."""
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
  assert lowered(kernels.linear) == plain
  assert plain.count("dot_general") == 3
