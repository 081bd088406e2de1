"""The train step on one device and on meshes of eight; locked towers."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_samples
import pytest
import step_samples
import trainings
from step_samples import dino, make_batch, make_spec, mesh_of
from trainings import smallest

from mtv_jax.augment.random import step_key
from mtv_jax.augment.views import build_views
from mtv_jax.cli.train import train
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops
from mtv_jax.train import forward, gradients, train_loop
from mtv_jax.train.run import open_run
from mtv_jax.train.runtime.prefetch import prefetch_to_device
from mtv_jax.train.spec import ObjectiveWeight, abstract_state, init_params
from mtv_jax.train.step import ema_update, make_train_step
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names


def dict_of(tree):
  return dict(flatten_with_names(tree))


@functools.cache
def params_of():
  return step_samples.params_of(make_spec())


def begin(spec, tx, params, shape=(1, 1, 1), rules=()):
  """The step on a mesh: program, state and batch."""
  mesh = mesh_of(shape)
  train_step = make_train_step(spec, tx, mesh, rules)
  return train_step, train_step.init(params), shard_batch(make_batch(), mesh)


@functools.cache
def three_steps(shape, rules=()):
  """Change of the parameters in three steps, and the metrics of each."""
  args = make_spec(), optax.sgd(0.1), params_of(), shape, rules
  (train_step, state, batch), metrics = begin(*args), []
  for _ in range(3):
    state, values = train_step.update(state, batch)
    metrics.append(jax.device_get(values))
  start, end = map(dict_of, jax.device_get((params_of(), state.params)))
  return {name: value - start[name] for name, value in end.items()}, metrics


# Also splits parameters that the built-in rules leave whole.
RULES = (
  (r"blocks/mlp/fc1/kernel$", (None, "fsdp")),
  (r"blocks/attention/qkv/(kernel|bias)$", ("fsdp",)),
  (r"norm\d?/scale$", ("fsdp",)),
  (r"blocks/mlp/fc2/kernel$", ("fsdp", None, None)),
)


@pytest.mark.parametrize(
  ("shape", "rules"), [((2, 2, 2), ()), ((2, 4, 1), RULES)], ids=["", "rules"]
)
def test_sharded_step_equals_a_single_device(shape, rules):
  """Every objective is in test_mtv_recipe.py."""
  expected, expected_metrics = three_steps((1, 1, 1))
  actual, metrics = three_steps(shape, rules)
  params = dict_of(params_of())
  for name, move in expected.items():
    error = np.linalg.norm(actual[name] - move)
    # Each step rounds the parameter.
    rounding = 4e-7 * np.linalg.norm(params[name]) + 1e-8
    assert error <= 1e-5 * np.linalg.norm(move) + rounding, name
  assert np.mean([np.abs(x).max() > 1e-4 for x in expected.values()]) > 0.5
  for got, want in zip(metrics, expected_metrics, strict=True):
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


def test_the_first_loss_equals_its_formula():
  spec, params, batch = make_spec(), params_of(), make_batch()
  _, (metrics, *_) = three_steps((1, 1, 1))
  x = jax.image.resize(
    batch["image"].astype("float32"), (16, 16, 16, 3), "linear"
  )
  towers = {e.tower: tower for e, tower in spec.towers.items()}
  image = towers["image"].apply({"params": params["image"]}, x / 127.5 - 1)
  text = towers["text"].apply(
    {"params": params["text"]}, jnp.asarray(batch["caption"])
  )
  valid = batch["caption_valid"]
  u, v = (np.asarray(t.pooled, np.float64)[valid] for t in (image, text))
  u /= np.linalg.norm(u, axis=1, keepdims=True)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  logits = 10.0 * u @ v.T - 2.0
  signs = 2 * np.eye(len(u)) - 1
  expected = np.logaddexp(0.0, -signs * logits).sum() / len(u)
  np.testing.assert_allclose(metrics["contrastive/loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["contrastive/labelled"], 13 / 16)


@dataclasses.dataclass(frozen=True)
class PullToTeacher(base.Objective):
  """The smallest objective with a teacher: the student's pooled vector."""

  def needs(self):
    return base.Needs(
      {base.Encoding("image", "image", w): () for w in ("student", "teacher")}
    )

  def loss_inputs(self, encodings, heads, batch):
    student, teacher = (
      encodings[base.Encoding("image", "image", w)].pooled[:, 0]
      for w in ("student", "teacher")
    )
    return jnp.square(student - 2.0 * teacher).mean(-1)

  def loss(self, loss_inputs, heads, context):
    count = jnp.ones(()) * loss_inputs.shape[0]
    return base.Terms(loss=base.WeightedMean(loss_inputs.sum(), count))


def test_ema_teacher_and_step_are_updated():
  spec = make_spec(
    objectives={"pull": PullToTeacher()},
    weights={"pull": ObjectiveWeight(1.0)},
    teacher_momentum=0.5,
    ema_decay=0.9,
  )
  params = init_params(spec, jax.random.key(0))
  train_step, state, batch = begin(spec, optax.sgd(0.1), params)
  state, metrics = train_step.update(state, batch)
  assert int(state.step) == 1 and metrics["grad_norm"] > 0
  assert set(state.teacher) == {"image", "heads"}
  teacher, ema, before, after = (
    np.asarray(tree["image"]["patch_embed"]["kernel"])
    for tree in (state.teacher, state.ema, params, state.params)
  )
  assert np.abs(after - before).max() > 1e-4
  tolerance = dict(rtol=1e-5, atol=1e-7)
  expected = 0.5 * before + 0.5 * after
  np.testing.assert_allclose(teacher, expected, **tolerance)
  # It warms up: after the first update its decay is 1 / 10, not 0.9.
  np.testing.assert_allclose(ema, 0.1 * before + 0.9 * after, **tolerance)
  # Without such an objective there is no teacher.
  assert abstract_state(make_spec(), optax.sgd(0.1)).teacher == {}


@pytest.mark.slow
def test_seeds_share_a_program():
  """A compilation cache compares lowered texts; crops follow the seed."""
  views = build_views({"image": dict(count=1, ops="crop(16, 0.4, 1.0)|flip")})
  texts, losses = set(), set()
  for seed in (0, 2**32 - 1):
    spec = make_spec(seed=seed, views=views)
    train_step, state, batch = begin(spec, optax.sgd(0.1), params_of())
    texts.add(train_step.update.lower(train_step.abstract, batch).as_text())
    constant_seed = functools.partial(forward.total_loss, spec)
    expected, _ = jax.jit(constant_seed)(state.params, state, batch)
    loss = train_step.update(state, batch)[1]["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    losses.add(float(loss))
  assert len(texts) == 1 and len(losses) == 2


@pytest.mark.slow
def test_a_head_only_teacher_reads_the_encoder_of_the_same_step():
  """TIPSv2: equal to a teacher whose encoder is the student's copy."""
  spec = make_spec(
    objectives={"dino": dino()},
    weights={"dino": ObjectiveWeight(1.0)},
    teacher_momentum=0.5,
    teacher_ema="heads",
  )
  params, batch = step_samples.params_of(spec, seed=0), make_batch()
  train_step, state, on_device = begin(spec, optax.sgd(0.1), params)
  state, _ = train_step.update(state, on_device)
  old, new, teacher = (
    dict_of(tree["heads"]) for tree in (params, state.params, state.teacher)
  )
  assert set(state.teacher) == {"heads"}
  for name, value in teacher.items():
    mean = (np.asarray(old[name]) + np.asarray(new[name])) / 2
    np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7)
  with pytest.raises(ValueError, match="teacher.ema='all'"):
    state.weights("teacher")

  @jax.jit
  def gradients_of(state, batch):
    (loss, _), grads = gradients.compute_gradients(spec, state, batch)
    return loss, grads

  def compute(state):
    return gradients_of(state, batch)

  copy = {**state.teacher, "image": state.params["image"]}
  other = {**state.teacher, "image": params["image"]}
  loss, grads = compute(state)
  expected, expected_grads = compute(state.replace(teacher=copy))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for name, value in dict_of(expected_grads).items():
    error = np.linalg.norm(dict_of(grads)[name] - value)
    assert error <= 1e-5 * np.linalg.norm(value) + 1e-8, name
  assert abs(compute(state.replace(teacher=other))[0] - loss) > 1e-4


GRAM = build_objective("gram", dict(view="image", teacher="teacher"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(views={}), "contrastive reads the view 'image'"),
    (
      dict(model=dataclasses.replace(make_spec().model, text=None)),
      "contrastive reads text, but",
    ),
    (dict(objectives={}, weights={}), "objectives is empty"),
    (
      dict(objectives={"gram": GRAM}, teacher_ema="heads"),
      "gram would compare the student with",
    ),
  ],
)
def test_invalid_step_specs_are_rejected(changes, message):
  with pytest.raises(ConfigError, match=message):
    make_spec(**changes)


@pytest.mark.parametrize("op", ["keep(0.5", "blocks(0.5"])
def test_masks_have_the_patches_of_the_model(op):
  """Indices for another patch size would select wrong or missing patches."""
  views = [
    build_views({"image": dict(ops=f"resize(32)|{op}{patch})")})
    for patch in ("", ", patch=8")  # Patches of 16 by default.
  ]
  name = op.partition("(")[0]
  message = rf"views.image: {name}\(\) .* write {name}\(..., patch=8\)"
  with pytest.raises(ConfigError, match=message):
    make_spec(views=views[0])
  make_spec(views=views[1])


def test_objective_weight_start_and_ramp():
  weight = ObjectiveWeight(0.5, start=10, ramp=4)
  active = [s for s in (0, 9, 10, 50) if weight.is_active(s)]
  assert active == [10, 50]
  values = [float(weight(s)) for s in (10, 11, 13, 50)]
  np.testing.assert_allclose(values, [0.125, 0.25, 0.5, 0.5])
  # DINOv3's Gram weight by `linear_warmup_cosine_decay`, 0 to 2 in 1000 steps.
  gram = ObjectiveWeight(2.0, ramp=1000, ramp_shape="cosine")
  values = [float(gram(s)) for s in (0, 100, 250, 900, 999, 5000)]
  expected = [1 - np.cos(np.pi * s / 999) for s in (0, 100, 250, 900)]
  np.testing.assert_allclose(values, [*expected, 2, 2], atol=1e-6)


def two_objectives(**weight):
  return make_spec(
    objectives={**make_spec().objectives, "pull": PullToTeacher()},
    weights={
      "contrastive": ObjectiveWeight(1.0),
      "pull": ObjectiveWeight(1.0, **weight),
    },
    teacher_momentum=0.5,
  )


@pytest.mark.slow
def test_a_later_objective_starts_with_the_student_as_teacher():
  spec = two_objectives(start=2)
  assert spec.active_objectives(1) == ("contrastive",)
  assert spec.active_objectives(2) == ("contrastive", "pull")
  params = init_params(spec, jax.random.key(0))
  train_step, state, batch = begin(spec, optax.sgd(0.1), params)
  assert all(train_step.copy_teachers(state, s) is state for s in (0, 1, 3))
  before = np.asarray(state.teacher["image"]["patch_embed"]["kernel"])
  state, metrics = train_step.update(state, batch, spec.active_objectives(0))
  assert "pull/loss" not in metrics
  teacher = state.teacher["image"]["patch_embed"]["kernel"]
  np.testing.assert_array_equal(teacher, before)
  state = train_step.copy_teachers(state, 2)
  np.testing.assert_array_equal(
    state.teacher["image"]["patch_embed"]["kernel"],
    state.params["image"]["patch_embed"]["kernel"],
  )
  _, metrics = train_step.update(state, batch, spec.active_objectives(2))
  assert metrics["pull/loss"] > 0


@dataclasses.dataclass(frozen=True)
class Draw(base.Objective):
  """A random number of each step."""

  view: str = "image"

  def needs(self):
    return base.Needs({self.image: ()})

  def loss_inputs(self, encodings, heads, batch):
    return batch["views"][self.view].images[:, 0]

  def loss(self, loss_inputs, heads, context):
    drawn = jax.random.uniform(context.key)
    return base.Terms(base.WeightedMean(drawn, jnp.float32(1)))


def test_a_loss_draws_equally_on_all_devices():
  """By seed, step and name."""
  spec = make_spec(
    objectives={"draw": Draw()},
    weights={"draw": ObjectiveWeight(1.0)},
    seed=5,
    accumulate=2,
  )
  params = step_samples.params_of(spec)
  train_step, state, batch = begin(spec, optax.sgd(0.1), params, (8, 1, 1))
  for step in range(2):
    state, metrics = train_step.update(state, batch)
    key = step_key(jax.random.key(5), "loss/draw", step)
    want = jax.random.uniform(key)
    np.testing.assert_array_equal(metrics["draw/loss"], want)


def test_parameters_of_inactive_objectives_are_unchanged():
  spec = two_objectives()
  params = init_params(spec, jax.random.key(0))
  config = dict(lr=0.1, weight_decay=0.1, rules=[(".", dict(weight_decay=1.0))])
  tx = optim_samples.build(config, params=params).tx
  train_step, state, batch = begin(spec, tx, params)
  state, _ = train_step.update(state, batch, ("pull",))
  for name in ("text", "heads"):
    jax.tree.map(
      np.testing.assert_array_equal, state.params[name], params[name]
    )
  moved = state.params["image"]["patch_embed"]["kernel"]
  assert np.abs(moved - params["image"]["patch_embed"]["kernel"]).max() > 0.01


def numpy_softmax_loss(log_scale, loss_inputs):
  """CLIP's loss in float64."""
  valid = np.asarray(loss_inputs.valid)
  image, text = (
    np.float64(x)[valid] for x in (loss_inputs.image, loss_inputs.text)
  )
  logits = np.exp(log_scale) * image[:, 0] @ text.T  # The only crop.
  rows = np.log(np.exp(logits).sum(1)) - np.diagonal(logits)
  columns = np.log(np.exp(logits).sum(0)) - np.diagonal(logits)
  return (rows + columns).mean() / 2


def test_temperature_is_clipped_after_each_update():
  """CLIP's projection against NumPy: it reaches both bounds, and leaves one."""
  options = dict(loss_type="softmax", init_scale=1.3, max_scale=1.5)
  spec = make_spec(
    objectives={"contrastive": build_objective("contrastive", options)}
  )
  heads = init_params(spec, jax.random.key(1))["heads"]
  params = {**params_of(), "heads": heads}
  others = dict_of(params).keys() - {"heads/contrastive/logit_scale"}
  spec = dataclasses.replace(spec, frozen=frozenset(others))
  rates = [1.0, 1e4, -1e4, 1.0]
  tx = optax.sgd(lambda count: jnp.asarray(rates)[count])
  train_step, state, batch = begin(spec, tx, params, (2, 2, 2))
  keys = forward.view_keys(spec, jnp.int32(0), 16, None)
  loss_inputs = jax.jit(functools.partial(forward.compute_loss_inputs, spec))(
    params, state, make_batch(), keys
  )["contrastive"]
  expected, values = np.log(1.3), []
  for rate in rates:
    state, _ = train_step.update(state, batch)
    values.append(float(state.params["heads"]["contrastive"]["logit_scale"]))
    up, down = (
      numpy_softmax_loss(expected + step, loss_inputs) for step in (1e-5, -1e-5)
    )
    expected -= rate * (up - down) / 2e-5
    expected = np.clip(expected, 0, np.log(1.5))
    np.testing.assert_allclose(values[-1], expected, rtol=1e-4, atol=1e-7)
  assert {np.float32(0), np.float32(np.log(1.5))} <= set(np.float32(values))
  assert len({round(v, 6) for v in values}) == 4


def test_ema_update():
  ema = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(1.0, jnp.bfloat16)}
  new = {"a": jnp.array([2.0, 0.0]), "b": jnp.array(3.0, jnp.float32)}
  out = ema_update(ema, new, 0.75)
  np.testing.assert_allclose(out["a"], [1.25, 1.5])
  assert out["b"].dtype == jnp.bfloat16 and float(out["b"]) == 1.5
  # (1 + 0) / (10 + 0) at the start; 0.75 once that is larger.
  early = ema_update(ema, new, 0.75, step=0)
  np.testing.assert_allclose(early["a"], [1.9, 0.2], rtol=1e-6)
  late = ema_update(ema, new, 0.75, step=jnp.array(1000))
  np.testing.assert_allclose(late["a"], out["a"])


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
  state = open_run(locked(), tmp_path).train_step.abstract
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  trained = {k: v for k, v in state.params.items() if k != "image"}
  count = sum(x.size for x in jax.tree.leaves(trained))
  assert moments <= 2 * count + 8


@pytest.mark.slow
def test_a_frozen_tower_with_ema_and_gradient_accumulation():
  """The parts change nothing, and neither tower nor average moves."""
  params = dict(flatten_with_names(params_of()))
  frozen = frozenset(name for name in params if name.startswith("image/"))

  def after(parts):
    spec = make_spec(ema_decay=0.9, accumulate=parts, frozen=frozen)
    mesh = mesh_of((1, 1, 1))
    train_step = make_train_step(spec, optax.sgd(0.1), mesh)
    state, batch = train_step.init(params_of()), make_batch()
    for _ in range(2):
      state, metrics = train_step.update(state, shard_batch(batch, mesh))
    tree = {"params": state.params, "ema": state.ema, "metrics": metrics}
    return dict(flatten_with_names(jax.device_get(tree)))

  whole, actual = after(1), after(2)
  for key, value in whole.items():
    error = np.linalg.norm(actual[key] - value)
    assert error <= 1e-6 * np.linalg.norm(value) + 1e-8, key
  for tree in ("params", "ema"):
    for name, before in params.items():
      moved = np.abs(whole[f"{tree}/{name}"] - before).max()
      assert moved == 0 if name in frozen else True, name
    name = "text/token_embedding"
    assert np.abs(whole[f"{tree}/{name}"] - params[name]).max() > 1e-6


@pytest.mark.slow
def test_a_stalling_loader_counts_as_waiting(tmp_path, monkeypatch):
  def stalling(loader, mesh):
    for batch in prefetch_to_device(loader, mesh):
      time.sleep(0.5)
      yield batch

  monkeypatch.setattr(train_loop, "prefetch_to_device", stalling)
  train(smallest(total_steps=4, evals={}), tmp_path)
  rows = [r for r in trainings.rows(tmp_path) if "speed/wait" in r]
  # In seconds, since the share depends on how long a step takes.
  waits = [r["speed/wait"] * r["speed/step_seconds"] for r in rows[1:]]
  assert np.median(waits) >= 0.5, waits
