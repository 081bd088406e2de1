"""OWLv2 expert: preprocessing, queries, labels, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mtv_jax.convert.tables import ConversionError
from mtv_jax.data import tokenizers
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.phrases import Phrases
from mtv_jax.experts.owlv2 import expert as owlv2
from mtv_jax.experts.owlv2 import model as owlv2_model
from mtv_jax.experts.owlv2 import weights as owlv2_weights
from mtv_jax.experts.owlv2.queries import QueryCache
from mtv_jax.parallel.mesh import make_mesh

TINY = {
  "model_type": "owlv2",
  "projection_dim": 16,
  "text_config": {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
  },
  "vision_config": {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
  },
}


@dataclasses.dataclass(frozen=True)
class Given(Phrases):
  """Phrases of `record["phrases"]`, or constant ones."""

  vocabulary: tuple[str, ...] | None = None

  @property
  def settings(self):
    return {"source": "given"}

  def __call__(self, record):
    return list(self.vocabulary or record["phrases"])


def mesh_of(count):
  return make_mesh({"data": -1}, jax.devices()[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model of random numbers with a tokenizer of bytes."""
  path = tmp_path_factory.mktemp("owlv2")
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(0, 0.3, shape).astype(np.float32)
    for rule in owlv2_weights.param_mapping(owlv2_weights.read_spec(TINY))
    for name, shape in rule.expected_shapes()
  }
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(TINY))
  tokenizers.export_files(tokenizers.build_tokenizer("bytes"), path, length=16)
  return path


def photo(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def label(expert, images, phrases):
  """The outcomes of some images of one group, in one batch."""
  prepared = [
    expert.prepare(image, {"key": "7", "phrases": own})
    for image, own in zip(images, phrases, strict=True)
  ]
  arrays = {
    name: np.stack(
      [prepared[i % len(prepared)].arrays[name] for i in range(expert.rows)]
    )
    for name in prepared[0].arrays
  }
  outputs = {k: np.asarray(v) for k, v in expert.run(arrays).items()}
  return [
    expert.finish({k: v[i, ...] for k, v in outputs.items()}, item.meta)
    for i, item in enumerate(prepared)
  ]


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


def test_extreme_aspect_ratio_is_resized_without_allocating_the_square():
  square = owlv2.pad_to_square(np.full((4, 1500, 3), 255, np.uint8), 50)
  assert square.shape == (50, 50, 3)
  assert square[0].min() > 0.5
  np.testing.assert_array_equal(square[6:], 0.5)


# --- A tiny model -------------------------------------------------------------


@pytest.mark.slow
def test_labels_do_not_depend_on_the_number_of_devices(folder):
  images = [photo((30, 60), i) for i in range(8)]
  phrases = [[f"a {i}", "dog", "the same"] for i in range(8)]
  options = dict(phrases=Given(), threshold=0.0, nms=0.9)
  whole = owlv2.load_expert(folder, mesh=mesh_of(8), **options)
  assert isinstance(whole, Expert)
  assert whole.rows == 8
  together = label(whole, images, phrases)
  one = owlv2.load_expert(folder, mesh=mesh_of(1), **options)
  assert one.settings == whole.settings
  json.dumps(one.settings)
  for i in reversed(range(8)):
    (alone,) = label(one, images[i : i + 1], phrases[i : i + 1])
    batched, single = together[i].label, alone.label
    assert batched.phrases == single.phrases
    np.testing.assert_array_equal(batched.boxes, single.boxes)
    np.testing.assert_array_equal(batched.scores, single.scores)
    assert len(batched.boxes)
    assert set(batched.phrases) <= set(phrases[i])
    assert (batched.boxes >= 0).all() and (batched.boxes <= 1).all()
    assert (np.diff(batched.scores) <= 0).all()

  with pytest.raises(BadRecord, match="no phrases"):
    one.prepare(images[0], {"key": "7", "phrases": []})


@pytest.mark.slow
def test_a_fixed_vocabulary_gives_the_same_boxes(folder):
  images, phrases = [photo((30, 60))], ("a 0", "dog", "the same")
  options = dict(mesh=mesh_of(1), threshold=0.0, nms=0.9)
  one = owlv2.load_expert(folder, phrases=Given(), **options)
  (expected,) = label(one, images, [phrases])
  closed = owlv2.load_expert(folder, phrases=Given(phrases), **options)
  assert set(closed.prepare(images[0], {"key": "7"}).arrays) == {"pixels"}
  (again,) = label(closed, images, [[]])
  assert again.label.phrases == expected.label.phrases
  np.testing.assert_array_equal(again.label.boxes, expected.label.boxes)


def test_queries_do_not_depend_on_earlier_requests():
  def embed(params, tokens):
    return params * tokens.sum(axis=1).astype(np.float32)

  def make(capacity):
    return QueryCache(
      embed, np.float32(2), width=3, mesh=mesh_of(2), capacity=capacity
    )

  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 9, (90, 1, 3)).astype(np.int32)
  tokens[7] = 0
  queries = make(8)
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
  patches = owlv2_model.Patches(
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
  config = tmp_path / "config.json"
  config.write_text(json.dumps(TINY))
  with pytest.raises(ConversionError, match=r"box_head\.dense1\.bias"):
    owlv2_weights.read(tmp_path)
  config.write_text(json.dumps(TINY | {"model_type": "owlvit"}))
  with pytest.raises(ConversionError, match="owlvit"):
    owlv2_weights.read(tmp_path)
  config.write_text(json.dumps(TINY | {"projection_dim": 8}))
  with pytest.raises(ConversionError, match="projection_dim=8"):
    owlv2_weights.read(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
    owlv2_weights.read_tokenizer(tmp_path)
  for options in (
    dict(prompts="a dog"), dict(dtype="float16"), dict(batch_size=0),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(options))):
      owlv2.load_expert(folder, phrases=Given(), **options)


@pytest.mark.slow
def test_the_logits_of_several_prompts_are_averaged(folder):
  files = owlv2_weights.read(folder)
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
