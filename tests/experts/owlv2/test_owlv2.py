"""OWLv2 expert: preprocessing, queries, labels, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from labelling_samples import label_images, mesh_of

from mtv_jax.convert.tables import ConversionError
from mtv_jax.data import tokenizers
from mtv_jax.data.records import BadRecord
from mtv_jax.experts import base, owlv2, owlv2_model
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.phrases import FixedPhrases, Tags

TOWER = {
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
}
TINY = {
  "model_type": "owlv2",
  "projection_dim": 16,
  "text_config": {**TOWER, "vocab_size": 258},
  "vision_config": {**TOWER, "image_size": 64, "patch_size": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model of random numbers with a tokenizer of bytes."""
  path = tmp_path_factory.mktemp("owlv2")
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(0, 0.3, shape).astype(np.float32)
    for rule in owlv2_model.param_mapping(owlv2_model.read_spec(TINY))
    for name, shape in rule.expected_shapes()
  }
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(TINY))
  tokenizers.export_files(tokenizers.build_tokenizer("bytes"), path, length=16)
  return path


def photo(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def label(expert, images, phrases):
  records = [{"meta": {"tags": own}} for own in phrases]
  return label_images(expert, images, records)


# --- In NumPy -----------------------------------------------------------------


def test_a_patch_biases_its_box_to_itself():
  bias = owlv2_model.box_bias((2, 4))
  x, y, width, height = (1 / (1 + np.exp(-bias))).T
  np.testing.assert_allclose(x[:4], [0.25, 0.5, 0.75, 1], atol=2e-4)
  np.testing.assert_allclose(y[[0, 4]], [0.5, 1], atol=2e-4)
  np.testing.assert_allclose(width, 0.25, atol=2e-4)
  np.testing.assert_allclose(height, 0.5, atol=2e-4)
  assert np.isfinite(bias).all()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64), (1, 9)])
def test_images_are_padded_to_a_grey_square(shape):
  image = photo(shape)
  side = max(shape)
  square = owlv2.pad_to_square(image, side)
  expected = np.full((side, side, 3), 0.5)
  expected[: shape[0], : shape[1]] = image / 255
  np.testing.assert_allclose(square, expected, atol=1e-6)

  # An extreme aspect ratio, resized without allocating the square.
  square = owlv2.pad_to_square(np.full((4, 1500, 3), 255, np.uint8), 50)
  assert square.shape == (50, 50, 3)
  assert square[0].min() > 0.5
  np.testing.assert_array_equal(square[6:], 0.5)


# --- A tiny model -------------------------------------------------------------


@pytest.mark.slow
def test_labels_do_not_depend_on_devices_and_padding(folder, monkeypatch):
  images = [photo((30, 60), i) for i in range(8)]
  phrases = [[f"a {i}", "dog", "the same"] for i in range(8)]
  options = dict(phrases=Tags("tags"), threshold=0.0, nms=0.9)
  whole = owlv2.load_expert(folder, mesh=mesh_of(8), **options)
  assert isinstance(whole, Expert)
  assert whole.rows == 8
  together = label(whole, images, phrases)
  one = owlv2.load_expert(folder, mesh=mesh_of(1), **options)
  assert one.settings == whole.settings
  json.dumps(one.settings)
  for i in (7, 3, 0):
    (alone,) = label(one, images[i : i + 1], phrases[i : i + 1])
    batched, single = together[i].label, alone.label
    assert batched.phrases == single.phrases
    np.testing.assert_array_equal(batched.boxes, single.boxes)
    np.testing.assert_array_equal(batched.scores, single.scores)
    assert len(batched.boxes)
    assert set(batched.phrases) <= set(phrases[i])
    assert (batched.boxes >= 0).all() and (batched.boxes <= 1).all()
    assert (np.diff(batched.scores) <= 0).all()

  # One program on accelerators.
  with monkeypatch.context() as patch:
    patch.setattr(base, "is_accelerator", lambda mesh: True)
    given = dict(dtype="float32", batch_size=1)
    padded = owlv2.load_expert(folder, mesh=mesh_of(1), **given, **options)
  assert padded.settings == one.settings
  record = {"key": "7", "captions": [], "meta": {"tags": phrases[0]}}
  assert padded.prepare(images[0], record).group == 512
  (alone,) = label(padded, images[:1], phrases[:1])
  assert alone.label.phrases == together[0].label.phrases
  np.testing.assert_array_equal(alone.label.boxes, together[0].label.boxes)

  with pytest.raises(BadRecord, match="no phrases"):
    one.prepare(images[0], {"key": "7", "meta": {}})
  # A fixed vocabulary gives the same boxes.
  options["phrases"] = FixedPhrases(tuple(phrases[0]))
  closed = owlv2.load_expert(folder, mesh=mesh_of(1), **options)
  assert set(closed.prepare(images[0], {"key": "7"}).arrays) == {"pixels"}
  (again,) = label(closed, images[:1], [[]])
  assert again.label.phrases == together[0].label.phrases
  np.testing.assert_array_equal(again.label.boxes, together[0].label.boxes)


def test_queries_do_not_depend_on_earlier_requests():
  def embed(params, tokens):
    return params * tokens.sum(axis=1).astype(np.float32)

  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 9, (90, 1, 3)).astype(np.int32)
  tokens[7] = 0
  options = dict(width=3, mesh=mesh_of(2), capacity=8)
  queries = owlv2.QueryCache(embed, np.float32(2), **options)
  for request in (tokens[:5], tokens[3:9], tokens[::-1], tokens[60:66]):
    slots = queries.look_up(request)
    expected = 2 * request.sum(axis=1)
    is_phrase = request.any(axis=(1, 2))
    np.testing.assert_array_equal(slots >= 0, is_phrase)
    table = np.asarray(queries.table)
    np.testing.assert_array_equal(table[slots[is_phrase]], expected[is_phrase])
  encoded = queries.encoded
  queries.look_up(tokens[60:66].reshape(2, 3, 1, 3))
  assert queries.encoded == encoded


def test_padding_queries_never_win():
  patches = owlv2_model.Proposals(
    embeddings=np.ones((1, 2, 2), np.float32),
    shift=np.full((1, 2), -5, np.float32),
    scale=np.ones((1, 2), np.float32),
    boxes=None,
    objectness=None,
  )
  queries = np.array([[[1, 0], [9, 9]]], np.float32)
  logits = patches.logits(queries, np.array([[True, False]]))
  np.testing.assert_array_equal(logits[0, :, 0], -4)
  np.testing.assert_array_equal(logits[0, :, 1], np.finfo(np.float32).min)


def test_errors_name_the_tensor_the_field_and_the_option(folder, tmp_path):
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  del tensors["box_head.dense1.bias"]
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  for change, message in (
    ({}, r"box_head\.dense1\.bias"),
    ({"model_type": "owlvit"}, "owlvit"),
    ({"projection_dim": 8}, "projection_dim=8"),
  ):
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ConversionError, match=message):
      owlv2_model.read(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
    owlv2_model.read_tokenizer(tmp_path)
  options = dict(prompts="a dog", dtype="float16", batch_size=0)
  for name, value in options.items():
    with pytest.raises(ValueError, match=name):
      owlv2.load_expert(folder, phrases=Tags("tags"), **{name: value})


@pytest.mark.slow
def test_the_logits_of_several_prompts_are_averaged(folder):
  files = owlv2_model.read(folder)
  model = owlv2_model.Owlv2(files.spec)
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 258, (1, 3, 16)).astype(np.int32)
  pixels = rng.normal(size=(1, 64, 64, 3)).astype(np.float32)

  def run(params, pixels, tokens):
    variables = {"params": params}
    _, each = model.apply(variables, pixels, tokens)
    patches = model.apply(variables, pixels, method="detect")
    query = model.apply(variables, tokens, method="queries")
    return each, patches.logits(query[None], jnp.ones((1, 1), bool))

  each, together = jax.jit(run)(files.params, pixels, tokens)
  np.testing.assert_allclose(together[..., 0], each.mean(-1), atol=1e-5)
