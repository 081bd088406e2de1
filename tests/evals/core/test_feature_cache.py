"""Shared features: computed once, bounded in memory and on disk."""

import gc
import itertools
import logging
import os
import pathlib

import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.encoder import encoder as encoder_lib
from mtv_jax.evals import run
from mtv_jax.evals.core import feature_cache, global_features
from mtv_jax.evals.core.examples import ClassificationSet, LazySequence
from mtv_jax.evals.core.feature_cache import FeatureFolder

SIZE = 3 * 192 * 4  # bytes of three embeddings


class Counting(baselines.PixelEncoder):
  """Encoder that records the number of images and the outputs of requests.

  Its copies share the records.
  """

  def __init__(self, *, fail_at: int | None = None):
    super().__init__(16, 8)
    self.requests, self.outputs, self.fail_at = [], [], fail_at

  def image(self, images, *, layers=(), outputs=(), batch_size=64):
    if len(self.requests) == self.fail_at:
      raise KeyboardInterrupt
    self.requests.append(len(images))
    self.outputs.append((*layers, *outputs))
    return super().image(
      images, layers=layers, outputs=outputs, batch_size=batch_size
    )


@pytest.fixture
def encoder():
  return Counting()


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def as_set(images, digest="a"):
  return ClassificationSet(
    name="x",
    images=LazySequence(images.__getitem__, len(images)),
    labels=np.zeros(len(images), np.int32),
    classes=None,
    ids=None,
    digest=digest,
  )


def embed(encoder, images, digest="a", **options):
  return global_features.embed(encoder, as_set(images, digest), **options)


def test_a_request_is_computed_once(encoder, images):
  first = embed(encoder, images)
  assert embed(encoder, images, batch_size=1) is first
  assert encoder.outputs == [("pooled",)]
  want = encoder.image(images, outputs=("pooled",)).pooled
  np.testing.assert_array_equal(first, want)
  with pytest.raises(ValueError, match="read-only"):
    first[0] = 0
  # Other images, and another encoder.
  other = embed(encoder, images[::-1], digest="b")
  np.testing.assert_array_equal(other, first[::-1])
  embed(fresh := Counting(), images)
  assert fresh.requests == [3]


def test_least_recently_used_is_evicted(encoder, images, monkeypatch, caplog):
  monkeypatch.setattr(feature_cache, "BUDGET", 2 * SIZE)
  with caplog.at_level(logging.WARNING, feature_cache.__name__):
    for digest in ("a", "b", "a", "c", "a", "b"):
      embed(encoder, images, digest=digest)
  # c evicts b, since a was used later; then b is computed again.
  assert len(encoder.requests) == 4
  # Logged once.
  (record,) = caplog.records
  assert "(3, 192) of the data b is the first to be evicted" in record.message
  # An array larger than the budget is returned and not cached.
  monkeypatch.setattr(feature_cache, "BUDGET", SIZE - 1)
  for _ in range(2):
    assert embed(encoder, images, digest="d").shape == (3, 192)
  assert len(encoder.requests) == 6


def test_features_are_freed_with_their_encoder(images):
  encoder = Counting()
  embed(global_features.with_view(encoder, "center"), images)
  before = len(global_features._caches)
  del encoder
  gc.collect()
  assert len(global_features._caches) <= before - 2


def opened(path, limit=10**6, **options):
  """A new encoder, as of another process, with a folder."""
  encoder = Counting(**options)
  global_features.share_features(encoder, [], FeatureFolder(path, limit))
  return encoder


def test_a_folder_serves_other_processes(images, tmp_path, monkeypatch):
  want = embed(opened(tmp_path), images)
  again = opened(tmp_path)
  np.testing.assert_array_equal(embed(again, images), want)
  assert not again.requests
  # Other pixels of equal names and sizes, preprocessing, parameters, version.
  for change in ("pixels", "view", "params", "version"):
    encoder, changed = opened(tmp_path), images
    if change == "pixels":
      changed = images + np.uint8(1)
    elif change == "view":
      encoder = global_features.with_view(encoder, "center")
    elif change == "params":
      encoder.params = {"image": {"w": np.ones(2)}}
    else:
      monkeypatch.setattr(feature_cache.mtv_jax, "__version__", "another")
    embed(encoder, changed)
    assert encoder.requests == [3], change


@pytest.mark.parametrize("damage", ["cut", "bits", "empty", "removed", "rows"])
def test_damaged_files_are_encoded_again(images, tmp_path, damage, caplog):
  want = embed(opened(tmp_path), images)
  (file,) = tmp_path.glob("*/0-3.pooled.npz")
  data = file.read_bytes()
  file.unlink()
  if damage == "rows":
    folder = FeatureFolder(tmp_path, 10**6)
    folder.write(file.parent.name, "pooled", range(3), want[:2])
  elif damage != "removed":
    at = len(data) // 2
    bits = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    file.write_bytes({"cut": data[:-9], "bits": bits, "empty": b""}[damage])
  for requests in ([3], []):
    encoder = opened(tmp_path)
    np.testing.assert_array_equal(embed(encoder, images), want)
    assert encoder.requests == requests
  assert file.read_bytes() == data


def test_a_killed_process_loses_the_rows_of_one_file(tmp_path, monkeypatch):
  monkeypatch.setattr(feature_cache, "_ROWS_PER_FILE", 4)
  images = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
  want = embed(Counting(), images, batch_size=2)
  with pytest.raises(KeyboardInterrupt):
    embed(opened(tmp_path, fail_at=1), images, batch_size=2)
  encoder = opened(tmp_path)
  np.testing.assert_array_equal(embed(encoder, images, batch_size=2), want)
  # The last file has the rest.
  assert encoder.requests == [7]


def test_a_folder_is_bounded(images, tmp_path, caplog, monkeypatch):
  limit = 2 * SIZE + 1000  # Two files.
  other = tmp_path / "other" / "1-2.x.npz"
  other.parent.mkdir()
  other.write_bytes(bytes(9999))
  for number, digest in enumerate("abac"):
    embed(opened(tmp_path, limit), images, digest)
    for file in tmp_path.glob("*/0-3.*"):  # An hour later.
      at = file.stat().st_mtime_ns - 3600 * 10**9
      os.utime(file, ns=(at, at))
    assert len([*tmp_path.glob("*/0-3.*")]) == min(number + 1, 2)
  for digest, requests in (("a", []), ("c", []), ("b", [3])):
    embed(encoder := opened(tmp_path, limit), images, digest)
    assert encoder.requests == requests

  def deny(path, **options):
    raise PermissionError

  with monkeypatch.context() as patch:  # Another user's files.
    patch.setattr(pathlib.Path, "unlink", deny)
    FeatureFolder(tmp_path, limit).make_room(SIZE)
  # A larger set is not kept, and evicts nothing.
  embed(opened(tmp_path, SIZE - 1), images, "d")
  assert "exceed the limit" in caplog.text
  assert len([*tmp_path.glob("*/0-3.*")]) == 2 and other.exists()


def test_a_full_disk_stops_writing(images, tmp_path, caplog):
  (tmp_path / "file").touch()
  encoder = opened(tmp_path / "file")
  assert embed(encoder, images).shape == (3, 192)
  assert "Features are not saved" in caplog.text


@pytest.mark.parametrize("is_stored", [False, True])
def test_probes_encode_each_image_once(
  encoder, tmp_path, write_image, is_stored
):
  for split, count in (("train", 4), ("val", 3)):
    for colour, i in itertools.product(("red", "blue", "green"), range(count)):
      write_image(tmp_path / split / colour / f"{i}.png", colour)
  evals = {
    "knn": {"feature": "mean"},
    "few_shot": {"shots": (1,), "seeds": (0,)},
    "logistic": {"select": "train_split", "strengths": (1.0,), "max_iter": 2},
    "linear_probe": {"select": "train_split", "steps": 2, "rates": (1.0,)},
  }
  evals["linear_probe"] |= {"train_batch": 4, "augment": "cached"}
  evals = {k: {"data": str(tmp_path), **v} for k, v in evals.items()}
  built = run.build({k: {"view": "encoder", **v} for k, v in evals.items()})
  for evaluator in built.values():
    evaluator.prepare()
  folder = FeatureFolder(tmp_path / "features", 10**6) if is_stored else None
  global_features.share_features(encoder, built.values(), folder)
  for evaluator in built.values():
    evaluator.run(encoder)
  assert sorted(encoder.requests) == [9, 12]
  # Alone, a probe computes only what it needs.
  run.evaluate(alone := Counting(), {"knn": {**evals["knn"], "view": "center"}})
  assert alone.outputs == [("patches",)] * 2
  few = {**evals["few_shot"], "view": "center"}
  run.evaluate(alone := Counting(), {"few_shot": few})
  assert alone.requests == [3, 9]


@pytest.mark.long
def test_probes_of_a_vit_s_encode_each_photo_once(shared_data, monkeypatch):
  """Five outputs of 300 photos, and the figures of each probe alone."""
  encoded = []
  encode = encoder_lib.Encoder.image

  def image(self, images, **options):
    encoded.append(len(images))
    return encode(self, images, **options)

  monkeypatch.setattr(encoder_lib.Encoder, "image", image)
  options = {"data": str(shared_data / "cifar10_jpg"), "view": "center"}
  options |= {"count": 100, "train_count": 200}
  names = "knn", "few_shot", "logistic", "linear_probe"
  evals = dict.fromkeys(names, options)
  evals["few_shot"] = {**options, "shots": (1, 10)}
  evals["logistic"] = {**options, "strengths": (0.1,)}
  evals["linear_probe"] = {**options, "augment": "cached", "steps": 20}
  together = run.evaluate(baselines.load("random:S/16@64"), evals)
  assert sum(encoded) == 300
  encoded.clear()
  for name, entry in evals.items():
    alone = run.evaluate(baselines.load("random:S/16@64"), {name: entry})
    assert alone[name].metrics == together[name].metrics
  assert sum(encoded) == 4 * 300
