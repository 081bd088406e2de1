"""Linear probes, against NumPy, torch and scikit-learn; parallel heads."""

import functools

import jax
import numpy as np
import pytest

import mtv_jax
from mtv_jax.evals.classification import linear_probe
from mtv_jax.evals.classification.probe_evaluators import hold_out
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.global_features import LastBlocks
from mtv_jax.parallel.mesh import make_mesh

RATES = (0.01, 0.1, 1.0)


@pytest.fixture(scope="module")
def blobs():
  """Features of four classes around their means, and their labels."""
  rng = np.random.default_rng(0)
  means = rng.normal(size=(4, 6))
  labels = rng.integers(0, 4, 120).astype(np.int32)
  x = (means[labels] + 0.7 * rng.normal(size=(120, 6))).astype(np.float32)
  blocks = LastBlocks(tokens=(x[:, 2:4], x[:, 4:]), mean=x[:, :2])
  table = linear_probe.make_linear_input(blocks, (1, 2), ("off", "on"))
  return table, labels


def batches(table, labels, size=32, seed=0):
  take = probe.shuffled_batches(len(labels), batch_size=size, seed=seed)
  return lambda step: {"x": table.x[take(step)], "label": labels[take(step)]}


def train(table, labels, rates=RATES, steps=25, **options):
  return linear_probe.train_heads(
    batches(table, labels),
    columns=table.columns,
    rates=rates,
    classes=4,
    steps=steps,
    batch_size=32,
    **options,
  )


@pytest.fixture(scope="module")
def fitted(blobs):
  return train(*blobs, mesh=make_mesh({"data": -1}))


def test_thirteen_rates():
  want = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
  want += [1e-2, 2e-2, 5e-2, 0.1]
  np.testing.assert_allclose(linear_probe.RATES, want, rtol=1e-12)


def test_columns_of_the_heads(blobs):
  table, _ = blobs
  assert {k: (c.start, c.stop) for k, c in table.columns.items()} == {
    "1 block": (2, 4),
    "1 block + mean": (0, 4),
    "2 blocks": (2, 6),
    "2 blocks + mean": (0, 6),
  }


@pytest.mark.parametrize("name", ["1 block", "2 blocks + mean"])
@pytest.mark.parametrize("rate_index", [0, 2])
def test_each_head_equals_one_trained_alone(blobs, fitted, name, rate_index):
  table, labels = blobs
  c = table.columns[name]
  start = linear_probe.init_heads(table.columns, rates=3, classes=4)[name]
  w, b = start["kernel"][:, rate_index].astype(float), np.zeros(4)
  assert 0.005 < w.std() < 0.02
  mw, mb = 0, 0
  for step in range(25):
    batch = batches(table, labels)(step)
    x = batch["x"][:, c.start : c.stop].astype(float)
    logits = x @ w + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = (p - np.eye(4)[batch["label"]]) / 32
    mw, mb = 0.9 * mw + x.T @ g, 0.9 * mb + g.sum(0)
    rate = RATES[rate_index] * 32 / 256 * 0.5 * (1 + np.cos(np.pi * step / 25))
    w, b = w - rate * mw, b - rate * mb
  head = fitted.params[name]
  np.testing.assert_allclose(head["kernel"][:, rate_index], w, atol=2e-6)
  np.testing.assert_allclose(head["bias"][rate_index], b, atol=2e-6)
  logits = table.x[:, c.start : c.stop] @ w + b
  want = np.mean(logits.argmax(1) == labels)
  got = linear_probe.top1(fitted.params, table, labels)[name][rate_index]
  assert got == pytest.approx(want)
  scores = linear_probe.scores(fitted.params, table, name=name, rate=rate_index)
  np.testing.assert_allclose(scores, logits, atol=1e-5)


def test_rates_differ_and_one_device_is_eight(blobs, fitted):
  got = linear_probe.top1(fitted.params, *blobs)
  assert len({x for head in got.values() for x in head}) > 4
  equal = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(equal, train(*blobs).params, fitted.params)


def test_rates_share_their_products(blobs, monkeypatch):
  counts = []

  def fit(loss, params, batches, **_):
    losses = jax.make_jaxpr(lambda p: loss(p, None, batches(0), None)[0])
    counts.append(str(losses(params)).count("dot_general"))
    return probe.FitResult(params, None, np.zeros(1, np.float32))

  monkeypatch.setattr(probe, "fit", fit)
  for rates in (RATES[:1], linear_probe.RATES):
    train(*blobs, rates=rates)
  assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_scenes():
  result = linear_probe.LinearProbe(
    count=24, train_count=48, steps=3, train_batch=16, rates=(1e-3, 0.1)
  ).run(mtv_jax.load("pixels:16/8"))
  protocol = result.protocol
  assert protocol["heads"] == ["1 block", "1 block + mean"]
  assert len(protocol["top1_where_selected"]["1 block"]) == 2
  assert protocol["augment"] == "none"
  best = max(max(v) for v in protocol["top1_where_selected"].values())
  assert result.metrics["top1"] == pytest.approx(best)


@pytest.fixture
def folder(tmp_path, write_classes):
  write_classes(tmp_path / "train", 4)
  write_classes(tmp_path / "val", 2)
  return tmp_path


def test_crops_are_encoded_at_every_step(folder):
  evaluator = linear_probe.LinearProbe(
    data=str(folder), steps=3, train_batch=12, rates=(1.0,), augment=None
  )
  result = evaluator.run(mtv_jax.load("pixels:16/8"))
  assert result.errors.keys() == result.metrics.keys()
  # Images of one colour equal their crops: three steps are enough.
  assert result.metrics["top1"] == 1.0
  assert result.protocol["augment"].startswith("random crop (area 0.08..1")
  assert result.protocol["view"] == "center"
  assert result.protocol["preprocess"]["resize_size"] == 18


def test_too_many_crops_are_cached_by_default(folder, caplog):
  options = dict(data=str(folder), steps=101, train_batch=12, rates=(1.0,))
  probe = linear_probe.LinearProbe(**options)
  protocol = probe.run(mtv_jax.load("pixels:16/8")).protocol
  assert protocol["augment"] == "none"
  assert "101 steps of 12 crops are 101 times the 12" in caplog.text
  args = dict(steps=101, batch=12, images=12)
  crops = linear_probe.LinearProbe(**options, augment="crops")
  assert crops._resolve_augment(**args) == "crops"
  assert probe._resolve_augment(**(args | {"steps": 100})) == "crops"


def test_few_images_are_seen_a_hundred_times(folder):
  """12 images in 300 steps of 4, instead of 12,500 of 1,024."""
  options = dict(data=str(folder), rates=(1.0,), blocks=(1,), average=("off",))
  probe = linear_probe.LinearProbe(**options)
  result = probe.run(mtv_jax.load("pixels:16/8"))
  protocol = result.protocol
  assert (protocol["steps"], protocol["train_batch"]) == (300, 4)
  assert protocol["augment"] == "none"
  assert "100 passes over 12 images, " in protocol["schedule_length"]
  assert result.metrics["top1"] == 1.0
  published = linear_probe.LinearProbe(**options, published=True)
  assert published._schedule(12) == (12_500, 1024, "published", False)
  length = dict(steps=12_500, batch=1024, images=12)
  assert published._resolve_augment(**length) == "crops"
  assert linear_probe.LinearProbe()._schedule(12)[:2] == (300, 256)


def test_held_out():
  labels = np.array([0] * 25 + [1] * 10 + [2] * 6 + [3] * 2 + [5])
  rng = np.random.default_rng(0)
  labels = rng.permutation(labels)
  train, out = hold_out(labels)
  assert sorted([*train, *out]) == list(range(len(labels)))
  assert list(np.bincount(labels[out], minlength=6)) == [2, 1, 1, 1, 0, 0]
  assert list(train) == sorted(train)


def test_selection_on_held_out_training_images(folder):
  options = dict(steps=8, train_batch=9, rates=(1e-9, 1.0), augment="cached")
  evaluator = linear_probe.LinearProbe(
    data=str(folder), select="train_split", **options
  )
  protocol = evaluator.run(mtv_jax.load("pixels:16/8")).protocol
  assert protocol["trained_on"] == 9
  assert protocol["selection"].startswith("the best on 3 training images")
  assert protocol["selected"]["rate"] == 1.0


@pytest.mark.reference
def test_a_head_equals_torchs(blobs, fitted):
  import torch

  table, labels = blobs
  start = linear_probe.init_heads(table.columns, rates=3, classes=4)["1 block"]
  layer = torch.nn.Linear(2, 4)
  with torch.no_grad():
    layer.weight.copy_(torch.from_numpy(start["kernel"][:, 1].T.copy()))
    layer.bias.zero_()
  sgd = torch.optim.SGD(layer.parameters(), lr=0.1 * 32 / 256, momentum=0.9)
  cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 25, eta_min=0)
  for step in range(25):
    batch = batches(table, labels)(step)
    x = torch.from_numpy(batch["x"][:, 2:4].copy())
    y = torch.from_numpy(batch["label"]).long()
    sgd.zero_grad()
    torch.nn.functional.cross_entropy(layer(x), y).backward()
    sgd.step()
    cosine.step()
  head = fitted.params["1 block"]
  weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
  np.testing.assert_allclose(head["kernel"][:, 1], weight.T, atol=1e-6)
  np.testing.assert_allclose(head["bias"][1], bias, atol=1e-6)
