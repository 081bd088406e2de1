"""Updates against NumPy and optax, clipping, the moving average."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_samples import (
  BIAS,
  GRADS,
  PARAMS,
  SHAPES,
  STEPS,
  build,
  norm,
  numpy_adamw,
  run,
)

from mtv_jax.utils.tree import flatten_with_names


def test_adamw_with_schedule_decay_clipping_and_multipliers():
  optimizer = build(
    {
      "lr": 0.1,
      "weight_decay": 0.2,
      "b2": 0.95,
      "clip_norm": 2.0,
      "rules": [
        ("token_embedding", {"lr": 0.5}),
        ("logit", {"lr": 2.0, "weight_decay": 0.3}),
        ("^text/", {"lr": 100.0}),  # Too late for the only one it matches.
      ],
    },
    {"name": "cosine", "warmup_steps": 2, "cooldown_steps": 2, "end": 0.1},
  )

  def lr(t):
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * max(t - 2, 0) / 4)) / 2
    return 0.1 * cosine * min(1, (t + 1) / 2) * min(1, (6 - t) / 2)

  multipliers = {
    "image/blocks/mlp/fc1/kernel": (1, 1),
    "image/blocks/mlp/fc1/bias": (1, 0),
    "image/position_embedding": (1, 0),
    "text/token_embedding": (0.5, 0),
    "heads/contrastive/logit_scale": (2, 0.3),
  }
  ours, _ = run(optimizer.tx)
  theirs = numpy_adamw(lr, multipliers, decay=0.2, clip=2.0)
  for t in range(STEPS):
    assert float(optimizer.schedule(t)) == pytest.approx(lr(t), rel=1e-6)
    for name, expected in theirs[t].items():
      np.testing.assert_allclose(ours[t][name], expected, rtol=2e-5, atol=2e-6)
  rows = {row.name: row for row in optimizer.table}
  assert {n: (r.lr, r.weight_decay) for n, r in rows.items()} == multipliers
  assert rows["text/token_embedding"].rule == "token_embedding"
  assert rows["image/position_embedding"].rule is None


def test_weight_decay_follows_a_cosine_over_the_run():
  optimizer = build(
    {"weight_decay": 0.1, "weight_decay_end": 0.9, "b2": 0.95},
    {"name": "constant", "warmup_steps": 3},
  )
  decays = [0.9 - 0.4 * (1 + math.cos(math.pi * t / STEPS)) for t in range(8)]
  decays[7] = 0.9  # After the run.
  for t, decay in enumerate(decays):
    values = optimizer.hyperparameters(t)
    assert float(values["weight_decay"]) == pytest.approx(decay, rel=1e-6)
    rate = 1e-2 * min(1, (t + 1) / 3)
    assert float(values["lr"]) == pytest.approx(rate, rel=1e-6)
  ours, _ = run(optimizer.tx)
  kernel = "image/blocks/mlp/fc1/kernel"
  plain, _ = run(
    build({"b2": 0.95}, {"name": "constant", "warmup_steps": 3}).tx
  )
  # The decay's share, since the updates don't depend on it.
  apart = 0.0
  before = dict(flatten_with_names(PARAMS))[kernel]
  for t in range(STEPS):
    rate = 1e-2 * min(1, (t + 1) / 3)
    apart = apart - rate * decays[t] * before
    got = ours[t][kernel] - plain[t][kernel]
    np.testing.assert_allclose(got, apart, rtol=1e-4, atol=1e-6)
    before = ours[t][kernel]
    np.testing.assert_array_equal(ours[t][BIAS], plain[t][BIAS])
  constant = build({"weight_decay": 0.1, "weight_decay_end": 0.1})
  assert set(constant.hyperparameters(0)) == {"lr"}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_a_decay_schedule_keeps_the_tree_of_the_state(name):
  config = {"name": name, "weight_decay": 0.1, "clip_norm": 1.0}
  init = build(config).tx.init
  scheduled = build({**config, "weight_decay_end": 0.2}).tx.init
  old, new = (jax.eval_shape(f, PARAMS) for f in (init, scheduled))
  assert jax.tree.structure(old) == jax.tree.structure(new)
  assert [n for n, _ in flatten_with_names(old)][-1] == "3/count"


KERNELS = jax.tree.map(lambda x: x.ndim == 3, PARAMS)


@pytest.mark.parametrize(
  ("config", "reference"),
  [
    ({"name": "adamw"}, optax.adamw(1e-2, weight_decay=0.3, mask=KERNELS)),
    ({"name": "lion"}, optax.lion(1e-2, weight_decay=0.3, mask=KERNELS)),
    (
      {"name": "lion", "b1": 0.95, "b2": 0.98},
      optax.lion(1e-2, b1=0.95, b2=0.98, weight_decay=0.3, mask=KERNELS),
    ),
    (
      {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
      optax.sgd(1e-2, momentum=0.9),
    ),
    ({"name": "sgd", "weight_decay": 0.0}, optax.sgd(1e-2)),
    (
      # optax's own adds the decay without the learning rate.
      {"name": "adafactor", "b2": 1.0, "b1": 0.0},
      optax.adafactor(
        1e-2,
        multiply_by_parameter_scale=False,
        weight_decay_rate=0.3 * 1e-2,
        weight_decay_mask=KERNELS,
      ),
    ),
  ],
)
def test_against_optax(config, reference):
  ours, _ = run(build({"weight_decay": 0.3, **config}).tx)
  theirs, _ = run(reference)
  for name in SHAPES:
    np.testing.assert_allclose(
      ours[-1][name], theirs[-1][name], rtol=1e-5, atol=1e-7
    )
    assert np.abs(ours[-1][name] - ours[0][name]).max() > 1e-3


def test_adafactor_factors_and_keeps_momentum():
  params = {"a": {"kernel": np.zeros((2, 256, 128), np.float32)}}
  tx = build({"name": "adafactor", "mu_dtype": "bfloat16"}, params=params).tx
  state = dict(flatten_with_names(jax.eval_shape(tx.init, params)))
  shapes = {name.split("/", 1)[1]: x.shape for name, x in state.items()}
  momentum = [x for x in state.values() if x.shape == (2, 256, 128)]
  assert [x.dtype for x in momentum] == [jnp.bfloat16]
  assert sorted(s for s in shapes.values() if len(s) == 2) == [
    (2, 128),
    (2, 256),
  ]


@pytest.mark.parametrize("by", ["parameter", "layer"])
def test_adafactor_clips_a_stack_whole_or_by_layer(by):
  # The second moment is partly old: a gradient that grows is above an RMS of 1.
  params = {"image": {"blocks": {"bias": jnp.ones((2, 3))}}}
  config = {"name": "adafactor", "b1": 0.0, "b2": 0.4, "clip_rms_by": by}
  tx = build(config, params=params).tx
  first, second = np.ones((2, 3)), np.array([[9.0, 8, 7], [0.5, 0.6, 0.7]])
  state = tx.init(params)
  for grad in (first, second):
    grads = jax.tree.map(lambda _, g=grad: jnp.float32(g), params)
    updates, state = tx.update(grads, state, params)
  raw = second / np.sqrt(0.4 * first**2 + 0.6 * second**2)
  axis = 1 if by == "layer" else None
  rms = np.sqrt(np.mean(raw**2, axis=axis, keepdims=True))
  assert rms.max() > 1.05 and (by == "parameter" or rms.min() < 0.9)
  expected = -1e-2 * raw / np.maximum(rms, 1.0)
  got = updates["image"]["blocks"]["bias"]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_adafactor_second_moment_keeps_moving():
  # With the cap at 0 the second moment is the last gradient squared.
  params = {"kernel": jnp.ones(3)}
  tx = build({"name": "adafactor", "b2": 0.0, "b1": 0.0}, params=params).tx
  grads = [{"kernel": jnp.array(g)} for g in ([1.0, 2, 3], [9.0, -8, 7])]
  history, _ = run(tx, params, grads)
  step = history[1]["kernel"] - history[0]["kernel"]
  np.testing.assert_allclose(step, [-0.01, 0.01, -0.01], rtol=1e-5)


def test_moments_have_the_names_and_shapes_of_parameters():
  for name in ("adamw", "lion", "sgd"):
    tx = build({"name": name, "momentum": 0.9, "mu_dtype": "bfloat16"}).tx
    state = flatten_with_names(jax.eval_shape(tx.init, PARAMS))
    moments = [(n, x) for n, x in state if not n.endswith("count")]
    assert len(moments) == len(SHAPES) * (2 if name == "adamw" else 1)
    for path, leaf in moments:
      owner = [n for n in SHAPES if path.endswith("/" + n)]
      assert leaf.shape == SHAPES[owner[0]]
      assert leaf.dtype == (jnp.float32 if "/nu/" in path else jnp.bfloat16)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_bit_equal_and_have_no_moments(name):
  rules = [("^image/", {"lr": 0})]
  config = {"weight_decay": 0.5, "clip_norm": 1.0, "rules": rules}
  optimizer = build({"name": name, **config})
  history, state = run(optimizer.tx)
  flat = dict(flatten_with_names(PARAMS))
  for name in SHAPES:
    moved = not np.array_equal(history[-1][name], flat[name])
    assert moved == (not name.startswith("image/"))
  moments = [n for n, x in flatten_with_names(state) if x.ndim]
  assert moments and not [n for n in moments if "image" in n]
  # Their gradients do not count in the norm for clipping, either.
  zeroed = [
    {**grad, "image": jax.tree.map(np.zeros_like, grad["image"])}
    for grad in GRADS
  ]
  again, _ = run(optimizer.tx, grads=zeroed)
  for name in SHAPES:
    np.testing.assert_array_equal(history[-1][name], again[-1][name])


def test_clipping():
  tx = build({"name": "sgd", "lr": 1.0, "clip_norm": 0.5}).tx
  for scale, expected in [(1.0, 0.5), (1e-3, 1e-3 * norm(GRADS[0]))]:
    grad = jax.tree.map(lambda x, s=scale: x * np.float32(s), GRADS[0])
    updates, _ = tx.update(grad, tx.init(PARAMS), PARAMS)
    assert norm(updates) == pytest.approx(expected, rel=1e-5)


def test_clipping_by_module():
  config = {"name": "sgd", "lr": 1.0, "clip_norm": 2.0, "clip_by": "module"}
  grad = jax.tree.map(lambda x: x, GRADS[0])
  grad["heads"]["contrastive"]["logit_scale"] = np.float32(-7)
  for rules in ((), [("bias$", {"lr": 0})]):
    tx = build({**config, "rules": rules}).tx
    updates, _ = tx.update(grad, tx.init(PARAMS), PARAMS)
    got, given = (dict(flatten_with_names(t)) for t in (updates, grad))
    for module in ("image", "text", "heads/contrastive"):
      # A frozen parameter does not count.
      names = [n for n in SHAPES if n.startswith(module)]
      names = [n for n in names if not rules or n != BIAS]
      length = norm([given[n] for n in names])
      for name in names:
        expected = -given[name] * min(1, 2.0 / length)
        np.testing.assert_allclose(got[name], expected, rtol=1e-5)
    assert np.abs(got[BIAS]).max() == 0 if rules else norm([got[BIAS]]) > 0.1
