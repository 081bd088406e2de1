"""Depth, regions and boxes from the heads of pretraining, live and loaded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mtv_jax
from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.convert import huggingface, native
from mtv_jax.data import tokenizers
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads.base import PredictionHead
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


def objective(name):
  entry = OBJECTIVES[name]
  return build_objective(name, entry).resolve(SPEC, {})


@pytest.fixture(scope="module")
def heads():
  """The modules of pretraining, by name."""
  result = {}
  for name in OBJECTIVES:
    result |= objective(name).heads()
  return result


@pytest.fixture(scope="module")
def params(heads):
  rng = np.random.default_rng(3)
  shapes = models.abstract_params(SPEC)
  shapes["heads"] = {
    name: jax.eval_shape(lambda h=head: h.init(jax.random.key(0), SPEC))
    for name, head in heads.items()
  }
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes
  )


def build(params, devices=None, prediction_heads=HEADS, **kwargs):
  return Encoder(
    SPEC,
    params,
    Preprocess(size=32),
    tokenizers.build_tokenizer("bytes", clean="lower"),
    make_mesh({"data": -1}, devices),
    prediction_heads=prediction_heads,
    **kwargs,
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
    out = tower.apply(variables, batch, taps=(0, 1, 2))
    stages = [out.taps[i].reshape(3, 4, 4, 32) for i in (0, 1, 1, 2)]
    return {
      "depth": bound["depth"](stages, (12, 12)),
      "regions": bound["prompter"](out.patches, boxes, 32),
      "boxes": bound["locator"](out.patches, texts),
    }

  return jax.tree.map(np.asarray, jax.jit(run)(params))


def test_depth_equals_the_objective_s_head(encoder, images, expected):
  assert encoder.can_predict("depth")
  got = encoder.depth(images)
  assert got.shape == (3, 12, 12)
  assert np.std(got) > 0.01
  np.testing.assert_allclose(got, expected["depth"], atol=2e-5)


def test_regions_equal_the_prompter(encoder, images, expected):
  assert encoder.can_predict("grounding")
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
  assert encoder.can_predict("locator")
  result = encoder.locate(images, PHRASES)
  np.testing.assert_array_equal(result.valid.sum(axis=1), [2, 0, 3])
  centre, half = expected["boxes"][..., :2], expected["boxes"][..., 2:] / 2
  want = np.concatenate([centre - half, centre + half], axis=-1)
  np.testing.assert_allclose(result.boxes[0, :2], want[0, :2], atol=2e-5)
  np.testing.assert_allclose(result.boxes[2], want[2, 2:], atol=2e-5)
  assert np.abs(result.boxes[2, 0] - result.boxes[2, 1]).max() > 1e-3


def test_one_device_and_eight_agree(encoder, params, images):
  single = build(params, jax.devices()[:1])
  np.testing.assert_allclose(
    single.ground(images, BOXES, batch_size=2).embeddings,
    encoder.ground(images, BOXES).embeddings,
    atol=1e-5,
  )


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
  described = json.loads(json.dumps(heads_lib.describe_heads(heads)))
  assert heads_lib.described_heads(described) == heads


def test_only_trained_tasks_predict():
  entry = {"captioning": {"tasks": ["caption", "referring"]}}
  heads = heads_lib.heads_of_config(entry, SPEC)
  assert set(heads) == {"caption", "referring"}
  described = json.loads(json.dumps(heads_lib.describe_heads(heads)))
  assert heads_lib.described_heads(described) == heads


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = {"model": MODEL, "objectives": OBJECTIVES}
  (folder / "config.json").write_text(json.dumps(config))
  with Checkpointer(folder / "checkpoints", every_steps=1) as saver:
    saver.save(1, {"params": params})
  return folder


@pytest.mark.parametrize("form", ["run", "to_hf", "native"])
def test_loaded_heads_predict(form, run, encoder, images, tmp_path):
  folder = run
  if form != "run":
    model = loading.read_model(run)
    write = huggingface.write if form == "to_hf" else native.write
    folder = write(tmp_path / "out", model)
  loaded = mtv_jax.load(folder)
  assert loaded.prediction_heads == HEADS
  np.testing.assert_array_equal(loaded.depth(images), encoder.depth(images))
  np.testing.assert_array_equal(
    loaded.ground(images, BOXES).embeddings,
    encoder.ground(images, BOXES).embeddings,
  )
  for name, given in {
    "caption": {},
    "referring": {"phrases": PHRASES},
    "region_caption": {"boxes": BOXES},
  }.items():
    got = loaded.predict(name, images, **given)
    want = encoder.predict(name, images, **given)
    assert got.keys() == want.keys()
    for key, value in want.items():
      np.testing.assert_array_equal(got[key], value)


@pytest.fixture(scope="module")
def short_phrases(params, tmp_path_factory):
  """A run whose phrases have fewer tokens than its captions."""
  folder = tmp_path_factory.mktemp("short_phrases")
  ops = "decode|canvas(32)|caption(12)|regions(2, phrase_length=8)"
  config = {"data": {"ops": ops}, "model": MODEL, "objectives": OBJECTIVES}
  (folder / "config.json").write_text(json.dumps(config))
  with Checkpointer(folder / "checkpoints", every_steps=1) as saver:
    saver.save(1, {"params": params})
  return folder


@pytest.mark.parametrize("form", ["run", "to_hf", "native"])
def test_phrases_have_the_length_of_pretraining(
  form, short_phrases, encoder, images, tmp_path
):
  folder = short_phrases
  if form != "run":
    write = huggingface.write if form == "to_hf" else native.write
    folder = write(tmp_path / "out", loading.read_model(short_phrases))
  loaded = mtv_jax.load(folder)
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


class MeanColour(nn.Module):
  channels: int

  @nn.compact
  def __call__(self, patches):
    return nn.Dense(self.channels)(patches).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class ColourHead(PredictionHead):
  objective = "colour"
  params_key = "colour"

  channels: int = 3

  def module(self):
    return MeanColour(self.channels)

  def example(self, spec):
    return (jax.ShapeDtypeStruct((1, 1, spec.image.width), "float32"),)

  def predict(self, head, image, grid):
    return {"colour": head(image.patches)}


def test_a_registered_head_predicts(params, images, encoder, monkeypatch):
  monkeypatch.setitem(heads_lib.HEADS, "colour", ColourHead)
  config = {"colour": {"weight": 1.0, "channels": 2}}
  heads = heads_lib.heads_of_config(config, SPEC)
  assert heads_lib.described_heads(heads_lib.describe_heads(heads)) == heads
  head = base.Head.of(heads["colour"])["colour"].init(jax.random.key(1), SPEC)
  extended = build(
    {**params, "heads": {"colour": head}}, prediction_heads=heads
  )
  assert extended.can_predict("colour") and not extended.can_predict("depth")
  colour = extended.predict("colour", images)["colour"]
  patches = encoder.image(images, outputs=("patches",)).patches
  mean = patches.mean(axis=(1, 2))
  dense = head["Dense_0"]
  expected = mean @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
  np.testing.assert_allclose(colour, expected, atol=1e-5)


def test_invalid_arguments_raise(encoder, params, images):
  bare = build(params, prediction_heads=None)
  assert not bare.can_predict("depth")
  assert not bare.can_predict("grounding")
  with pytest.raises(ValueError, match="can't predict 'depth'"):
    bare.depth(images)
  with pytest.raises(ValueError, match="can't predict 'grounding'"):
    bare.ground(images, BOXES)
  with pytest.raises(ValueError, match="can't predict 'locator'"):
    bare.locate(images, PHRASES)
  with pytest.raises(ValueError, match="3 images, and boxes of 2"):
    encoder.ground(images, BOXES[:2])
  with pytest.raises(ValueError, match=r"boxes of image 0 must be \[m, 4\]"):
    encoder.ground(images, [[[0.1, 0.2, 0.3]], [], []])
  with pytest.raises(ValueError, match="boxes of image 2 are not finite"):
    encoder.ground(images, [[], [], [[0, 0, 1, np.nan]]])
  with pytest.raises(TypeError, match="list of phrases for each image"):
    encoder.locate(images, ["a ball", "a cube", "a cone"])
  with pytest.raises(TypeError, match=r"inputs \['boxes'\]; got \[\]"):
    encoder.predict("grounding", images)
  with pytest.raises(ValueError, match="'tabs'. Did you mean 'taps'"):
    heads_lib.described_heads({"depth": {"tabs": [0]}})
  with pytest.raises(ValueError, match="has 'depths'"):
    heads_lib.described_heads({"depths": {}})
  cropping = Encoder(
    SPEC,
    params,
    Preprocess(size=32, resize="shortest", crop="center"),
    prediction_heads=HEADS,
  )
  with pytest.raises(ValueError, match="sees whole images"):
    cropping.ground(images, BOXES)
