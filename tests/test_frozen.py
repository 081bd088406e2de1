"""A locked tower: no moments, no backward pass, no change, no wait for it."""

import time

import jax
import numpy as np
import pytest
import trainings

from mtv_jax import config as config_lib
from mtv_jax import experiment, train
from mtv_jax.benchmarks import flops


def smallest(**changes):
  config = config_lib.read(str(trainings.CONFIG))
  config.update(changes)
  return config


def locked():
  config = smallest(total_steps=2, evals={})
  config.ema = None
  config.optim.rules = [("^image/", dict(lr=0.0))]
  return config


def parts(config):
  found = flops.bench_flops(config, batch_size=4)
  return {p.name: p.flops for p in found.parts}, found


def test_a_locked_tower_costs_its_forward_pass_and_has_no_moments(tmp_path):
  open_, _ = parts(smallest())
  shut, found = parts(locked())
  image, text = "image(image, student)", "text(caption, student)"
  # Forward, and without the gradient on the pixels less than twice that back.
  assert shut[image] < 0.4 * open_[image]
  assert shut[text] == open_[text]
  # The whole step knows it too: nothing pulls gradients through the tower.
  assert found.traced == pytest.approx(found.total, rel=0.01)
  state = experiment.build(locked(), tmp_path).program.abstract
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  trained = {k: v for k, v in state.params.items() if k != "image"}
  count = sum(x.size for x in jax.tree.leaves(trained))
  assert moments <= 2 * count + 8


@pytest.mark.slow
def test_a_locked_tower_stays_as_it_was(tmp_path):
  built = experiment.build(locked(), tmp_path / "a")
  before = jax.device_get(train.start(built, None).params)
  after = jax.device_get(train.run(locked(), tmp_path / "b").params)
  jax.tree.map(np.testing.assert_array_equal, before["image"], after["image"])
  kernel = ("text", "projection", "kernel")
  assert (_at(before, kernel) != _at(after, kernel)).any()


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


@pytest.mark.slow
def test_a_loader_that_stalls_shows_as_waiting(tmp_path, monkeypatch):
  plain = train.placed_batches

  def stalling(loader, mesh):
    for batch in plain(loader, mesh):
      time.sleep(0.5)
      yield batch

  waits = []
  for name in ("fast", "slow"):
    train.run(smallest(total_steps=6, evals={}), tmp_path / name)
    rows = trainings.rows(tmp_path / name)
    waits.append([r["speed/wait"] for r in rows if "speed/wait" in r][-1])
    monkeypatch.setattr(train, "placed_batches", stalling)
  assert waits[1] > 0.5 and waits[1] > waits[0]
