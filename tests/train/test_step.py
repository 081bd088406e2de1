"""The train step: what it computes, alone and on meshes of eight devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_mtv

from mtv_jax.augment import views
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel import sharding
from mtv_jax.perf import hlo, hlo_text
from mtv_jax.train import gradients
from mtv_jax.train import step as step_lib
from mtv_jax.train import step_spec as recipe_lib
from mtv_jax.utils import tree as trees


def dict_of(tree):
  return dict(trees.flatten_names(tree))


MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


def make_recipe(**changes):
  spec = ModelSpec.from_config(
    dict(
      variant="mu/8",
      image_size=16,
      text=dict(variant="mu", length=8, vocab_size=32),
    )
  )
  recipe = recipe_lib.Recipe(
    spec=spec,
    dtype="float32",
    objectives={
      "contrastive": build_objective("contrastive", dict(init_bias=-2.0))
    },
    weights={"contrastive": recipe_lib.Weight(1.0)},
    views=views.build_views({"image": dict(count=1, ops="resize(16)")}),
    seed=0,
    total_steps=100,
  )
  return dataclasses.replace(recipe, **changes)


def make_batch(rows=16):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (rows, 24, 24, 3), dtype=np.uint8),
    "image_size": np.full((rows, 2), 24, np.int32),
    "caption": rng.integers(2, 32, (rows, 8), dtype=np.int32),
    # Uneven over the devices: the last ones have nothing to contrast.
    "caption_valid": np.arange(rows) < rows - 3,
  }


def mesh_of(shape):
  return sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))


@functools.cache
def params_of():
  return jax.jit(functools.partial(recipe_lib.init_params, make_recipe()))(
    jax.random.key(1)
  )


def gradients_on(mesh, rules=()):
  recipe, params = make_recipe(), params_of()
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh, rules)
  state = program.init(params)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def compute(state, batch):
    return jax.grad(lambda p: gradients.total_loss(recipe, p, state, batch)[0])(
      state.params
    )

  return compute(state, sharding.place_batch(make_batch(), mesh))


def three_steps(mesh):
  program = step_lib.make_program(make_recipe(), optax.sgd(0.1), mesh)
  state = program.init(params_of())
  batch = sharding.place_batch(make_batch(), mesh)
  for _ in range(3):
    state, metrics = program.update(state, batch)
  return jax.device_get(state.params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone():
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  return jax.device_get(gradients_on(mesh)), *three_steps(mesh)


@pytest.mark.parametrize(
  "shape",
  [
    shape if shape == (2, 2, 2) else pytest.param(shape, marks=pytest.mark.slow)
    for shape in MESHES
  ],
  ids=str,
)
def test_gradients_and_parameters_equal_those_of_one_device(alone, shape):
  mesh = mesh_of(shape)
  expected_gradients, expected_params, expected_metrics = alone
  found = dict_of(jax.device_get(gradients_on(mesh)))
  for name, expected in dict_of(expected_gradients).items():
    error = np.linalg.norm(found[name] - expected)
    assert error <= 1e-5 * np.linalg.norm(expected) + 1e-8, name

  params, metrics = three_steps(mesh)
  params, start = dict_of(params), dict_of(params_of())
  moved = 0
  for name, expected in dict_of(expected_params).items():
    error = np.linalg.norm(params[name] - expected)
    assert error <= 1e-5 * np.linalg.norm(expected) + 1e-8, name
    moved += np.linalg.norm(expected - start[name]) > 1e-4
  assert moved > len(params) / 2
  for name, expected in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, err_msg=name)


def test_fsdp_is_gathered_wherever_a_rule_of_the_config_puts_it(alone):
  """Also of what the built-in rules leave whole."""
  rules = [
    (r"blocks/mlp/fc1/kernel$", (None, "fsdp")),
    (r"blocks/attention/qkv/(kernel|bias)$", ("fsdp",)),
    (r"norm\d?/scale$", ("fsdp",)),
    (r"blocks/mlp/fc2/kernel$", ("fsdp", None, None)),
  ]
  found = jax.device_get(gradients_on(mesh_of((2, 4, 1)), rules))
  found = dict_of(found)
  for name, expected in dict_of(alone[0]).items():
    error = np.linalg.norm(found[name] - expected)
    assert error <= 1e-5 * np.linalg.norm(expected) + 1e-8, name


def test_the_first_loss_is_the_formula_s():
  recipe, params, batch = make_recipe(), params_of(), make_batch()
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.sgd(0.0), mesh)
  _, metrics = program.update(
    program.init(params), sharding.place_batch(batch, mesh)
  )

  x = jax.image.resize(
    batch["image"].astype("float32"), (16, 16, 16, 3), "linear"
  )
  image = recipe.towers["image"].apply(
    {"params": params["image"]}, x / 127.5 - 1
  )
  text = recipe.towers["text"].apply(
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


def test_the_ema_follows_and_the_step_counts():
  recipe, params = make_recipe(ema_decay=0.9), params_of()
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.sgd(0.5), mesh)
  state, _ = program.update(
    program.init(params), sharding.place_batch(make_batch(), mesh)
  )
  assert int(state.step) == 1
  assert state.teacher == {}
  name = "image/patch_embed/kernel"
  before, after, ema = (
    np.asarray(dict_of(t)[name]) for t in (params, state.params, state.ema)
  )
  np.testing.assert_allclose(
    # It warms up: after the first update its decay is 1 / 10, not 0.9.
    ema,
    0.1 * before + 0.9 * after,
    rtol=1e-5,
    atol=1e-7,
  )
  assert np.abs(after - before).max() > 1e-4


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


def test_a_teacher_is_kept_when_an_objective_reads_one():
  recipe = make_recipe(
    objectives={"pull": PullToTeacher()},
    weights={"pull": recipe_lib.Weight(1.0)},
    teacher_momentum=0.5,
  )
  params = recipe_lib.init_params(recipe, jax.random.key(0))
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh)
  state, metrics = program.update(
    program.init(params), sharding.place_batch(make_batch(), mesh)
  )
  assert metrics["grad_norm"] > 0
  assert set(state.teacher) == {"image", "heads"}
  teacher, before, after = (
    np.asarray(tree["image"]["patch_embed"]["kernel"])
    for tree in (state.teacher, params, state.params)
  )
  np.testing.assert_allclose(
    teacher, 0.5 * before + 0.5 * after, rtol=1e-5, atol=1e-7
  )


def test_a_recipe_that_can_not_be_computed_is_refused():
  with pytest.raises(ValueError, match="view 'image'"):
    make_recipe(views={})
  with pytest.raises(ValueError, match="model.text"):
    make_recipe(spec=dataclasses.replace(make_recipe().spec, text=None))
  with pytest.raises(ValueError, match="objectives is empty"):
    make_recipe(objectives={}, weights={})


def test_a_weight_starts_and_rises():
  weight = recipe_lib.Weight(0.5, start=10, ramp=4)
  assert [weight.active(s) for s in (0, 9, 10, 50)] == [
    False,
    False,
    True,
    True,
  ]
  values = [float(weight(s)) for s in (10, 11, 13, 50)]
  np.testing.assert_allclose(values, [0.125, 0.25, 0.5, 0.5])


def two_objectives(**weight):
  return make_recipe(
    objectives={**make_recipe().objectives, "pull": PullToTeacher()},
    weights={
      "contrastive": recipe_lib.Weight(1.0),
      "pull": recipe_lib.Weight(1.0, **weight),
    },
    teacher_momentum=0.5,
  )


@pytest.mark.slow
def test_an_objective_joins_late_with_a_teacher_that_is_the_student():
  recipe = two_objectives(start=2)
  assert recipe.active(1) == ("contrastive",)
  assert recipe.active(2) == ("contrastive", "pull")
  assert [recipe.teacher_starts(s) for s in range(4)] == [0, 0, 1, 0]
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh)
  state = program.init(recipe_lib.init_params(recipe, jax.random.key(0)))
  batch = sharding.place_batch(make_batch(), mesh)
  before = np.asarray(state.teacher["image"]["patch_embed"]["kernel"])
  state, metrics = program.update(state, batch, recipe.active(0))
  assert "pull/loss" not in metrics
  teacher = state.teacher["image"]["patch_embed"]["kernel"]
  np.testing.assert_array_equal(teacher, before)
  state = program.restart_teacher(state)
  np.testing.assert_array_equal(
    state.teacher["image"]["patch_embed"]["kernel"],
    state.params["image"]["patch_embed"]["kernel"],
  )
  _, metrics = program.update(state, batch, recipe.active(2))
  assert metrics["pull/loss"] > 0


def test_what_no_active_objective_reads_stays_where_it_is():
  recipe = two_objectives()
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.adamw(0.1), mesh)
  params = recipe_lib.init_params(recipe, jax.random.key(0))
  state, _ = program.update(
    program.init(params), sharding.place_batch(make_batch(), mesh), ("pull",)
  )
  for name in ("text", "heads"):
    jax.tree.map(
      np.testing.assert_array_equal, state.params[name], params[name]
    )
  moved = state.params["image"]["patch_embed"]["kernel"]
  assert np.abs(moved - params["image"]["patch_embed"]["kernel"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_gradients_in_parts_are_those_of_the_whole_batch(parts):
  recipe = two_objectives()
  mesh = sharding.make_mesh(dict(data=2), jax.devices()[:2])
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh)
  params = recipe_lib.init_params(recipe, jax.random.key(1))
  # Away from its teacher, where the gradient of PullToTeacher is not special.
  state = program.init(params)
  batch = sharding.place_batch(make_batch(), mesh)

  def compute(count):
    part = dataclasses.replace(recipe, accumulate=count)
    return jax.jit(functools.partial(gradients.compute, part))(state, batch)

  (loss, _), expected = compute(1)
  (found_loss, _), found = compute(parts)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
  found = dict_of(jax.device_get(found))
  for name, value in dict_of(jax.device_get(expected)).items():
    error = np.linalg.norm(found[name] - value)
    assert error <= 1e-5 * np.linalg.norm(value) + 1e-8, name


@pytest.mark.slow
def test_encoder_norms_are_each_objective_s_own():
  recipe = two_objectives()
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh)
  state = program.init(recipe_lib.init_params(recipe, jax.random.key(1)))
  batch = sharding.place_batch(make_batch(), mesh)
  norms = program.encoder_norms(state, batch, ("contrastive", "pull"))
  for name in norms:
    alone = recipe.only((name,))
    compute = jax.jit(functools.partial(gradients.compute, alone))
    grads = compute(state, batch)[1]
    expected = optax.tree.norm(grads["image"])
    np.testing.assert_allclose(norms[name], expected, rtol=1e-5)
    assert expected > 0


WHOLE = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_no_activation_of_the_whole_recipe_is_gathered(shape):
  """Of the compiled step: what the devices hand to all is small."""
  mesh = mesh_of(shape)
  recipe = tiny_mtv.built()
  program = step_lib.make_program(recipe, optax.sgd(0.1), mesh)
  split = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
    for name, x in tiny_mtv.rows().items()
  }
  compiled = program.compiled().lower(program.abstract, batch).compile()
  rows = hlo.collectives(compiled)
  gathers = [row for row in rows if row.kind == "all-gather"]
  sizes = [x.size * 4 for x in jax.tree.leaves(program.abstract.params)]
  large = [row for row in gathers if row.result > max(sizes)]
  assert not large, large
  if shape == (8, 1, 1):
    # Whole parameters everywhere. Logits of Sinkhorn stay by rows, and KoLeo
    # goes around a ring.
    assert not gathers, gathers
  if mesh.shape["tensor"] == 1:
    wrong = sent_by_towers_beside_parameters(rows, program.abstract.params)
    assert not wrong, wrong


def sent_by_towers_beside_parameters(rows, params):
  """Exchanges within towers that carry more than parameters and gradients.

  Looking up words is left out: of a vocabulary that is split by channels it
  does gather what it has found.
  """
  matrices, vectors = parameter_shapes(params)

  def known(shape):
    return no_ones(shape.dims) in matrices or math.prod(shape.dims) in vectors

  return [
    row
    for row in rows
    if re.search("/(ViT|TextTower)/", row.scope)
    and "/jit(_take)/" not in row.scope
    and (
      not all(map(known, hlo_text.shapes(row.shape)))
      or (row.kind == "all-reduce" and "transpose(" not in row.scope)
    )
  ]


def parameter_shapes(params):
  """Of layers: shapes, whole and split once by `fsdp`, and vectors' lengths.

  Vectors may be cut by heads, so that only their length says what they are.
  """
  matrices, vectors = set(), {1}
  for name, leaf in dict_of(params).items():
    dims = leaf.shape[1:] if "/blocks/" in name else leaf.shape
    fsdp = leaf.sharding.mesh.shape["fsdp"]
    matrices.add(no_ones(dims))
    for i, size in enumerate(dims):
      part = (*dims[:i], size // fsdp, *dims[i + 1 :])
      matrices.add(no_ones(part))
    if len(dims) == 1:
      vectors |= {dims[0], dims[0] // fsdp}
  return matrices, vectors


def no_ones(dims):
  """Sizes, sorted, as the compiler transposes; without those of 1."""
  return tuple(sorted(size for size in dims if size > 1))
