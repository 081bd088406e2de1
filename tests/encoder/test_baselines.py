"""Baselines: raw pixels and an untrained tower."""

import json

import jax
import numpy as np
import pytest

import mtv_jax
from mtv_jax.encoder import baselines, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (40, 30 + i, 3), np.uint8) for i in range(3)]


def test_patches_are_pixels(images):
  encoder = mtv_jax.load("pixels:48/8")
  out = encoder.image(
    images, layers=(0, -1), outputs=("pooled", "patches", "prefix")
  )
  assert out.patches.shape == (3, 6, 6, 192)
  assert out.prefix.shape == (3, 0, 192)
  pixels = [Preprocess(size=48)(image) for image in images]
  np.testing.assert_allclose(
    out.patches[1, 2, 4].reshape(8, 8, 3), pixels[1][16:24, 32:40], atol=1e-6
  )
  np.testing.assert_array_equal(out.layers[0], out.patches)
  np.testing.assert_array_equal(out.layers[-1], out.patches)
  # As a tower, whose only block adds zero.
  model = loading.read_model("pixels:48/8")
  preprocess = Preprocess.from_dict(model.preprocess)
  tower = Encoder(model.spec, model.params, preprocess).image(
    images, layers=(0,)
  )
  np.testing.assert_allclose(tower.layers[0], out.patches, atol=1e-6)
  # The thumbnail: means of 6 x 6 pixels.
  means = np.stack(pixels).reshape(3, 8, 6, 8, 6, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(out.pooled, means.reshape(3, -1), atol=1e-5)
  assert encoder.spec.embed_dim == 192
  assert json.loads(json.dumps(encoder.protocol()))["weights"] == "none"


def test_any_size_and_devices(images):
  rng = np.random.default_rng(1)
  pixels = rng.integers(0, 256, (2, 20, 30, 3), np.uint8)
  mesh = make_mesh({"data": -1}, jax.devices()[:1])
  outputs = ("pooled", "patches")
  out, single = (
    mtv_jax.load("pixels:20/10", mesh=m).dense(pixels, outputs=outputs)
    for m in (None, mesh)
  )
  assert out.patches.shape == (2, 2, 3, 300)
  np.testing.assert_array_equal(out.patches, single.patches)
  # Cells of 2.5 x 3.75 pixels, weighed by hand.
  x = (pixels[0].astype(np.float32) / 255 - 0.5) / 0.5
  first = x[0:3, 0:4]
  rows, columns = np.array([1, 1, 0.5]), np.array([1, 1, 1, 0.75])
  want = np.einsum("y,x,yxc->c", rows, columns, first) / (2.5 * 3.75)
  np.testing.assert_allclose(out.pooled[0, :3], want, atol=1e-5)


def test_random_baseline_is_an_untrained_tower(images):
  encoder = mtv_jax.load("random:mu/8@32")
  assert encoder.preprocess.size == 32
  assert encoder.spec.image.patch_size == 8
  out = encoder.image(images)
  params = models.init_params(encoder.spec, jax.random.key(0))
  want = Encoder(encoder.spec, params, Preprocess(size=32)).image(images)
  np.testing.assert_array_equal(out.pooled, want.pooled)
  assert np.isfinite(out.pooled).all()
  assert np.std(out.pooled, axis=0).max() > 1e-4
  assert encoder.protocol()["weights"] == "untrained"
  with pytest.raises(ValueError, match="no text tower"):
    encoder.text(["a"])


def test_default_sizes():
  assert mtv_jax.load("pixels:64").spec.image.patch_size == 16
  assert baselines.is_baseline("random:B/16")
  assert not baselines.is_baseline("runs/random")
  shape = baselines._RANDOM.fullmatch("random:g-opt/14").groups("224")
  assert shape == ("g-opt/14", "224")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("pixels:big", "is not a baseline; expected pixels:SIZE"),
    ("random:B", "is not a baseline"),
    ("random:Q/16", "Unknown variant 'Q/16'"),
    ("pixels:50", "not divisible into patches of 16x16"),
  ],
)
def test_other_names(name, message):
  with pytest.raises(ValueError, match=message):
    mtv_jax.load(name)


def test_untrained_towers_are_read_without_an_encoder():
  """For teachers; the description creates no arrays."""
  info, model = (
    read("random:mu/8@32")
    for read in (loading.read_model_info, loading.read_model)
  )
  assert (info.spec, info.preprocess.size) == (model.spec, 32)
  assert model.params["image"]["norm"]["scale"].shape == (64,)


def test_baselines_have_one_set_of_weights():
  with pytest.raises(ValueError, match="has one set of weights"):
    mtv_jax.load("pixels:64", weights="ema")
