"""Depth, regions and boxes from the heads of pretraining, live and loaded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import random_leaves

import mtv_jax
from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.convert import huggingface, native
from mtv_jax.data import tokenizers
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.objectives import base, build_objective
from mtv_jax.parallel.mesh import make_mesh

TOWER = {"width": 32, "depth": 3, "heads": 2, "mlp_dim": 64}
MODEL = {
  "image_size": 32,
  "patch_size": 8,
  **TOWER,
  "text": {"length": 12, "vocab_size": 258, "tokenizer": "bytes", **TOWER},
}
OBJECTIVES = {
  "captioning": {"bins": 50, "depth": 1},
  "contrastive": {"weight": 1.0},
  "deep": {"type": "depth", "taps": [0, 1, 1, 2], "features": 8, "size": 12},
  "grounding": {"attention_heads": 2, "regression": 1.0},
}
SPEC = models.ModelSpec.from_config(MODEL)
HEADS = heads_lib.heads_of_config(OBJECTIVES, SPEC)
PREPROCESS = Preprocess(size=32)
CROPPING = Preprocess(size=32, resize="shortest", crop="center")


@pytest.fixture(scope="module")
def heads():
  """The modules of pretraining, by name."""
  result = {}
  for name, entry in OBJECTIVES.items():
    result |= build_objective(name, entry).resolve(SPEC, {}).heads()
  return result


@pytest.fixture(scope="module")
def params(heads):
  shapes = models.abstract_params(SPEC)
  shapes["heads"] = {
    name: jax.eval_shape(lambda h=head: h.init(jax.random.key(0), SPEC))
    for name, head in heads.items()
  }
  return random_leaves(shapes, seed=3)


def build(params, heads=HEADS, devices=None, preprocess=PREPROCESS):
  tokenizer = tokenizers.build_tokenizer("bytes", clean="lower")
  mesh = make_mesh({"data": -1}, devices)
  return Encoder(
    SPEC, params, preprocess, tokenizer, mesh, prediction_heads=heads
  )


@pytest.fixture(scope="module")
def encoder(params):
  return build(params)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (30 + i, 50, 3), np.uint8) for i in range(3)]


BOXES = [
  [[0.0, 0.0, 0.5, 0.5], [0.1, 0.2, 0.9, 1.0], [0.4, 0.4, 0.6, 0.6]],
  [],
  [[0.25, 0.5, 0.75, 1.0]],
]
PHRASES = [["a red ball", "a cube"], [], ["a cube", "a red ball", "a cube"]]


@pytest.fixture(scope="module")
def expected(encoder, heads, params, images):
  """What the objectives' own modules say of tokens computed here."""
  batch = jnp.stack([Preprocess(size=32)(image) for image in images])
  # Every box and phrase in every image, independent of each other.
  boxes = jnp.asarray([box for own in BOXES for box in own], jnp.float32)
  texts = encoder.text([phrase for own in PHRASES for phrase in own])
  texts = jnp.asarray(texts / np.linalg.norm(texts, axis=-1, keepdims=True))
  boxes, texts = (jnp.stack([x] * len(images)) for x in (boxes, texts))

  def run(params):
    bound = base.BoundHeads(heads, params["heads"])
    tower, variables = models.image_tower(SPEC), {"params": params["image"]}
    out = tower.apply(variables, batch, layers=(0, 1, 2))
    stages = [out.intermediates[i].reshape(3, 4, 4, 32) for i in (0, 1, 1, 2)]
    return {
      "depth": bound["depth"](stages, (12, 12)),
      "regions": bound["prompter"](out.patches, boxes, 32),
      "boxes": bound["locator"](out.patches, texts),
    }

  return jax.tree.map(np.asarray, jax.jit(run)(params))


def test_depth_equals_the_objective_s_head(encoder, images, expected):
  got = encoder.depth(images)
  assert got.shape == (3, 12, 12) and np.std(got) > 0.01
  np.testing.assert_allclose(got, expected["depth"], atol=2e-5)


def test_regions_equal_the_prompter(encoder, images, expected):
  result = encoder.ground(images, BOXES)
  assert result.embeddings.shape == (3, 3, 32)
  np.testing.assert_array_equal(result.valid.sum(axis=1), [3, 0, 1])
  want = expected["regions"]
  want = want / np.linalg.norm(want, axis=-1, keepdims=True)
  np.testing.assert_allclose(result.embeddings[0], want[0, :3], atol=2e-5)
  np.testing.assert_allclose(result.embeddings[2, 0], want[2, 3], atol=2e-5)
  assert not result.embeddings[~result.valid].any()
  # The box matters, so that the comparison can fail.
  assert np.abs(result.embeddings[0, 0] - result.embeddings[0, 2]).max() > 0.01


def test_boxes_equal_the_locator(encoder, images, expected):
  result = encoder.locate(images, PHRASES)
  np.testing.assert_array_equal(result.valid.sum(axis=1), [2, 0, 3])
  centre, half = expected["boxes"][..., :2], expected["boxes"][..., 2:] / 2
  want = np.concatenate([centre - half, centre + half], axis=-1)
  np.testing.assert_allclose(result.boxes[0, :2], want[0, :2], atol=2e-5)
  np.testing.assert_allclose(result.boxes[2], want[2, 2:], atol=2e-5)
  assert np.abs(result.boxes[2, 0] - result.boxes[2, 1]).max() > 1e-3


def test_one_device_and_eight_agree(encoder, params, images):
  single = build(params, devices=jax.devices()[:1])
  one = single.ground(images, BOXES, batch_size=2).embeddings
  eight = encoder.ground(images, BOXES).embeddings
  np.testing.assert_allclose(one, eight, atol=1e-5)


def assert_described(heads):
  """Heads survive their JSON description."""
  described = json.loads(json.dumps(heads_lib.describe_heads(heads)))
  assert heads_lib.described_heads(described) == heads


@pytest.mark.parametrize("open_", [True, False])
@pytest.mark.parametrize("name", ["deep", "grounding", "captioning"])
def test_heads_of_a_config_equal_those_of_its_objectives(name, open_):
  entry = dict(OBJECTIVES[name])
  if open_:  # What a config leaves open has the objective's defaults.
    entry = {k: v for k, v in entry.items() if k == "type"}
  resolved = build_objective(name, entry).resolve(SPEC, {})
  heads = heads_lib.heads_of_config({name: entry}, SPEC)
  key = {"deep": "depth", "captioning": "caption"}.get(name, name)
  assert heads[key] == resolved.head
  assert_described(heads)


def test_only_trained_tasks_predict():
  entry = {"captioning": {"tasks": ["caption", "referring"]}}
  heads = heads_lib.heads_of_config(entry, SPEC)
  assert set(heads) == {"caption", "referring"}
  assert_described(heads)


@pytest.fixture(scope="module", params=["run", "to_hf", "native"])
def save(request, params, tmp_path_factory):
  """Function that writes a run with a config, or an export of that run."""

  def save(**config):
    folder = tmp_path_factory.mktemp("run")
    config |= {"model": MODEL, "objectives": OBJECTIVES}
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpointer(folder / "checkpoints", every_steps=1) as saver:
      saver.save(1, {"params": params})
    if request.param == "run":
      return folder
    write = huggingface.write if request.param == "to_hf" else native.write
    return write(folder / "out", loading.read_model(folder))

  return save


def test_loaded_heads_predict(save, encoder, images):
  loaded = mtv_jax.load(save())
  assert loaded.prediction_heads == HEADS
  for name, given in {
    "depth": {},
    "grounding": {"boxes": BOXES},
    "caption": {},
    "referring": {"phrases": PHRASES},
    "region_caption": {"boxes": BOXES},
  }.items():
    assert encoder.can_predict(name)
    got = loaded.predict(name, images, **given)
    want = encoder.predict(name, images, **given)
    assert got.keys() == want.keys()
    for key, value in want.items():
      np.testing.assert_array_equal(got[key], value)


def test_phrases_have_the_length_of_pretraining(save, encoder, images):
  """Phrases have fewer tokens than captions."""
  ops = "decode|canvas(32)|caption(12)|regions(2, phrase_length=8)"
  loaded = mtv_jax.load(save(data={"ops": ops}))
  assert loaded.phrase_length == 8
  # The text tower attends to padding.
  short, full = loaded.phrases(["ball"]), loaded.text(["ball"])
  tower = models.text_tower(SPEC)
  tokens = jnp.asarray(loaded.tokenizer.encode(["ball"], 8))
  want = tower.apply({"params": encoder.params["text"]}, tokens).pooled
  np.testing.assert_allclose(short, want, atol=1e-5)
  assert np.abs(short - full).max() > 0.01
  # A longer phrase is cut, as in pre-training, and does not affect the rest.
  cut = loaded.phrases(["a red ball", "ball"])
  np.testing.assert_array_equal(cut[1:], short)
  assert loaded.tokenizer.is_cut("a red ball", 8)
  np.testing.assert_array_equal(cut[:1], loaded.text(["a red ball"], length=8))
  # The locator gets the phrases' embeddings.
  phrases = [["ball", "a red ball"]]
  boxes = loaded.locate(images[:1], phrases).boxes[0]
  other = encoder.locate(images[:1], phrases).boxes[0]
  assert (np.abs(boxes - other).max(axis=1) > 1e-4).all()


def test_captions_have_tokens_and_text(encoder, params, images):
  out = encoder.predict("caption", images)
  assert out["tokens"].shape == (3, 12) and out["tokens"].dtype == np.int32
  rows = [row[: [*row, 1].index(1)] for row in out["tokens"].tolist()]
  texts = [bytes(max(i - 2, 0) for i in row if i > 1) for row in rows]
  assert out["text"].tolist() == [t.decode(errors="replace") for t in texts]
  assert len(set(map(tuple, rows))) > 1  # They depend on the image.
  regions = encoder.predict("region_caption", images, boxes=BOXES)
  assert regions["text"].shape == regions["valid"].shape == (3, 3)
  boxes = encoder.predict("referring", images, phrases=PHRASES)["boxes"]
  np.testing.assert_allclose(boxes, np.round(boxes * 49) / 49, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "name", "inputs", "error", "message"),
  [
    ({"heads": None}, "depth", {}, ValueError, "can't predict 'depth'"),
    ({}, "grounding", {"boxes": BOXES[:2]}, ValueError, "3 .*, but boxes for"),
    (
      {},
      "grounding",
      {"boxes": [[[0.1, 0.2, 0.3]], [], []]},
      ValueError,
      r"boxes of image 0 must be \[m, 4\]",
    ),
    (
      {},
      "grounding",
      {"boxes": [[], [], [[0, 0, 1, np.nan]]]},
      ValueError,
      "boxes of image 2 are not finite",
    ),
    (
      {},
      "locator",
      {"phrases": ["a ball", "a cube", "a cone"]},
      TypeError,
      "list of phrases for each image",
    ),
    ({}, "grounding", {}, TypeError, r"inputs \['boxes'\]; got \[\]"),
    (
      {"preprocess": CROPPING},
      "grounding",
      {"boxes": BOXES},
      ValueError,
      "sees whole images",
    ),
  ],
)
def test_invalid_arguments(
  params, images, options, name, inputs, error, message
):
  encoder = build(params, **options)
  assert encoder.can_predict(name) == ("heads" not in options)
  with pytest.raises(error, match=message):
    encoder.predict(name, images, **inputs)


def test_invalid_descriptions():
  with pytest.raises(ValueError, match="'tabs'. Did you mean 'taps'"):
    heads_lib.described_heads({"depth": {"tabs": [0]}})
  with pytest.raises(ValueError, match="has 'depths'"):
    heads_lib.described_heads({"depths": {}})
