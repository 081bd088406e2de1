"""Probe heads against NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.evals.core import probe_heads
from mtv_jax.evals.core.probe_heads import ProbeHead
from mtv_jax.parallel.mesh import make_mesh


def test_new_heads():
  rng = np.random.default_rng
  params, state = probe_heads.init_head(ProbeHead(4), 6, rng(3).standard_normal)
  kernel = rng(3).normal(0, 0.01, (6, 4)).astype(np.float32)
  np.testing.assert_array_equal(params["logits"]["kernel"], kernel)
  assert not params["logits"]["bias"].any()
  assert (params["norm"]["scale"] == 1).all()
  assert (state["batch_stats"]["norm"]["var"] == 1).all()
  head = ProbeHead(4, convs=2, conv_features=64)
  params, state = probe_heads.init_head(head, 32, rng(3).standard_normal)
  stds = [params[k]["kernel"].std() for k in ("conv1", "conv2", "logits")]
  he = np.sqrt(2 / (9 * 64))
  np.testing.assert_allclose(stds, [he, he, 0.01], rtol=0.1)
  assert {*state["batch_stats"]} == {"norm", "norm1", "norm2"}


def test_batch_norm_against_numpy():
  rng = np.random.default_rng(1)
  x = rng.normal(3, 2, (4, 5, 1, 6)).astype(np.float32)
  stats = {"mean": np.full(6, 0.5, "f4"), "var": np.full(6, 2.0, "f4")}
  params = {
    "norm": {"scale": np.arange(6, dtype="f4"), "bias": np.ones(6, "f4")},
    "logits": {"kernel": np.eye(6, dtype="f4"), "bias": np.zeros(6, "f4")},
  }
  variables = {"params": params, "batch_stats": {"norm": stats}}
  head = ProbeHead(6)
  out, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
  flat = x.reshape(20, 6).astype(float)
  want = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  want = (want * params["norm"]["scale"] + 1).reshape(x.shape)
  np.testing.assert_allclose(out, want, atol=1e-5)
  got = new["batch_stats"]["norm"]
  mean, var = 0.45 + 0.1 * flat.mean(0), 1.8 + 0.1 * flat.var(0)
  np.testing.assert_allclose(got["mean"], mean, rtol=1e-5)
  np.testing.assert_allclose(got["var"], var, rtol=1e-5)
  out = head.apply({"params": params, **new}, x)
  want = (x - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + 1
  np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("convs", [0, 2])
def test_channel_dropout(convs):
  """Features are 1, so that half of the logits are 0 and half are 2."""
  head = ProbeHead(
    64, batch_norm=False, dropout=0.5, convs=convs, conv_features=64
  )
  params, state = probe_heads.init_head(
    head, 64, np.random.default_rng(0).standard_normal
  )
  params["logits"]["kernel"] = np.eye(64, dtype=np.float32)
  variables = {"params": params, **state}
  x, key = jnp.ones((5, 4, 4, 64)), jax.random.key(0)
  out = head.apply(variables, x, train=True, rng=key, mutable=["batch_stats"])[
    0
  ]
  dropped = np.asarray(out == 0).all(axis=(1, 2))
  assert 0.4 < dropped.mean() < 0.6
  # Drawn for each image independently.
  assert (dropped[0] != dropped[1]).any()
  if not convs:
    assert set(np.unique(out)) == {0.0, 2.0}
    assert (head.apply(variables, x) == 1).all()


def test_predictions_on_one_device_and_eight():
  """Batches are padded to one shape; every trained head has its output."""
  rng = np.random.default_rng(1)
  head = ProbeHead(4)
  trained = [
    probe_heads.init_head(head, 6, rng.standard_normal) for _ in range(2)
  ]
  x = rng.normal(size=(3, 2, 2, 6)).astype(np.float32)
  for devices in (1, 8):
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    predict = probe_heads.predict_fn(head, trained, mesh=mesh, batch_size=8)
    for got, (params, state) in zip(predict(x), trained, strict=True):
      want = head.apply({"params": params, **state}, x)
      np.testing.assert_allclose(got, want, atol=1e-6)
  halves = probe_heads.predict_fn(
    head, trained, mesh=mesh, batch_size=8, finish=jnp.negative
  )
  np.testing.assert_array_equal(halves(x)[0], -predict(x)[0])


@pytest.mark.reference
@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"affine": False, "epsilon": 1e-6},
    {"batch_norm": False, "upsample": 4},
    {"convs": 2, "conv_features": 8},
  ],
)
def test_heads_equal_torch(fields):
  import torch
  from probe_head_parity import as_torch, eval_biased, random_head, torch_head

  head = ProbeHead(5, **fields)
  params, state = random_head(head, 6)
  model = torch_head(head, params, state)
  start = [m["var"] for m in state.get("batch_stats", {}).values()]
  rng = np.random.default_rng(1)
  x = rng.normal(1, 2, (3, 4, 7, 6)).astype(np.float32)
  size = (3, 4 * head.upsample, 7 * head.upsample)
  labels = rng.integers(0, 5, size)

  def loss_fn(params, state, x):
    out, new = head.apply(
      {"params": params, **state}, x, train=True, mutable=["batch_stats"]
    )
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(out), labels[..., None], axis=-1
    )
    return -picked.mean(), new

  for batch in (x, 2 * x + 1):
    loss = torch.nn.functional.cross_entropy(
      model(as_torch(batch)), torch.from_numpy(labels)
    )
    (value, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, state, jnp.asarray(batch)
    )
    assert value == pytest.approx(loss.item(), rel=1e-5)
    model.zero_grad()
    loss.backward()
  weight = [m for m in model if isinstance(m, torch.nn.Conv2d)][0].weight.grad
  name = "conv1" if head.convs else "logits"
  got = grads[name]["kernel"]
  got = got.transpose(3, 2, 0, 1) if head.convs else got.T[..., None, None]
  np.testing.assert_allclose(got, weight.numpy(), atol=1e-5)
  with torch.no_grad():
    eval_biased(model, (0.9**2, start), 3 * 4 * 7)
    want = model(as_torch(x)).permute(0, 2, 3, 1)
  got = head.apply({"params": params, **state}, x)
  np.testing.assert_allclose(got, want.numpy(), atol=2e-5)
