"""Updates against NumPy and optax, schedules against golden values, rules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtv_jax.config import schema
from mtv_jax.train import optim, param_rules, schedules
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

RNG = np.random.default_rng(0)
SHAPES = {
  "image/blocks/mlp/fc1/kernel": (2, 4, 6),
  "image/blocks/mlp/fc1/bias": (2, 6),
  "image/position_embedding": (5, 4),
  "text/token_embedding": (7, 4),
  "heads/contrastive/logit_scale": (),
}
BIAS = "image/blocks/mlp/fc1/bias"
STEPS = 6


def random_tree():
  return unflatten_names(
    {n: RNG.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
  )


PARAMS = random_tree()
GRADS = [random_tree() for _ in range(STEPS)]


def build(
  optim_config, schedule_config=None, params=PARAMS, total_steps=STEPS, **starts
):
  return optim.make_optimizer(
    {"lr": 1e-2, "clip_norm": 0.0, **optim_config},
    schedule_config or {"name": "constant"},
    length=schema.RunLength(8, None, total_steps),
    params=params,
    **starts,
  )


def run(tx, params=PARAMS, grads=GRADS):
  """The parameters after each step, as flat numpy trees, and the last state."""
  params = jax.tree.map(jnp.asarray, params)
  state = tx.init(params)

  @jax.jit
  def update(params, state, grad):
    updates, state = tx.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  history = []
  for grad in grads:
    params, state = update(params, state, grad)
    history.append({n: np.array(x) for n, x in flatten_with_names(params)})
  return history, state


def numpy_adamw(lr, multipliers, *, decay, clip, b1=0.9, b2=0.95, eps=1e-8):
  """AdamW as its paper writes it, in float64; lr is a function of the step."""
  p = {n: x.astype(np.float64) for n, x in flatten_with_names(PARAMS)}
  m = {n: np.zeros_like(x) for n, x in p.items()}
  v = {n: np.zeros_like(x) for n, x in p.items()}
  history = []
  for t, tree in enumerate(GRADS):
    g = dict(flatten_with_names(tree))
    norm = math.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in g.values()))
    for n in p:
      x = g[n].astype(np.float64) * min(1.0, clip / norm)
      m[n] = b1 * m[n] + (1 - b1) * x
      v[n] = b2 * v[n] + (1 - b2) * x * x
      mhat, vhat = m[n] / (1 - b1 ** (t + 1)), v[n] / (1 - b2 ** (t + 1))
      u = mhat / (np.sqrt(vhat) + eps)
      lr_mult, decay_mult = multipliers[n]
      lr_mult = lr_mult(t) if callable(lr_mult) else lr_mult
      p[n] = p[n] - lr(t) * lr_mult * (u + decay * decay_mult * p[n])
    history.append(dict(p))
  return history


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
  # What the decay alone took off, as the updates don't depend on it.
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


def test_frozen_parameters_stay_bit_equal_and_have_no_moments():
  rules = [("^image/", {"lr": 0})]
  optimizer = build({"weight_decay": 0.5, "clip_norm": 1.0, "rules": rules})
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


def norm(tree):
  squares = [np.square(x, dtype=float).sum() for x in jax.tree.leaves(tree)]
  return math.sqrt(sum(squares))


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
  with pytest.raises(
    ConfigError, match="'module' has no effect, as clip_norm=0"
  ):
    build({"clip_by": "module"})
  with pytest.raises(
    ConfigError, match="clip_by is 'head'. There are: global, module"
  ):
    build({"clip_norm": 1.0, "clip_by": "head"})


# --- schedules ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    (
      {"name": "constant"},
      {0: 1.0, 50: 1.0, 99: 1.0},
    ),
    (
      {"name": "constant", "warmup_steps": 10, "cooldown_steps": 20},
      {0: 0.1, 4: 0.5, 9: 1.0, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 120: 0.0},
    ),
    (
      {"name": "cosine", "warmup_percent": 20},
      # (1 + cos(pi/4)) / 2 = 0.853553
      {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.853553, 60: 0.5, 100: 0.0, 150: 0.0},
    ),
    (
      {"name": "cosine", "end": 0.1},
      {0: 1.0, 50: 0.55, 100: 0.1},
    ),
    (
      {"name": "rsqrt", "warmup_examples": 80, "timescale_steps": 30},
      {0: 0.1, 9: 1.0, 10: 1.0, 40: 0.707107, 100: 0.5},
    ),
  ],
)
def test_schedules(config, expected):
  schedule = schedules.make_schedule(
    config, lr=2.0, length=schema.RunLength(8, None, 100)
  )
  got = {t: float(schedule(t)) / 2 for t in expected}
  assert got == pytest.approx(expected, abs=1e-6)


def test_schedule_errors():
  make = functools.partial(
    schedules.make_schedule, lr=1.0, length=schema.RunLength(8, None, 100)
  )
  with pytest.raises(ConfigError, match="60 steps of warm-up and 50 of cool"):
    make({"warmup_steps": 60, "cooldown_steps": 50})
  with pytest.raises(ConfigError, match="'cosin'. Did you mean 'cosine'"):
    make({"name": "cosin"})
  with pytest.raises(ConfigError, match="schedule.end is 2, expected a number"):
    make({"end": 2})
  with pytest.raises(ConfigError, match="no option 'warmup'. .*warmup_steps"):
    make({"warmup": 3})
  for config, message in [
    ({"name": "rsqrt"}, "end_lr=1e-06 is an option of the cosine alone"),
    ({"end": 0.1}, "end_lr=1e-06 and end=0.1 are two ends; give one of them"),
    ({"cooldown_steps": 5}, "end_lr=1e-06 contradicts a cool-down"),
    ({"end_lr": 2.0}, "end_lr=2 exceeds the peak rate, 1 at this batch size"),
  ]:
    with pytest.raises(ConfigError, match=message):
      make({"end_lr": 1e-6, **config})


@pytest.mark.parametrize(
  ("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0), (None, 4.0)]
)
def test_the_rate_follows_the_batch_and_its_end_does_not(scaling, factor):
  config = {"lr": 2e-3, "lr_per_examples": 256, "lr_scaling": scaling}
  for batch_size, ratio in [(1024, factor), (256, 1.0), (64, 1 / factor)]:
    schedule = optim.make_optimizer(
      config,
      {"name": "cosine", "end_lr": 1e-6},
      length=schema.RunLength(batch_size, None, 100),
      params=PARAMS,
    ).schedule
    assert float(schedule(0)) == pytest.approx(2e-3 * ratio, rel=1e-6)
    middle = (2e-3 * ratio + 1e-6) / 2
    assert float(schedule(50)) == pytest.approx(middle, rel=1e-6)
    assert float(schedule(100)) == pytest.approx(1e-6, rel=1e-5)
  with pytest.raises(ConfigError, match="'sqrt' has no effect without"):
    build({"lr_scaling": "sqrt"})


# --- rules -------------------------------------------------------------------


def test_rule_errors():
  def table(*rules):
    return param_rules.match_param_rules(PARAMS, rules)

  with pytest.raises(ValueError, match="names are: image/position_embedding"):
    table(("image/pos_embedding", {"lr": 0}))
  with pytest.raises(
    ConfigError,
    match="no option 'wd'. There are: layer_decay, lr, start_epochs",
  ):
    table((".", {"wd": 0}))
  with pytest.raises(ConfigError, match="lr is -1, expected a number >= 0"):
    table((".", {"lr": -1}))
  with pytest.raises(ConfigError, match="a rule is"):
    table((".", 0.1))
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
    param_rules.match_param_rules(PARAMS, [("^image/blocks", {"lr": 0})])
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
  table = param_rules.match_param_rules(params, LAYERED)
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
    param_rules.match_param_rules(params, [("^heads/", {"layer_decay": 0.9})])
  with pytest.raises(
    ConfigError, match="layer_decay is 0.0, expected a number >"
  ):
    param_rules.match_param_rules(params, [(".", {"layer_decay": 0.0})])


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


# --- parameters that start late ----------------------------------------------


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
    ({"start": 3}, "no option 'start'. Did you mean 'start_"),
    (
      {"start_steps": 6},
      "starts at step 6 of a run of 6 steps and would never",
    ),
    ({"start_steps": 3, "lr": 0}, "has a start, but lr=0 freezes"),
  ]:
    with pytest.raises(ConfigError, match=message):
      build({"rules": [("token", options)]})


# --- the moving average ------------------------------------------------------


def test_ema_update():
  ema = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(1.0, jnp.bfloat16)}
  new = {"a": jnp.array([2.0, 0.0]), "b": jnp.array(3.0, jnp.float32)}
  out = optim.ema_update(ema, new, 0.75)
  np.testing.assert_allclose(out["a"], [1.25, 1.5])
  assert out["b"].dtype == jnp.bfloat16 and float(out["b"]) == 1.5
  # (1 + 0) / (10 + 0) at the start; 0.75 once that is larger.
  early = optim.ema_update(ema, new, 0.75, step=0)
  np.testing.assert_allclose(early["a"], [1.9, 0.2], rtol=1e-6)
  late = optim.ema_update(ema, new, 0.75, step=jnp.array(1000))
  np.testing.assert_allclose(late["a"], out["a"])
