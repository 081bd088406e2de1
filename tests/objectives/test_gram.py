"""Gram anchoring: against NumPy in float64, in the step, on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtv_jax.augment import views
from mtv_jax.models import positions
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective, gram
from mtv_jax.perf import flops
from mtv_jax.train import spec as spec_lib
from mtv_jax.utils.errors import ConfigError


def numpy_loss_and_gradient(student, teacher):
  """The mean over the matrix of squared differences, and its gradient."""
  losses, slopes = [], []
  for s, t in zip(student, teacher, strict=True):
    length = np.linalg.norm(s, axis=1, keepdims=True)
    x, y = s / length, t / np.linalg.norm(t, axis=1, keepdims=True)
    difference = x @ x.T - y @ y.T
    losses.append((difference**2).mean())
    of_x = 4 * difference @ x / difference.size
    slopes.append((of_x - x * (x * of_x).sum(1, keepdims=True)) / length)
  return np.array(losses), np.stack(slopes)


@pytest.mark.parametrize("chunk", [256, 4, 1])
def test_loss_and_gradient_equal_numpy(chunk, monkeypatch):
  monkeypatch.setattr(gram, "_CHUNK", chunk)
  rng = np.random.default_rng(0)
  student = rng.normal(size=(3, 9, 16)) * rng.uniform(0.1, 5, (3, 9, 1))
  teacher = rng.normal(size=(3, 9, 24))  # Another width.
  student, teacher = np.float32(student), np.float32(teacher)
  values, slopes = numpy_loss_and_gradient(
    np.float64(student), np.float64(teacher)
  )

  def total(s):
    losses = gram.gram_losses(s, jnp.asarray(teacher))
    return losses.sum(), losses

  grad, got = jax.grad(total, has_aux=True)(jnp.asarray(student))
  np.testing.assert_allclose(got, values, rtol=1e-5)
  np.testing.assert_allclose(grad, slopes, rtol=1e-5, atol=1e-6 * slopes.std())


def test_features_of_twice_the_resolution_are_resampled_by_keys_cubic():
  """Halfway between pixels, a = -0.75 weights -3/32, 19/32, 19/32, -3/32."""
  rng = np.random.default_rng(1)
  grid = rng.normal(size=(2, 8, 8, 5))
  weights = np.array([-3, 19, 19, -3]) / 32
  padded = np.pad(grid, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
  want = np.zeros((2, 4, 4, 5))
  for i, j in np.ndindex(4, 4):
    part = padded[:, i : i + 7 : 2, j : j + 7 : 2]
    want += weights[i] * weights[j] * part
  patches = jnp.asarray(grid.reshape(2, 64, 5), jnp.float32)
  got = positions.resize_patches(patches, 16)
  np.testing.assert_allclose(got, want.reshape(2, 16, 5), atol=1e-6)
  assert positions.resize_patches(patches, 64) is patches


# ---------------------------------------------------------------------------
# In the train step.

VIEWS = {
  "global": dict(
    count=2,
    ops="crop(16, 0.4, 1.0)|flip|solarize(1.0)|blocks(0.2, 0.5, patch=8)",
  ),
  "gram": dict(count=2, ops="crop(32, 0.4, 1.0)|flip", crops_of="global"),
}
SHAPE = dict(variant="mu/8", image_size=16, width=32, heads=2, mlp_dim=64)


@functools.cache
def make_spec():
  built = views.build_views(VIEWS)
  model = ModelSpec.from_config(dict(SHAPE, mask_token=True))
  entry = dict(view_teacher="gram")
  return spec_lib.StepSpec(
    model=model,
    dtype="float32",
    objectives={"gram": build_objective("gram", entry).resolve(model, built)},
    weights={"gram": spec_lib.ObjectiveWeight(1.0)},
    views=built,
    seed=0,
    total_steps=100,
    # Wider and deeper than the student.
    teachers={
      "gram": spec_lib.FrozenTeacher(
        ModelSpec.from_config(dict(SHAPE, width=48, depth=3))
      )
    },
  )


def make_batch(rows=16):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (rows, 40, 40, 3), dtype=np.uint8),
    "image_size": np.tile([[40, 60]], (rows, 1)).astype(np.int32),
  }


def test_a_teacher_has_no_moments():
  abstract = spec_lib.abstract_state(make_spec(), optax.adam(1e-3))
  student, teacher, moments = (
    sum(x.size for x in jax.tree.leaves(tree))
    for tree in (abstract.params, abstract.teachers, abstract.opt_state)
  )
  assert moments == 2 * student + 1 and teacher > student


@pytest.mark.slow
def test_the_teacher_sees_the_same_crops_undistorted():
  spec, batch = make_spec(), make_batch(4)
  batch["image"][:] = 240
  made = flops.make_views(spec, jax.tree.map(jnp.asarray, batch))
  student, teacher = made["global"], made["gram"]
  np.testing.assert_array_equal(student.box, teacher.box)
  np.testing.assert_array_equal(student.flipped, teacher.flipped)
  assert len(np.unique(student.box)) > 8
  assert teacher.images.shape[2] == 2 * student.images.shape[2]
  assert teacher.mask is None and student.mask.any()
  # The student's are solarised.
  np.testing.assert_allclose(teacher.images, 240 / 127.5 - 1, atol=1e-5)
  np.testing.assert_allclose(student.images, 1 - 240 / 127.5, atol=1e-5)


@pytest.mark.slow
def test_the_cost_of_a_teacher_is_a_forward_pass():
  spec, batch = make_spec(), jax.eval_shape(lambda: make_batch(4))
  costs = flops.step_flops(spec, batch, optax.adam(1e-3))
  assert costs.traced == pytest.approx(costs.total, rel=0.01)
  parts = costs.parts
  assert parts["image(gram, gram)"] > parts["image(global, student)"]


def test_the_size_of_a_teacher_makes_its_view():
  built = views.build_views({"global": VIEWS["global"]})
  spec = make_spec()
  teachers = {"gram": dataclasses.replace(spec.teachers["gram"], size=32)}
  objective = gram.Gram().resolve(spec.model, built, teachers)
  sized = dataclasses.replace(
    spec, objectives={"gram": objective}, views=built, teachers=teachers
  )
  assert sorted(map(str, sized.plan)) == [
    "image(global, student)", "image(global@32, gram)",
  ]  # fmt: skip
  view = sized.views["global@32"]
  assert (view.size, view.count, view.patch) == (32, 2, None)
  assert view.crops_of == "global"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(count=1), "count, crop or flip"),
    (dict(ops="crop(32, 0.3, 1.0)|flip"), "count, crop or flip"),
    (dict(crops_of="globl"), "expected one of \\['global'\\]"),
    (dict(crops_of=None), "crops_of='global'"),
    (dict(ops="crop(32, 0.4, 1.0)|flip|keep(0.25)"), "drops .*without keep"),
  ],
  ids=["count", "area", "name", "none", "keep"],
)
def test_views_that_do_not_fit_are_rejected(changes, message):
  resampled = VIEWS["gram"]["ops"].replace("1.0)", "1.0, method='bicubic')")
  assert views.build_views(
    VIEWS | {"gram": VIEWS["gram"] | dict(ops=resampled)}
  )
  with pytest.raises(ConfigError, match=message):
    built = views.build_views({**VIEWS, "gram": {**VIEWS["gram"], **changes}})
    gram.Gram(view_teacher="gram").resolve(make_spec().model, built)


def test_an_unknown_teacher_is_rejected():
  with pytest.raises(ConfigError, match="the teacher 'gram', which"):
    dataclasses.replace(make_spec(), teachers={})
  assert str(base.Encoding("image", "v", "gram")) == "image(v, gram)"
