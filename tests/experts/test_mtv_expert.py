"""Runs of this package as experts of depth and boxes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.data import tokenizers
from mtv_jax.data.labels import label_values
from mtv_jax.data.records import BadRecord
from mtv_jax.encoder import apply_fns
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.experts import mtv_expert
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.phrases import FixedPhrases, NGrams
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import make_mesh

TOWER = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
MODEL = {
  "image_size": 32,
  "patch_size": 8,
  **TOWER,
  "text": {"length": 12, "vocab_size": 258, "tokenizer": "bytes", **TOWER},
}
OBJECTIVES = {
  "contrastive": {"weight": 1.0},
  "depth": {"taps": [0, 0, 1, 1], "features": 8, "size": 16},
  "grounding": {"regression": 1.0},
}
SPEC = models.ModelSpec.from_config(MODEL)
EVERYTHING = dict(
  threshold=0.0, nms=1.0, max_boxes=100, min_side=0.0, max_area=1.0
)
NAMES = FixedPhrases(("a red ball", "a cube", "sky"))


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(3)
  shapes = models.abstract_params(SPEC)
  shapes["heads"] = {
    name: jax.eval_shape(lambda h=head: h.init(jax.random.key(0), SPEC))
    for objective, entry in OBJECTIVES.items()
    for name, head in build_objective(objective, entry)
    .resolve(SPEC, {})
    .heads()
    .items()
  }
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes
  )


def build(params, *, devices=1, **changes):
  mesh = make_mesh({"data": -1}, jax.devices()[:devices])
  return Encoder(
    SPEC,
    params,
    Preprocess(size=32),
    tokenizers.build_tokenizer("bytes", clean="lower"),
    mesh,
    **{
      "prediction_heads": heads_lib.heads_of_config(OBJECTIVES, SPEC),
      **changes,
    },
  )


@pytest.fixture(scope="module")
def encoder(params):
  return build(params)


@pytest.fixture(scope="module")
def box_expert(encoder):
  """Labels every box of a vocabulary."""
  return mtv_expert.MtvBoxExpert(encoder, NAMES, batch_size=2, **EVERYTHING)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (30 + i, 50, 3), np.uint8) for i in range(2)]


def label(expert, images, records=None):
  """The outcome of each image; all are of one group and fill the rows."""
  records = records or [{"key": str(i)} for i in range(len(images))]
  prepared = [
    expert.prepare(image, record)
    for image, record in zip(images, records, strict=True)
  ]
  assert len({p.group for p in prepared}) == 1
  filled = [prepared[i % len(prepared)] for i in range(expert.rows)]
  arrays = {
    name: np.stack([p.arrays[name] for p in filled])
    for name in prepared[0].arrays
  }
  out = {k: np.asarray(v) for k, v in expert.run(arrays).items()}
  return [
    expert.finish({k: v[i] for k, v in out.items()}, p.meta)
    for i, p in enumerate(prepared)
  ]


@pytest.mark.slow
def test_depth_is_the_encoders(encoder, images):
  expert = mtv_expert.mtv_depth_expert(encoder, batch_size=2, side=16)
  assert isinstance(expert, Expert)
  outcomes = label(expert, images)
  for outcome, wanted in zip(outcomes, encoder.depth(images), strict=True):
    want = label_values.make_depth(wanted, side=16).label
    assert len(np.unique(want.values)) > 100
    # One part in 65,535, and rounding from a different order of summation.
    np.testing.assert_allclose(
      outcome.label.values.astype(int), want.values.astype(int), atol=4
    )


@pytest.mark.parametrize(
  "kind", ["vocabulary", pytest.param("ngrams", marks=pytest.mark.slow)]
)
def test_boxes_are_the_locators_and_scores_the_losses(
  encoder, box_expert, images, kind
):
  phrases, expert = NAMES, box_expert
  if kind == "ngrams":
    phrases = NGrams()
    expert = mtv_expert.MtvBoxExpert(
      encoder, phrases, batch_size=2, **EVERYTHING
    )
  records = [
    {"key": str(i), "captions": ["cube under blue sky"[i:]], "meta": {}}
    for i in range(2)
  ]
  assert isinstance(expert, Expert)
  outcomes = label(expert, images, records)
  queries = [phrases(record) for record in records]
  located = encoder.locate(images, queries)
  inside = located.boxes.clip(0, 1)
  regions = encoder.ground(images, list(inside)).embeddings
  head = encoder.params["heads"]["grounding"]
  scale, bias = np.exp(head["logit_scale"]), np.asarray(head["logit_bias"])
  for i, outcome in enumerate(outcomes):
    count = len(queries[i])
    texts = normalize(encoder.text(queries[i]))
    cosine = (regions[i, :count] * texts).sum(axis=1)
    scores = 1 / (1 + np.exp(-(scale * cosine + bias)))
    # Near ties may be ordered differently.
    assert (np.diff(outcome.label.scores) <= 0).all()
    assert np.ptp(scores) > 1e-3
    order = [queries[i].index(phrase) for phrase in outcome.label.phrases]
    assert sorted(order) == list(range(count))
    np.testing.assert_allclose(outcome.label.scores, scores[order], atol=1e-5)
    np.testing.assert_allclose(outcome.label.boxes, inside[i, order], atol=2e-5)


def test_thresholds_count(encoder, box_expert, images):
  prepared = [box_expert.prepare(image, {"key": "a"}) for image in images]
  out = box_expert.run(
    {"images": np.stack([p.arrays["images"] for p in prepared])}
  )
  row = {name: np.asarray(value)[0] for name, value in out.items()}
  scores = box_expert.finish(row, NAMES.vocabulary).label.scores
  options = {**EVERYTHING, "threshold": float(scores[1])}
  fewer = mtv_expert.MtvBoxExpert(encoder, NAMES, batch_size=2, **options)
  assert len(fewer.finish(row, NAMES.vocabulary).label.boxes) == 1
  assert fewer.settings["threshold"] == options["threshold"]
  assert fewer.settings["hash"] == box_expert.settings["hash"]
  json.dumps(fewer.settings)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_bits(params, encoder, images):
  many = build(params, devices=2)
  for kind in ("depth", "boxes"):
    outputs = []
    for each in (encoder, many):
      rows = each.mesh.size
      expert = (
        mtv_expert.mtv_depth_expert(each, batch_size=1, side=16)
        if kind == "depth"
        else mtv_expert.MtvBoxExpert(each, NAMES, batch_size=1, **EVERYTHING)
      )
      prepared = [expert.prepare(image, {"key": "a"}) for image in images]
      out = []
      for start in range(0, len(prepared), rows):
        part = prepared[start : start + rows]
        out.append(
          expert.run({"images": np.stack([p.arrays["images"] for p in part])})
        )
      outputs.append(jax.tree.map(lambda *x: np.concatenate(x), *out))
    assert outputs[0].keys() == outputs[1].keys()
    for name in outputs[0]:
      np.testing.assert_array_equal(outputs[0][name], outputs[1][name])


def test_a_record_without_phrases_is_a_bad_record(encoder, images):
  expert = mtv_expert.MtvBoxExpert(
    encoder, NGrams(), batch_size=1, **EVERYTHING
  )
  record = {"key": "7", "captions": ["the photo"], "meta": {}}
  with pytest.raises(BadRecord, match="'7'.*no phrases"):
    expert.prepare(images[0], record)


def test_models_without_the_heads(params):
  heads = dict(params["heads"])
  del heads["locator"]
  no_locator = build({**params, "heads": heads})
  with pytest.raises(ValueError, match="no locator.*regression"):
    mtv_expert.MtvBoxExpert(no_locator, NAMES, batch_size=1, **EVERYTHING)
  bare = build({**params, "heads": {"contrastive": heads["contrastive"]}})
  with pytest.raises(ValueError, match="no prompter"):
    mtv_expert.MtvBoxExpert(bare, NAMES, batch_size=1, **EVERYTHING)
  with pytest.raises(ValueError, match="no depth"):
    mtv_expert.mtv_depth_expert(bare, batch_size=1, side=16)
  del heads["grounding"]
  heads["locator"] = params["heads"]["locator"]
  unscaled = build({**params, "heads": heads})
  with pytest.raises(ValueError, match="lacks the heads.*grounding"):
    mtv_expert.MtvBoxExpert(unscaled, NAMES, batch_size=1, **EVERYTHING)


def test_encoders_of_a_crop_are_rejected(params):
  cropped = Preprocess(size=32, resize="shortest", crop="center")
  encoder = build(params).with_preprocess(cropped)
  with pytest.raises(ValueError, match="crop"):
    mtv_expert.mtv_depth_expert(encoder, batch_size=1, side=16)


@pytest.mark.slow
def test_a_run_is_opened_as_an_expert(params, images, tmp_path):
  config = {"model": MODEL, "objectives": OBJECTIVES}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with Checkpointer(tmp_path / "checkpoints", every_steps=1) as saver:
    saver.save(1, {"params": params})
  mesh = make_mesh({"data": -1}, jax.devices()[:1])
  expert = mtv_expert.load_expert(
    tmp_path, kind="depth", mesh=mesh, batch_size=2
  )
  assert expert.rows == 2 and expert.kind == "depth"
  outcome, _ = label(expert, images)
  assert outcome.label.values.shape == (128, 128)
  with pytest.raises(ValueError, match="phrases"):
    mtv_expert.load_expert(tmp_path, kind="boxes", mesh=mesh)
  with pytest.raises(ValueError, match="Did you mean 'boxes'"):
    mtv_expert.load_expert(tmp_path, kind="box", mesh=mesh)


@pytest.mark.slow
def test_the_image_tower_runs_once(encoder):
  """Locating and embedding share the patches; nothing is computed twice."""
  expert = mtv_expert.MtvBoxExpert(encoder, NAMES, batch_size=2, **EVERYTHING)
  images = jnp.zeros((2, 32, 32, 3))
  both = expert._function.lower(expert._params, {"images": images}).compile()
  tower = apply_fns.image_function(
    SPEC, "float32", (), ("patches",), encoder.mesh
  )
  alone = tower.lower(encoder.params["image"], images).compile()
  one, all_ = (x.cost_analysis()["flops"] for x in (alone, both))
  assert all_ < 2 * one
