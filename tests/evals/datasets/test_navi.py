"""Readers of posed images: NAVI and RGB-D sequences, in miniature."""

import json

import cv2
import numpy as np
import PIL.Image
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.correspondence import geometric
from mtv_jax.evals.datasets import navi, posed, rgbd

DEPTH = np.zeros((6, 8), np.uint16)
DEPTH[1:5, 2:7] = 3277  # 655.35 / 3277 m is 0.2 m
HALF = np.sqrt(0.5)


def write_object(root, name, *, folders, count=3, rotated=0):
  """An object whose photos are 30 degrees apart about z."""
  for folder in folders:
    path = root / name / folder
    for part in ("images", "depth", "masks"):
      (path / part).mkdir(parents=True)
    rows = []
    # The order differs from the names' order.
    for i in reversed(range(count)):
      angle = np.radians(30 * i) / 2
      rows.append(
        {
          "object_id": name,
          "camera": {
            "q": [np.cos(angle), 0, 0, np.sin(angle)],
            "t": [0, 0, 500.0 + i],
            "focal_length": 12.0,
          },
          "filename": f"{i:03d}.jpg",
          "image_size": [6, 8],
        }
      )
      pixels = np.full((6, 8, 3), 40 * i, np.uint8)
      pixels[:2] = 255
      image, exif = PIL.Image.fromarray(pixels), PIL.Image.Exif()
      if rotated:
        exif[0x0112] = rotated
      image.save(
        path / "images" / f"{i:03d}.jpg", exif=exif, quality=100, subsampling=0
      )
      depth = np.rot90(DEPTH, -1) if rotated == 6 else DEPTH
      cv2.imwrite(str(path / "depth" / f"{i:03d}.png"), depth)
    (path / "annotations.json").write_text(json.dumps(rows))


@pytest.fixture
def root(tmp_path):
  write_object(tmp_path, "b_cup", folders=["wild_set", "multiview-00-pixel"])
  write_object(
    tmp_path,
    "a_toy",
    folders=["wild_set", "multiview_00_canon", "multiview_01_canon"],
    rotated=6,
  )
  write_object(tmp_path, "c_wild", folders=["wild_set"])
  (tmp_path / "custom_splits").mkdir()
  return tmp_path


def test_photos_of_all_objects(root):
  frames = navi.open_posed(root, subset="wild_set")
  # Both spellings count; an object without a capture is left out.
  assert frames.names == tuple(
    f"{name}/wild_set/images/{i:03d}.jpg"
    for name in ("a_toy", "b_cup")
    for i in range(3)
  )
  assert frames.groups == ((0, 1, 2), (3, 4, 5))
  assert frames.metadata["objects_left_out"] == ["c_wild"]
  assert frames.stored == 1024
  captures = navi.open_posed(root, subset="multiview")
  assert captures.groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
  assert captures.names[3] == "a_toy/multiview_01_canon/images/000.jpg"


def test_a_photo_with_its_depth_and_pose(root):
  frames = navi.open_posed(root, subset="wild_set")
  frame = frames.read(5, 0)
  assert frame.image.shape == (6, 8, 3)
  assert frame.image[0].min() > 250
  assert abs(int(frame.image[5].mean()) - 80) < 3
  np.testing.assert_allclose(frame.depth[2, 3], 0.2, rtol=1e-4)
  assert frame.depth[0, 0] == 0
  assert (frame.depth > 0).sum() == 20
  assert frame.focal == 12.0
  # 60 degrees about z; millimetres are metres.
  want = [[0.5, -np.sqrt(0.75), 0], [np.sqrt(0.75), 0.5, 0], [0, 0, 1]]
  np.testing.assert_allclose(frame.pose[:3, :3], want, atol=1e-9)
  np.testing.assert_allclose(frame.pose[:3, 3], [0, 0, 0.502])
  np.testing.assert_array_equal(frames.poses[5], frame.pose)
  # Rotated by EXIF: the first rows become the rightmost columns.
  turned = frames.read(0, 0)
  assert turned.image.shape == (8, 6, 3)
  assert turned.image[:, -1].min() > 250
  assert turned.depth.shape == (8, 6)


def test_quaternions():
  x = navi.rotation_of(np.array([HALF, HALF, 0, 0]))
  np.testing.assert_allclose(x @ [0, 1, 0], [0, 0, 1], atol=1e-12)
  y = navi.rotation_of(np.array([HALF, 0, HALF, 0]))
  np.testing.assert_allclose(y @ [0, 0, 1], [1, 0, 0], atol=1e-12)
  z = navi.rotation_of(3 * np.array([HALF, 0, 0, HALF]))
  np.testing.assert_allclose(z @ [1, 0, 0], [0, 1, 0], atol=1e-12)
  q = np.array([0.3, -0.5, 0.7, 0.1])
  r = navi.rotation_of(q)
  np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-12)
  assert np.linalg.det(r) == pytest.approx(1)
  # The axis is not rotated.
  np.testing.assert_allclose(r @ q[1:], q[1:], atol=1e-12)


def test_figures_on_photos(root):
  encoder = baselines.PixelEncoder(64, 8)
  evaluator = geometric.GeometricCorrespondence(
    data=str(root), size=64, stride=2, keep=10
  )
  got = evaluator.run(encoder)
  # Every second of six photos starts a pair; the toy's photos are rotated.
  assert got.protocol["pairs"] == 3
  assert got.protocol["matches_kept"] == 30
  assert got.protocol["dataset"] == "NAVI"
  assert got.protocol["objects"] == 2
  assert got.protocol["metres"] == [0.01, 0.02, 0.05]
  assert sum(got.protocol["pairs_by_angle"].values()) == 3
  assert 0 < got.chance["recall_1cm"] < got.chance["recall_5cm"] < 1


def test_half_unpacked_objects_are_explained(root):
  missing = root / "a_toy" / "wild_set" / "depth" / "001.png"
  missing.unlink()
  with pytest.raises(FileNotFoundError, match="1 of 6.*a_toy.*001.png"):
    navi.open_posed(root, subset="wild_set")
  (root / "a_toy" / "wild_set" / "annotations.json").write_text("[]")
  with pytest.raises(ValueError, match="a_toy.*no usable view"):
    navi.open_posed(root, subset="wild_set")
  (root / "a_toy" / "wild_set" / "annotations.json").write_text('[{"q": 1}]')
  with pytest.raises(ValueError, match="expected a list of .filename"):
    navi.open_posed(root, subset="wild_set")
  (root / "a_toy" / "wild_set" / "annotations.json").unlink()
  with pytest.raises(FileNotFoundError, match="a_toy.*has no annotations"):
    navi.open_posed(root, subset="wild_set")


def test_an_object_with_one_photo_is_named(tmp_path):
  write_object(tmp_path, "cup", folders=["wild_set"], count=1)
  frames = navi.open_posed(tmp_path, subset="wild_set")
  with pytest.raises(ValueError, match="cup/wild_set.*1 frame"):
    posed.draw_pairs(frames, seed=8)


def test_wrong_depth_is_rejected(root):
  path = root / "b_cup" / "wild_set" / "depth" / "000.png"
  cv2.imwrite(str(path), DEPTH.astype(np.uint8))
  frames = navi.open_posed(root, subset="wild_set")
  with pytest.raises(ValueError, match="000.png is .*mode L; expected .*I;16"):
    frames.read(3, 0)
  cv2.imwrite(str(path), DEPTH.T)
  with pytest.raises(ValueError, match="6x8 .*its depth 8x6"):
    frames.read(3, 0)


def write_frame(folder, number, *, angle, depth, suffix="png"):
  folder.mkdir(parents=True, exist_ok=True)
  stem = folder / f"frame-{number:06d}"
  pixels = np.full((*depth.shape, 3), number, np.uint8)
  PIL.Image.fromarray(pixels).save(f"{stem}.color.{suffix}")
  cv2.imwrite(f"{stem}.depth.png", depth)
  pose = np.eye(4)
  c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
  pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = c, s, -s, c
  pose[:3, 3] = (number / 10, 0, 0)
  np.savetxt(f"{stem}.pose.txt", pose)


@pytest.fixture
def sequences(tmp_path):
  depth = np.full((48, 64), 2000, np.uint16)
  depth[0, 0], depth[0, 1] = 0, 65535
  for number, angle in enumerate((0, 10, 25)):
    write_frame(tmp_path / "fire" / "seq-01", number, angle=angle, depth=depth)
  for number, angle in enumerate((0, 5)):
    write_frame(
      tmp_path / "office" / "seq-02",
      number,
      angle=angle,
      depth=depth,
      suffix="jpg",
    )
  np.savetxt(
    tmp_path / "office" / "camera-intrinsics.txt",
    [[60, 0, 30], [0, 61, 26], [0, 0, 1]],
  )
  return tmp_path


def test_sequences(sequences):
  frames = rgbd.open_posed(sequences)
  assert frames.groups == ((0, 1, 2), (3, 4))
  assert frames.names[1] == "fire/seq-01/frame-000001.color.png"
  assert frames.names[4] == "office/seq-02/frame-000001.color.jpg"
  first, last = frames.read(1, 0), frames.read(4, 0)
  assert first.depth[0, :3].tolist() == [0, 0, 2]
  assert first.image[3, 3, 0] == 1
  # The default intrinsics are 7-Scenes'.
  assert (first.focal, first.centre) == (585.0, (288.0, 216.0))
  assert (last.focal, last.centre) == (60.5, (-2.0, 2.0))
  # The camera is at the origin of its frame.
  origin = first.pose @ [0.1, 0, 0, 1.0]
  np.testing.assert_allclose(origin, [0, 0, 0, 1], atol=1e-9)
  np.testing.assert_array_equal(frames.poses[1], first.pose)


def test_partners_must_overlap(sequences):
  """At a focal length of 60, 64 pixels see 56 degrees."""
  np.savetxt(
    sequences / "camera-intrinsics.txt", [[60, 0, 32], [0, 60, 24], [0, 0, 1]]
  )
  frames = rgbd.open_posed(sequences)
  assert frames.overlaps(0, 1)
  depth = np.full((48, 64), 2000, np.uint16)
  write_frame(sequences / "fire" / "seq-01", 3, angle=50, depth=depth)
  write_frame(sequences / "fire" / "seq-01", 4, angle=180, depth=depth)
  frames = rgbd.open_posed(sequences)
  assert not frames.overlaps(0, 3)
  assert not frames.overlaps(0, 4)
  assert frames.overlaps(2, 3)


def test_lost_frames(sequences):
  folder = sequences / "fire" / "seq-01"
  (folder / "frame-000001.pose.txt").write_text("-inf " * 16)
  frames = rgbd.open_posed(sequences)
  assert frames.metadata["frames_without_pose"] == 1
  assert len(frames.names) == 4
  (folder / "frame-000002.depth.png").unlink()
  with pytest.raises(FileNotFoundError, match="frame-000002.pose.txt has no"):
    rgbd.open_posed(sequences)
  (folder / "frame-000002.pose.txt").write_text("1 2 3")
  with pytest.raises(ValueError, match="3 numbers; expected 4 rows of 4"):
    rgbd.open_posed(sequences)


def test_other_data_is_rejected(tmp_path):
  empty = tmp_path / "photos"
  empty.mkdir()
  with pytest.raises(NotApplicable, match="Geometric correspondence reads"):
    geometric.GeometricCorrespondence(data=str(empty)).prepare()
  with pytest.raises(NotApplicable, match="reads posed views"):
    geometric.GeometricCorrespondence(data={"type": "tfds"}).prepare()
