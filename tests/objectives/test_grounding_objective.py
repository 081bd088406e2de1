"""Grounding from tower outputs to loss terms: loss inputs, shards, steps."""

import dataclasses
import functools
import math

import grounding_samples as samples
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from xla_options import EXACT

from mtv_jax.augment import views
from mtv_jax.data import ops, tokenizers
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.models import text as text_lib
from mtv_jax.models import vit
from mtv_jax.models.heads import prompter
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective, grounding
from mtv_jax.parallel.mesh import BATCH_SPEC, MESH_AXES, make_mesh, shard_batch
from mtv_jax.train import gradients
from mtv_jax.train.spec import (
  ObjectiveWeight,
  StepSpec,
  init_params,
  init_state,
)
from mtv_jax.train.step import make_program
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

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
      taps={},
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


def test_padding_does_not_change_the_loss():
  params = params_of(FULL)
  batch, junk = batch_of(), batch_of(seed=9)
  junk["box_valid"][:] = False
  padded = dict(batch)
  for name, value in batch.items():
    if value.ndim > 1 and value.shape[1] == 5:
      padded[name] = np.concatenate([value, junk[name][:, :2]], axis=1)
  (loss, (terms, _)), (heads, patches, pooled) = run(FULL, params, batch)
  (loss2, (terms2, _)), gradients = run(FULL, params, padded)
  actual = (loss2, terms2.report, gradients[0], gradients[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    actual,
    (loss, terms.report, heads, patches),
  )
  np.testing.assert_allclose(gradients[2][:, :5], pooled, atol=1e-6)
  assert not gradients[2][:, 5:].any()


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


@functools.cache
def on_mesh(shape, chunk):
  """Value, report and gradients of uneven loss inputs on a mesh."""
  objective = dataclasses.replace(FULL, chunk=chunk)
  params = params_of(FULL)
  batch = batch_of(images=16)
  # The second of eight devices lacks regions, and so does the second of four.
  batch["box_valid"][2:8] = False
  batch["box_valid"][8, 1:] = False
  devices = jax.devices()[: math.prod(shape)]
  mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)), devices)
  loss_inputs = jax.device_put(
    compute_loss_inputs(FULL, params, batch),
    NamedSharding(mesh, BATCH_SPEC),
  )

  def loss(loss_inputs, params):
    terms = terms_of(objective, params, loss_inputs)
    return terms.loss.value(), terms.report

  compute = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
  )
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  result, gradients = jax.device_get(compute(loss_inputs, params))
  floats = [x for x in jax.tree.leaves(gradients) if x.dtype == np.float32]
  return result, floats


def test_sharded_chunks_equal_one_device():
  """The ring is compared in tests/parallel."""
  (value, report), gradients = on_mesh((2, 2, 2), 12)
  (expected, expected_report), expected_gradients = on_mesh((1, 1, 1), None)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    report,
    expected_report,
  )
  # Regions, texts, boxes, scale and bias.
  assert sum(np.linalg.norm(x) > 1e-6 for x in expected_gradients) >= 5
  for a, b in zip(gradients, expected_gradients, strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


@pytest.mark.parametrize("ops", ["blocks(0.2, 0.5)", "keep(0.25)"])
def test_a_view_that_hides_patches_raises(ops):
  built = views.build_views({"image": dict(ops=f"resize(64)|{ops}")})
  with pytest.raises(ConfigError, match="'image'.*hides patches"):
    build().resolve(SPEC, built)


def test_masked_patches_are_allowed_and_dropped_ones_are_not():
  def resolve(ops):
    built = views.build_views({"image": dict(ops=f"resize(64)|{ops}")})
    return build(allow_masked=True).resolve(SPEC, built)

  assert resolve("blocks(0.2, 0.5)").allow_masked
  with pytest.raises(ConfigError, match="without blocks and keep.$"):
    resolve("keep(0.25)")


def test_equal_phrases_may_be_encoded_once():
  phrase = build(distinct_phrases=0.5).phrase
  assert phrase != PHRASE and phrase.distinct == 0.5
  assert phrase in build(distinct_phrases=0.5).needs().encodings


def test_a_model_without_text_tower_raises():
  with pytest.raises(ConfigError, match="text tower"):
    build().resolve(ModelSpec(image=SPEC.image), {})


def test_invalid_options_raise():
  with pytest.raises(ValueError, match="Did you mean 'score'"):
    build(pick="scores")
  with pytest.raises(ConfigError, match="regions is 0"):
    build(regions=0)
  with pytest.raises(ConfigError, match="chunk is 0"):
    build(chunk=0)
  with pytest.raises(ConfigError, match="regression is -1"):
    build(regression=-1.0)
  with pytest.raises(ConfigError, match="Did you mean 'regions'"):
    build(region=3)


STEP_SPEC = ModelSpec.from_config(
  dict(
    variant="mu/8",
    image_size=32,
    text=dict(variant="mu", length=16, vocab_size=258),
  )
)
STEP_VIEWS = views.build_views({"image": dict(ops="crop(32, 0.6, 1.0)")})


def make_spec(*names, **options):
  entries = {
    "contrastive": dict(init_bias=-3.0),
    "grounding": dict(init_bias=-3.0, regression=0.2),
  }
  return StepSpec(
    model=STEP_SPEC,
    dtype="float32",
    objectives={name: build_objective(name, entries[name]) for name in names},
    weights=dict.fromkeys(names, ObjectiveWeight(1.0)),
    views=STEP_VIEWS,
    seed=0,
    total_steps=100,
    **options,
  )


def make_batch(rows=16):
  """Rendered scenes as the host gives them; some lack boxes."""
  pipeline = ops.build_ops(
    "canvas(40)|caption(16)|regions(6, 12)",
    tokenizer=tokenizers.build_tokenizer("bytes"),
  )
  source = SceneSource(size=40, length=rows)
  records = [pipeline(source[i], np.random.default_rng(i)) for i in range(rows)]
  batch = {k: np.stack([r[k] for r in records]) for k in pipeline.fields}
  batch["box_valid"][4:8] = False
  return batch


def loss_and_gradients(spec, params, batch):
  def compute(params, batch):
    state = init_state(spec, optax.sgd(0.1), params)
    (loss, terms), grads = gradients.compute_gradients(spec, state, batch)
    return loss, terms, grads

  jitted = jax.jit(compute, compiler_options=EXACT)
  loss, terms, grads = jax.device_get(jitted(params, batch))
  return loss, terms, dict(flatten_with_names(grads))


@pytest.mark.slow
def test_train_step_with_the_contrastive_loss():
  both = make_spec("contrastive", "grounding")
  batch = make_batch()
  init = functools.partial(init_params, both)
  params = jax.jit(init)(jax.random.key(0))

  _, terms, _ = loss_and_gradients(both, params, batch)
  assert terms["grounding"].report["labelled"].value() == 12 / 16

  # Without boxes it trains like contrast only.
  blank = batch | {"box_valid": np.zeros_like(batch["box_valid"])}
  _, _, without = loss_and_gradients(both, params, blank)
  contrast = make_spec("contrastive")
  _, _, alone = loss_and_gradients(contrast, params, blank)
  for name, expected in alone.items():
    error = np.linalg.norm(without[name] - expected)
    assert error <= 1e-6 * np.linalg.norm(expected), name
  assert not any(without[name].any() for name in without if name not in alone)

  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  program = make_program(both, optax.adam(1e-3), mesh)
  state, placed = program.init(params), shard_batch(batch, mesh)
  history = []
  for _ in range(40):
    state, metrics = program.update(state, placed)
    history.append(jax.device_get(metrics))
  first, last = history[0], history[-1]
  assert last["grounding/loss"] < 0.6 * first["grounding/loss"]
  assert last["grounding/accuracy"] > 0.3
  assert last["grounding/iou"] > first["grounding/iou"]
