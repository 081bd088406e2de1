"""muP: initial values, learning rates, changes of activations over width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_samples import make_batch, params_of
from trainings import smallest

from mtv_jax.models import two_tower
from mtv_jax.train.config import resolve
from mtv_jax.train.forward import total_loss
from mtv_jax.train.optim.optimizer import OptimConfig, build_optimizer
from mtv_jax.train.run import (
  build_run,
  build_spec,
  make_config_mesh,
)
from mtv_jax.train.spec import init_state
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

BASE = dict(base_width=32, base_depth=1)


def config_of(width=128, depth=2, mup=None, heads=2, **changes):
  """Towers of `width`; the base has 2 heads, so heads grow in channels."""
  config = smallest(**changes)
  for tower in (config.model, config.model.text):
    tower.update(width=width, depth=depth, heads=heads, mlp_dim=2 * width)
    if mup is not None:
      tower.mup = dict(mup)
  return config


def params_by_name(config):
  spec = build_spec(resolve(config), 10)
  params = flatten_with_names(jax.device_get(params_of(spec)))
  return spec, dict(params)


@pytest.mark.slow
def test_initial_values_have_the_variance_of_mup():
  """The same draws, in the units of a base model of a quarter of the width."""
  configs = [config_of(), config_of(mup=dict(BASE, base_heads=2))]
  for config in configs:  # Projections to 16 channels at any width.
    config.model.projection = config.model.text.projection = 16
  (_, plain), (_, scaled) = map(params_by_name, configs)
  expected = {
    "image/blocks/mlp/fc1/kernel": 1,  # Xavier falls with the fan-in.
    "image/blocks/mlp/fc2/kernel": 1 / 2,  # Twice the depth.
    "text/blocks/attention/out/kernel": 1 / 2,
    "image/pool/attention/kv/kernel": 1,
    "image/pool/attention/q/kernel": 1 / 2,  # Queries of 4 x the channels.
    "image/projection/kernel": 1 / 2,  # LeCun, and the fan-out is fixed.
    "image/position_embedding": 2,  # big_vision's: 1 / sqrt(width).
    "image/pool/probe": (129 / 33) ** 0.5,  # Xavier of [1, width].
    "text/token_embedding": 1,
    "image/patch_embed/kernel": 1,
  }
  for name, ratio in expected.items():
    np.testing.assert_allclose(scaled[name], plain[name] * ratio, 1e-4, 1e-7)
  qkv, own = (p["text/blocks/attention/qkv/kernel"] for p in (scaled, plain))
  factors = np.repeat(np.float32([0.5, 1, 1]), 64)  # q|k|v, dim
  expected = own * np.tile(factors, 2)  # Columns are by head first.
  np.testing.assert_allclose(qkv, expected, 1e-4, 1e-7)


def rates(optim, **options):
  """Learning-rate multipliers by name, as arrays of the parameters' shape."""
  config = config_of(mup=dict(BASE, base_heads=2, **options))
  spec = build_spec(resolve(config), 10)
  rule = build_optimizer(OptimConfig(name=optim, lr=1.0))
  shapes = dict(flatten_with_names(jax.eval_shape(lambda: params_of(spec))))
  return {
    name: np.unique(
      rule.mup_rate(name, shapes[name].shape, m.base_shape) * m.rate
    )
    for name, m in spec.mup_multipliers.items()
  }


@pytest.mark.parametrize(
  ("optim", "hidden", "options", "depth"),
  [
    ("adamw", 1 / 4, {}, 1),
    ("muon", 1 / 2, dict(depth_exponent=0.5), 0.5**0.5),
  ],
)
def test_learning_rates(optim, hidden, options, depth):
  """CompleteP's and depth-muP's, for Adam's and for Muon's spectral norm."""
  found = rates(optim, **options)
  branch = 0.5 ** options.get("depth_exponent", 1)
  expected = {
    "image/blocks/mlp/fc1/kernel": [hidden * depth],
    "image/blocks/mlp/fc2/kernel": [hidden * depth * branch],
    "image/blocks/attention/qkv/kernel": [hidden * depth / 2, hidden * depth],
    "image/blocks/norm1/scale": [depth],
    "image/blocks/mlp/fc2/bias": [depth * branch],
    "image/pool/mlp/fc1/kernel": [1 / 4],  # AdamW's also under Muon.
    "image/position_embedding": [1],
    "text/token_embedding": [1],
    "heads/contrastive/logit_scale": [1],
  }
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, 1e-6, err_msg=name)


@pytest.mark.slow
def test_the_base_model_trains_as_without_mup():
  """All factors are 1: bit-equal losses and updates of equal parameters."""
  start, results = None, []
  for mup in (None, dict(base_width=32, base_depth=1)):
    config = resolve(config_of(32, 1, mup))
    step = build_run(config, make_config_mesh(config, jax.devices()[:1]), 80)
    params = params_of(step.spec)
    start = start or params
    # Another program may round the draws otherwise.
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-8), params, start
    )
    state = step.train_step.init(start)
    batch = make_batch()
    batch["caption"] = np.pad(batch["caption"], ((0, 0), (0, 8)))
    for _ in range(2):
      state, values = step.train_step.update(state, batch)
    results.append(jax.device_get((state, values["loss"])))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_what_mup_does_not_support():
  config = config_of(
    mup=dict(BASE, base_heads=2), optim=dict(name="lion", lr=1e-3)
  )
  with pytest.raises(ConfigError, match="no learning rates for Lion: set"):
    run = resolve(config)
    build_run(run, make_config_mesh(run, jax.devices()[:1]), 80)
  with pytest.raises(
    ConfigError, match="base_width 24 can't be split into heads"
  ):
    resolve(config_of(mup=dict(base_width=24)))


def pooled_changes(width, depth, mup):
  """RMS changes of pooled features of both towers in 5 steps on one batch."""
  config = config_of(width, depth, mup, heads=width // 16)
  config.schedule = dict(name="constant")
  config = resolve(config)
  mesh = make_config_mesh(config, jax.devices()[:1])
  run = build_run(config, mesh, 80)
  spec, tx = run.spec, run.optimizer.tx
  batch = jax.tree.map(jnp.asarray, make_batch())
  batch["caption"] = jnp.pad(batch["caption"], ((0, 0), (0, 8)))
  images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3))
  towers = two_tower.image_tower(spec.model), two_tower.text_tower(spec.model)

  def encode(params):
    inputs = images, batch["caption"]
    names = "image", "text"
    return [
      tower.apply({"params": params[name]}, x).pooled
      for name, tower, x in zip(names, towers, inputs, strict=True)
    ]

  @jax.jit
  def train(params):
    state = init_state(spec, tx, params)

    def step(carry, _):
      params, moments = carry
      loss = functools.partial(total_loss, spec, state=state, batch=batch)
      grads = jax.grad(lambda p: loss(params=p)[0])(params)
      updates, moments = tx.update(grads, moments, params)
      return (optax.apply_updates(params, updates), moments), None

    carry, _ = jax.lax.scan(step, (params, state.opt_state), length=5)
    pairs = zip(encode(params), encode(carry[0]), strict=True)
    return [jnp.sqrt(jnp.mean(jnp.square(b - a))) for a, b in pairs]

  return np.array(train(params_of(spec)))


@pytest.mark.slow
def test_a_step_moves_features_alike_at_any_width():
  """8 times the width: a factor below 1.5 with muP, above 1.7 without."""
  base = pooled_changes(32, 1, None)
  with_mup = pooled_changes(256, 1, BASE) / base
  without = pooled_changes(256, 1, None) / base
  assert (with_mup > 1 / 1.5).all() and (with_mup < 1.5).all(), with_mup
  assert without[0] > 1.7, without
