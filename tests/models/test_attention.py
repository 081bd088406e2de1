"""Attention of every choice against the plain formula, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import attention, layers, positions
from mtv_jax.utils.errors import ConfigError, InputError


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


def value_and_gradients(how, arrays, target):
  def loss(*qkv):
    out = how(*qkv)
    return jnp.sum(out * target), out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
  return (out, *grads)


@pytest.mark.parametrize(
  "how", [attention.cpu_attention, attention.blockwise_attention]
)
def test_attention_in_blocks(how, monkeypatch):
  """Values, gradients, and that no remat policy saves the logits."""
  monkeypatch.setattr(attention, "BLOCK", 32)
  monkeypatch.setattr(attention, "CPU_BLOCK", 32)
  q, k, v = inputs(77)
  expected = attention_in_numpy(q, k, v)
  np.testing.assert_allclose(how(q, k, v), expected, atol=1e-5)
  policy = jax.checkpoint_policies.everything_saveable
  saving = jax.checkpoint(how, policy=policy)
  residuals = jax.eval_shape(lambda *qkv: jax.vjp(saving, *qkv)[1], q, k, v)
  largest = max(leaf.size for leaf in jax.tree.leaves(residuals))
  assert q.size <= largest < 2 * q.size  # Blocks of 32 are padded.
  arrays = q / 100, k, v  # Large logits round differently.
  target = inputs(77, seed=1)[1]
  plain = jax.nn.dot_product_attention
  results = (value_and_gradients(f, arrays, target) for f in (how, plain))
  for ours, theirs in zip(*results, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_short_sequences_use_plain_attention():
  text = jax.jit(attention.attention).lower(*inputs(8)).as_text()
  assert "while" not in text


@pytest.mark.parametrize(
  ("n", "causal", "masked"),
  [
    (130, False, False),  # Padded.
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        (128, True, False),
        (650, True, True),  # Several blocks.
      ]
    ),
  ],
)
def test_splash_attention_equals_plain_attention(n, causal, masked):
  rng = np.random.default_rng(0)
  q, k, v, target = (
    jnp.asarray(x) for x in rng.normal(size=(4, 3, n, 2, 8)).astype(np.float32)
  )
  masks = dict(causal=causal)
  if masked:
    valid = rng.random((3, n)) < 0.7
    valid[:, 0] = True
    masks["valid"] = jnp.asarray(valid)

  def splash(*qkv):
    return attention.splash_attention(*qkv, **masks, interpret=True)

  def plain(*qkv):
    return attention.attention(*qkv, **masks)

  actual = value_and_gradients(splash, (q, k, v), target)
  expected = value_and_gradients(plain, (q, k, v), target)
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_splash_attention_to_no_valid_token_is_uniform():
  q, k, v = (jnp.tile(x, (1, 2, 1, 1)) for x in inputs(130))
  valid = jnp.zeros(q.shape[:2], bool)
  out = attention.splash_attention(q, k, v, valid=valid, interpret=True)
  plain = attention.attention(q, k, v, valid=valid)
  np.testing.assert_allclose(out, plain, atol=1e-6)
  np.testing.assert_allclose(out[:, 0], v.mean(1), atol=1e-6)


def test_an_unknown_choice_is_an_error():
  with pytest.raises(ConfigError, match="'flash'"):
    attention.build_attention("flash")


@pytest.mark.parametrize("choice", attention.CHOICES)
def test_cpus_take_the_plain_formula(choice):
  assert attention.build_attention(choice) is attention.attention


@pytest.mark.parametrize(
  ("dtype", "width", "capability", "lacks"),
  [
    ("bfloat16", 64, "9.0", None),
    ("float16", 72, "8.0", None),
    ("float32", 64, "9.0", "not float32"),
    ("bfloat16", 60, "9.0", "not 60"),
    ("bfloat16", 136, "9.0", "not 136"),
    ("bfloat16", 64, "7.5", "not 7.5"),
    ("bfloat16", 64, "gfx942", "not gfx942"),
  ],
)
def test_what_cudnn_lacks(dtype, width, capability, lacks):
  q = jax.ShapeDtypeStruct((1, 8, 2, width), dtype)
  reason = attention.cudnn_lacks(q, capability)
  assert reason is None if lacks is None else lacks in reason


class Gpu:
  """Stand-in for a GPU."""

  platform = "gpu"
  compute_capability = "9.0"


def test_cudnn_is_not_given_what_it_lacks(monkeypatch):
  """Float32 is rejected if cuDNN is required, else it uses XLA's attention."""
  arrays = inputs(8)
  monkeypatch.setattr(attention.jax, "devices", lambda: [Gpu()])
  with pytest.raises(InputError, match="='cudnn' needs.*not float32. Set"):
    attention.build_attention("cudnn")(*arrays)
  out = attention.build_attention("auto")(*arrays)
  np.testing.assert_array_equal(out, attention.attention(*arrays))


@pytest.mark.parametrize("choice", ["auto", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_takes_what_it_supports(choice, causal, monkeypatch):
  arrays = [x.astype(jnp.bfloat16) for x in inputs(8)]
  plain = jax.nn.dot_product_attention
  options = []

  def record(*arrays, implementation=None, **others):
    options.append(dict(others, implementation=implementation))
    return plain(*arrays, **others)

  monkeypatch.setattr(attention.jax, "devices", lambda: [Gpu()])
  monkeypatch.setattr(attention.jax.nn, "dot_product_attention", record)
  attention.build_attention(choice)(*arrays, causal=causal)
  assert options == [dict(is_causal=causal, implementation="cudnn")]


@pytest.mark.reference
def test_rope_attention_equals_transformers_in_value_and_gradient():
  torch = pytest.importorskip("torch")
  dinov3 = pytest.importorskip(
    "transformers.models.dinov3_vit.modeling_dinov3_vit"
  )
  grid, heads, d = (3, 5), 2, 16
  rope = positions.Rope(base=100.0)
  shape = (4, 2, 2 + 15, heads, d)  # q, k, v and a cotangent; two registers.
  arrays = np.random.default_rng(0).normal(size=shape).astype(np.float32)

  def attend(q, k, v):
    angles = rope.angles(jnp.asarray(rope.coordinates(grid))[None], d)
    angles = jnp.pad(angles, ((0, 0), (2, 0), (0, 0)))
    q, k = (positions.rotate(x, angles) for x in (q, k))
    return attention.attention(q, k, v)

  out, pull = jax.vjp(attend, *map(jnp.asarray, arrays[:3]))
  config = dinov3.DINOv3ViTConfig(
    hidden_size=heads * d, num_attention_heads=heads, patch_size=4
  )
  turn = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()
  leaves = [torch.tensor(x, requires_grad=True) for x in arrays[:3]]
  q, k, v = (x.transpose(1, 2) for x in leaves)
  cos, sin = turn(torch.zeros(1, 3, 4 * grid[0], 4 * grid[1]))
  q, k = dinov3.apply_rotary_pos_emb(q, k, cos, sin)
  attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
  want = attended.transpose(1, 2)
  want.backward(torch.tensor(arrays[3]))
  np.testing.assert_allclose(out, want.detach(), atol=1e-5)
  for got, leaf in zip(pull(jnp.asarray(arrays[3])), leaves, strict=True):
    np.testing.assert_allclose(got, leaf.grad, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["exact", "tanh", "quick"])
def test_gelu_equals_torch_in_value_and_gradient(kind):
  torch = pytest.importorskip("torch")
  activations = pytest.importorskip("transformers.activations")
  names = dict(exact="gelu", tanh="gelu_pytorch_tanh", quick="quick_gelu")
  x = np.linspace(-9, 9, 2001, dtype=np.float32)
  leaf = torch.tensor(x, requires_grad=True)
  want = activations.ACT2FN[names[kind]](leaf)
  want.sum().backward()
  got, pull = jax.vjp(lambda x: layers.gelu(x, kind), jnp.asarray(x))
  np.testing.assert_allclose(got, want.detach(), atol=2e-6)
  (slope,) = pull(jnp.ones_like(got))
  # 1 - tanh^2 is multiplied by 50 at the ends of the range.
  np.testing.assert_allclose(slope, leaf.grad, atol=2e-5)
