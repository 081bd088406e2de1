"""Rules of parameters, and the updates that they scale."""

import functools

import jax
import numpy as np
import pytest
from optim_samples import PARAMS, RNG, SHAPES, STEPS, build, numpy_adamw, run

from mtv_jax.config.durations import RunLength
from mtv_jax.train.optim import param_rules
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

match = functools.partial(
  param_rules.match_param_rules, length=RunLength(8, None, STEPS)
)


def test_rule_errors():
  def table(*rules):
    return match(PARAMS, rules)

  with pytest.raises(ValueError, match="names are: image/position_embedding"):
    table(("image/pos_embedding", {"lr": 0}))
  with pytest.raises(
    ConfigError,
    match="wd is an unknown key. There are: layer_decay, lr, start_epochs",
  ):
    table((".", {"wd": 0}))
  with pytest.raises(ConfigError, match="lr is -1, expected a number >= 0"):
    table((".", {"lr": -1}))
  with pytest.raises(ConfigError, match="a rule is .* got None"):
    table(None)
  with pytest.raises(ConfigError, match="a rule is"):
    table((".", 0.1))
  with pytest.raises(ConfigError, match="layer_decay, but lr=0 freezes all"):
    table((".", {"lr": 0, "layer_decay": 0.9}))
  with pytest.raises(ConfigError, match="freeze every parameter"):
    build({"rules": [(".", {"lr": 0})]})
  with pytest.raises(ConfigError, match="'adam'. Did you mean 'adamw'"):
    build({"name": "adam"})
  with pytest.raises(ConfigError, match="'weight_decy'. .*'weight_decay'"):
    build({"weight_decy": 1.0})
  with pytest.raises(ConfigError, match="weight_decay_end has no effect"):
    build({"weight_decay_end": 1.0, "rules": [(".", {"weight_decay": 0})]})
  with pytest.raises(
    ConfigError, match="optim.b2 is 2, expected a number >= 0"
  ):
    build({"b2": 2})


def test_describe():
  text = param_rules.describe_rules(
    match(PARAMS, [("^image/blocks", {"lr": 0})])
  )
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
  lines = param_rules.describe_rules(table).split("\n")
  ranges = {tuple(line.split()[:3]) for line in lines}
  assert ("^(image|heads)/", "0.0625-1", "0") in ranges
  assert ("^(image|heads)/", "0.125-1", "1") in ranges
  assert ("patch_embed", "0.0125", "1") in ranges
  assert ("^text/", "1.62-2", "1") in ranges
  with pytest.raises(ConfigError, match="but matches no block or embedding"):
    match(params, [("^heads/", {"layer_decay": 0.9})])
  with pytest.raises(
    ConfigError, match="layer_decay is 0.0, expected a number >"
  ):
    match(params, [(".", {"layer_decay": 0.0})])


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
  text = param_rules.describe_rules(optimizer.table)
  assert "text/token_embedding (from step 3)" in text
  for options, message in [
    ({"start": 3}, "start is an unknown key. Did you mean 'start_"),
    (
      {"start_steps": 6},
      "starts at step 6 of a run of 6 steps and would never",
    ),
    ({"start_steps": 3, "lr": 0}, "has a start, but lr=0 freezes"),
  ]:
    with pytest.raises(ConfigError, match=message):
      build({"rules": [("token", options)]})
