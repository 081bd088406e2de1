"""Encoder: features do not depend on batch size, mesh and number of hosts."""

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import trainings
from random_trees import random_params

from mtv_jax.data import tokenizers
from mtv_jax.data.ops import find_op
from mtv_jax.encoder import apply_fns, batched, preprocess
from mtv_jax.encoder import encoder as encoder_lib
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.encoder.preprocess import Preprocess, as_pixels
from mtv_jax.encoder.visual_language import VisualLanguageModel
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads.language_model import LanguageHead
from mtv_jax.models.text import TextSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings

TOWER = {"width": 32, "heads": 2, "mlp_dim": 64}
SPEC = models.ModelSpec(
  image=ViTSpec(
    image_size=32, patch_size=8, depth=3, cls_token=True, registers=2, **TOWER
  ),
  text=TextSpec(vocab_size=258, length=12, depth=1, projection=32, **TOWER),
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PREPROCESS = Preprocess(size=32, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def params():
  head = {"logit_scale": np.float32(1.5), "logit_bias": np.float32(-2.0)}
  return random_params(SPEC, seed=1) | {"heads": {"contrastive": head}}


VISION = dataclasses.replace(SPEC, text=None)
SMALL = dataclasses.replace(
  SPEC, text=dataclasses.replace(SPEC.text, vocab_size=100)
)


def build(params, devices=None, spec=SPEC, **kwargs):
  mesh = make_mesh({"data": -1}, devices)
  tokenizer = tokenizers.build_tokenizer("bytes", clean="lower")
  return Encoder(spec, params, PREPROCESS, tokenizer, mesh, **kwargs)


def apply_tower(params, pixels, layers):
  tower = models.image_tower(SPEC)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x, layers=layers))
  return apply(params["image"], jnp.asarray(pixels, jnp.float32))


@pytest.fixture(scope="module")
def encoder(params):
  return build(params)


@pytest.fixture(scope="module")
def single(params):
  return build(params, jax.devices()[:1])


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(2)
  sizes = [(40, 56), (32, 32), (33, 70), (128, 20), (64, 64)]
  return [rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes]


@pytest.fixture(scope="module")
def features(encoder, images):
  return encoder.image(images, layers=(0, -1))


def assert_equal_features(got, out, grid, layers):
  """Equal to the tower's output; `layers` maps indices to blocks."""
  rows = len(got.patches)
  pairs = [(got.pooled, out.pooled), (got.prefix, out.prefix)]
  pairs.append((got.patches, out.patches.reshape(rows, *grid, 32)))
  assert got.layers.keys() == got.prefix_layers.keys() == layers.keys()
  for layer, block in layers.items():
    tokens = np.asarray(out.intermediates[block])
    pairs.append((got.layers[layer], tokens[:, 3:].reshape(rows, *grid, 32)))
    pairs.append((got.prefix_layers[layer], tokens[:, :3]))
  for ours, want in pairs:
    np.testing.assert_allclose(ours, want, atol=2e-5)
  # Different layers, so that the comparison can fail.
  first, last = (got.layers[layer] for layer in layers)
  assert np.abs(first - last).max() > 0.1
  assert np.abs(got.prefix_layers[-1] - got.prefix).max() > 0.1


def test_features_are_those_of_the_tower(features, params, images):
  out = apply_tower(params, [PREPROCESS(image) for image in images], (0, 2))
  assert features.pooled.shape == (5, 32)
  assert_equal_features(features, out, (4, 4), {0: 0, -1: 2})


@pytest.mark.parametrize(
  ("layer", "select"),
  [
    ((0, -1), "all"),
    ((2, 0), "patches"),
    (-2, "patches"),
    (None, "all"),
    (-2, "pooled"),
  ],
)
def test_features_of_a_language_model(params, images, layer, select):
  """An evaluation encodes what the connector reads in training."""
  sizes = dict(vocab_size=258, width=8, heads=2, kv_heads=1, depth=1)
  head = LanguageHead(layer=layer, select=select, **sizes).resolve(SPEC)
  heads = {"heads": {**params["heads"], head.params_key: {}}}
  encoder = build(params | heads, prediction_heads={head.params_key: head})
  model = VisualLanguageModel(encoder, find_op("conversation(9)"))
  out = apply_tower(params, [PREPROCESS(image) for image in images], (0, 1, 2))
  blocks = out.intermediates
  expected = {
    ((0, 2), "all"): np.concatenate([blocks[0], blocks[2]], axis=-1),
    ((2, 0), "patches"): np.concatenate([blocks[2], blocks[0]], -1)[:, 3:],
    (1, "patches"): blocks[1][:, 3:],
    (None, "all"): np.concatenate([out.prefix, out.patches], axis=1),
    (None, "pooled"): out.pooled[:, None],
  }[head.layer, head.select]
  np.testing.assert_allclose(model.encode(images), expected, atol=2e-5)
  crops = jax.tree.map(lambda x: x[:, None], out)  # [b, crops, n, d].
  np.testing.assert_array_equal(head.select_features(crops)[:, 0], expected)
  assert head.example(SPEC)[1].shape[-1] == expected.shape[-1]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_results_of_any_batch_size(encoder, features, images, batch_size):
  options = dict(outputs=("pooled",), batch_size=batch_size)
  again = encoder.image([*images, *images], **options).pooled
  both = np.concatenate([features.pooled] * 2)
  np.testing.assert_allclose(again, both, atol=1e-5)


def test_one_device_and_eight_agree(single, features, images):
  assert jax.device_count() == 8
  out = single.image(images, layers=(0, -1), batch_size=3)
  np.testing.assert_allclose(out.pooled, features.pooled, atol=1e-5)
  np.testing.assert_allclose(out.patches, features.patches, atol=1e-5)
  np.testing.assert_allclose(out.layers[0], features.layers[0], atol=1e-5)


def test_text_on_one_device_and_eight(single, encoder, params):
  strings = ["a red ball", "Two CUBES", "", "x" * 40]
  texts = encoder.text(strings)
  tokens = jnp.asarray(encoder.tokenizer.encode(strings, 12))
  apply = jax.jit(models.text_tower(SPEC).apply)
  out = apply({"params": params["text"]}, tokens)
  np.testing.assert_allclose(texts, out.pooled, atol=2e-5)
  again = single.text(strings, batch_size=3)
  np.testing.assert_allclose(again, texts, atol=1e-5)


def test_sharded_parameters_give_the_same(params, features, images):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  sharded = jax.device_put(params, tree_shardings(params, mesh))
  # Without a mesh, the parameters' mesh is used.
  live = Encoder(SPEC, sharded, PREPROCESS)
  assert live.mesh == mesh
  leaves = map(jax.tree.leaves, (live.params, sharded))
  copied = [a is not b for a, b in zip(*leaves, strict=True)]
  assert not any(copied), "live parameters were copied"
  out = live.image(images, outputs=("pooled",))
  np.testing.assert_allclose(out.pooled, features.pooled, atol=1e-5)


def test_new_parameters_do_not_recompile(encoder, features, params, images):
  before = apply_fns.image_function.cache_info().misses
  events = []
  listen = lambda event, duration, **_: events.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    other = build(jax.tree.map(lambda x: x * np.float32(1.1), params))
    out = other.image(images, layers=(0, -1))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert apply_fns.image_function.cache_info().misses == before
  assert not [e for e in events if "backend_compile" in e]
  assert np.abs(out.pooled - features.pooled).max() > 1e-2


def test_image_kinds_agree(encoder, images, tmp_path):
  pil_image, file = PIL.Image.fromarray(images[4]), tmp_path / "a.png"
  pil_image.save(file)
  kinds = [np.stack([images[4]]), [pil_image], [file.read_bytes()]]
  kinds += [[file], np.array([str(file)])]
  kinds += [[images[4].astype(np.uint16) * 257]]
  first, *others = (encoder.image(k, outputs=("pooled",)).pooled for k in kinds)
  for other in others:
    np.testing.assert_array_equal(other, first)


@pytest.mark.reference
def test_tensors_agree(encoder, images):
  """Channels last or first, also those that record gradients."""
  torch = pytest.importorskip("torch")
  last = torch.from_numpy(images[4])
  deep = torch.from_numpy(images[4].astype(np.uint16) * 257)
  kinds = [images[4], last, last.permute(2, 0, 1), deep]
  first, *others = encoder.image(kinds, outputs=("pooled",)).pooled
  for other in others:
    np.testing.assert_array_equal(other, first)
  with pytest.raises(TypeError, match=r"path.*Tensor float32 \[64, 64, 3\]"):
    encoder.image([(last / 255).requires_grad_()])
  with pytest.raises(TypeError, match=r"a Tensor: pass \[image\]"):
    preprocess.check_images(last, "image")


def turned(image):
  exif = PIL.Image.Exif()
  exif[0x112] = 6
  return PIL.Image.fromarray(image), {"exif": exif}


def deep(image):
  grey = image[..., 0].astype(np.uint16) * 257
  return PIL.Image.fromarray(grey), {}


def see_through(image):
  alpha = image[..., :1]
  return PIL.Image.fromarray(np.concatenate([image, alpha], axis=-1)), {}


@pytest.mark.parametrize("make", [turned, deep, see_through])
def test_pil_files_equal_their_bytes(encoder, images, make):
  pil_image, options = make(images[0])
  file = io.BytesIO()
  pil_image.save(file, "PNG", **options)
  with PIL.Image.open(io.BytesIO(file.getvalue())) as opened:
    out = encoder.image([opened, file.getvalue()], outputs=("pooled",)).pooled
    plain = np.asarray(opened.convert("RGB"))
  np.testing.assert_array_equal(out[0], out[1])
  # Pillow's resize would give another result.
  other = encoder.image([plain], outputs=("pooled",)).pooled
  assert np.abs(other[0] - out[0]).max() > 1e-3


def test_only_requested_outputs(encoder, images):
  out = encoder.image(images, outputs=("prefix",))
  assert out.pooled is None and out.patches is None
  assert out.prefix.shape == (5, 3, 32)


def test_similarity_is_the_formula(encoder):
  rng = np.random.default_rng(3)
  a, b = (rng.normal(size=(n, 32)).astype(np.float32) for n in (3, 2))
  got = encoder.similarity(a, b)
  for i, j in np.ndindex(3, 2):
    cosine = a[i] @ b[j] / (np.linalg.norm(a[i]) * np.linalg.norm(b[j]))
    assert got[i, j] == pytest.approx(np.exp(1.5) * cosine - 2, abs=1e-5)


def test_normalize_keeps_zero():
  got = normalize(np.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(got, [[0.6, 0.8], [0.0, 0.0]], atol=1e-7)


def test_bfloat16_is_close_and_comes_back_as_float32(params, features, images):
  half = build(params, dtype="bfloat16")
  out = half.image(images, outputs=("pooled",)).pooled
  assert out.dtype == np.float32
  cosine = np.sum(normalize(out) * normalize(features.pooled), axis=-1)
  assert cosine.min() > 0.99
  assert np.abs(out - features.pooled).max() > 1e-5


def test_protocol_is_json(encoder):
  protocol = json.loads(json.dumps(encoder.protocol()))
  assert protocol["input_size"] == 32
  assert protocol["image_pool"] == "map"
  assert protocol["tokenizer"]["kind"] == "bytes"


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda e, x: e.image(x[0]), TypeError, r"pass \[image\]"),
    (lambda e, x: e.image([x[0] / 255.0]), TypeError, r"uint16 \[.*float64"),
    (lambda e, x: e.image(x, layers=(3,)), ValueError, r"layer 3 .*0\.\.2"),
    (lambda e, x: e.image(x, outputs=("pool",)), ValueError, "some of"),
    (lambda e, x: e.image([]), ValueError, "no images"),
    # The annotations, which tests check, are stricter than users' code.
    (
      lambda e, x: preprocess.check_images((i for i in x), "image"),
      TypeError,
      r"a generator: pass list\(images\)",
    ),
    (lambda e, x: e.image([x[0][:0]]), TypeError, r"must be.*\[0, 56, 3\]"),
    (lambda e, x: e.image([b"no"]), ValueError, "'image 0'.*are not an image"),
    (lambda e, x: e.image([b"\0\0\0 ftypavif"]), ValueError, "ypavif' are not"),
    (lambda e, x: e.image(["a/b.jpg"]), FileNotFoundError, "a/b.jpg"),
    (
      lambda e, x: preprocess.check_images(pathlib.Path("a.jpg"), "image"),
      TypeError,
      r"a PosixPath: pass \[image\]",
    ),
    (lambda e, x: e.text([None]), TypeError, "strings"),
    (lambda e, x: e.text("a ball"), TypeError, r"pass \[string\]"),
    (
      lambda e, x: encoder_lib.check_embeddings(np.ones((1, 3)), np.eye(2)),
      ValueError,
      r"\[1, 3\] and \[2, 2\]",
    ),
    (
      lambda e, x: build(e.params, dtype="float8"),
      ValueError,
      "mean 'float32'",
    ),
    (lambda e, x: build(e.params["image"]), ValueError, "has no 'image'"),
    (lambda e, x: build(e.params, spec=SMALL), ValueError, "100 is too small"),
    (
      lambda e, x: build(e.params, spec=VISION).text(["a"]),
      ValueError,
      "no text",
    ),
    (
      lambda e, x: build({"image": e.params["image"]}, spec=VISION).similarity(
        np.ones((1, 32)), np.ones((1, 32))
      ),
      ValueError,
      r"one named 'contrastive'; none of \[\] have one",
    ),
    (
      lambda e, x: e.dense([np.zeros((41, 24, 3), np.uint8)]),
      ValueError,
      "41x24 .* nearest valid size is 40x24",
    ),
    (
      lambda e, x: e.dense([x[1], x[1][:16]]),
      ValueError,
      "image 1 is 16x32, but the first one 32",
    ),
    (
      lambda e, x: Encoder(e.spec, e.params, PREPROCESS, dtype="float16"),
      ValueError,
      "'float16' on CPUs; use 'bfloat16'",
    ),
    (lambda e, x: e.dense([x[1] / 255]), TypeError, "image 0 must be an array"),
    (lambda e, x: as_pixels(b"jpeg", "image 0"), TypeError, "Encoder.image"),
    (lambda e, x: e.dense(x[1]), TypeError, r"Encoder.dense takes.*\[image\]"),
  ],
)
def test_invalid_arguments(encoder, images, call, error, message):
  with pytest.raises(error, match=message):
    call(encoder, images)


def test_an_error_names_the_item(encoder, images):
  with pytest.raises(TypeError) as error:
    encoder.image([images[0], images[1] / 255.0])
  assert "item 1" in "".join(error.value.__notes__)


@pytest.fixture(scope="module")
def tall():
  return np.random.default_rng(2).integers(0, 256, (5, 40, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def dense(encoder, tall):
  outputs = ("pooled", "patches", "prefix")
  return encoder.dense(tall, layers=(1, -1), outputs=outputs)


def test_dense_equals_the_tower_at_that_size(dense, params, tall):
  out = apply_tower(params, (tall / np.float32(255) - MEAN) / STD, (1, 2))
  assert_equal_features(dense, out, (5, 3), {1: 1, -1: 2})


def test_dense_at_the_input_size_equals_image(encoder, tall):
  squares = tall[:, :32, :1].repeat(32, axis=2)
  whole = encoder.image(squares, layers=(0,), outputs=("patches",))
  out = encoder.dense(squares, layers=(0,))
  np.testing.assert_array_equal(out.patches, whole.patches)
  np.testing.assert_array_equal(out.layers[0], whole.layers[0])
  np.testing.assert_array_equal(out.prefix_layers[0], whole.prefix_layers[0])


def test_dense_on_one_device_and_eight(single, dense, tall):
  out = single.dense(tall, layers=(1,), batch_size=2)
  np.testing.assert_allclose(out.patches, dense.patches, atol=1e-5)
  np.testing.assert_allclose(out.layers[1], dense.layers[1], atol=1e-5)
  assert out.pooled is None


def test_floats_and_lists_are_the_same_pixels(encoder, dense, tall):
  floats = [image.astype(np.float32) for image in tall]
  again = encoder.dense(floats)
  np.testing.assert_array_equal(again.patches, dense.patches)
  # Values are not rounded.
  other = encoder.dense([image + np.float32(0.4) for image in floats])
  assert np.abs(other.patches - dense.patches).max() > 1e-4


@pytest.mark.parametrize(
  ("arguments", "want"),
  [
    ((1000, 64, 8), 64),
    ((1000, 60, 8), 64),
    ((1, 64, 1), 1),
    ((5, 64, 1), 8),
    ((5, 6, 1), 6),
    ((3, 64, 8), 8),
  ],
)
def test_padded_batch_size(arguments, want):
  assert batched.padded_batch_size(*arguments) == want


# In two processes, and in this one.
MODEL = """
import jax
import numpy as np
from mtv_jax.data import conversations, tokenizers
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models

tower = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
text = {"length": 8, "vocab_size": 258, **tower}
spec = models.ModelSpec.from_config(
  {"image_size": 16, "patch_size": 8, **tower, "text": text})
params = jax.tree.map(np.asarray, models.init_params(spec, jax.random.key(0)))


class Photos(list):
  read = set()

  def __getitem__(self, i):
    self.read.add(i)
    return super().__getitem__(i)


rng = np.random.default_rng(0)
photos = Photos(rng.integers(0, 256, (11, 20, 24, 3), np.uint8))
tokenizer = tokenizers.build_tokenizer("bytes")
encoder = Encoder(spec, params, Preprocess(size=16), tokenizer)
out = encoder.image(photos, layers=(0,), batch_size=4)
arrays = dict(pooled=out.pooled, layer=out.layers[0], read=sorted(Photos.read),
              text=encoder.text(["a", "b", "c"]))
"""
SAVE = """
import sys
assert jax.device_count() == 4 and jax.local_device_count() == 2
np.savez(f"{sys.argv[1]}/{process}", **arrays)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
  """Each decodes its own half; both get all results, like a single process."""
  trainings.run_pair(MODEL + SAVE, str(tmp_path), devices=2)
  first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
  assert sorted([*first["read"], *second["read"]]) == list(range(11))
  assert len(first["read"]) == 6
  exec(MODEL, alone := {})
  for got in (first, second):
    for name in ("pooled", "layer", "text"):
      want = alone["arrays"][name]
      np.testing.assert_allclose(got[name], want, atol=1e-5)
