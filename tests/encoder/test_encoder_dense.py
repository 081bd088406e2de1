"""Encoder.dense: features at the size of the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess, as_pixels
from mtv_jax.models import two_tower as models
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import make_mesh

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
  )
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32),
    models.abstract_params(SPEC),
  )


def build(params, devices=None):
  preprocess = Preprocess(size=32, mean=MEAN, std=STD)
  mesh = make_mesh({"data": -1}, devices)
  return Encoder(SPEC, params, preprocess, mesh=mesh)


@pytest.fixture(scope="module")
def encoder(params):
  return build(params)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(2).integers(0, 256, (5, 40, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def features(encoder, images):
  outputs = ("pooled", "patches", "prefix")
  return encoder.dense(images, layers=(1, -1), outputs=outputs)


def test_dense_equals_the_tower_at_that_size(features, params, images):
  pixels = (images.astype(np.float32) / 255 - MEAN) / STD
  tower = models.image_tower(SPEC)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x, taps=(1, 2)))
  out = apply(params["image"], jnp.asarray(pixels, jnp.float32))
  want = {
    "pooled": out.pooled,
    "patches": out.patches.reshape(5, 5, 3, 32),
    "prefix": out.prefix,
  }
  for name, value in want.items():
    np.testing.assert_allclose(getattr(features, name), value, atol=2e-5)
  for layer, tap in ((1, 1), (-1, 2)):
    tapped = np.asarray(out.taps[tap])
    np.testing.assert_allclose(
      features.layers[layer], tapped[:, 3:].reshape(5, 5, 3, 32), atol=2e-5
    )
    np.testing.assert_allclose(
      features.prefix_layers[layer], tapped[:, :3], atol=2e-5
    )
  assert np.abs(features.prefix_layers[-1] - features.prefix).max() > 0.1


def test_dense_at_the_input_size_equals_image(encoder, images):
  squares = images[:, :32, :1].repeat(32, axis=2)
  whole = encoder.image(squares, layers=(0,), outputs=("patches",))
  dense = encoder.dense(squares, layers=(0,))
  np.testing.assert_array_equal(dense.patches, whole.patches)
  np.testing.assert_array_equal(dense.layers[0], whole.layers[0])
  np.testing.assert_array_equal(dense.prefix_layers[0], whole.prefix_layers[0])


def test_batch_size_and_devices_do_not_change_results(features, params, images):
  single = build(params, jax.devices()[:1])
  out = single.dense(images, layers=(1,), batch_size=2)
  np.testing.assert_allclose(out.patches, features.patches, atol=1e-5)
  np.testing.assert_allclose(out.layers[1], features.layers[1], atol=1e-5)
  assert out.pooled is None


def test_floats_and_lists_are_the_same_pixels(encoder, features, images):
  floats = [image.astype(np.float32) for image in images]
  again = encoder.dense(floats)
  np.testing.assert_array_equal(again.patches, features.patches)
  # And are not rounded.
  other = encoder.dense([image + np.float32(0.4) for image in floats])
  assert np.abs(other.patches - features.patches).max() > 1e-4


def test_invalid_arguments_raise(encoder, images):
  with pytest.raises(ValueError, match="41x24 .* nearest size that is: 40x24"):
    encoder.dense([np.zeros((41, 24, 3), np.uint8)])
  with pytest.raises(ValueError, match="image 1 is 24x40 and the first one 40"):
    encoder.dense([images[0], images[0].transpose(1, 0, 2)])
  with pytest.raises(TypeError, match=r"image 0 must be an array.*float64"):
    encoder.dense([images[0] / 255])
  with pytest.raises(TypeError, match="Encoder.image takes any image"):
    as_pixels(b"jpeg", "image 0")
  with pytest.raises(TypeError, match=r"Encoder.dense takes a seq.*\[image\]"):
    encoder.dense(images[0])
