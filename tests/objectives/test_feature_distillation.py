"""Feature distillation: against NumPy in float64, in the step, on meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_samples import mesh_of

from mtv_jax.augment import views
from mtv_jax.models.two_tower import ModelSpec, init_params
from mtv_jax.models.vit import ImageOutput
from mtv_jax.objectives import base, build_objective
from mtv_jax.objectives.feature_distillation import assign_rows
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops
from mtv_jax.train import forward, initialization
from mtv_jax.train import spec as spec_lib
from mtv_jax.train.step import make_train_step
from mtv_jax.train.teachers import FrozenTeacher, PixelMap
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.resampling import resize_matrix

NAME = "feature_distillation"
STUDENT = ModelSpec.from_config(
  dict(
    variant="mu/8",
    image_size=16,
    width=32,
    heads=2,
    mlp_dim=32,
    depth=1,
    registers=2,
  )  # fmt: skip
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXT = base.Context(step=0, total_steps=10, statistics={})
VIEWS = views.build_views({"image": dict(ops="crop(16, 0.4, 1.0)|flip")})
TEACHERS = {
  # Finer patches at another resolution and normalisation, and two layers.
  "fine": FrozenTeacher(
    ModelSpec.from_config(
      dict(
        variant="mu/4", image_size=12, width=48, heads=2, mlp_dim=32,
        pool="cls", projection=20, depth=2,
      )
    ),
    size=24,
    layers=(0, 1),
    pixels=PixelMap.between(((0.5,) * 3, (0.5,) * 3), (MEAN, STD)),
  ),
  # Coarser patches.
  "coarse": FrozenTeacher(
    ModelSpec.from_config(
      dict(
        variant="mu/16", image_size=16, width=32, heads=2, mlp_dim=32, depth=1
      )
    ),
  ),
}  # fmt: skip


OTHERS = {
  "odd": FrozenTeacher(
    ModelSpec.from_config(dict(variant="mu/8", width=36, image_size=16))
  ),
  "copied": FrozenTeacher(STUDENT, update_every=10),
}


def make(names=("fine", "coarse"), **options):
  teachers = {name: {**TEACHERS, **OTHERS}[name] for name in names}
  return build_objective(NAME, options).resolve(STUDENT, VIEWS, teachers)


# ---------------------------------------------------------------------------
# The loss.


def numpy_adaptor(params, x, eps):
  mlp = params["mlp"]
  x = x @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1)[..., None] + eps)
  x = x * mlp["norm1"]["scale"] + mlp["norm1"]["bias"]
  x = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
  return x @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]


def numpy_resize(x, grid):
  old = math.isqrt(x.shape[-2])
  matrix = np.eye(grid)
  if old != grid:
    matrix = resize_matrix(old, grid, "antialiased")
  x = x.reshape(*x.shape[:-2], old, old, -1)
  x = np.einsum("yh,xw,bnhwd->bnyxd", matrix, matrix, x)
  return x.reshape(*x.shape[:2], grid**2, -1)


def numpy_cosine(x, y):
  lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
  return (x * y).sum(-1) / lengths


def numpy_distance(x, y, kind):
  if kind == "mse":
    return ((x - y) ** 2).mean(-1)
  error = abs(x - y)
  smooth = np.where(error < 1, error**2 / 2, error - 0.5).mean(-1)
  return 0.9 * (1 - numpy_cosine(x, y)) + 0.1 * smooth


def random_outputs(objective, rows=3, crops=2):
  """Random encodings, far from unit scale."""
  rng = np.random.default_rng(0)

  def output(spec, size, layers):
    image = spec.image
    patches = image.grid_of(size, size)[0] ** 2

    def draw(*shape):
      x = rng.normal(1.0, 3.0, (rows, crops, *shape))
      return jnp.asarray(x, jnp.float32)

    return ImageOutput(
      patches=draw(patches, image.width),
      prefix=draw(image.prefix, image.width),
      pooled=draw(image.embed_dim),
      intermediates={
        i: draw(image.prefix + patches, image.width) for i in layers
      },
    )

  outputs = {}
  for encoding, layers in objective.needs().encodings.items():
    frozen = TEACHERS.get(encoding.weights)
    spec = STUDENT if frozen is None else frozen.model
    size = encoding.size or VIEWS[encoding.view].size
    outputs[encoding] = output(spec, size, layers)
  return outputs


def random_statistics(objective):
  """Arbitrary values, so that a wrong order or transpose shows."""
  rng = np.random.default_rng(1)
  return {
    name: jnp.asarray(rng.normal(size=x.shape) / len(x), jnp.float32)
    for name, x in objective.initial_statistics().items()
  }


@pytest.mark.parametrize(
  ("feature_loss", "normalize", "options"),
  [
    ("cosine_smooth_l1", "none", {}),
    ("mse", "phi_s", {"adaptor_eps": 0.5}),
    (
      "mse",
      "none",
      dict(
        normalize_summary="phi_s",
        summary_weights=dict(coarse=0.25),
        summary_tokens=dict(coarse=1),
      ),
    ),
  ],
)
def test_loss_equals_numpy(feature_loss, normalize, options):
  objective = make(
    feature_loss=feature_loss,
    normalize=normalize,
    teacher_weights=dict(coarse=0.5),
    summary_weight=2.0,
    feature_weight=3.0,
    **options,
  )
  heads = objective.heads()
  assert sorted(heads) == [
    "adaptor_coarse_patches", "adaptor_coarse_pooled", "adaptor_fine_layer0",
    "adaptor_fine_layer1", "adaptor_fine_pooled",
  ]  # fmt: skip
  key = jax.random.key(0)
  params = {n: h.init(key, STUDENT) for n, h in heads.items()}
  outputs = random_outputs(objective)

  bound = base.BoundHeads(heads, params)
  given = random_statistics(objective)
  batch = {"statistics": given}
  inputs = objective.loss_inputs(outputs, bound, batch)
  terms = objective.loss(inputs, bound, CONTEXT)

  student, fine, coarse = (
    next(o for e, o in outputs.items() if e.weights == name)
    for name in ("student", "fine", "coarse")
  )
  as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  params, student, fine, coarse, given = map(
    as64, (params, student, fine, coarse, given)
  )

  def predict(name, x):
    eps = options.get("adaptor_eps", 1e-6)
    return numpy_adaptor(params[f"adaptor_{name}"], x, eps)

  methods = dict(pooled=options.get("normalize_summary", "none"))
  assert sorted(given) == sorted(
    f"{target.name}_{statistic}"
    for target in objective.targets
    for statistic in ("mean", "matrix")
    if methods.get(target.kind, normalize) != "none"
  )

  def standardize(name, target):
    if f"{name}_mean" not in given:
      return target
    return (target - given[f"{name}_mean"]) @ given[f"{name}_matrix"].T

  def summary(name, teacher):
    token = options.get("summary_tokens", {}).get(name)
    ours = student.pooled if token is None else student.prefix[:, :, token]
    predicted = predict(f"{name}_pooled", ours)
    target = standardize(f"{name}_pooled", teacher.pooled)
    weight = options.get("summary_weights", {}).get(name, 1.0)
    return weight * (1 - numpy_cosine(predicted, target)).mean()

  def features(name, target, grid):
    predicted = predict(name, numpy_resize(student.patches, grid))
    target = standardize(name, numpy_resize(target, grid))
    return numpy_distance(predicted, target, feature_loss).mean()

  # Without the CLS token, on the student's grid of 2 x 2.
  layers = [
    features(f"fine_layer{i}", fine.intermediates[i][:, :, 1:], 2)
    for i in (0, 1)
  ]
  want = 2 * summary("fine", fine) + 3 * np.mean(layers)
  want += 0.5 * 2 * summary("coarse", coarse)
  # On the teacher's grid of one patch.
  want += 0.5 * 3 * features("coarse_patches", coarse.patches, 1)
  assert float(terms.loss.value()) == pytest.approx(want, rel=1e-5)
  assert float(terms.report["fine_layer0_loss"].value()) == pytest.approx(
    layers[0], rel=1e-5
  )
  assert float(terms.loss.count) == 3


def test_without_adaptors_equal_features_have_no_loss():
  same = FrozenTeacher(STUDENT)
  objective = build_objective(NAME, dict(adaptor="none"))
  objective = objective.resolve(STUDENT, VIEWS, {"same": same})
  assert objective.heads() == {}
  student = next(iter(random_outputs(make(["coarse"])).values()))
  outputs = dict.fromkeys(objective.needs().encodings, student)
  batch = {"statistics": random_statistics(objective)}
  heads = base.BoundHeads({}, {})
  inputs = objective.loss_inputs(outputs, heads, batch)
  loss = objective.loss(inputs, heads, CONTEXT).loss.value()
  assert abs(float(loss)) < 1e-6


def test_rows_of_other_sources_do_not_count():
  objective = make(["coarse"], sources=(1, 2), normalize="none")
  assert objective.needs().fields == ("source",)
  heads = {
    name: head.init(jax.random.key(0), STUDENT)
    for name, head in objective.heads().items()
  }
  heads = base.BoundHeads(objective.heads(), heads)
  encodings = random_outputs(objective)

  def loss(encodings, source):
    batch = {"source": jnp.asarray(source), "statistics": {}}
    inputs = objective.loss_inputs(encodings, heads, batch)
    return objective.loss(inputs, heads, CONTEXT).loss

  some = loss(encodings, [0, 2, 1])
  rows = jax.tree.map(lambda x: x[1:], encodings)
  only = loss(rows, [2, 1])
  np.testing.assert_allclose(some.value(), only.value(), rtol=1e-6)
  assert some.count == 2
  assert loss(encodings, [0, 0, 0]).value() == 0


def test_rows_are_divided_among_the_teachers():
  objective = make(["coarse", "fine"], partition=True, normalize="none")
  heads = {
    name: head.init(jax.random.key(0), STUDENT)
    for name, head in objective.heads().items()
  }
  heads = base.BoundHeads(objective.heads(), heads)
  encodings = random_outputs(objective)
  inputs = objective.loss_inputs(encodings, heads, {"statistics": {}})
  terms = objective.loss(inputs, heads, CONTEXT)
  assert terms.loss.count == 3 and terms.report["labelled"].value() == 1
  for name, losses in inputs.losses.items():
    teacher = 0 if name.startswith("coarse") else 1
    rows = np.asarray(assign_rows(jnp.ones(3), 2)) == teacher
    got = terms.report[f"{name}_loss"].value()
    np.testing.assert_allclose(got, losses[rows].mean(), rtol=1e-6)


@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_a_period_of_sources_gives_no_source_to_one_teacher(teachers):
  rows = np.asarray(assign_rows(jnp.ones(360), teachers))
  assert np.ptp(np.bincount(rows)) == 0
  for period in (2, 3, 4):
    for source in range(period):
      counts = np.bincount(rows[source::period], minlength=teachers)
      assert counts.min() > 0.7 * counts.mean()
  labelled = np.arange(360) % 3 == 0
  ranked = np.asarray(assign_rows(jnp.float32(labelled), teachers))[labelled]
  np.testing.assert_array_equal(ranked, rows[:120])


def test_every_patch_of_a_finer_grid_is_learned():
  """Also if the teacher's patches are four times as large."""
  target = next(t for t in make(["coarse"]).targets if t.kind == "patches")
  target = dataclasses.replace(target, grid=2)
  patches = jnp.ones((1, 1, 64, 3))
  slopes = jax.grad(lambda x: jnp.sum(jnp.square(target.resize(x))))(patches)
  assert np.all(np.abs(slopes) > 1e-3)
  assert slopes.sum() == pytest.approx(2 * 4 * 3, rel=1e-5)


def test_all_teachers_with_a_path_by_default():
  snapshot = FrozenTeacher(STUDENT, snapshot=True)
  objective = build_objective(NAME, {})
  every = {**TEACHERS, "ema": snapshot}
  resolved = objective.resolve(STUDENT, VIEWS, every)
  assert resolved.teachers == ("fine", "coarse")
  # Adding a teacher does not change existing heads.
  one = objective.resolve(STUDENT, VIEWS, {"fine": TEACHERS["fine"]})
  assert one.heads().items() <= resolved.heads().items()


@pytest.mark.parametrize(
  ("names", "options", "message"),
  [
    ([], {}, "config.teachers names no encoder"),
    (["fine"], dict(teachers=["fin"]), r"config.teachers lacks \['fin'\]"),
    (["fine"], dict(teacher_weights=dict(f=1.0)), r"lacks \['f'\]"),
    (["fine"], dict(adaptor="none"), "32 channels can't be compared"),
    (["odd"], {}, "phi_s' of teacher 'odd' with 36 channels: no Hadamard"),
    (["copied"], {}, "teacher 'copied' is copied from the EMA teacher later"),
    (["fine"], dict(summary_weight=0, feature_weight=0), "both 0"),
    (["fine"], dict(summary_tokens=dict(fine=2)), "has 2 prefix tokens"),
    (["fine"], dict(summary_weights=dict(fien=1)), "fien"),
    (
      ["fine"],
      dict(summary_weight=0, summary_weights=dict(fine=1)),
      "summary_weight=0, but",
    ),
    (["odd"], dict(normalize_summary="phi_s", normalize="none"), "36 channels"),
  ],
  ids=[
    "none",
    "unknown",
    "weight",
    "width",
    "odd",
    "copied",
    "weights",
    "summary_tokens",
    "summary_weights",
    "no_summaries",
    "odd_summary",
  ],  # fmt: skip
)
def test_teachers_that_do_not_fit_are_rejected(names, options, message):
  with pytest.raises(ConfigError, match=message):
    make(names, **options)


# ---------------------------------------------------------------------------
# In the train step.


@functools.cache
def make_spec(accumulate=1):
  return spec_lib.StepSpec(
    model=STUDENT,
    dtype="float32",
    objectives={NAME: make(normalize_summary="standardize")},
    weights={NAME: spec_lib.ObjectiveWeight(1.0)},
    views=VIEWS,
    seed=0,
    total_steps=100,
    accumulate=accumulate,
    teachers=TEACHERS,
  )


def make_batch(rows=16):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (rows, 40, 40, 3), dtype=np.uint8),
    "image_size": np.tile([[40, 60]], (rows, 1)).astype(np.int32),
  }


@functools.cache
def frozen_params():
  return {
    name: init_params(teacher.model, jax.random.key(7))
    for name, teacher in TEACHERS.items()
  }


def initial_state(train_step):
  spec = train_step.spec
  params = jax.jit(functools.partial(spec_lib.init_params, spec))
  return train_step.init(params(jax.random.key(1)), frozen_params())


@functools.cache
def moments_on(shape, accumulate=1):
  mesh = mesh_of(shape)
  train_step = make_train_step(make_spec(accumulate), optax.sgd(0.5), mesh)
  state, moments = initial_state(train_step), {}
  for step in range(2):
    batch = shard_batch(make_batch(), mesh)
    parts = initialization.jit_feature_moments(train_step)(
      state, batch, (NAME,), np.int32(step)
    )
    for key, arrays in jax.device_get(parts)[NAME].items():
      initialization.merge_parts(moments, key, arrays)
  return moments


@pytest.mark.slow
def test_statistics_give_the_targets_unit_variance():
  """On the fitted examples, at the grid and in the crops of the loss."""
  moments = moments_on((1, 1, 1))
  assert {k: int(m.count) for k, m in moments.items()} == {
    "fine_pooled": 32, "fine_layer0": 2 * 16 * 4, "fine_layer1": 2 * 16 * 4,
    "coarse_pooled": 32, "coarse_patches": 32,
  }  # fmt: skip
  objective = make_spec().objectives[NAME]
  fitted = objective.fit_statistics(moments)
  shapes = jax.tree.map(jnp.shape, objective.initial_statistics())
  assert jax.tree.map(np.shape, fitted) == shapes
  for name, values in moments.items():
    matrix = fitted[f"{name}_matrix"]
    output = matrix @ values.covariance @ matrix.T
    np.testing.assert_allclose(np.diag(output), 1, rtol=1e-3)


@pytest.mark.slow
def test_moments_do_not_depend_on_the_mesh():
  for key, sharded in moments_on((2, 2, 2), accumulate=2).items():
    single = moments_on((1, 1, 1))[key]
    assert sharded.count == single.count
    np.testing.assert_allclose(sharded.mean, single.mean, atol=1e-5)
    np.testing.assert_allclose(sharded.covariance, single.covariance, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_sees_the_crops_at_its_size_in_its_pixels():
  """The step applies `pixels`, see tests/train/test_teachers.py."""
  spec = make_spec()
  assert sorted(map(str, spec.plan)) == [
    "image(image, coarse)", "image(image, student)", "image(image@24, fine)",
  ]  # fmt: skip
  batch = jax.tree.map(jnp.asarray, make_batch(4))
  made = flops.make_views(spec, batch)
  np.testing.assert_array_equal(made["image"].box, made["image@24"].box)
  assert len(np.unique(made["image"].box)) > 4

  # As a run of the teacher's own would normalise them.
  own = views.build_views(
    {"image": dict(ops="crop(24, 0.4, 1.0)|flip")}, mean=MEAN, std=STD
  )
  keys = forward.view_keys(spec, jnp.zeros((), jnp.int32), 4, None)["image"]
  want = own["image"](batch["image"], batch["image_size"], keys, "float32")
  images = made["image@24"].images
  encoding = next(e for e in spec.plan if e.weights == "fine")
  got = spec.teachers[encoding.weights].pixels(images)
  np.testing.assert_allclose(got, want.images, atol=1e-5)


@pytest.mark.slow
def test_the_cost_is_that_of_its_parts():
  batch = jax.eval_shape(lambda: make_batch(4))
  costs = flops.step_flops(make_spec(), batch, optax.adam(1e-3))
  assert costs.traced == pytest.approx(costs.total, rel=0.01)
  assert costs.parts["image(image@24, fine)"] > 0
