"""Muon against a Newton-Schulz iteration in NumPy, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_samples
import pytest

from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

DEPTH, WIDTH, HEADS, DIM = 2, 8, 4, 2
SHAPES = {
  "image/blocks/attention/qkv/kernel": (DEPTH, WIDTH, 3 * WIDTH),
  "image/blocks/attention/out/kernel": (DEPTH, WIDTH, WIDTH),
  "image/blocks/mlp/fc1/kernel": (DEPTH, WIDTH, 4 * WIDTH),
  "image/blocks/mlp/fc2/kernel": (DEPTH, 4 * WIDTH, WIDTH),
  "heads/decoder/blocks/cross_attention/kv/kernel": (DEPTH, 6, 2 * WIDTH),
  "heads/language_model/decoder/blocks/mlp/gate/kernel": (DEPTH, WIDTH, 12),
  "image/blocks/mlp/fc1/bias": (DEPTH, 4 * WIDTH),
  "image/patch_embed/kernel": (12, WIDTH),
  "text/token_embedding": (7, WIDTH),
  "heads/contrastive/logit_scale": (),
}
TAKEN = {n for n in SHAPES if "blocks" in n and n.endswith("kernel")}
STEPS = 3


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return unflatten_names(
    {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
  )


PARAMS = random_tree(0)
GRADS = [random_tree(1 + i) for i in range(STEPS)]


def build(**config):
  return optim_samples.build(
    {"name": "muon", "lr": 0.1, "weight_decay": 0.5, **config},
    params=PARAMS,
    total_steps=STEPS,
    attention_heads=dict.fromkeys(("image", "heads/decoder"), HEADS),
  )


# Keys and values of cross-attention are one matrix by default.
SPLIT = dict(split_kv=True)


def run(tx, shardings=None):
  params = jax.tree.map(jnp.asarray, PARAMS)
  if shardings is not None:
    params = jax.device_put(params, shardings)
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  for grads in GRADS:
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return {n: np.asarray(x) for n, x in flatten_with_names(params)}, state


def newton_schulz(x):
  """The quintic iteration of Jordan et al. 2024, on one matrix."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def expected(name, split=True):
  """A parameter after all steps, one matrix at a time in float64."""
  param = dict(flatten_with_names(PARAMS))[name].astype(np.float64)
  grads = [dict(flatten_with_names(g))[name].astype(np.float64) for g in GRADS]
  momentum, beta = np.zeros_like(param), 0.95
  for t, grad in enumerate(grads, 1):
    momentum = beta * momentum + (1 - beta) * grad
    ahead = beta * momentum / (1 - beta ** (t + 1))
    ahead = ahead + (1 - beta) * grad / (1 - beta**t)
    update = np.zeros_like(param)
    for layer in range(DEPTH):
      if split and "kv" in name:
        # Columns (head, q|k|v, dim): take each projection out of the kernel.
        columns = np.arange(param.shape[2]).reshape(HEADS, -1, DIM)
        parts = [x.reshape(-1) for x in np.moveaxis(columns, 1, 0)]
      else:
        parts = [np.arange(param.shape[2])]
      for part in parts:
        matrix = ahead[layer][:, part]
        scale = 0.2 * max(matrix.shape) ** 0.5
        update[layer][:, part] = scale * newton_schulz(matrix)
    param = param - 0.1 * (update + 0.5 * param)
  return param


@functools.cache
def single_device():
  return run(build(**SPLIT).tx)


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_each_matrix_of_a_stack_is_orthogonalised_by_itself(name):
  params, _ = single_device()
  np.testing.assert_allclose(params[name], expected(name), rtol=1e-3, atol=2e-4)


def test_keys_and_values_are_one_matrix_by_default():
  name = next(n for n in SHAPES if "/kv/" in n)
  fused = run(build().tx)[0][name]
  wanted = expected(name, split=False)
  np.testing.assert_allclose(fused, wanted, rtol=1e-3, atol=2e-4)
  assert np.abs(wanted - expected(name)).max() > 0.01


def test_other_parameters_are_updated_by_adamw():
  params, _ = single_device()
  adamw, _ = run(build(name="adamw").tx)
  for name in SHAPES.keys() - TAKEN:
    np.testing.assert_allclose(params[name], adamw[name], rtol=1e-6)


def test_moments_have_the_parameters_shapes_and_the_log_names_the_matrices():
  _, state = single_device()
  moments = dict(flatten_with_names(state))
  for name in TAKEN:
    (moment,) = [x for n, x in moments.items() if n.endswith(f"mu/{name}")]
    assert moment.shape == SHAPES[name]
  assert "one matrix" not in build(**SPLIT).note
  note = build(rules=[("mlp/fc2", {"lr": 0})]).note
  assert "cross-attention are one matrix" in note
  assert note.startswith("Muon updates 5 of 9 parameters")
  assert "qkv" in note and "fc2" not in note and "patch_embed" not in note


def test_sharded_equals_a_single_device():
  params, _ = single_device()
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  shardings = tree_shardings(jax.tree.map(jnp.asarray, PARAMS), mesh)
  sharded, state = run(build(**SPLIT).tx, shardings)
  for name, value in sharded.items():
    np.testing.assert_allclose(value, params[name], rtol=1e-5, atol=1e-6)
