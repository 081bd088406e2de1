"""MAE: the loss against NumPy in float64, and its visible patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtv_jax.augment import views
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ImageOutput
from mtv_jax.objectives import base, build_objective, mae
from mtv_jax.perf import flops
from mtv_jax.train.spec import ObjectiveWeight, StepSpec
from mtv_jax.utils.errors import ConfigError


def numpy_patches(image, patch):
  """Patches row by row, each (y, x, channel)."""
  side = len(image) // patch
  cut = [
    image[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].ravel()
    for y in range(side)
    for x in range(side)
  ]
  return np.stack(cut).astype(np.float64)


def numpy_normalised(patches):
  mean = patches.mean(-1, keepdims=True)
  return (patches - mean) / np.sqrt(patches.var(-1, ddof=1)[..., None] + 1e-6)


def numpy_error(predicted, target, hidden):
  errors = [
    ((p - t) ** 2).mean() for p, t in zip(predicted, target, strict=True)
  ]
  return sum(e for e, h in zip(errors, hidden, strict=True) if h)


@pytest.mark.parametrize(
  "hidden",
  [[1, 0, 1, 1, 0], [1] * 5, [0] * 5, [0, 0, 1, 0, 0]],
  ids=["some", "all", "none", "one"],
)
def test_error_and_gradient_equal_numpy(hidden):
  rng = np.random.default_rng(0)
  predicted, target = rng.normal(size=(2, 1, 5, 12))
  hidden = np.array([hidden], bool)

  def mean(p):
    error, count = mae.patch_errors(
      p, jnp.asarray(target, jnp.float32), jnp.asarray(hidden)
    )
    return base.WeightedMean(error.sum(), count.sum()).value()

  value, grad = jax.value_and_grad(mean)(jnp.asarray(predicted, jnp.float32))
  count = max(hidden.sum(), 1)
  expected = numpy_error(predicted[0], target[0], hidden[0]) / count
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  slope = 2 * (predicted - target) * hidden[..., None] / (12 * count)
  np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-9)


def test_targets_have_no_mean_and_unit_variance():
  rng = np.random.default_rng(1)
  pixels = rng.normal(size=(3, 48)) * [[1.0], [0.01], [0.0]] + 0.5
  result = mae.normalize_patches(jnp.asarray(pixels, jnp.float32))
  # The last patch is constant: normalised in float32, it is zero.
  np.testing.assert_allclose(
    result, numpy_normalised(pixels), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(result[0].var(ddof=1), 1.0, rtol=1e-3)
  assert not np.asarray(result[2]).any()


def test_slots_invert_keep():
  keep = jnp.array([[4, 0, 2], [1, 2, 3]])
  slots, visible = mae.visible_slots(keep, 5)
  np.testing.assert_array_equal(slots, [[1, 3, 2, 3, 0], [3, 0, 1, 2, 3]])
  np.testing.assert_array_equal(visible, np.asarray(slots) < 3)


@pytest.fixture(scope="module")
def decoder():
  module = mae.MaskedDecoder(outputs=12, width=16, depth=2, heads=2)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
  prefix = jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32)
  keep = jnp.array([[0, 2, 5], [1, 3, 4]], jnp.int32)
  init = jax.jit(module.init, static_argnums=4)
  params = init(jax.random.key(0), tokens, prefix, keep, (2, 3))
  apply = jax.jit(module.apply, static_argnums=4)
  return params, apply, tokens, prefix, keep


def test_order_of_visible_patches_does_not_matter(decoder):
  params, apply, tokens, prefix, keep = decoder
  expected = apply(params, tokens, prefix, keep, (2, 3))
  assert expected.shape == (2, 6, 12)
  order = jnp.array([2, 0, 1])
  shuffled = apply(params, tokens[:, order], prefix, keep[:, order], (2, 3))
  np.testing.assert_allclose(shuffled, expected, atol=1e-5)


def test_hidden_patches_depend_on_position_and_prefix(decoder):
  params, apply, tokens, prefix, keep = decoder
  result = apply(params, tokens, prefix, keep, (2, 3))
  assert np.abs(result[0, 1] - result[0, 3]).max() > 1e-3
  other = apply(params, tokens, prefix + 1.0, keep, (2, 3))
  assert np.abs(other - result).max(axis=(1, 2)).min() > 1e-3


def test_without_prefix_and_in_bfloat16(decoder):
  params, apply, tokens, prefix, keep = decoder
  none = prefix[:, :0]
  exact = apply(params, tokens, none, keep, (2, 3))
  half = (x.astype(jnp.bfloat16) for x in (tokens, none))
  rough = apply(params, *half, keep, (2, 3))
  assert rough.dtype == jnp.float32
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05


SPEC = ModelSpec.from_config(
  dict(variant="mu/8", image_size=32, pool="cls", registers=1)
)
SMALL = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)


def _resolved(ops="resize(32)|keep(0.25, patch=8)", **options):
  return build_objective("mae", dict(SMALL, **options)).resolve(
    SPEC, views.build_views({"mae": dict(ops=ops)})
  )


@pytest.fixture(scope="module")
def parts():
  objective = _resolved()
  head = objective.heads()["mae_decoder"]
  params = jax.jit(lambda key: head.init(key, SPEC))(jax.random.key(0))
  return objective, {"mae_decoder": params}


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  keep = [[rng.permutation(16)[:4] for _ in range(2)] for _ in range(3)]
  view_batch = views.ViewBatch(
    images=jnp.asarray(rng.uniform(-1, 1, (3, 2, 32, 32, 3)), jnp.float32),
    box=None,
    flipped=None,
    keep=jnp.asarray(np.sort(keep), jnp.int32),
  )
  output = ImageOutput(
    patches=jnp.asarray(rng.normal(size=(3, 2, 4, 64)), jnp.float32),
    prefix=jnp.asarray(rng.normal(size=(3, 2, 2, 64)), jnp.float32),
    pooled=jnp.zeros((3, 2, 64)),
    intermediates={},
  )
  return view_batch, output


def _loss_inputs(objective, params, view_batch, output):
  return objective.loss_inputs(
    {base.Encoding("image", "mae"): output},
    base.BoundHeads(objective.heads(), params),
    {"views": {"mae": view_batch}},
  )


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_inputs_and_loss_equal_the_formula(parts, norm_pixels):
  objective, params = parts
  objective = dataclasses.replace(objective, norm_pixels=norm_pixels)
  view_batch, output = _inputs()
  heads = base.BoundHeads(objective.heads(), params)
  result = _loss_inputs(objective, params, view_batch, output)
  expected = np.zeros(3)
  for i in range(3):
    for j in range(2):
      target = numpy_patches(np.asarray(view_batch.images[i, j]), 8)
      if norm_pixels:
        target = numpy_normalised(target)
      args = (x[i : i + 1, j] for x in (output.patches, output.prefix))
      keep = view_batch.keep[i : i + 1, j]
      predicted = heads["mae_decoder"](*args, keep, (4, 4))[0]
      hidden = ~np.isin(np.arange(16), keep[0])
      expected[i] += numpy_error(np.float64(predicted), target, hidden)
  np.testing.assert_allclose(result.error, expected, rtol=1e-5)
  np.testing.assert_array_equal(result.hidden, [24, 24, 24])
  terms = objective.loss(result, heads, base.Context(0, 1, {}))
  value = terms.loss.value()
  np.testing.assert_allclose(value, expected.sum() / 72, rtol=1e-5)
  np.testing.assert_allclose(terms.report["hidden"].value(), 0.75)


def test_default_decoder_equals_the_paper():
  heads = build_objective("mae", dict(patch=16)).heads()
  module = heads["mae_decoder"].module
  assert (module.width, module.depth, module.heads) == (512, 8, 16)
  assert module.outputs == 768


@pytest.mark.slow
def test_a_masked_step_takes_less_than_half_the_flops():
  """ViT-B/16 and MAE's decoder, at 75 % masking and without."""
  model = ModelSpec.from_config(
    dict(variant="B/16", image_size=224, pool="mean")
  )
  batch = {
    "image": jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8),
    "image_size": jax.ShapeDtypeStruct((2, 2), jnp.int32),
  }

  def count(keep):
    ops = f"crop(224, 0.2, 1.0)|flip|keep({keep})"
    spec = StepSpec(
      model=model,
      dtype="float32",
      objectives={"mae": build_objective("mae", dict(patch=16))},
      weights={"mae": ObjectiveWeight(1.0)},
      views=views.build_views({"mae": dict(ops=ops)}),
      seed=0,
      total_steps=100,
    )
    return flops.step_flops(spec, batch, optax.sgd(0.1)).traced

  assert count(0.25) < 0.5 * count(1.0)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(ops="resize(32)"), r"keep\(0.25\)"),
    (dict(ops="resize(32)|keep(1.0, patch=8)"), "keeps all patches: lower"),
    (dict(ops="resize(32)|keep(0.25, patch=16)"), r"keep\(0.25, patch=8\)"),
    (dict(patch=14), "the model's is 8"),
    (dict(decoder_heads=7), "multiple of 4 and 7 heads"),
  ],
)
def test_invalid_options_and_views_raise(options, message):
  with pytest.raises(ConfigError, match=message):
    _resolved(**options)
  with pytest.raises(ConfigError, match="set patch=16"):
    build_objective("mae", {}).heads()
