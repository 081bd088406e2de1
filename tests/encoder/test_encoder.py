"""Encoder: features do not depend on batch size, mesh and number of hosts.

Also `Encoder.dense`, features at the size of the images.
"""

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

from mtv_jax.data import tokenizers
from mtv_jax.encoder import apply_fns, batched, preprocess
from mtv_jax.encoder import encoder as encoder_lib
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.encoder.preprocess import Preprocess, as_pixels
from mtv_jax.models import two_tower as models
from mtv_jax.models.text import TextSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings

TOWER = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
SPEC = models.ModelSpec(
  image=ViTSpec(
    image_size=32,
    patch_size=8,
    width=32,
    depth=3,
    heads=2,
    mlp_dim=64,
    cls_token=True,
    registers=2,
  ),
  text=TextSpec(
    vocab_size=258,
    length=12,
    width=32,
    depth=1,
    heads=2,
    mlp_dim=64,
    projection=32,
  ),
)


@pytest.fixture(scope="module")
def params():
  # Random instead of initialised: no leaf is zero, and nothing is compiled.
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32),
    models.abstract_params(SPEC),
  )
  head = {"logit_scale": np.float32(1.5), "logit_bias": np.float32(-2.0)}
  return {**params, "heads": {"contrastive": head}}


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def build(params, devices=None, **kwargs):
  mesh = make_mesh({"data": -1}, devices)
  tokenizer = tokenizers.build_tokenizer("bytes", clean="lower")
  preprocess = Preprocess(size=32, mean=MEAN, std=STD)
  return Encoder(SPEC, params, preprocess, tokenizer, mesh, **kwargs)


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


def test_features_are_those_of_the_tower(features, params, images):
  preprocess = Preprocess(size=32, mean=MEAN, std=STD)
  batch = jnp.stack([preprocess(image) for image in images])
  tower = models.image_tower(SPEC)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x, taps=(0, 2)))
  out = apply(params["image"], batch)
  assert features.pooled.shape == (5, 32)
  assert features.patches.shape == (5, 4, 4, 32)
  assert features.prefix.shape == (5, 3, 32)
  assert sorted(features.layers) == [-1, 0]
  np.testing.assert_allclose(features.pooled, out.pooled, atol=2e-5)
  np.testing.assert_allclose(features.prefix, out.prefix, atol=2e-5)
  flat = features.patches.reshape(5, 16, 32)
  np.testing.assert_allclose(flat, out.patches, atol=2e-5)
  for layer, tap in ((0, 0), (-1, 2)):
    flat = features.layers[layer].reshape(5, 16, 32)
    np.testing.assert_allclose(flat, out.taps[tap][:, 3:], atol=2e-5)
  # Different layers, so that the comparison can fail.
  assert np.abs(features.layers[0] - features.layers[-1]).max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_results_of_any_batch_size(encoder, features, images, batch_size):
  again = encoder.image(
    [*images, *images], outputs=("pooled",), batch_size=batch_size
  )
  both = np.concatenate([features.pooled] * 2)
  np.testing.assert_allclose(again.pooled, both, atol=1e-5)


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
  tower = models.text_tower(SPEC)
  out = jax.jit(lambda p, x: tower.apply({"params": p}, x))(
    params["text"], tokens
  )
  np.testing.assert_allclose(texts, out.pooled, atol=2e-5)
  np.testing.assert_allclose(
    single.text(strings, batch_size=3), texts, atol=1e-5
  )


def test_sharded_parameters_give_the_same(params, features, images):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  sharded = jax.device_put(params, tree_shardings(params, mesh))
  # Without a mesh, the parameters' mesh is used.
  live = Encoder(SPEC, sharded, Preprocess(size=32, mean=MEAN, std=STD))
  assert live.mesh == mesh
  leaves = zip(
    jax.tree.leaves(live.params), jax.tree.leaves(sharded), strict=True
  )
  assert all(a is b for a, b in leaves), "live parameters were copied"
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


def test_image_kinds_agree(encoder, images):
  square = images[4]
  jpeg = PIL.Image.fromarray(square)
  as_array = encoder.image(np.stack([square]), outputs=("pooled",)).pooled
  as_pil = encoder.image([jpeg], outputs=("pooled",)).pooled
  np.testing.assert_array_equal(as_array, as_pil)
  file = io.BytesIO()
  jpeg.save(file, "PNG")
  as_bytes = encoder.image([file.getvalue()], outputs=("pooled",)).pooled
  np.testing.assert_array_equal(as_array, as_bytes)


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
  assert out.pooled is None
  assert out.patches is None
  assert out.prefix.shape == (5, 3, 32)


def test_similarity_is_the_formula(encoder):
  rng = np.random.default_rng(3)
  a = rng.normal(size=(3, 32)).astype(np.float32)
  b = rng.normal(size=(2, 32)).astype(np.float32)
  want = np.array(
    [
      [
        np.exp(1.5) * (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)) - 2.0
        for y in b
      ]
      for x in a
    ]
  )
  np.testing.assert_allclose(encoder.similarity(a, b), want, atol=1e-5)


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


def test_invalid_arguments_raise(encoder, images, params):
  with pytest.raises(TypeError, match=r"pass \[image\]"):
    encoder.image(images[0])
  with pytest.raises(TypeError, match=r"uint8 \[H, W, 3\].*float64") as error:
    encoder.image([images[0], images[1] / 255.0])
  assert "item 1" in "".join(error.value.__notes__)
  with pytest.raises(ValueError, match=r"layer 3 .* 3 blocks.*0\.\.2"):
    encoder.image(images, layers=(3,))
  with pytest.raises(ValueError, match="expected some of"):
    encoder.image(images, outputs=("pool",))
  with pytest.raises(ValueError, match="no images"):
    encoder.image([])
  with pytest.raises(TypeError, match=r"a generator: pass list\(images\)"):
    # The annotations, which tests check, are stricter than users' code.
    preprocess.check_images((image for image in images), "image")
  with pytest.raises(TypeError, match=r"image 0 must be.*\[0, 9, 3\]"):
    encoder.image([np.zeros((0, 9, 3), np.uint8)])
  with pytest.raises(ValueError, match="record 'image 1'.*are no image"):
    encoder.image([images[0], b"nothing"])
  with pytest.raises(TypeError, match="strings"):
    encoder.text([None])
  with pytest.raises(ValueError, match=r"\[1, 32\] and \[1, 16\]"):
    encoder_lib.check_embeddings(np.ones((1, 32)), np.ones((1, 16)))
  with pytest.raises(ValueError, match="'float8'. Did you mean 'float32'"):
    Encoder(SPEC, params, Preprocess(size=32), dtype="float8")
  for path in ("a/b.jpg", pathlib.Path("a/b.jpg")):
    with pytest.raises(TypeError, match=r"image 0 is the path 'a/b.jpg'.*read"):
      encoder.image([path])
  with pytest.raises(TypeError, match=r"pass \[string\]"):
    encoder.text("a ball")
  with pytest.raises(ValueError, match="params has no 'image'"):
    Encoder(SPEC, params["image"], Preprocess(size=32))
  vision = dataclasses.replace(SPEC, text=None)
  image_only = Encoder(vision, {"image": params["image"]}, Preprocess(size=32))
  with pytest.raises(ValueError, match="no text tower"):
    image_only.text(["a"])
  with pytest.raises(ValueError, match=r"logit_scale\): \[\]; expected one"):
    image_only.similarity(np.ones((1, 32)), np.ones((1, 32)))


def test_tokenizer_larger_than_the_vocabulary_raises(params):
  text = dataclasses.replace(SPEC.text, vocab_size=100)
  tokenizer = tokenizers.build_tokenizer("bytes")
  with pytest.raises(ValueError, match="100 is too small"):
    Encoder(
      dataclasses.replace(SPEC, text=text),
      params,
      Preprocess(size=32),
      tokenizer,
    )


@pytest.fixture(scope="module")
def tall():
  return np.random.default_rng(2).integers(0, 256, (5, 40, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def dense(encoder, tall):
  outputs = ("pooled", "patches", "prefix")
  return encoder.dense(tall, layers=(1, -1), outputs=outputs)


def test_dense_equals_the_tower_at_that_size(dense, params, tall):
  pixels = (tall.astype(np.float32) / 255 - MEAN) / STD
  tower = models.image_tower(SPEC)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x, taps=(1, 2)))
  out = apply(params["image"], jnp.asarray(pixels, jnp.float32))
  want = {
    "pooled": out.pooled,
    "patches": out.patches.reshape(5, 5, 3, 32),
    "prefix": out.prefix,
  }
  for name, value in want.items():
    np.testing.assert_allclose(getattr(dense, name), value, atol=2e-5)
  for layer, tap in ((1, 1), (-1, 2)):
    tapped = np.asarray(out.taps[tap])
    np.testing.assert_allclose(
      dense.layers[layer], tapped[:, 3:].reshape(5, 5, 3, 32), atol=2e-5
    )
    np.testing.assert_allclose(
      dense.prefix_layers[layer], tapped[:, :3], atol=2e-5
    )
  assert np.abs(dense.prefix_layers[-1] - dense.prefix).max() > 0.1


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


def test_invalid_arguments_of_dense_raise(encoder, tall):
  with pytest.raises(ValueError, match="41x24 .* nearest size that is: 40x24"):
    encoder.dense([np.zeros((41, 24, 3), np.uint8)])
  with pytest.raises(ValueError, match="image 1 is 24x40 and the first one 40"):
    encoder.dense([tall[0], tall[0].transpose(1, 0, 2)])
  with pytest.raises(TypeError, match=r"image 0 must be an array.*float64"):
    encoder.dense([tall[0] / 255])
  with pytest.raises(TypeError, match="Encoder.image takes any image"):
    as_pixels(b"jpeg", "image 0")
  with pytest.raises(TypeError, match=r"Encoder.dense takes a seq.*\[image\]"):
    encoder.dense(tall[0])


def test_padded_batch():
  assert batched.padded_batch(1000, 64, 8) == 64
  assert batched.padded_batch(1000, 60, 8) == 64
  assert batched.padded_batch(1, 64, 1) == 1
  assert batched.padded_batch(5, 64, 1) == 8
  assert batched.padded_batch(5, 6, 1) == 6
  assert batched.padded_batch(3, 64, 8) == 8


PROCESS = """
import sys
import numpy as np
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.models import two_tower as models
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.data import tokenizers

assert jax.device_count() == 4 and jax.local_device_count() == 2
spec = models.ModelSpec.from_config({
  "image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2,
  "mlp_dim": 64, "text": {"length": 8, "vocab_size": 258, "width": 32,
                          "depth": 1, "heads": 2, "mlp_dim": 64}})
params = jax.tree.map(np.asarray, models.init_params(spec, jax.random.key(0)))


class Photos(list):
  read = set()

  def __getitem__(self, i):
    self.read.add(i)
    return super().__getitem__(i)


rng = np.random.default_rng(0)
photos = Photos(rng.integers(0, 256, (11, 20, 24, 3), np.uint8))
encoder = Encoder(spec, params, Preprocess(size=16),
                  tokenizers.build_tokenizer("bytes"))
out = encoder.image(photos, layers=(0,), batch_size=4)
text = encoder.text(["a", "b", "c"])
np.savez(f"{sys.argv[1]}/{process}", pooled=out.pooled, layer=out.layers[0],
         text=text, read=sorted(photos.read))
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
  """Each decodes its own half; both get all results, like a single process."""
  trainings.run_pair(PROCESS, str(tmp_path), devices=2)
  first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
  assert sorted([*first["read"], *second["read"]]) == list(range(11))
  assert len(first["read"]) == 6

  spec = models.ModelSpec.from_config(
    {
      "image_size": 16,
      "patch_size": 8,
      **TOWER,
      "text": {"length": 8, "vocab_size": 258, **TOWER},
    }
  )
  params = models.init_params(spec, jax.random.key(0))
  rng = np.random.default_rng(0)
  photos = rng.integers(0, 256, (11, 20, 24, 3), np.uint8)
  alone = Encoder(
    spec, params, Preprocess(size=16), tokenizers.build_tokenizer("bytes")
  )
  out = alone.image(photos, layers=(0,))
  for got in (first, second):
    np.testing.assert_allclose(got["pooled"], out.pooled, atol=1e-5)
    np.testing.assert_allclose(got["layer"], out.layers[0], atol=1e-5)
    np.testing.assert_allclose(
      got["text"], alone.text(["a", "b", "c"]), atol=1e-5
    )
