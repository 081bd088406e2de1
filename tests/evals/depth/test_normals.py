"""Surface normals: plane fits, Probe3D's files, loss, scores, end to end."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from mtv_jax.encoder import baselines
from mtv_jax.evals.datasets import normals as files
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.depth.depth_probe import NormalsProbe, score_normals

CAMERA = (50.0, 60.0, 15.5, 11.5)


def plane_depth(normal, distance, shape=(24, 32)):
  """Depth of the plane normal . P = -distance; the normal faces the camera."""
  fx, fy, cx, cy = CAMERA
  y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
  ray = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(shape)], -1)
  return -distance / (ray @ np.asarray(normal))


@pytest.mark.parametrize("window", [3, 7])
def test_normals_of_planes(window):
  wall, floor = np.array([0.6, 0, -0.8]), np.array([0, -0.8, -0.6])
  depth = plane_depth(wall, 2.0)
  depth[:, 16:] = plane_depth(floor, 1.0)[:, 16:]
  depth[4, 4] = 0
  got = files.from_depth(depth, CAMERA, window=window)
  assert np.isnan(got[4, 4]).all()
  edge = window // 2
  for part, want in (
    (np.s_[:, : 16 - edge], wall),
    (np.s_[:, 16 + edge :], floor),
  ):
    known = got[part][np.isfinite(got[part]).all(-1)]
    assert len(known) >= got[part][..., 0].size - 1
    np.testing.assert_allclose(known, np.tile(want, (len(known), 1)), atol=1e-5)
  # Windows across the edge of the two planes, 0.5 m apart.
  assert np.isnan(got[:, 16 - edge : 16 + edge]).mean() > 0.7


def write_probe3d(root, *, size=(480, 640), geonet=3):
  """Official layout: a pickle of images, and GeoNet's .mat files."""
  rng = np.random.default_rng(0)
  shape = (4, *size)
  stored = {
    "images": rng.integers(0, 256, (4, 3, *size), np.uint8),
    "depths": rng.uniform(0.5, 12, shape) * (rng.random(shape) > 0.1),
    "snorms": rng.normal(size=(4, 3, *size)).astype(np.float32),
    "scene_types": [["kitchen"]] * 4,
    "train_indices": np.array([0, 2]),
    "test_indices": np.array([3, 1]),
  }
  (root / "nyuv2").mkdir()
  path = root / "nyuv2" / "nyuv2_snorm_all.pkl"
  path.write_bytes(pickle.dumps(stored))
  for i in range(geonet):
    (root / "nyuv2_geonet").mkdir(exist_ok=True)
    image = rng.integers(0, 256, (481, 642, 3)) - files._GEONET_MEAN
    fields = {"img": image.astype(np.float32)}
    fields["depth"] = rng.uniform(0.5, 12, (481, 642)).astype(np.float32)
    fields["norm"] = rng.normal(size=(481, 642, 3)).astype(np.float32)
    name = f"kitchen_0001_{i}-1.mat"
    scipy.io.savemat(root / "nyuv2_geonet" / name, fields)
  return stored


def test_probe3d_files(tmp_path):
  stored = write_probe3d(tmp_path, size=(6, 8), geonet=0)
  for root in (tmp_path, tmp_path / "nyuv2/nyuv2_snorm_all.pkl"):
    test = registry.open_normals(str(root), split="test", size=0, count=None)
    np.testing.assert_array_equal(
      test.images[0], stored["images"][3].transpose(1, 2, 0)
    )
    depth = stored["depths"][3]
    valid = (depth > 0) & (depth <= 10)
    np.testing.assert_array_equal(np.isfinite(test.maps[0]).all(-1), valid)
    want = stored["snorms"][3].transpose(1, 2, 0)
    np.testing.assert_array_equal(test.maps[0][valid], want[valid])
  train = registry.open_normals(str(tmp_path), split="train", size=0, count=1)
  assert (len(train.images), train.source) == (1, "Ladicky et al. 2014")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"test_indices": np.array([], int)}, "has no test images"),
    (
      {"snorms": np.zeros((4, 3, 5, 5))},
      r"differ in size: \[\(4, 5, 5\), \(4, 6, 8\)",
    ),
  ],
)
def test_damaged_pickles(tmp_path, change, message):
  stored = write_probe3d(tmp_path, size=(6, 8), geonet=0) | change
  path = tmp_path / "nyuv2_snorm_all.pkl"
  path.write_bytes(pickle.dumps(stored))
  with pytest.raises(ValueError, match=message):
    registry.open_normals(str(path), split="test", size=0, count=None)


def test_the_digest_does_not_depend_on_the_folder(tmp_path):
  digests = set()
  for name in "ab":
    (root := tmp_path / name).mkdir()
    write_probe3d(root, size=(6, 8), geonet=1)
    options = dict(split="train", size=0, count=None)
    digests.add(registry.open_normals(str(root), **options).digest)
  assert len(digests) == 1


def test_score_by_hand():
  truth = np.float32([[0, 0, 1]] * 3)
  angles = np.radians([0, 20, 40])
  predicted = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], -1)
  got = score_normals(2 * predicted, truth, mean=np.zeros(3))
  assert got["mean"] == pytest.approx(20, abs=1e-5)
  assert got["median"] == pytest.approx(20, abs=1e-5)
  assert got["rmse"] == pytest.approx(np.sqrt((20**2 + 40**2) / 3), abs=1e-5)
  names = ("within_11.25", "within_22.5", "within_30")
  assert [got[n] for n in names] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
  assert score_normals(None, truth, mean=np.array([1.0, 0, 0]))["mean"] == 90


@pytest.mark.reference
def test_loss_matches_torch():
  """Value and gradient; pixels without a normal count for neither."""
  import torch
  from torch.nn import functional

  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 9, 13, 4)).astype(np.float32)
  truth = rng.normal(size=(2, 9, 13, 3)).astype(np.float32)
  truth[0, :3] = np.nan
  target = NormalsProbe()._make_target("nyu")

  def loss_fn(x, truth=truth):
    return target.loss(target.decode(x), jnp.asarray(truth), None, 0)

  value, grad = jax.value_and_grad(loss_fn)(jnp.asarray(logits))
  x = torch.tensor(logits, requires_grad=True)
  valid = torch.from_numpy(np.isfinite(truth).all(-1))
  want = torch.from_numpy(np.nan_to_num(truth))
  cosine = torch.cosine_similarity(x[..., :3], want, dim=-1)
  k = functional.elu(x[..., 3]) + 1.01
  loss = torch.log(1 + torch.exp(-torch.pi * k)) - torch.log(k * k + 1)
  loss = loss + k * cosine.clamp(-1 + 1e-4, 1 - 1e-4).acos()
  loss = loss[valid].mean()
  loss.backward()
  assert float(value) == pytest.approx(loss.item(), abs=1e-5)
  np.testing.assert_allclose(grad, x.grad, atol=1e-6, rtol=1e-4)
  value, grad = jax.value_and_grad(loss_fn)(0 * logits, np.nan * truth)
  assert value == np.abs(grad).max() == 0


@pytest.mark.slow
def test_scenes_end_to_end():
  evaluator = NormalsProbe(
    train_count=48, count=10, steps=60, batch_size=8, pictures=2, lr=0.01
  )
  result = evaluator.run(baselines.load("pixels:32/8"))
  assert result.lower == ("rmse", "mean", "median")
  assert result.units["mean"] == "degrees"
  assert result.metrics["mean"] < 0.95 * result.chance["mean"]
  assert result.protocol["prediction_resize"] == "bicubic_corners"
  assert result.sheets["normals"].std() > 10


@pytest.mark.slow
def test_probe3d_files_end_to_end(tmp_path):
  write_probe3d(tmp_path)
  result = NormalsProbe(
    data=str(tmp_path), steps=2, input_size=96, dpt_features=4, batch_size=2
  ).run(baselines.load("pixels:32/16"))
  assert result.protocol["train_normals"] == "Qi et al. 2018 (GeoNet)"
  assert result.protocol["normals"] == "Ladicky et al. 2014"
  # Random normals are 90 degrees apart on average.
  assert result.metrics["mean"] == pytest.approx(90, abs=3)
