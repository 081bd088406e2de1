"""Depth heads, losses and schedules against formulas and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import random_leaves

from mtv_jax.evals.core import probe_heads as heads
from mtv_jax.evals.depth import training


def test_expected_depth_golden(monkeypatch):
  monkeypatch.setattr(training, "BINS", 3)  # at 0.001, 5.0005 and 10 m
  z = jnp.array([1.0, 0.0, -2.0])
  p = (jax.nn.relu(z) + 0.1) / 1.3
  np.testing.assert_allclose(p, [0.846154, 0.076923, 0.076923], atol=1e-6)
  depth = training.DepthTarget(10.0).decode(z[None, None, None])
  assert depth.item() == pytest.approx(1.154731, abs=1e-6)


GOLDEN = tuple(
  jnp.asarray(x, jnp.float32)[None, None]
  for x in ([1, 2, 3, 7], [1.1, 1.8, 3.5, 0])
)


def test_sig_loss_golden():
  predicted, truth = GOLDEN
  valid = truth > 0
  dino = training.sig_loss(predicted, truth, valid)
  assert float(dino) == pytest.approx(0.137261, abs=1e-6)
  probe3d = training.sig_loss(predicted, truth, valid, ddof=0)
  assert float(probe3d) == pytest.approx(0.112586, abs=1e-6)
  g = np.log(np.array([1.001, 2.001, 3.001]) / [1.101, 1.801, 3.501])
  warm = training.sig_loss(predicted, truth, valid, variance_weight=0.0)
  assert float(warm) == pytest.approx(np.sqrt(0.15) * abs(g.mean()), rel=1e-5)


def test_losses_without_a_valid_pixel_are_zero():
  predicted, truth = GOLDEN
  none = jnp.zeros(truth.shape, bool)
  for loss in (training.sig_loss, training.gradient_loss):
    value, grad = jax.jit(jax.value_and_grad(loss))(predicted, truth, none)
    assert float(value) == 0
    assert not np.any(grad)
  # A perfect prediction does not give NaN, either.
  truth = jnp.full((1, 3, 3), 2.0)
  grad = jax.jit(jax.grad(training.sig_loss))(truth, truth, truth > 0)
  assert np.all(np.isfinite(grad))


def numpy_gradient_loss(predicted, truth, valid):
  """The gradient loss pixel by pixel."""
  g = np.where(valid, np.log(predicted + 1e-3) - np.log(truth + 1e-3), 0)
  total = 0
  for stride in (1, 2, 4, 6):
    e, m = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
    part = 0
    for b, y, x in np.ndindex(e.shape):
      for y2, x2 in ((y + 2, x), (y, x + 2)):
        if y2 < e.shape[1] and x2 < e.shape[2] and m[b, y, x] and m[b, y2, x2]:
          part += abs(e[b, y2, x2] - e[b, y, x])
    total += part / m.sum()
  return total


def test_gradient_loss_by_hand():
  rng = np.random.default_rng(0)
  predicted, truth = rng.uniform(0.5, 9, (2, 2, 13, 15)).astype(np.float32)
  valid = rng.random((2, 13, 15)) < 0.7
  truth = np.where(valid, truth, 0)
  loss = jax.jit(training.gradient_loss)
  got = loss(*map(jnp.asarray, (predicted, truth, valid)))
  want = numpy_gradient_loss(predicted, truth, valid)
  assert float(got) == pytest.approx(want, rel=1e-5)
  # The log error of a scaled map is flat, up to the millimetre added.
  scaled = loss(*map(jnp.asarray, (2 * truth, truth, valid)))
  assert float(scaled) < 1e-2


@pytest.mark.parametrize(
  ("schedule", "options", "golden"),
  [
    (
      training.warm_cosine,
      {"steps": 38_400, "lr": 3e-4},
      {0: 3e-7, 6400: 1.4025e-4, 12799: 2.2529e-4, 12800: 2.2499e-4}
      | {25600: 7.4998e-5, 38399: 1.2e-8},
    ),
    (
      training.quarter_cosine,
      {"steps": 1000, "lr": 1.0},
      {0: 0.01, 75: 0.505, 150: 1, 575: 0.71004, 1000: 0.01},
    ),
  ],
)
def test_schedules_golden(schedule, options, golden):
  for step, rate in golden.items():
    assert float(schedule(step, **options)) == pytest.approx(rate, rel=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("steps", [100, 1001])
def test_one_cycle_matches_torch(steps):
  import torch

  weight = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
  schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 1e-4, total_steps=steps, div_factor=25, final_div_factor=100
  )
  want = []
  for _ in range(steps):
    want.append(schedule.get_last_lr()[0])
    optimizer.step()
    if len(want) < steps:
      schedule.step()
  rate = functools.partial(training.one_cycle, steps=steps, lr=1e-4)
  got = jax.vmap(rate)(jnp.arange(steps))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-11)


def test_layers_of_the_published_probes():
  blocks = {
    name: [protocol.out_indices(depth) for depth in (12, 24)]
    for name, protocol in training.PROTOCOLS.items()
  }
  assert blocks == {
    "linear": [(11,), (23,)],
    "lin1": [(11,), (23,)],
    "lin4": [(2, 5, 8, 11), (4, 11, 17, 23)],
    "dpt": [(2, 5, 8, 11), (5, 11, 17, 23)],
    "probe3d": [(2, 5, 8, 11), (5, 11, 17, 23)],
  }
  assert training.PROTOCOLS["dpt"].out_indices(2) == (0, 0, 1, 1)


def torch_bins(logits, max_depth):
  """Expected depth of logits `[b, k, h, w]` in PyTorch."""
  import torch

  weights = torch.relu(logits) + 0.1
  weights = weights / weights.sum(1, keepdim=True)
  bins = torch.linspace(0.001, max_depth, logits.shape[1])
  return (weights * bins[None, :, None, None]).sum(1)


@pytest.mark.reference
def test_dpt_head_matches_torch():
  import torch
  from probe_head_parity import as_torch
  from torch.nn import functional

  head = heads.DPTHead(features=8, outputs=training.BINS)
  params, state = heads.init_depth_head(head, 4 * 5, seed=0)
  params = random_leaves(params)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 3, 4, 4 * 5)).astype(np.float32)

  def conv(name, value, tree=params):
    # Flax stores kernels as (y, x, in, out), PyTorch as (out, in, y, x).
    kernel = np.transpose(tree[name]["kernel"], (3, 2, 0, 1))
    kernel, bias = torch.tensor(kernel), as_torch(tree[name]["bias"])
    return functional.conv2d(value, kernel, bias, padding=kernel.shape[-1] // 2)

  def unit(name, value):
    inner = torch.relu(conv("conv1", value, params[name]))
    return value + torch.relu(conv("conv2", inner, params[name]))

  def enlarge(value, factor):
    return functional.interpolate(
      value, scale_factor=factor, mode="bilinear", align_corners=True
    )

  maps = [
    enlarge(conv(f"lateral{i + 1}", part), 2)
    for i, part in enumerate(as_torch(x).split(5, dim=1))
  ]
  out = unit("unit4_2", maps[3])
  for i in (3, 2, 1):
    out = unit(f"unit{i}_2", unit(f"unit{i}_1", maps[i - 1]) + out)
  out = torch.relu(conv("conv1", enlarge(out, 4)))
  want = torch_bins(enlarge(conv("conv2", out), 2), 10.0)
  assert state == {}
  logits = head.apply({"params": params}, x)
  got = training.DepthTarget(10.0).decode(logits)
  assert got.shape == (2, 48, 64)
  np.testing.assert_allclose(got, want, atol=1e-4)
