"""Depth probe: augmentation, padding, training, end-to-end runs."""

import dataclasses
import json

import cv2
import jax
import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals.core import probe, probe_heads, resizing
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.dense import PaddedView
from mtv_jax.evals.core.examples import LazySequence
from mtv_jax.evals.depth import augment, metrics, training
from mtv_jax.evals.depth.augment import DepthExample
from mtv_jax.evals.depth.depth_probe import DepthProbe, score
from mtv_jax.evals.depth.training import PROTOCOLS


@pytest.fixture(scope="module")
def nyu_like():
  """An image whose grey level is its depth, with an invalid region."""
  rng = np.random.default_rng(0)
  small = rng.uniform(1, 9, (6, 8)).astype(np.float32)
  depth = cv2.resize(small, (640, 480), interpolation=cv2.INTER_NEAREST)
  depth[100:200, 300:400] = 0
  image = np.repeat(depth[..., None] * 18, 3, axis=-1)
  return DepthExample(image, depth)


@pytest.mark.parametrize("name", ["flip", "toolbox", "probe3d"])
def test_image_and_depth_stay_aligned(nyu_like, name):
  size = augment.augmented_size(name, (480, 640))
  seen = []
  for seed in range(8):
    rng = np.random.default_rng(seed)
    augmented = augment.AUGMENTS[name](nyu_like, rng)
    assert augmented.depth.shape == augmented.image.shape[:2] == size
    assert augmented.image.min() >= 0
    assert augmented.image.max() <= 255
    # Except at edges, grey remains a function of depth, up to the colour
    # jitter: a rank correlation near one.
    grey, depth = augmented.image.mean(axis=-1), augmented.depth
    orders = [x[::5, ::5].ravel().argsort().argsort() for x in (grey, depth)]
    assert np.corrcoef(*orders)[0, 1] > 0.97
    seen.append(augmented.depth.tobytes())
  assert len(set(seen)) > 1
  again = augment.AUGMENTS[name](nyu_like, np.random.default_rng(7))
  assert again.depth.tobytes() == seen[-1]


def test_toolbox_crops_the_border(nyu_like):
  image = np.full((480, 640, 3), 255, np.float32)
  image[45:472, 43:608] = 100
  example = DepthExample(image, nyu_like.depth)
  for seed in range(6):
    augmented = augment.AUGMENTS["toolbox"](
      example, np.random.default_rng(seed)
    )
    assert augmented.image.max() < 255 * 0.75
  with pytest.raises(ValueError, match="480 x 640, but this one is 4 x 4"):
    small = DepthExample(image[:4, :4], nyu_like.depth[:4, :4])
    augment.AUGMENTS["toolbox"](small, np.random.default_rng(0))


def test_rotation_is_clockwise_and_interpolates_no_depth(nyu_like):
  image = np.zeros((101, 101, 3), np.float32)
  depth = np.full((101, 101), 3.0, np.float32)
  image[50, 90] = 255
  turned = augment.rotate(DepthExample(image, depth), 90.0)
  assert turned.image[90, 50, 0] == pytest.approx(255, abs=1)
  depth = augment.rotate(nyu_like, 2.0).depth
  assert set(np.unique(depth)) <= {*np.unique(nyu_like.depth), 0.0}
  assert (depth == 0).sum() > (nyu_like.depth == 0).sum()


def test_inputs_are_padded_with_the_mean_on_all_sides():
  mean = (0.5, 0.25, 0.75)
  view = PaddedView((30, 45), (30, 45), 14, mean=mean)
  assert view.padded == (42, 56)
  assert view.grid == (3, 4)
  image = np.zeros((30, 45, 3), np.float32)
  padded = view.pad(image)
  assert padded.shape == (42, 56, 3)
  assert (padded[6:36, 5:50] == 0).all()
  np.testing.assert_allclose(padded[0, 0], 255 * np.array(mean))
  assert (padded.any(-1)).sum() == 42 * 56 - 30 * 45
  with pytest.raises(ValueError, match="29 x 45 among images of 30 x 45; all"):
    view.pad(image[1:])


def test_restoring_undoes_the_padding():
  """A plane over the padded input becomes an equal plane over the image."""
  view = PaddedView((60, 90), (30, 45), 14, "bilinear")
  rows, columns = (np.arange(14 * n) + 0.5 for n in view.grid)
  plane = (2 * rows[:, None] + 3 * columns).astype(np.float32)
  got = view.restore(plane[None])[0]
  assert got.shape == (60, 90)
  y, x = (np.arange(n) + 0.5 for n in (60, 90))
  # Half the size, at an offset of 6 and 5 pixels.
  want = 2 * (y[:, None] / 2 + 6) + 3 * (x / 2 + 5)
  np.testing.assert_allclose(got[1:-1, 1:-1], want[1:-1, 1:-1], rtol=1e-5)
  on_device = view.restore(jax.numpy.asarray(plane[None]))[0]
  np.testing.assert_allclose(on_device, got, rtol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bilinear_corners"])
def test_restoring_without_padding_is_resizing(method):
  view = PaddedView((24, 40), (12, 20), 4, method)
  maps = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  want = resizing.resize_maps(maps, (24, 40), method=method)
  np.testing.assert_allclose(view.restore(maps), want, atol=1e-6)


def test_chance_of_scale_invariant_metrics_is_the_best_constant():
  """An image whose depth has a root mean square of 3.272 and deviates 1.138.

  A constant that is aligned to 0 would have an error of 3.272.
  """
  mean = np.sqrt(3.272**2 - 1.138**2)
  truth = np.float32([mean - 1.138, mean + 1.138] * 50)
  chance = score(None, truth, mean=2.0, scale_invariant=True)
  assert chance["si_rmse"] == pytest.approx(1.138, abs=1e-6)
  ratio = np.maximum(mean / truth, truth / mean)
  assert chance["si_delta1"] == np.mean(ratio < 1.25)
  assert chance["si_delta3"] == np.mean(ratio < 1.25**3) > 0
  want = np.sqrt(np.mean((truth.astype(float) - 2) ** 2))
  assert chance["rmse"] == pytest.approx(want, rel=1e-6)
  # A constant prediction lacks a scale, as in MiDaS's closed form.
  flat = score(np.full(100, 3.0), truth, mean=2.0, scale_invariant=True)
  assert flat["si_rmse"] == pytest.approx(3.272, abs=1e-6)
  assert "si_rmse" not in score(None, truth, mean=2.0, scale_invariant=False)


def tower_of(cls_token=True, **fields):
  """An encoder of 12 blocks of width 2 that computes nothing."""
  encoder = baselines.load("pixels:32/8")
  fields |= {"cls_token": cls_token, "width": 2, "depth": 12}
  image = dataclasses.replace(encoder.spec.image, **fields)
  encoder.spec = dataclasses.replace(encoder.spec, image=image)
  return encoder


DINO = {"pool": "cls", "layer_scale": 1e-5}


@pytest.mark.parametrize(
  ("protocol", "cls", "fields", "blocks", "channels"),
  [
    ("linear", None, {}, (11,), 2),
    ("lin1", None, {}, (11,), 4),
    ("lin1", None, {"cls_token": False}, (11,), 2),
    # Probe3D's DPT reads the CLS token of DINO, and not of CLIP and MAE.
    ("dpt", None, DINO, (2, 5, 8, 11), 16),
    ("dpt", None, {"pool": "cls"}, (2, 5, 8, 11), 8),
    ("dpt", "concat", {}, (2, 5, 8, 11), 16),
    ("dpt", "off", DINO, (2, 5, 8, 11), 8),
  ],
)
def test_features_of_the_protocols(protocol, cls, fields, blocks, channels):
  """Blocks of width 2 that a head reads, with or without CLS tokens."""
  evaluator = DepthProbe(protocol=protocol, cls=cls)
  setup = evaluator._resolve_setup(tower_of(**fields), scenes())
  assert (setup.layers, setup.channels) == (blocks, channels)
  assert setup.has_cls == (channels == 4 * len(blocks))


def scenes():
  return DepthProbe(count=2)._set("test", 32)


def test_the_defaults_of_scenes_hold_for_a_mapping():
  evaluator = DepthProbe(data={"type": "scenes", "length": 2})
  assert len(evaluator._set("train", 32).images) == 2
  assert evaluator._set("test", 32).images[0].shape == (32, 32, 3)


SMALL = {"train_count": 24, "count": 10, "steps": 40, "batch_size": 8}


@pytest.fixture(scope="module")
def pixels():
  return baselines.load("pixels:32/8")


@pytest.fixture(scope="module")
def result(pixels):
  return DepthProbe(**SMALL, pictures=2).run(pixels)


def test_scenes_end_to_end(result):
  assert tuple(result.metrics) == tuple(metrics.METRICS)
  # Raw pixels predict depth better than its mean.
  assert result.metrics["rmse"] < 0.95 * result.chance["rmse"]
  assert result.units["rmse"] == "m"
  assert "rmse" in result.lower
  assert "delta1" not in result.lower
  protocol = json.loads(json.dumps(result.protocol))
  assert protocol["protocol"] == "linear"
  assert (protocol["images"], protocol["train_images"]) == (10, 24)
  assert (protocol["steps"], protocol["batch_size"]) == (40, 8)
  assert protocol["input_size"] == [32, 32]
  assert protocol["final_norm"] is True
  assert (protocol["crop"], protocol["tta"]) == ("none", "flip")
  assert protocol["data_hash"] != protocol["train_hash"]
  sheet = result.sheets["depth"]
  assert sheet.dtype == np.uint8
  assert sheet.shape == (28 + 2 * 178 + 8, 3 * 178 + 2 * 8, 3)
  assert sheet.std() > 10


def torch_prediction(image, model, max_depth):
  """The linear probe on one image of raw pixels, in PyTorch."""
  import torch
  from torch.nn import functional

  pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
  normalised = (pixels / 255 - 0.5) / 0.5
  # The pixels of each patch, ordered (y, x, channel).
  patches = normalised.reshape(1, 3, 4, 8, 4, 8).permute(0, 3, 5, 1, 2, 4)
  weights = torch.relu(model(patches.reshape(1, 192, 4, 4))) + 0.1
  bins = torch.linspace(0.001, max_depth, 256)[:, None, None]
  depth = (weights * bins).sum(1) / weights.sum(1)
  depth = functional.interpolate(
    depth[None], (32, 32), mode="bilinear", align_corners=False
  )
  return depth[0, 0].detach().numpy()


@pytest.mark.reference
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_predictions_match_torch(pixels, tta):
  """From the image to the clipped depth map, given equal weights."""
  from probe_head_parity import torch_head

  evaluator = DepthProbe(count=3, batch_size=2, tta=tta, max_depth=6.0)
  data = evaluator._set("test", 32)
  setup = evaluator._resolve_setup(pixels, data)
  rng = np.random.default_rng(0)
  params, state = jax.tree.map(
    lambda x: rng.uniform(-0.5, 1, x.shape).astype(np.float32),
    probe_heads.init_depth_head(setup.head, setup.channels, seed=0),
  )
  state["batch_stats"]["norm"]["var"] += 0.6
  # Weights that grow with the bin, or every depth would be near the mean.
  params["logits"]["kernel"] *= np.linspace(-1, 1, 256, dtype=np.float32)
  model = torch_head(setup.head, params, state).eval()
  fitted = probe.FitResult(params, {"head": state}, np.zeros(1, np.float32))
  predicted = list(training.predict(setup, data, fitted))
  assert len(predicted) == 3
  for i, (_, truth, depth) in enumerate(predicted):
    image = data.images[i].astype(np.float32)
    want = torch_prediction(image, model, 6.0)
    if tta == "flip":
      other = torch_prediction(image[:, ::-1], model, 6.0)
      want = (want + other[:, ::-1]) / 2
    np.testing.assert_array_equal(truth, data.maps[i])
    np.testing.assert_allclose(depth, want.clip(1e-3, 6), atol=1e-5)
    assert np.ptp(depth) > 0.5


def test_kitti_is_rejected(tmp_path):
  (tmp_path / "kitti_eigen_test_files_with_gt.txt").touch()
  with pytest.raises(NotApplicable, match="is KITTI.*relative_depth"):
    DepthProbe(data=str(tmp_path)).prepare()


def write_nyu(root, train=3, test=2):
  """Writes lists of images whose grey level is their depth."""
  rng = np.random.default_rng(0)
  for split, count in (("train", train), ("test", test)):
    lines = []
    for i in range(count):
      small = rng.uniform(1500, 8000, (3, 4)).astype(np.uint16)
      depth = cv2.resize(small, (640, 480), interpolation=cv2.INTER_NEAREST)
      depth[:60, :60] = 0
      cv2.imwrite(str(root / f"{split}{i}.png"), depth)
      cv2.imwrite(str(root / f"{split}{i}.jpg"), (depth // 32).astype(np.uint8))
      lines.append(f"{split}{i}.jpg {split}{i}.png 518.8579")
    (root / f"nyu_{split}.txt").write_text("\n".join(lines))
  return root


def test_published_values_for_real_data(tmp_path):
  evaluator = DepthProbe(data=str(write_nyu(tmp_path, 1, 1)), published=True)
  train = evaluator._set("train", 0)
  setup = evaluator._resolve_setup(tower_of(), train)
  assert setup.protocol == PROTOCOLS["linear"]
  # By default at most 100 passes: of NYUv2's 795 images, not of its 24,231.
  for images, length in ((24_231, (38_400, 16)), (795, (4969, 16))):
    some = dataclasses.replace(train, images=LazySequence(len, images))
    capped = DepthProbe(data="nyu")._resolve_setup(tower_of(), some)
    assert (capped.protocol.steps, capped.protocol.batch_size) == length
    assert ("instead of 38400" in capped.schedule.why) == (images == 795)
  assert (setup.protocol.steps, setup.protocol.lr) == (38_400, 3e-4)
  assert (setup.layers, setup.target.max_depth) == ((11,), 10)
  many = dataclasses.replace(train, images=LazySequence(len, 795))
  dpt = DepthProbe(protocol="dpt")._resolve_setup(tower_of(), many)
  assert dpt.protocol == dataclasses.replace(PROTOCOLS["dpt"], steps=990)
  assert (dpt.protocol.batch_size, dpt.protocol.lr) == (8, 5e-4)
  assert (dpt.layers, dpt.dpt_features) == ((2, 5, 8, 11), 512)


@pytest.mark.slow
@pytest.mark.parametrize(
  "protocol", ["linear", "lin4", pytest.param("dpt", marks=pytest.mark.long)]
)
def test_every_protocol_on_files(tmp_path, pixels, protocol):
  evaluator = DepthProbe(
    data=str(write_nyu(tmp_path)),
    protocol=protocol,
    steps=15,
    lr=0.02 if protocol != "dpt" else 0.005,
    batch_size=2,
    input_size=(48, 64),
    dpt_features=8,
  )
  result = evaluator.run(pixels)
  assert result.protocol["images"] == 2
  assert result.protocol["depth"] == "raw, mm"
  assert result.metrics["rmse"] < result.chance["rmse"]
  scale_invariant = protocol == "dpt"
  assert ("si_rmse" in result.metrics) == scale_invariant
  assert ("si_rmse" in result.lower) == scale_invariant
  if scale_invariant:
    assert result.protocol["image_size"] == [480, 480]
    assert result.metrics["si_rmse"] <= result.metrics["rmse"] + 1e-6


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["lin4", "dpt"])
def test_scenes_through_a_vit(protocol):
  options = {} if protocol == "dpt" else {"train_count": 64, "count": 16}
  encoder = baselines.load("random:mu/8@64")
  result = DepthProbe(protocol=protocol, **options).run(encoder)
  assert result.errors.keys() == result.metrics.keys()
  assert result.metrics["rmse"] < 0.95 * result.chance["rmse"]


@pytest.mark.slow
@pytest.mark.long
def test_real_nyu(shared_data):
  evaluator = DepthProbe(
    data=str(shared_data / "nyuv2"),
    input_size=(192, 256),
    augment="none",
    steps=300,
    lr=3e-3,
  )
  result = evaluator.run(baselines.load("random:mu/16@96"))
  assert result.protocol["images"] == result.protocol["train_images"] == 100
  assert result.protocol["crop"] == "nyu_eigen"
  # The mean depth has an RMSE of about 1 m on these rooms.
  assert result.metrics["rmse"] < 0.98 * result.chance["rmse"]
  assert 0.6 < result.chance["rmse"] < 1.6
