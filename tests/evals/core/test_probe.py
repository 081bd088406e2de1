"""Training loop of probes, against NumPy, torch and across meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtv_jax.evals.core import probe
from mtv_jax.parallel.mesh import make_mesh


def squared(params, state, batch, rng):
  del rng
  out = batch["x"] @ params["w"]
  return jnp.mean((out - batch["y"]) ** 2), {"seen": state["seen"] + 1}


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 5)).astype(np.float32)
  return x, (x @ rng.normal(size=5)).astype(np.float32)


def batches(data, size):
  x, y = data
  take = probe.shuffled_batches(len(x), batch_size=size)
  return lambda step: {"x": x[take(step)], "y": y[take(step)]}


def run(data, **options):
  options = {"steps": 30, "state": {"seen": jnp.zeros((), int)}, **options}
  size = options.pop("size", 16)
  return probe.fit(
    squared,
    {"w": np.zeros(5, np.float32)},
    options.pop("batches", batches(data, size)),
    optimizer=optax.sgd(0.05, momentum=0.9),
    **options,
  )


def test_fit_is_momentum_sgd(data):
  fitted = run(data)
  w, m, losses = np.zeros(5), np.zeros(5), []
  for step in range(30):
    batch = batches(data, 16)(step)
    x, y = batch["x"].astype(float), batch["y"]
    error = x @ w - y
    losses.append(np.mean(error**2))
    m = 0.9 * m + 2 * x.T @ error / len(x)
    w = w - 0.05 * m
  np.testing.assert_allclose(fitted.losses, losses, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(fitted.params["w"], w, atol=1e-5)
  assert fitted.losses[0] > 5 * fitted.losses[-1]
  assert int(fitted.state["seen"]) == 30


def test_one_device_and_eight_agree(data):
  one = run(data, mesh=make_mesh({"data": -1}, jax.devices()[:1]))
  eight = run(data, mesh=make_mesh({"data": -1}))
  np.testing.assert_allclose(one.losses, eight.losses, atol=1e-5)
  # Ten rows on eight devices are replicated, with equal results.
  odd = run(data, mesh=make_mesh({"data": -1}), size=10, steps=3)
  np.testing.assert_allclose(odd.losses, run(data, size=10, steps=3).losses)


def test_steps_have_rngs_and_batches_may_be_iterated(data):
  def noise(params, state, batch, rng):
    return params["w"].sum() * 0 + jax.random.normal(rng), state

  kwargs = dict(optimizer=optax.sgd(1.0), steps=3)
  take = batches(data, 4)
  params = {"w": np.ones(2, np.float32)}
  a = probe.fit(noise, params, (take(s) for s in range(3)), **kwargs)
  b = probe.fit(noise, params, take, **kwargs)
  c = probe.fit(noise, params, take, seed=1, **kwargs)
  assert len(set(a.losses.tolist())) == 3
  assert list(a.losses) == list(b.losses)
  assert list(a.losses) != list(c.losses)
  with pytest.raises(ValueError, match="end after 2 steps"):
    probe.fit(noise, params, [take(0), take(1)], **kwargs)


def test_heads_on_the_way_are_kept(data):
  fitted = run(data, snapshot_steps=(3, 30))
  assert sorted(fitted.snapshots) == [3, 30]
  params, state = fitted.snapshots[3]
  np.testing.assert_array_equal(params["w"], run(data, steps=3).params["w"])
  assert int(state["seen"]) == 3
  np.testing.assert_array_equal(
    fitted.snapshots[30][0]["w"], fitted.params["w"]
  )


def test_a_loss_that_diverges_is_an_error(data):
  def diverge(params, state, batch, rng):
    return jnp.sum(params["w"]) / jnp.sum(0 * batch["x"]), state

  rows = ({"x": data[0][:4]} for _ in range(9))
  with pytest.raises(ValueError, match="the loss is nan at step 0 of 9"):
    probe.fit(
      diverge,
      {"w": np.zeros(2, np.float32)},
      rows,
      optimizer=optax.sgd(1.0),
      steps=9,
    )
  assert len([*rows]) == 6  # Not after hours.


@pytest.mark.parametrize("size", [3, 7, 25])
def test_shuffled_sees_every_item_equally_often(size):
  take = probe.shuffled_batches(7, batch_size=size, seed=3)
  seen = np.concatenate([take(step) for step in range(7)])
  assert len(seen) == 7 * size
  assert list(np.bincount(seen, minlength=7)) == [size] * 7
  for epoch in seen.reshape(-1, 7):
    assert sorted(epoch) == list(range(7))
  assert list(take(2)) == list(take(2))
  assert len({tuple(e) for e in seen.reshape(-1, 7)}) > 1


def test_schedules_have_at_most_100_passes(caplog):
  resolve = functools.partial(probe.resolve_schedule, (12_500, 1024))
  # The review's 1,500 photos; 12,500 steps of 1,024 were 8,533 passes.
  small = resolve(images=1500)
  assert small[:2] == (300, 500) and small.is_capped
  assert small.steps * small.batch_size == 100 * 1500
  small.warn("linear_probe")
  resolve(images=1500, uncapped=True).warn("linear_probe")
  assert [r.message for r in caplog.records] == [
    "linear_probe: trains 300 steps of batch size 500, 100 passes over 1500 "
    "images, instead of 12500 steps of 1024 (published=True)"
  ]
  assert resolve(images=1500, uncapped=True)[:3] == (12_500, 1024, "published")
  # ImageNet has 10 passes; a tenth of it is the limit.
  assert resolve(images=1_281_167)[:3] == (12_500, 1024, "published")
  assert resolve(images=128_000)[:3] == (12_500, 1024, "published")
  assert resolve(images=127_000)[:2] == (12_403, 1024)
  # What is given stays.
  assert resolve(images=1500, steps=7)[:3] == (7, 1024, "given")
  assert resolve(images=1500, batch_size=1000)[:2] == (150, 1000)
  assert resolve(images=1)[:2] == (100, 1)
