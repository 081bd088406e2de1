"""Runs of this package as experts of depth and boxes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelling_samples import label_images, mesh_of

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


def build(params, *, devices=1):
  return Encoder(
    SPEC,
    params,
    Preprocess(size=32),
    tokenizers.build_tokenizer("bytes", clean="lower"),
    mesh_of(devices),
    prediction_heads=heads_lib.heads_of_config(OBJECTIVES, SPEC),
  )


def box_expert_of(encoder, phrases=None, *, batch_size=2, **options):
  """Labels every box, of a vocabulary by default."""
  return mtv_expert.MtvBoxExpert(
    encoder, phrases or NAMES, batch_size=batch_size, **(EVERYTHING | options)
  )


@pytest.fixture(scope="module")
def encoder(params):
  return build(params)


@pytest.fixture(scope="module")
def box_expert(encoder):
  return box_expert_of(encoder)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (30 + i, 50, 3), np.uint8) for i in range(2)]


@pytest.mark.slow
def test_depth_is_the_encoders(encoder, images):
  expert = mtv_expert.make_depth_expert(encoder, batch_size=2, side=16, bits=16)
  assert isinstance(expert, Expert)
  outcomes = label_images(expert, images, [{}] * 2)
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
    expert = box_expert_of(encoder, phrases)
  records = [{"captions": ["cube under blue sky"[i:]]} for i in range(2)]
  assert isinstance(expert, Expert)
  outcomes = label_images(expert, images, records)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["depth", "boxes"])
def test_any_number_of_devices_gives_the_same_bits(
  params, encoder, images, kind
):
  outputs = []
  for each in (encoder, build(params, devices=2)):
    expert = (
      mtv_expert.make_depth_expert(each, batch_size=1, side=16, bits=16)
      if kind == "depth"
      else box_expert_of(each, batch_size=1)
    )
    rows = [expert.prepare(image, {"key": "a"}).arrays for image in images]
    batches = [
      jax.tree.map(lambda *x: np.stack(x), *rows[i : i + expert.rows])
      for i in range(0, len(rows), expert.rows)
    ]
    outputs.append([jax.device_get(expert.run(batch)) for batch in batches])
  one, two = (jax.tree.map(lambda *x: np.concatenate(x), *o) for o in outputs)
  assert len(outputs[0]) == 2 * len(outputs[1])
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_thresholds_count(encoder, box_expert):
  boxes, scores = np.zeros((3, 4), np.float32), np.float32([0.2, 0.5, 0.9])
  row = {"boxes": boxes + np.float32([0, 0, 1, 1]), "scores": scores}
  assert len(box_expert.finish(row, NAMES.vocabulary).label.boxes) == 3
  fewer = box_expert_of(encoder, threshold=0.5)
  label = fewer.finish(row, NAMES.vocabulary).label
  assert label.phrases == ("sky",) and label.scores == scores[2:]
  assert fewer.settings["threshold"] == 0.5
  assert fewer.settings["hash"] == box_expert.settings["hash"]
  json.dumps(fewer.settings)


def test_a_record_without_phrases_is_a_bad_record(encoder, images):
  expert = box_expert_of(encoder, NGrams())
  record = {"key": "7", "captions": ["the photo"], "meta": {}}
  with pytest.raises(BadRecord, match="'7'.*no phrases"):
    expert.prepare(images[0], record)


@pytest.mark.parametrize(
  ("kind", "lacking", "message"),
  [
    ("boxes", ["locator"], "can't predict 'locator'.*regression"),
    ("boxes", ["prompter"], "can't predict 'grounding'"),
    ("boxes", ["grounding"], "lacks the heads.*grounding"),
    ("depth", ["depth"], "can't predict 'depth'"),
    ("depth", [], "crop"),
  ],
)
def test_encoders_that_cannot_label(params, kind, lacking, message):
  heads = {k: v for k, v in params["heads"].items() if k not in lacking}
  encoder = build({**params, "heads": heads})
  if not lacking:
    cropped = Preprocess(size=32, resize="shortest", crop="center")
    encoder = encoder.with_preprocess(cropped)
  with pytest.raises(ValueError, match=message):
    if kind == "depth":
      mtv_expert.make_depth_expert(encoder, batch_size=1, side=16, bits=16)
    box_expert_of(encoder)


@pytest.mark.slow
def test_a_run_is_opened_as_an_expert(params, images, tmp_path):
  config = {"model": MODEL, "objectives": OBJECTIVES}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with Checkpointer(tmp_path / "checkpoints", every_steps=1) as saver:
    saver.save(1, {"params": params})
  mesh = mesh_of(1)
  expert = mtv_expert.load_expert(
    tmp_path, kind="depth", mesh=mesh, batch_size=2
  )
  assert expert.rows == 2 and expert.kind == "depth"
  outcome, _ = label_images(expert, images, [{}] * 2)
  assert (outcome.label.values.shape, outcome.label.bits) == ((96, 96), 10)
  with pytest.raises(ValueError, match="phrases"):
    mtv_expert.load_expert(tmp_path, kind="boxes", mesh=mesh)
  with pytest.raises(ValueError, match="Did you mean 'boxes'"):
    mtv_expert.load_expert(tmp_path, kind="box", mesh=mesh)


@pytest.mark.slow
def test_the_image_tower_runs_once(encoder, box_expert):
  """Locating and embedding share the patches; nothing is computed twice."""
  expert, images = box_expert, jnp.zeros((2, 32, 32, 3))
  both = expert._function.lower(expert._params, {"images": images}).compile()
  tower = apply_fns.image_function(
    SPEC, "float32", (), ("patches",), encoder.mesh
  )
  alone = tower.lower(encoder.params["image"], images).compile()
  one, all_ = (x.cost_analysis()["flops"] for x in (alone, both))
  assert all_ < 2 * one
