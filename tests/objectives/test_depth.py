"""The depth losses against NumPy in float64, edge cases and invariances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prototype_samples import numeric_gradient

from mtv_jax.augment import geometry, views
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ImageOutput
from mtv_jax.objectives import base, build_objective, depth
from mtv_jax.utils.errors import ConfigError

SIDE = 8


def numpy_standardise(x, valid):
  values = np.sort(x[valid])
  if not len(values):
    return np.zeros_like(x)
  median = values[(len(values) - 1) // 2]
  scale = np.abs(values - median).mean()
  return np.where(valid, (x - median) / max(scale, 1e-3), 0.0)


def numpy_ssi(p, d, valid, trim=0.1):
  residual = numpy_standardise(p, valid) - numpy_standardise(d, valid)
  sizes = np.sort(np.abs(residual[valid]))
  count = math.ceil(round((1 - trim) * len(sizes), 9))
  return sizes[:count].mean() if count else 0.0


def numpy_gradient_matching(p, d, valid, scales=4):
  residual = numpy_standardise(p, valid) - numpy_standardise(d, valid)
  total = 0.0
  for k in range(scales):
    r, m = residual[:: 2**k, :: 2**k], valid[:: 2**k, :: 2**k]
    summed = 0.0
    for y, x in np.ndindex(*r.shape):
      for to in ((y + 1, x), (y, x + 1)):
        if to[0] < len(r) and to[1] < len(r[0]) and m[y, x] and m[to]:
          summed += abs(r[to] - r[y, x])
    total += summed / max(m.sum(), 1)
  return total


def numpy_loss(p, d, valid):
  return numpy_ssi(p, d, valid) + 2 * numpy_gradient_matching(p, d, valid)


def _errors(p, d, valid, **options):
  return depth.map_errors(
    jnp.asarray(p, jnp.float32),
    jnp.asarray(d, jnp.float32),
    jnp.asarray(valid),
    **options,
  )


@jax.jit
def losses(p, d, valid):
  errors = depth.map_errors(p, d, valid)
  return errors.ssi, errors.gradient


@jax.jit
def slope(p, d, valid):
  def total(p):
    errors = depth.map_errors(p, d, valid)
    return (errors.ssi + 2 * errors.gradient).sum()

  return jax.grad(total)(p)


def _pixels(*pixels):
  valid = np.zeros((SIDE, SIDE), bool)
  for pixel in pixels:
    valid[pixel] = True
  return valid


def _cases():
  rng = np.random.default_rng(0)
  p, d = rng.normal(size=(2, SIDE, SIDE))
  everything, some = np.ones((SIDE, SIDE), bool), rng.random(p.shape) < 0.6
  wide = np.where(rng.random(p.shape) < 0.1, 50.0, 1.0)
  return {
    "random": (p, d, everything),
    "some valid": (p, d, some),
    "outliers": (p * wide, d, everything),
    "small": (1e-2 * p + 5, d, some),
    "two valid": (p, d, _pixels((1, 1), (1, 2))),
    "flat prediction": (np.full_like(p, 0.3), d, everything),
    "nearly flat prediction": (1e-4 * p, d, everything),
    "one valid": (p, d, _pixels((3, 4))),
    "none valid": (p, d, ~everything),
    "flat label": (p, np.full_like(d, 0.7), everything),
  }


CASES = _cases()
# Cases where the loss is differentiable, without kinks.
SMOOTH = (
  "random",
  "some valid",
  "outliers",
  "small",
  "nearly flat prediction",
)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_numpy(case):
  p, d, valid = CASES[case]
  # A batch of one.
  ssi, gradient = losses(*(jnp.asarray(x)[None] for x in CASES[case]))
  if case in ("one valid", "none valid", "flat label"):
    # Such a label carries no information and is ignored.
    assert ssi == gradient == _errors(p[None], d[None], valid[None]).labelled
    assert ssi == 0
    return
  np.testing.assert_allclose(ssi[0], numpy_ssi(p, d, valid), rtol=1e-5)
  np.testing.assert_allclose(
    gradient[0], numpy_gradient_matching(p, d, valid), rtol=1e-5
  )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_and_equal_numpy(case):
  p, d, valid = CASES[case]
  result = np.asarray(slope(*(jnp.asarray(x)[None] for x in CASES[case])))[0]
  assert np.isfinite(result).all()
  # The floor of the scale bounds them.
  assert np.abs(result).sum() < 1e5
  if case in SMOOTH:
    # The loss is smooth between its kinks.
    expected = numeric_gradient(lambda p: numpy_loss(p, d, valid), p, step=1e-6)
    error = np.linalg.norm(result - expected)
    assert error < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("a", "b"), [(1.0, 3.0), (250.0, -40.0), (0.1, 0.0)])
def test_errors_are_invariant_to_scale_and_shift(a, b):
  p, d, valid = (x[None] for x in CASES["some valid"])
  expected = np.asarray(losses(p, d, valid))
  np.testing.assert_allclose(losses(a * p + b, d, valid), expected, rtol=1e-4)
  # If the loss is invariant to scale, its gradient is inverse to the scale.
  np.testing.assert_allclose(
    a * slope(a * p + b, d, valid), slope(p, d, valid), rtol=1e-2, atol=1e-4
  )


def test_trimming_excludes_the_largest_tenth():
  residual = np.random.default_rng(3).normal(size=(1, 10, 10))
  expected = np.sort(np.abs(residual).ravel())[:90].mean()
  worst = np.argsort(np.abs(residual).ravel())[-10:]
  residual.flat[worst] *= 1e4
  valid = np.ones(residual.shape, bool)

  def error(r):
    return depth.trimmed_error(r, jnp.asarray(valid), 0.1)[0]

  value, grad = jax.value_and_grad(error)(jnp.asarray(residual, jnp.float32))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert not np.asarray(grad).ravel()[worst].any()
  assert (np.asarray(grad) != 0).sum() == 90


@pytest.mark.parametrize(
  ("trim", "pixels", "count"),
  [(0.1, 11, 10), (0.1, 10, 9), (0.1, 9, 9), (0.0, 7, 7), (0.2, 100, 80)],
)
def test_number_of_residuals_after_trimming(trim, pixels, count):
  residual = jnp.arange(1.0, pixels + 1).reshape(1, 1, -1)
  valid = jnp.ones(residual.shape, bool)
  result = depth.trimmed_error(residual, valid, trim)[0]
  np.testing.assert_allclose(result, np.arange(1, count + 1).mean(), rtol=1e-6)


def test_equal_residuals_at_the_threshold_share_the_weight():
  residual = jnp.array([[[1.0, 2.0, 2.0, 2.0, 0.0]]])
  valid = jnp.ones(residual.shape, bool)
  value, grad = jax.value_and_grad(
    lambda r: depth.trimmed_error(r, valid, 0.4)[0]
  )(residual)
  np.testing.assert_allclose(value, (0 + 1 + 2) / 3, rtol=1e-6)
  np.testing.assert_allclose(grad[0, 0, 1:4], 1 / 9, rtol=1e-6)


def test_affine_error_equals_least_squares():
  p, d, valid = CASES["some valid"]
  p = p + 2 * d
  a, b = np.polyfit(p[valid], d[valid], 1)
  rms = np.sqrt(np.mean((a * p + b - d)[valid] ** 2))
  args = (jnp.asarray(x)[None] for x in (p, d, valid))
  result = depth.affine_error(*args)[0]
  np.testing.assert_allclose(result, rms / d[valid].std(), rtol=1e-5)
  flat = depth.affine_error(*(jnp.asarray(x)[None] for x in (0 * p, d, valid)))
  assert flat[0] == 1


# The objective.


SPEC = ModelSpec.from_config(dict(variant="mu/8", image_size=16))


def _resolved(**options):
  view = options.pop("ops", "resize(16)")
  return build_objective("depth", dict(min_pixels=4, **options)).resolve(
    SPEC, views.build_views({"image": dict(ops=view)})
  )


@pytest.fixture(scope="module")
def parts():
  objective = _resolved()
  head = objective.heads()["depth"]
  params = jax.jit(lambda key: head.init(key, SPEC))(jax.random.key(0))
  return objective, {"depth": params}


def _view_batch(rng, rows, count):
  corner = rng.uniform(0, 0.4, (rows, count, 2))
  extent = rng.uniform(0.3, 0.6, (rows, count, 2))
  return views.ViewBatch(
    images=jnp.zeros((rows, count, 16, 16, 3)),
    box=jnp.asarray(np.concatenate([corner, corner + extent], -1), "float32"),
    flipped=jnp.asarray(rng.random((rows, count)) < 0.5),
  )


def _output(rng, rows, count, prefix):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return ImageOutput(
    patches=draw(rows, count, 4, 64),
    prefix=draw(rows, count, prefix, 64),
    pooled=draw(rows, count, 64),
    intermediates={i: draw(rows, count, prefix + 4, 64) for i in (0, 1)},
  )


def _loss_inputs(parts, output, view, label):
  objective, params = parts
  return objective.loss_inputs(
    {base.Encoding("image", "image"): output},
    base.BoundHeads(objective.heads(), params),
    {"views": {"image": view}, "depth": label},
  )


@pytest.mark.parametrize("prefix", [0, 3])
def test_loss_inputs_and_loss_average_over_the_labelled_crops(parts, prefix):
  rng = np.random.default_rng(2)
  rows, count = 4, 2
  view, output = (
    _view_batch(rng, rows, count),
    _output(rng, rows, count, prefix),
  )
  label = rng.integers(1, 65536, (rows, 12, 12)).astype(np.uint16)
  label[1] = 0  # An image without a label.
  label[2, :, :7] = 0
  objective, params = parts
  result = jax.jit(lambda o, m, l: _loss_inputs(parts, o, m, l))(
    output, view, jnp.asarray(label)
  )

  stages = [
    output.intermediates[i][:, :, prefix:].reshape(-1, 2, 2, 64)
    for i in objective.head.taps
  ]
  heads = base.BoundHeads(objective.heads(), params)
  predicted = np.float64(heads["depth"](stages, (8, 8)))
  maps, valid = geometry.crop_depth(jnp.asarray(label), view, 8)
  ssi, gradient, counted = [], [], []
  for p, d, m in zip(
    predicted, np.float64(maps), np.asarray(valid), strict=True
  ):
    counted.append(m.sum() >= 4)
    ssi.append(numpy_ssi(p, d, m) * counted[-1])
    gradient.append(numpy_gradient_matching(p, d, m) * counted[-1])
  assert counted[2:4] == [False, False]
  assert sum(counted) >= 4
  for name, values in dict(
    ssi=ssi, gradient=gradient, labelled=counted
  ).items():
    expected = np.reshape(values, (rows, count)).sum(1)
    np.testing.assert_allclose(
      getattr(result, name), expected, rtol=1e-4, err_msg=name
    )
  terms = objective.loss(result, heads, base.Context(0, 1, {}))
  expected = (np.sum(ssi) + 2 * np.sum(gradient)) / np.sum(counted)
  np.testing.assert_allclose(terms.loss.value(), expected, rtol=1e-4)
  labelled = terms.report["labelled"].value()
  np.testing.assert_allclose(labelled, np.mean(counted))


def test_labels_are_cropped_and_flipped_like_the_view():
  label = np.arange(64, dtype=np.uint16).reshape(1, 8, 8) * 1000
  view = views.ViewBatch(
    images=jnp.zeros((1, 1, 16, 16, 3)),
    box=jnp.array([[[0.5, 0.0, 1.0, 0.5]]]),
    flipped=jnp.array([[True]]),
  )
  values, valid = geometry.crop_depth(jnp.asarray(label), view, 4)
  expected = (label[0, 4:, :4][:, ::-1].astype(float) - 1) / 65534
  assert valid.all()
  np.testing.assert_allclose(values[0], expected, atol=1e-6)
  # 0 means no label, not the farthest depth.
  values, valid = geometry.crop_depth(jnp.zeros((1, 8, 8), jnp.uint16), view, 4)
  assert not valid.any()
  assert not values.any()


def test_open_options_come_from_the_model():
  objective = _resolved()
  assert objective.head.taps == (0, 0, 1, 1)
  assert objective.head.features == 16
  assert objective.needs().fields == ("depth",)
  large = ModelSpec.from_config(dict(variant="L/16", image_size=256))
  resolved = build_objective("depth", {}).resolve(large, {})
  assert resolved.head.taps == (4, 11, 17, 23)
  given = dict(taps=[0, 1, 1, 1], channels=[4, 4, 8, 8], features=8)
  head = _resolved(**given).head
  assert head == dataclasses.replace(
    head, **{k: tuple(v) if v != 8 else v for k, v in given.items()}
  )


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(taps=[1, 2]), "taps is"),
    (dict(trim=1.0), "trim is 1.0"),
    (dict(tap_norm="batch"), "tap_norm"),
    (dict(taps=[2, 5, 8, 11]), "depth 2"),
    (dict(ops="resize(16)|keep(0.5, patch=8)"), "drops some"),
  ],
)
def test_invalid_options_and_views_raise(options, message):
  with pytest.raises(ValueError, match=message):
    _resolved(**options)


@pytest.mark.parametrize("method", ["needs", "heads"])
def test_an_unresolved_objective_is_refused(method):
  with pytest.raises(ConfigError, match="set (taps|features)"):
    getattr(build_objective("depth", {}), method)()
