"""Shared features: computed once, forgotten with the encoder and in time."""

import dataclasses
import gc
import logging

import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals.core import global_features


class Counting(baselines.PixelEncoder):
  """Encoder that records its requests."""

  def __init__(self):
    super().__init__(16, 8)
    self.requests = []

  def image(self, images, *, layers=(), outputs=(), batch_size=64):
    self.requests.append((tuple(layers), tuple(outputs)))
    return super().image(
      images, layers=layers, outputs=outputs, batch_size=batch_size
    )


@pytest.fixture
def encoder():
  return Counting()


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def encode(encoder, images, digest="a", **options):
  options = {"digest": digest, **options}
  return global_features.encode_images(encoder, images, **options)


def test_a_request_is_computed_once(encoder, images):
  first = encode(encoder, images)
  again = encode(encoder, images, batch_size=1)
  assert encoder.requests == [((), ("pooled",))]
  assert again.pooled is first.pooled
  want = encoder.image(images, outputs=("pooled",)).pooled
  np.testing.assert_array_equal(first.pooled, want)
  assert first.patches is None and not first.layers
  with pytest.raises(ValueError, match="read-only"):
    first.pooled[0] = 0


def test_only_what_is_missing_is_computed(encoder, images):
  encode(encoder, images)
  outputs = ("prefix", "pooled", "patches")
  out = encode(encoder, images, layers=(-1, 0), outputs=outputs)
  assert encoder.requests[1:] == [((0,), ("prefix", "patches"))]
  want = encoder.image(images, layers=(-1,), outputs=("patches", "prefix"))
  np.testing.assert_array_equal(out.patches, want.patches)
  np.testing.assert_array_equal(out.layers[-1], want.layers[-1])
  np.testing.assert_array_equal(out.prefix, want.prefix)
  assert out.layers[0] is out.layers[-1]
  assert list(out.prefix_layers) == [-1, 0]
  encode(encoder, images, layers=(0,), outputs=())
  assert len(encoder.requests) == 3


def test_other_data_and_other_encoders_share_nothing(encoder, images):
  encode(encoder, images)
  other = encode(encoder, images[::-1], digest="b")
  assert len(encoder.requests) == 2
  again = encode(encoder, images).pooled
  np.testing.assert_array_equal(other.pooled, again[::-1])
  fresh = Counting()
  encode(fresh, images)
  assert len(fresh.requests) == 1


def test_least_recently_used_is_evicted(encoder, images, monkeypatch):
  size = 3 * 192 * 4
  monkeypatch.setattr(global_features, "BUDGET", 2 * size)
  for digest in ("a", "b", "a", "c", "a", "b"):
    encode(encoder, images, digest=digest)
  # c evicts b, since a was used later; then b is computed again.
  assert len(encoder.requests) == 4
  # An array larger than the budget is returned and not cached.
  monkeypatch.setattr(global_features, "BUDGET", size - 1)
  for _ in range(2):
    out = encode(encoder, images, digest="d")
    assert out.pooled.shape == (3, 192)
  assert len(encoder.requests) == 6


def test_features_are_freed_with_their_encoder(images):
  encoder = Counting()
  encode(encoder, images)
  before = len(global_features._stores)
  del encoder
  gc.collect()
  assert len(global_features._stores) < before


def test_equal_hash_of_other_images_is_an_error(encoder, images):
  encode(encoder, images)
  with pytest.raises(ValueError, match="2 images .* 3 were encoded before"):
    encode(encoder, images[:2])


def test_another_preprocessing_is_another_request(encoder, images):
  first = encode(encoder, images).pooled
  own = encoder.preprocess
  encoder.preprocess = dataclasses.replace(own, mean=(0.1, 0.1, 0.1))
  other = encode(encoder, images).pooled
  assert len(encoder.requests) == 2
  want = encoder.image(images, outputs=("pooled",)).pooled
  np.testing.assert_array_equal(other, want)
  assert np.abs(other - first).max() > 0.1
  encoder.preprocess = own
  assert encode(encoder, images).pooled is first


def test_eviction_is_logged_once(encoder, images, monkeypatch, caplog):
  size = 3 * 192 * 4
  monkeypatch.setattr(global_features, "BUDGET", size)
  with caplog.at_level(logging.WARNING, "mtv_jax.evals.core.global_features"):
    encode(encoder, images)
    assert not caplog.records
    for digest in ("b", "c"):
      encode(encoder, images, digest=digest)
    assert len(caplog.records) == 1
    assert "(3, 192) of the data a is the first to be evicted" in caplog.text
    # Once per encoder, even for an array larger than the cache.
    monkeypatch.setattr(global_features, "BUDGET", size - 1)
    encode(Counting(), images, digest="d")
  assert len(caplog.records) == 2
