"""Rules of parameters, the updates that they scale, and schedules."""

import functools

import jax
import numpy as np
import pytest
from optim_samples import (
  GRADS,
  PARAMS,
  RNG,
  SHAPES,
  STEPS,
  build,
  numpy_adamw,
  run,
)

from mtv_jax.config import sections
from mtv_jax.config.durations import RunLength
from mtv_jax.train.optim import schedules
from mtv_jax.train.optim.param_rules import describe_rules, match_param_rules
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

match = functools.partial(match_param_rules, length=RunLength(8, None, STEPS))


def rule(pattern, **values):
  return {"rules": [(pattern, values)]}


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (rule("image/pos_embedding", lr=0), "names are: image/position_embedding"),
    (
      rule(".", wd=0),
      "wd is an unknown key. There are: decay_to, layer_decay, lr,",
    ),
    (rule(".", lr=-1), "lr is -1, expected a number >= 0"),
    ({"rules": [None]}, "expected .regex.* got None"),
    ({"rules": [(".", 0.1)]}, "expected .regex"),
    (rule(".", lr=0, layer_decay=0.9), "layer_decay, but lr=0 freezes all"),
    (rule("logit", layer_decay=0.9), "matches only parameters outside the"),
    (rule(".", layer_decay=0.0), "layer_decay is 0.0, expected a number >"),
    (rule("token", start=3), "start is an unknown key. Did you mean 'start_"),
    (rule("token", start_steps=6), "starts at step 6 of a run of 6 steps, so"),
    (rule("token", start_steps=3, lr=0), "has a start, but lr=0 freezes"),
    (rule(".", lr=0), "freeze every parameter"),
    (rule("token", lr=0, decay_to="start"), "lr=0 or weight_decay=0 disables"),
    ({"name": "adam"}, "'adam'. Did you mean 'adamw'"),
    ({"weight_decy": 1.0}, "'weight_decy'. .*'weight_decay'"),
    (
      {"weight_decay_end": 1.0, **rule(".", weight_decay=0)},
      "weight_decay_end has no effect",
    ),
    ({"b2": 2}, "optim.b2 is 2, expected a number >= 0"),
    ({"clip_by": "module"}, "'module' has no effect, as clip_norm=0"),
    (
      {"clip_norm": 1.0, "clip_by": "head"},
      "'head'. There are: global",
    ),
    ({"lr_scaling": "sqrt"}, "'sqrt' has no effect without"),
    ({"name": "muon", "ns_steps": 0}, "optim.ns_steps is 0, expected an int"),
    ({"name": "muon", "nesterv": True}, "optim has no option 'nesterv'"),
  ],
)
def test_errors_name_the_key(config, message):
  with pytest.raises((ConfigError, InputError), match=message):
    build(config)


def test_describe():
  text = describe_rules(match(PARAMS, [("^image/blocks", {"lr": 0})]))
  rows = [line.split() for line in text.split("\n")[1:]]
  # Sorted names: heads (1 number), image (60 in two groups), the rest.
  assert rows[0][:6] == ["(no", "rule)", "1", "0", "3", "49"]
  assert ["^image/blocks", "frozen", "1", "1", "48"] in [r[:5] for r in rows]
  assert ["^image/blocks", "frozen", "0", "1", "12"] in [r[:5] for r in rows]


LAYERED = [
  ("patch_embed", {"lr": 0.2, "layer_decay": 0.5}),
  ("^(image|heads)/", {"layer_decay": 0.5}),
  ("^text/", {"layer_decay": 0.9, "lr": 2.0}),
]
TOWERS = {
  "heads/dino/mlp/fc1/kernel": (4, 4),
  "heads/mae_decoder/blocks/mlp/fc1/kernel": (2, 4, 4),
  "image/blocks/mlp/fc1/bias": (3, 4),
  "image/blocks/mlp/fc1/kernel": (3, 4, 4),
  "image/cls_token": (4,),
  "image/norm/scale": (4,),
  "image/patch_embed/kernel": (4, 4),
  "image/pool/attention/q/kernel": (4, 4),
  "image/position_embedding": (5, 4),
  "text/blocks/mlp/fc1/kernel": (2, 4, 4),
  "text/projection/kernel": (4, 4),
  "text/token_embedding": (7, 4),
}


def test_layer_decay_of_a_tower():
  """The exponents of DINOv2: depth + 1 - layer, with embeddings at layer 0."""
  params = unflatten_names({n: np.ones(s) for n, s in TOWERS.items()})
  table = match(params, LAYERED)
  image, text = (0.5**3, 0.5**2, 0.5), (2 * 0.9**2, 2 * 0.9)
  expected = {
    "heads/dino/mlp/fc1/kernel": (1.0,),
    "heads/mae_decoder/blocks/mlp/fc1/kernel": (1.0,),
    "image/blocks/mlp/fc1/bias": image,
    "image/blocks/mlp/fc1/kernel": image,
    "image/cls_token": (0.5**4,),
    "image/norm/scale": (1.0,),
    "image/patch_embed/kernel": (0.2 * 0.5**4,),
    "image/pool/attention/q/kernel": (1.0,),
    "image/position_embedding": (0.5**4,),
    "text/blocks/mlp/fc1/kernel": text,
    "text/projection/kernel": (2.0,),
    "text/token_embedding": (2 * 0.9**3,),
  }
  assert {row.name: row.rates for row in table} == {
    name: pytest.approx(rates) for name, rates in expected.items()
  }
  lines = describe_rules(table).split("\n")
  ranges = {tuple(line.split()[:3]) for line in lines}
  assert ("^(image|heads)/", "0.0625-1", "0") in ranges
  assert ("^(image|heads)/", "0.125-1", "1") in ranges
  assert ("patch_embed", "0.0125", "1") in ranges
  assert ("^text/", "1.62-2", "1") in ranges


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_layer_decay_scales_the_updates_of_each_layer(name):
  params = unflatten_names(
    {n: RNG.normal(size=s).astype(np.float32) for n, s in TOWERS.items()}
  )
  grads = jax.tree.map(lambda x: x + 1, params)
  updates = []
  for rules in (LAYERED, ()):
    config = {"name": name, "weight_decay": 0.3, "rules": rules}
    optimizer = build(config, params=params)
    tx = optimizer.tx
    update, _ = tx.update(grads, tx.init(params), params)
    updates.append(dict(flatten_with_names(update)))
  rows = {
    row.name: row for row in build({"rules": LAYERED}, params=params).table
  }
  decayed, plain = updates
  for leaf in TOWERS:
    for i, rate in enumerate(rates := rows[leaf].rates):
      one = slice(None) if len(rates) == 1 else i
      expected = rate * np.asarray(plain[leaf][one])
      np.testing.assert_allclose(decayed[leaf][one], expected, rtol=1e-5)


def test_before_its_start_a_parameter_stays_and_its_moments_advance():
  head = "heads/contrastive/logit_scale"
  optimizer = build(
    {
      "weight_decay": 0.3,
      "b2": 0.95,
      "clip_norm": 2.0,
      "rules": [
        ("token_embedding", {"start_percent": 50, "weight_decay": 1.0}),
        ("logit_scale", {"start_steps": 2, "lr": 0.5}),
      ],
    },
    start_steps={"heads/contrastive/": 4, "text/token": 1, "hea": 0},
  )
  starts = {"text/token_embedding": 3, head: 4}
  assert {r.name: r.start for r in optimizer.table if r.start} == starts
  multipliers = {n: (1, float(n.endswith("kernel"))) for n in SHAPES}
  multipliers["text/token_embedding"] = (lambda t: t >= 3, 1)
  multipliers[head] = (lambda t: 0.5 * (t >= 4), 0)
  ours, _ = run(optimizer.tx)
  # Gradients of all parameters count in the norm, as torch counts them.
  theirs = numpy_adamw(lambda t: 1e-2, multipliers, decay=0.3, clip=2.0)
  start = dict(flatten_with_names(PARAMS))
  for t in range(STEPS):
    for name, expected in theirs[t].items():
      np.testing.assert_allclose(ours[t][name], expected, rtol=2e-5, atol=2e-6)
    for name, first in starts.items():
      assert np.array_equal(ours[t][name], start[name]) == (t < first)
  text = describe_rules(optimizer.table)
  assert "text/token_embedding (from step 3)" in text


def test_a_parameter_decays_to_its_start():
  """With a constant gradient g the distance tends to -g / decay."""
  rules = [("^image/", {"weight_decay": 2.0, "decay_to": "start"})]
  config = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "rules": rules}
  grads = [GRADS[0]] * STEPS
  history, state = run(build(config).tx, grads=grads)
  start, grad = (dict(flatten_with_names(x)) for x in (PARAMS, GRADS[0]))
  kept = [n for n, x in flatten_with_names(state) if np.ndim(x)]
  for name in SHAPES:
    is_kept = any(n.endswith(f"start/{name}") for n in kept)
    assert is_kept == name.startswith("image/")
    expected = -grad[name] * 0.1 * STEPS
    if is_kept:
      expected = -grad[name] / 1.0 * (1 - (1 - 0.1 * 1.0) ** STEPS)
    distance = history[-1][name] - start[name]
    np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=1e-6)


def make_schedule(config, lr):
  config = sections.read(schedules.ScheduleConfig, config, "config.schedule")
  length = RunLength(8, None, 100)
  return schedules.make_schedule(config, lr=lr, length=length)


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    ({"name": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
    (
      {"name": "constant", "warmup_steps": 10, "cooldown_steps": 20},
      {0: 0.1, 4: 0.5, 9: 1.0, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 120: 0.0},
    ),
    (
      {"name": "cosine", "warmup_percent": 20},
      # (1 + cos(pi/4)) / 2 = 0.853553
      {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.853553, 60: 0.5, 100: 0.0, 150: 0.0},
    ),
    ({"name": "cosine", "end": 0.1}, {0: 1.0, 50: 0.55, 100: 0.1}),
    (
      {"name": "rsqrt", "warmup_examples": 80, "timescale_steps": 30},
      {0: 0.1, 9: 1.0, 10: 1.0, 40: 0.707107, 100: 0.5},
    ),
    (
      {"name": "constant", "warmup_steps": 11, "warmup_shape": "cosine"},
      {0: 0.0, 5: 0.5, 10: 1.0, 11: 1.0, 99: 1.0},
    ),
  ],
)
def test_schedules(config, expected):
  schedule = make_schedule(config, lr=2.0)
  got = {t: float(schedule(t)) / 2 for t in expected}
  assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"warmup_steps": 60, "cooldown_steps": 50}, "60 steps of warm-up and 50"),
    ({"name": "cosin"}, "'cosin'. Did you mean 'cosine'"),
    ({"end": 2}, "schedule.end is 2, expected a number"),
    ({"warmup": 3}, "no option 'warmup'. .*warmup_steps"),
    ({"name": "rsqrt", "end_lr": 0.1}, "end_lr=0.1 applies only to the cosine"),
    ({"end": 0.2, "end_lr": 0.1}, "end_lr=0.1 contradicts end=0.2; set only"),
    (
      {"cooldown_steps": 5, "end_lr": 0.1},
      "end_lr=0.1 contradicts a cool",
    ),
    ({"end_lr": 2.0}, "end_lr=2 exceeds the peak rate, 1 at this batch size"),
  ],
)
def test_schedule_errors(config, message):
  with pytest.raises(ConfigError, match=message):
    make_schedule(config, lr=1.0)


@pytest.mark.parametrize(
  ("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0), (None, 4.0)]
)
def test_the_rate_follows_the_batch_and_its_end_does_not(scaling, factor):
  config = {"lr": 2e-3, "lr_per_examples": 256, "lr_scaling": scaling}
  for batch_size, ratio in [(1024, factor), (256, 1.0), (64, 1 / factor)]:
    schedule = build(
      config,
      {"name": "cosine", "end_lr": 1e-6},
      total_steps=100,
      batch_size=batch_size,
    ).schedule
    assert float(schedule(0)) == pytest.approx(2e-3 * ratio, rel=1e-6)
    middle = (2e-3 * ratio + 1e-6) / 2
    assert float(schedule(50)) == pytest.approx(middle, rel=1e-6)
    assert float(schedule(100)) == pytest.approx(1e-6, rel=1e-5)
