"""The grounding objective: its inputs, its views and its loss on meshes."""

import dataclasses
import functools

import grounding_samples as samples
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from step_samples import mesh_of

from mtv_jax.augment import views
from mtv_jax.models import text as text_lib
from mtv_jax.models import vit
from mtv_jax.models.heads import prompter
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective, grounding
from mtv_jax.parallel.mesh import BATCH_SPEC

IMAGE = base.Encoding("image", "image")
PHRASE = base.Encoding("text", "box_phrase")
SPEC = ModelSpec(
  image=vit.ViTSpec(
    image_size=64, width=16, depth=1, heads=2, mlp_dim=16, projection=6
  ),
  text=text_lib.TextSpec(
    vocab_size=9, width=8, depth=1, heads=2, mlp_dim=8, projection=6
  ),
)


@functools.cache
def params_of(objective, seed=0):
  """Its heads' parameters, all nonzero."""

  def make(key):
    heads = sorted(objective.heads().items())
    return {
      name: head.init(jax.random.fold_in(key, i), SPEC)
      for i, (name, head) in enumerate(heads)
    }

  params = jax.jit(make)(jax.random.key(seed))
  if "locator" in params:
    kernel = params["locator"]["fc2"]["kernel"]
    params["locator"]["fc2"]["kernel"] = jax.random.normal(
      jax.random.key(7), kernel.shape
    )
  return params


def batch_of(images=4, count=5, seed=0):
  rng = np.random.default_rng(seed)
  corners = np.sort(rng.uniform(size=(images, count, 2, 2)), axis=2)
  return {
    "boxes": corners.reshape(images, count, 4).astype(np.float32),
    "box_phrase_id": rng.integers(0, 6, (images, count)).astype(np.uint32),
    "box_score": rng.uniform(size=(images, count)).astype(np.float32),
    "box_valid": rng.uniform(size=(images, count)) < 0.8,
    "patches": rng.normal(size=(images, 16, 16)).astype(np.float32),
    "pooled": rng.normal(size=(images, count, 6)).astype(np.float32),
    "shown": np.tile(np.float32([0, 0, 1, 1]), (images, 1)),
    "flipped": np.zeros(images, bool),
  }


@functools.partial(jax.jit, static_argnums=0)
def compute_loss_inputs(objective, params, batch):
  """The loss inputs of `batch_of`'s batch."""
  empty = jnp.zeros((len(batch["boxes"]), 1, 1))
  encodings = {
    IMAGE: vit.ImageOutput(
      patches=batch["patches"][:, None],
      prefix=empty,
      pooled=jnp.zeros((*batch["pooled"].shape[:1], 1, 6)),
      intermediates={},
    ),
    PHRASE: text_lib.TextOutput(tokens=empty, pooled=batch["pooled"]),
  }
  view_batch = views.ViewBatch(
    images=None,
    box=batch["shown"][:, None],
    flipped=batch["flipped"][:, None],
  )
  heads = base.BoundHeads(objective.heads(), params)
  return objective.loss_inputs(
    encodings, heads, {**batch, "views": {"image": view_batch}}
  )


def terms_of(objective, params, loss_inputs):
  heads = base.BoundHeads(objective.heads(), params)
  return objective.loss(loss_inputs, heads, base.Context(0, 1, {}))


@functools.partial(jax.jit, static_argnums=0)
def run(objective, params, batch):
  """(loss, (terms, loss_inputs)) and gradients to heads, patches and texts."""

  def loss(params, patches, pooled):
    inputs = {**batch, "patches": patches, "pooled": pooled}
    loss_inputs = compute_loss_inputs(objective, params, inputs)
    terms = terms_of(objective, params, loss_inputs)
    return terms.loss.value(), (terms, loss_inputs)

  compute = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  return compute(params, batch["patches"], batch["pooled"])


def build(**options):
  return build_objective("grounding", options)


# With everything on. Tests share it, and so its compilation.
FULL = build(regions=8, regression=0.5)


def test_it_reads_patches_and_phrases():
  needs = build().needs()
  assert dict(needs.encodings) == {IMAGE: (), PHRASE: ()}
  assert set(needs.fields) == {
    "boxes", "box_phrase", "box_phrase_id", "box_score", "box_valid",
  }  # fmt: skip
  assert set(build().heads()) == {"grounding", "prompter"}
  assert set(build(regression=1.0).heads()) == {
    "grounding", "prompter", "locator",
  }  # fmt: skip


def test_loss_equals_numpy_on_the_loss_inputs():
  objective = build(regions=3, init_scale=6.0, init_bias=-2.0)
  batch = batch_of()
  batch["box_valid"][2] = False
  (loss, (terms, loss_inputs)), _ = run(objective, params_of(objective), batch)
  assert loss_inputs.region.shape == (4, 3, 6)
  region, text = (
    np.float64(x).reshape(12, 6) for x in (loss_inputs.region, loss_inputs.text)
  )
  np.testing.assert_allclose(np.linalg.norm(region, axis=-1), 1, rtol=1e-5)
  ids = np.ravel(loss_inputs.phrase_id)
  valid = np.ravel(loss_inputs.valid)
  expected = samples.region_loss(
    region, text, 6.0, -2.0, phrase_id=ids, valid=valid
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  report = {k: float(v.value()) for k, v in terms.report.items()}
  hits = [
    ids[valid][np.argmax(region[a] @ text[valid].T)] == ids[a]
    for a in np.flatnonzero(valid)
  ]
  np.testing.assert_allclose(report["accuracy"], np.mean(hits), rtol=1e-6)
  np.testing.assert_allclose(report["phrases"], len(set(ids[valid])), rtol=1e-5)
  np.testing.assert_allclose(report["labelled"], 3 / 4)
  np.testing.assert_allclose(report["regions"], valid.sum() / 3, rtol=1e-6)
  np.testing.assert_allclose([report["scale"], report["bias"]], [6, -2])


def test_equal_phrases_are_one_answer():
  objective = build()
  loss_inputs = grounding.LossInputs(
    region=jnp.eye(4)[None],
    text=jnp.eye(4)[jnp.array([[1, 1, 2, 0]])],
    phrase_id=jnp.array([[7, 7, 2, 3]], jnp.uint32),
    valid=jnp.array([[True, True, True, False]]),
    boxes=jnp.zeros((1, 4, 4)),
  )
  terms = terms_of(objective, params_of(objective), loss_inputs)
  # Region 0: a tie of phrases 7 and 2, a miss. Region 1: a hit, by either copy
  # of its phrase. Region 2: a hit. Region 3: padding.
  assert terms.report["accuracy"].count == 3
  assert terms.report["accuracy"].sum == 2
  assert terms.report["phrases"].value() == 2


@pytest.mark.parametrize(
  ("pick", "expected"), [("first", [1, 2]), ("score", [3, 1])]
)
def test_picked_regions(pick, expected):
  batch = batch_of(images=1, count=5)
  batch["boxes"][:] = [0.2, 0.2, 0.8, 0.8]
  batch["boxes"][0, 4] = [0.3, 0.3, 0.3, 0.9]  # no area
  batch["box_phrase_id"][:] = np.arange(5)
  batch["box_valid"][:] = [False, True, True, True, True]
  batch["box_score"][:] = [0.95, 0.5, 0.4, 0.6, 0.9]
  objective = build(regions=2, pick=pick)
  loss_inputs = compute_loss_inputs(objective, params_of(objective), batch)
  np.testing.assert_array_equal(loss_inputs.phrase_id, [expected])
  assert loss_inputs.valid.all()


def test_boxes_are_cropped_and_flipped_like_the_view():
  batch = batch_of(images=1, count=3)
  batch["boxes"][0] = [
    [0.5, 0.1, 0.75, 0.4],  # inside the crop
    [0.0, 0.0, 0.4, 0.5],  # above it
    [0.4, 0.0, 0.7, 0.6],  # 2/3 of its height and 5/6 of its width are inside
  ]
  batch["box_valid"][:] = True
  batch["shown"][:] = [0.5, 0.0, 1.0, 0.5]
  batch["flipped"][:] = True
  objective = build(regions=3)
  loss_inputs = compute_loss_inputs(objective, params_of(objective), batch)
  np.testing.assert_array_equal(loss_inputs.valid, [[True, True, False]])
  np.testing.assert_allclose(
    loss_inputs.boxes[0],
    [[0.0, 0.2, 0.5, 0.8], [0.0, 0.0, 0.4, 1.0], [0.0] * 4],
    atol=1e-6,
  )


BAD = {
  "no valid region": dict(box_valid=np.zeros((4, 5), bool)),
  "no area": dict(boxes=np.full((4, 5, 4), 0.5, np.float32)),
  "not a number": dict(boxes=np.full((4, 5, 4), np.nan, np.float32)),
  "inverted": dict(boxes=np.tile(np.float32([0.9, 0.9, 0.1, 0.1]), (4, 5, 1))),
  "outside": dict(boxes=np.tile(np.float32([1.1, 1.1, 2, 2]), (4, 5, 1))),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_regions_have_no_gradient(case):
  (loss, (terms, loss_inputs)), gradients = run(
    FULL, params_of(FULL), batch_of() | BAD[case]
  )
  assert not loss_inputs.valid.any()
  assert loss == 0
  for gradient in jax.tree.leaves(gradients):
    assert not gradient.any()
  assert terms.report["accuracy"].value() == 0
  assert terms.report["labelled"].value() == 0


def test_identical_boxes_and_phrases_have_finite_gradients():
  batch = batch_of()
  batch["boxes"][:] = [0.1, 0.1, 0.7, 0.9]
  batch["box_phrase_id"][:] = 3
  batch["pooled"][:] = 0.0
  batch["patches"][:] = 1.0
  (loss, _), gradients = run(FULL, params_of(FULL), batch)
  assert np.isfinite(loss)
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("stop", [False, True])
def test_stop_text_gradient(stop):
  objective = dataclasses.replace(FULL, stop_text_gradient=stop)
  _, (heads, patches, pooled) = run(objective, params_of(FULL), batch_of())
  assert np.abs(pooled).max() == 0 if stop else np.abs(pooled).max() > 1e-4
  assert np.abs(patches).max() > 1e-4
  assert np.abs(heads["prompter"]["embed"]["kernel"]).max() > 1e-6


def test_regression_counts_one_region_per_phrase():
  batch = batch_of()
  batch["boxes"][:] = samples.some_boxes(20, seed=2).reshape(4, 5, 4)
  batch["box_valid"][:] = True
  batch["box_valid"][1, 0] = batch["box_valid"][3] = False
  batch["box_phrase_id"][:3] = [[1, 2, 1, 1, 2], [5, 5, 5, 6, 5], range(5)]
  (loss, (terms, loss_inputs)), _ = run(FULL, params_of(FULL), batch)
  assert loss_inputs.valid.sum() == 14
  # The remaining regions come first.
  np.testing.assert_array_equal(loss_inputs.phrase_id[1], [5, 5, 6, 5, 5])
  sole = np.zeros((4, 5), bool)
  sole[0, [0, 1]] = sole[1, [0, 2]] = sole[2] = True
  located, boxes = (
    np.float64(loss_inputs.located),
    np.float64(loss_inputs.boxes),
  )
  expected = samples.box_loss(located[sole], boxes[sole]) / 9
  actual = terms.report["regression"]
  assert actual.count == 9
  np.testing.assert_allclose(actual.value(), expected, rtol=1e-5)
  contrast = samples.region_loss(
    np.float64(loss_inputs.region).reshape(20, 6),
    np.float64(loss_inputs.text).reshape(20, 6),
    10.0,
    -10.0,
    phrase_id=np.ravel(loss_inputs.phrase_id),
    valid=np.ravel(loss_inputs.valid),
  )
  np.testing.assert_allclose(loss, contrast + 0.5 * expected, rtol=1e-5)
  corners = np.float64(prompter.corners(loss_inputs.located))
  overlaps = [
    samples.iou(a, b)[0]
    for a, b in zip(corners[sole], boxes[sole], strict=True)
  ]
  np.testing.assert_allclose(
    terms.report["iou"].value(), np.mean(overlaps), rtol=1e-5
  )


def test_sharded_chunks_equal_one_device():
  """The ring is compared in tests/parallel."""
  params, batch = params_of(FULL), batch_of(images=16)
  # The second of eight devices lacks regions, and so does the second of four.
  batch["box_valid"][2:8] = False
  batch["box_valid"][8, 1:] = False
  inputs = compute_loss_inputs(FULL, params, batch)

  def on_mesh(shape, chunk):
    objective = dataclasses.replace(FULL, chunk=chunk)

    def loss(inputs, params):
      terms = terms_of(objective, params, inputs)
      return terms.loss.value(), terms.report

    sharded = jax.device_put(inputs, NamedSharding(mesh_of(shape), BATCH_SPEC))
    compute = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)
    result, slopes = jax.device_get(jax.jit(compute)(sharded, params))
    return result, [x for x in jax.tree.leaves(slopes) if x.dtype == np.float32]

  result, slopes = on_mesh((2, 2, 2), 12)
  expected, expected_slopes = on_mesh((1, 1, 1), None)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, result, expected)
  # Regions, texts, boxes, scale and bias.
  assert sum(np.linalg.norm(x) > 1e-6 for x in expected_slopes) >= 5
  for a, b in zip(slopes, expected_slopes, strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


def test_equal_phrases_may_be_encoded_once():
  phrase = build(distinct_phrases=0.5).phrase
  assert phrase != PHRASE and phrase.distinct == 0.5
  assert phrase in build(distinct_phrases=0.5).needs().encodings


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(pick="scores"), "Did you mean 'score'"),
    (dict(regions=0), "regions is 0"),
    (dict(chunk=0), "chunk is 0"),
    (dict(regression=-1.0), "regression is -1"),
    (dict(region=3), "Did you mean 'regions'"),
    (dict(model=ModelSpec(image=SPEC.image)), "text tower"),
    (dict(ops="resize(64)|blocks(0.2, 0.5)"), "'image'.*hides some.*set allow"),
    (dict(ops="resize(64)|keep(0.25)"), "drops some. .* blocks and keep.$"),
    (
      dict(ops="resize(64)|keep(0.25)", allow_masked=True),
      "drops some. .*without keep.$",
    ),
  ],
)
def test_invalid_options_and_views_raise(options, message):
  def resolve(model=SPEC, ops="resize(64)", **options):
    built = views.build_views({"image": dict(ops=ops)})
    return build(**options).resolve(model, built)

  assert resolve(ops="resize(64)|blocks(0.2, 0.5)", allow_masked=True)
  with pytest.raises(ValueError, match=message):
    resolve(**options)
