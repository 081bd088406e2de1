"""NYUv2 and KITTI in the layouts they come in, as miniatures and for real."""

import sys
import types

import numpy as np
import pytest
import scipy.io
from dataset_samples import write_pixels

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import kitti, nyu, registry


def grey_image(level, size=(6, 8)):
  return np.full((*size, 3), level, np.uint8)


def open_depth(root, split="test", **kwargs):
  return registry.open_depth(str(root), split=split, size=32, **kwargs)


@pytest.fixture
def bts(tmp_path):
  """Two images: the lists' slashes, millimetres, and a hole."""
  depth = np.array([[1000, 2500], [0, 9999]], np.uint16)
  lines = []
  for i in range(2):
    write_pixels(tmp_path / f"kitchen/rgb_{i}.png", grey_image(10 * i, (2, 2)))
    write_pixels(tmp_path / f"kitchen/sync_depth_{i}.png", depth + np.uint16(i))
    lines.append(f"/kitchen/rgb_{i}.png /kitchen/sync_depth_{i}.png 518.8579")
  name = "nyudepthv2_test_files_with_gt.txt"
  (tmp_path / name).write_text("\n".join(lines) + "\n")
  return tmp_path


def test_nyu_lists(bts):
  data = open_depth(bts)
  assert (data.kind, len(data.images), len(data.maps)) == ("nyu", 2, 2)
  assert data.images[1].tolist() == grey_image(10, (2, 2)).tolist()
  want = np.array([[1.0, 2.5], [0.0, 9.999]], np.float32)
  np.testing.assert_allclose(data.maps[0], want, rtol=1e-6)
  assert data.maps[0].dtype == np.float32
  assert open_depth(bts).digest == data.digest
  assert open_depth(bts, count=1).digest != data.digest
  with pytest.raises(IndexError, match="2 of 2 items"):
    _ = data.maps[2]
  # A colour image is not a depth map.
  write_pixels(bts / "kitchen" / "sync_depth_0.png", grey_image(3))
  with pytest.raises(ValueError, match="mode RGB; expected one channel"):
    _ = open_depth(bts).maps[0]
  (bts / "kitchen" / "sync_depth_1.png").unlink()
  with pytest.raises(FileNotFoundError, match="1 of 4 files .*sync_depth_1"):
    open_depth(bts)


def test_nyu_lists_in_the_folders_of_bts(tmp_path):
  write_pixels(tmp_path / "sync/a/rgb.png", grey_image(1))
  write_pixels(tmp_path / "sync/a/d.png", np.full((6, 8), 500, np.uint16))
  (tmp_path / "nyu_train.txt").write_text("/a/rgb.png /a/d.png 518.8\n")
  assert open_depth(tmp_path, "train").maps[0][0, 0] == np.float32(0.5)


def test_nyu_of_marigold_has_both_depths(tmp_path):
  folder = tmp_path / "test" / "kitchen_0004"
  write_pixels(folder / "rgb_0001.png", grey_image(3))
  write_pixels(folder / "depth_0001.png", np.full((6, 8), 0, np.uint16))
  write_pixels(folder / "filled_0001.png", np.full((6, 8), 1500, np.uint16))
  assert open_depth(tmp_path).maps[0].max() == 0
  filled = open_depth(tmp_path, truth="filled")
  assert filled.maps[0].min() == np.float32(1.5)
  assert "filled" in filled.source


def test_nyu_by_id(tmp_path):
  write_pixels(tmp_path / "nyu_images/7.jpg", grey_image(3))
  write_pixels(tmp_path / "nyu_depths/7.png", np.full((6, 8), 51, np.uint8))
  (tmp_path / "test.txt").write_text("7 kitchen_0004\n")
  data = open_depth(tmp_path)
  assert data.maps[0][0, 0] == np.float32(2.0)
  assert "25.5" in data.source
  with pytest.raises(ValueError, match="has filled depth only"):
    open_depth(tmp_path, truth="raw")
  with pytest.raises(FileNotFoundError, match=r"missing  train\.txt"):
    open_depth(tmp_path, "train")


class FakeHDF5(dict):
  """What h5py gives of MATLAB's arrays: axes reversed."""

  def __init__(self, path, mode):
    assert mode == "r"
    rng = np.random.default_rng(0)
    super().__init__(
      images=rng.integers(0, 256, (3, 3, 8, 6), np.uint8),
      rawDepths=rng.uniform(0, 9, (3, 8, 6)).astype(np.float32),
      depths=rng.uniform(1, 9, (3, 8, 6)).astype(np.float32),
    )


def test_nyu_mat(tmp_path, monkeypatch):
  nyu._open_hdf5.cache_clear()
  module = types.ModuleType("h5py")
  module.File = FakeHDF5
  monkeypatch.setitem(sys.modules, "h5py", module)
  path = tmp_path / "nyu_depth_v2_labeled.mat"
  path.write_bytes(b"")
  splits = {"trainNdxs": [[1]], "testNdxs": [[2], [3]]}
  scipy.io.savemat(tmp_path / "splits.mat", splits)
  data, file = open_depth(path), FakeHDF5(path, "r")
  assert len(data.images) == 2
  # MATLAB counts from one, and puts rows first.
  assert data.images[0].shape == (6, 8, 3)
  np.testing.assert_array_equal(
    data.images[0][4, 5], file["images"][1, :, 5, 4]
  )
  assert data.maps[1][4, 5] == file["rawDepths"][2, 5, 4]
  filled = open_depth(tmp_path, truth="filled")
  assert filled.maps[1][4, 5] == file["depths"][2, 5, 4]
  assert filled.digest != data.digest
  assert len(open_depth(tmp_path, "train").images) == 1
  nyu._open_hdf5.cache_clear()
  monkeypatch.setitem(sys.modules, "h5py", None)
  with pytest.raises(ImportError, match="pip install h5py"):
    open_depth(tmp_path)


def test_nyu_tfds(monkeypatch):
  depths = [np.full((6, 8), 1.5 + i, np.float16) for i in range(3)]
  rows = [{"image": grey_image(i), "depth": d} for i, d in enumerate(depths)]
  calls = []
  module = types.ModuleType("tensorflow_datasets")
  module.data_source = lambda name, **k: calls.append((name, k)) or rows
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  config = {"type": "tfds", "name": "nyu_depth_v2"}
  data = registry.open_depth(config, split="test", size=32, count=1)
  assert calls == [("nyu_depth_v2", {"split": "validation", "data_dir": None})]
  assert data.maps[0][0, 0] == 2.5
  assert data.maps[0].dtype == np.float32
  assert "float16" in data.source


@pytest.fixture
def eigen(tmp_path):
  """Three lines: of the train part, of the val part, and without a map."""
  drives = ["2011_09_26_drive_0002_sync", "2011_09_26_drive_0009_sync"]
  lines = []
  for drive, part, suffix in zip(
    drives, ("train", "val"), ("png", "jpg"), strict=True
  ):
    image = f"2011_09_26/{drive}/image_02/data/0000000069.png"
    depth = f"{drive}/proj_depth/groundtruth/image_02/0000000069.png"
    path = tmp_path / "raw_data" / image
    write_pixels(path.with_suffix(f".{suffix}"), grey_image(50))
    values = np.zeros((6, 8), np.uint16)
    values[2, 3] = 256 * 12 + 64
    write_pixels(tmp_path / "data_depth_annotated" / part / depth, values)
    lines.append(f"{image} {depth} 721.5377")
  lines.append("2011_09_26/x/image_02/data/0000000000.png None 721.5377")
  (tmp_path / "kitti_eigen_test_files_with_gt.txt").write_text("\n".join(lines))
  return tmp_path


def test_kitti_list(eigen):
  data = open_depth(eigen)
  assert (data.kind, len(data.images)) == ("kitti", 2)
  assert data.images[1].shape == (6, 8, 3)
  assert data.maps[0][2, 3] == np.float32(12.25)
  assert (data.maps[0] > 0).sum() == 1
  val = open_depth(eigen, subset="val")
  assert len(val.images) == 1
  assert val.digest != data.digest
  with pytest.raises(ValueError, match="subset is 'vall'"):
    open_depth(eigen, subset="vall")
  (eigen / "data_depth_annotated" / "val").rename(eigen / "moved")
  with pytest.raises(FileNotFoundError, match="1 of 2 depth maps are missing"):
    open_depth(eigen)


CALIBRATION = """P2: 10 0 4 2 0 10 3 0 0 0 1 0.5
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


def write_frame(root, points):
  folder = root / "training"
  write_pixels(folder / "image_2" / "000000.png", grey_image(9))
  for name in ("velodyne", "calib"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  sweep = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
  sweep.astype(np.float32).tofile(folder / "velodyne" / "000000.bin")
  (folder / "calib" / "000000.txt").write_text(CALIBRATION)


def test_kitti_sweep_by_hand(tmp_path):
  # The laser looks along x, with y to the left and z up; the camera along z.
  points = np.array(
    [
      [4.5, 0, 0],  # z 5, u (45 * 0 + 4 * 4.5 + 2) / 5 = 4, v 2.7
      [9.5, 0, 0],  # z 10, u (38 + 2) / 10 = 4, v 2.85: hidden behind it
      [9.5, 4, 0],  # z 10, u (-40 + 38 + 2) / 10 = 0, v 2.85
      [-3, 0, 0],  # behind the camera
      [9.5, 50, 0],  # outside the image
    ]
  )
  write_frame(tmp_path, points)
  depth = open_depth(tmp_path).maps[0]
  want = np.zeros((6, 8), np.float32)
  want[3, 4], want[3, 0] = 5, 10
  np.testing.assert_allclose(depth, want, rtol=1e-6)


def test_nearest_point_wins_whatever_the_order():
  rng = np.random.default_rng(0)
  eye = np.eye(3, 4)
  calibration = {"P2": eye, "R0_rect": np.eye(3), "Tr_velo_to_cam": eye}
  points = rng.uniform((-1, -1, 1), (5, 5, 4), (500, 3)).astype(np.float32)
  got = kitti.project_points(points, calibration, size=(3, 4))
  want = np.zeros((3, 4))
  for x, y, z in points.astype(np.float64):
    u, v = round(x / z), round(y / z)
    if 0 <= u < 4 and 0 <= v < 3 and (not want[v, u] or z < want[v, u]):
      want[v, u] = z
  assert (want > 0).sum() > 8
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_kitti_frames_without_calibration(tmp_path):
  write_frame(tmp_path, np.ones((1, 3)))
  path = tmp_path / "training" / "calib" / "000000.txt"
  path.write_text(CALIBRATION.replace("R0_rect", "R_rect"))
  with pytest.raises(ValueError, match="lacks .*R0_rect.*it has .*R_rect"):
    _ = open_depth(tmp_path).maps[0]
  path.write_text("P2: " + 11 * "0 " + "x\n")
  with pytest.raises(ValueError, match="000000.txt: P2: .*'x'"):
    _ = open_depth(tmp_path).maps[0]
  with pytest.raises(ValueError, match="lacks depth for the train split"):
    open_depth(tmp_path, "train")
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"missing  training/calib"):
    open_depth(tmp_path)


def test_nothing_of_the_kind(tmp_path):
  (tmp_path / "notes").mkdir()
  with pytest.raises(NotApplicable, match="the folder contains notes/"):
    open_depth(tmp_path)
  (tmp_path / "captions.json").write_text("{}")
  with pytest.raises(NotApplicable, match="a file of another kind"):
    open_depth(tmp_path / "captions.json")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    open_depth(tmp_path / "missing")
  with pytest.raises(NotApplicable, match="sources with metric depth"):
    registry.open_depth({"type": "webdataset"}, split="test", size=32)


def test_real_nyu(shared_data):
  train, test = (open_depth(shared_data / "nyuv2", s) for s in registry.SPLITS)
  assert len(train.images) == len(test.images) == 100
  assert test.images[0].shape == (480, 640, 3)
  depth = np.stack([test.maps[i] for i in range(0, 100, 25)])
  assert depth.shape == (4, 480, 640)
  assert 0.5 < depth.min() < 1.5 < depth.mean() < 4 < depth.max() <= 10


def test_real_kitti_lidar_agrees_with_the_boxes(shared_data):
  root = shared_data / "kitti_object"
  data = open_depth(root)
  assert len(data.images) == 2
  compared = 0
  for i, name in enumerate(("000001", "000002")):
    depth = data.maps[i]
    assert depth.shape == data.images[i].shape[:2]
    # One sweep of 64 beams covers about a twentieth of the image.
    assert 0.03 < (depth > 0).mean() < 0.08
    lines = (root / f"training/label_2/{name}.txt").read_text().splitlines()
    for words in map(str.split, lines):
      if words[0] == "DontCare":
        continue
      x0, y0, x1, y1 = (round(float(v)) for v in words[4:8])
      inside = depth[y0:y1, x0:x1]
      surface = np.median(inside[inside > 0])
      # The label is the object's centre, at most half a length behind it.
      length, centre = float(words[10]), float(words[13])
      assert -0.5 < centre - surface < length / 2 + 0.5, words
      compared += 1
  assert compared >= 3
