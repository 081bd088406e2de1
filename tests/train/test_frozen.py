"""A locked tower: no moments, no backward pass, no change, no wait for it."""

import functools
import time

import jax
import numpy as np
import pytest
import trainings

from mtv_jax.config import recipes
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops
from mtv_jax.train import train_loop
from mtv_jax.train.build_step import build_train_step, make_config_mesh
from mtv_jax.train.experiment import build_experiment
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import resolve
from mtv_jax.train.runtime.prefetch import prefetch_to_device
from mtv_jax.train.spec import init_params
from mtv_jax.train.train import train
from mtv_jax.utils.tree import flatten_with_names


def smallest(**changes):
  config = recipes.read_config(str(trainings.CONFIG))
  config.update(changes)
  return config


def locked():
  config = smallest(total_steps=2, evals={})
  config.ema = None
  config.optim.rules = [("^image/", dict(lr=0.0))]
  return config


def parts(config):
  actual = flops.run(config, batch_size=4)
  return actual.parts, actual


@pytest.mark.slow
def test_a_frozen_tower_costs_its_forward_pass_and_has_no_moments(tmp_path):
  trained, _ = parts(smallest())
  frozen, actual = parts(locked())
  image, text = "image(image, student)", "text(caption, student)"
  # The backward pass costs less than two forward ones: no pixel gradient.
  assert frozen[image] < 0.4 * trained[image]
  assert frozen[text] == trained[text]
  # The whole step does not differentiate through the tower, either.
  assert actual.traced == pytest.approx(actual.total, rel=0.01)
  state = build_experiment(locked(), tmp_path).program.abstract
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  trained = {k: v for k, v in state.params.items() if k != "image"}
  count = sum(x.size for x in jax.tree.leaves(trained))
  assert moments <= 2 * count + 8


@pytest.mark.slow
def test_a_frozen_tower_is_unchanged(tmp_path):
  built = build_experiment(locked(), tmp_path / "a")
  before = jax.device_get(initialize_state(built).params)
  after = jax.device_get(train(locked(), tmp_path / "b").params)
  jax.tree.map(np.testing.assert_array_equal, before["image"], after["image"])
  kernel = ("text", "projection", "kernel")
  assert (_at(before, kernel) != _at(after, kernel)).any()


@pytest.mark.slow
def test_a_frozen_tower_with_ema_and_gradient_accumulation():
  """The parts change nothing, and neither tower nor average moves."""

  def after(parts):
    config = locked()
    config.ema = dict(decay=0.9)
    config.accumulate = parts
    # Adam would turn gradients that are zero but for rounding into steps.
    config.optim.name, config.optim.lr = "sgd", 0.1
    config = resolve(config)
    mesh = make_config_mesh(config, jax.devices()[:1])
    step = build_train_step(config, mesh, 100)
    init = functools.partial(init_params, step.step_spec)
    params, program = jax.jit(init)(jax.random.key(0)), step.program
    before = jax.device_get(params)
    state = program.init(params)
    for seed in range(2):
      batch = shard_batch(batch_of(config, seed), mesh)
      state, metrics = program.update(state, batch)
    return before, jax.device_get(state), jax.device_get(metrics)

  before, whole, expected = after(1)
  _, actual, metrics = after(2)
  for state in (whole, actual):
    for tree in (state.params, state.ema):
      jax.tree.map(
        np.testing.assert_array_equal, tree["image"], before["image"]
      )
  kernel = ("text", "projection", "kernel")
  for name in ("params", "ema"):
    values = dict(flatten_with_names(getattr(whole, name)))
    for key, value in flatten_with_names(getattr(actual, name)):
      error = np.linalg.norm(value - values[key])
      assert error <= 1e-6 * np.linalg.norm(values[key]) + 1e-8, (name, key)
    moved = _at(getattr(whole, name), kernel) - _at(before, kernel)
    assert np.abs(moved).max() > 1e-6
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)


def batch_of(config, seed):
  """Rows with noise for images and captions."""
  rng = np.random.default_rng(seed)
  rows, text = config.batch_size, config.model.text
  return {
    "image": rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
    "image_size": np.full((rows, 2), 32, np.int32),
    "caption": rng.integers(
      2, text.vocab_size, (rows, text.length), dtype=np.int32
    ),
    "caption_valid": np.ones(rows, bool),
  }


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


@pytest.mark.slow
def test_a_stalling_loader_counts_as_waiting(tmp_path, monkeypatch):
  plain = prefetch_to_device

  def stalling(loader, mesh):
    for batch in plain(loader, mesh):
      time.sleep(0.5)
      yield batch

  waits = []
  for name in ("fast", "slow"):
    train(smallest(total_steps=6, evals={}), tmp_path / name)
    rows = [r for r in trainings.rows(tmp_path / name) if "speed/wait" in r]
    # In seconds, since the share depends on how long a step takes.
    seconds = [r["speed/wait"] * r["speed/step_seconds"] for r in rows[1:]]
    waits.append(np.median(seconds))
    monkeypatch.setattr(train_loop, "prefetch_to_device", stalling)
  assert waits[0] < 0.5 <= waits[1], waits
