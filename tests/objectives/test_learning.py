"""Train steps of the objectives with labels and of MAE: losses fall."""

import jax
import numpy as np
import optax
import pytest
import step_samples
import tiny_mtv

from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train.step import make_train_step

NAMES = ("captioning", "depth", "grounding", "mae")


@pytest.mark.slow
def test_a_view_that_no_objective_reads_is_not_computed():
  for name in NAMES:
    spec = tiny_mtv.everything().select_objectives((name,))
    views = {e.view for e in spec.plan if e.tower == "image"}
    assert views == {spec.objectives[name].view}


@pytest.mark.slow
def test_every_loss_falls():
  spec = tiny_mtv.everything().select_objectives(NAMES)
  mesh = step_samples.mesh_of((1, 1, 1))
  train_step = make_train_step(spec, optax.adam(3e-3), mesh)
  state = train_step.init(step_samples.params_of(spec))
  batch = shard_batch(tiny_mtv.rows(), mesh)
  history = []
  for _ in range(30):
    state, metrics = train_step.update(state, batch)
    history.append(jax.device_get(metrics))
  for name in NAMES:
    losses = [metrics[f"{name}/loss"] for metrics in history]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), name
  first, last = history[0], history[-1]
  total = last["depth/ssi"] + 2 * last["depth/gradient"]
  np.testing.assert_allclose(last["depth/loss"], total, rtol=1e-5)
  assert last["depth/error"] < first["depth/error"]
  assert last["mae/hidden"] == 0.75
