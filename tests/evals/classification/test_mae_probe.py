"""MAE's linear probe: LARS, batch norm and schedule against NumPy and torch."""

import logging

import numpy as np
import pytest

import mtv_jax
from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder import baselines
from mtv_jax.encoder.features import ImageFeatures
from mtv_jax.evals.classification import mae_probe
from mtv_jax.evals.core import probe
from mtv_jax.evals.datasets import registry


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 90).astype(np.int32)
  x = rng.normal(size=(3, 5))[labels] + 0.5 * rng.normal(size=(90, 5))
  return (3 + 2 * x).astype(np.float32), labels


def batches(data):
  x, labels = data
  take = probe.shuffled_batches(90, batch_size=40)
  return lambda step: {"x": x[take(step)], "label": labels[take(step)]}


@pytest.fixture(scope="module")
def fitted(data):
  return mae_probe.fit(
    batches(data), width=5, classes=3, rate=6.4, steps=20, warmup=5
  )


def start():
  return np.random.default_rng(0).normal(0, 0.01, (5, 3)).astype(np.float32)


def rate(step):
  if step < 5:
    return 6.4 * step / 5
  return 6.4 * 0.5 * (1 + np.cos(np.pi * (step - 5) / 15))


def test_fit_equals_lars_on_normalised_features(data, fitted):
  w, b, mw, mb = start().astype(float), np.zeros(3), 0, 0
  mean, var = np.zeros(5), np.ones(5)
  for step in range(20):
    batch = batches(data)(step)
    x = batch["x"].astype(float)
    mean = 0.9 * mean + 0.1 * x.mean(0)
    var = 0.9 * var + 0.1 * x.var(0)
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    logits = x @ w + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = (p - np.eye(3)[batch["label"]]) / 40
    gw = x.T @ g
    trust = 0.001 * np.linalg.norm(w) / np.linalg.norm(gw)
    mw, mb = 0.9 * mw + trust * gw, 0.9 * mb + g.sum(0)
    w, b = w - rate(step) * mw, b - rate(step) * mb
  np.testing.assert_allclose(fitted.params["logits"]["kernel"], w, atol=1e-5)
  np.testing.assert_allclose(fitted.params["logits"]["bias"], b, atol=1e-4)
  stats = fitted.state["batch_stats"]["norm"]
  np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
  np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
  assert np.abs(w - start()).max() > 0.003
  x, _ = data
  want = (x - mean) / np.sqrt(var + 1e-6) @ w + b
  got = mae_probe.scores(fitted, x)
  np.testing.assert_allclose(got, want, atol=1e-4)


class SceneEncoder(baselines.PixelEncoder):
  """Features that are the labels of 16 test and 60 training scenes."""

  def image(self, images, **kwargs):
    split = {16: "test", 60: "train"}[len(images)]
    options = dict(split=split, count=len(images))
    labels = registry.open_classification("scenes", **options).labels
    rows = np.eye(len(scenes.CLASS_NAMES), dtype=np.float32)[labels]
    return ImageFeatures(rows, None, None, {})


@pytest.mark.slow
def test_scenes():
  options = dict(epochs=200, warmup=1, train_batch=80, base_rate=20.0)
  evaluator = mae_probe.MaeProbe(count=16, train_count=60, **options)
  result = evaluator.run(SceneEncoder(16, 8))
  # Images in a batch are distinct.
  assert result.protocol["steps"] == 200
  assert result.protocol["train_batch"] == 60
  assert result.protocol["train_batch_asked"] == 80
  assert result.protocol["rate"] == pytest.approx(20.0 * 60 / 256)
  assert result.protocol["augment"] == "none"
  # All 16 are correct; one answer for all images is right at most three times.
  assert result.metrics["top1"] == 1.0
  assert 0.05 <= result.chance["top1"] <= 3 / 16


@pytest.fixture
def folder(tmp_path, write_classes):
  for split in ("train", "val"):
    write_classes(tmp_path / split, 2, ("red", "blue"))
  return str(tmp_path)


def test_crops(folder, caplog):
  caplog.set_level(
    logging.INFO, "mtv_jax.evals.classification.probe_evaluators"
  )
  result = mae_probe.MaeProbe(
    data=folder, epochs=25, warmup=0, train_batch=8, base_rate=200.0
  ).run(mtv_jax.load("pixels:16/8"))
  assert result.metrics["top1"] == 1.0
  assert result.protocol["augment"].startswith("random crop")
  assert result.protocol["crops_encoded"] == 25 * 4
  assert "encodes 100 random crops (25 steps of 4) of 4 training" in caplog.text


def test_small_sets_take_small_batches(tmp_path, write_classes, caplog):
  write_classes(tmp_path / "train", 20)
  write_classes(tmp_path / "val", 1)
  options = dict(data=str(tmp_path), base_rate=200.0)
  encoder = mtv_jax.load("pixels:8/8")
  result = mae_probe.MaeProbe(**options).run(encoder)
  assert (result.protocol["steps"], result.protocol["train_batch"]) == (270, 20)
  assert result.protocol["crops_encoded"] == 0
  assert "batches of 60 are 90 LARS steps" in caplog.text
  evaluator = mae_probe.MaeProbe(**options, published=True)
  assert evaluator._resolve_batch_size(60) == (60, False)


def test_more_than_a_hundred_epochs_are_cached_by_default(folder, caplog):
  options = dict(data=folder, epochs=101, warmup=0, base_rate=200.0)
  encoder = mtv_jax.load("pixels:16/8")
  result = mae_probe.MaeProbe(**options).run(encoder)
  assert result.errors.keys() == result.metrics.keys()
  assert result.protocol["augment"] == "none"
  assert result.protocol["crops_encoded"] == 0
  assert "101 times the 4 training images" in caplog.text
