"""Readers of posed images: NAVI and RGB-D sequences, in miniature."""

import numpy as np
import PIL.Image
import pytest
from dataset_samples import write_json, write_pixels

from mtv_jax.encoder import baselines
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.correspondence import geometric
from mtv_jax.evals.datasets import posed, posed_files
from mtv_jax.utils.errors import InputError, MissingFileError

DEPTH = np.zeros((6, 8), np.uint16)
DEPTH[1:5, 2:7] = 3277  # 655.35 / 3277 m is 0.2 m
HALF = np.sqrt(0.5)


def write_object(root, name, *, folders, count=3, rotated=0):
  """An object whose photos are 30 degrees apart about z."""
  for path in (root / name / folder for folder in folders):
    rows = []
    # The order differs from the names' order.
    for i in reversed(range(count)):
      angle = np.radians(30 * i) / 2
      q, t = [np.cos(angle), 0, 0, np.sin(angle)], [0, 0, 500.0 + i]
      camera = {"q": q, "t": t, "focal_length": 12.0}
      rows.append({"camera": camera, "filename": f"{i:03d}.jpg"})
      pixels = np.full((6, 8, 3), 40 * i, np.uint8)
      pixels[:2] = 255
      depth = np.rot90(DEPTH, -1) if rotated == 6 else DEPTH
      write_pixels(path / "depth" / f"{i:03d}.png", depth)
      image, exif = path / "images" / f"{i:03d}.jpg", PIL.Image.Exif()
      if rotated:
        exif[0x0112] = rotated
      image.parent.mkdir(exist_ok=True)
      options = {"exif": exif, "quality": 100, "subsampling": 0}
      PIL.Image.fromarray(pixels).save(image, **options)
    write_json(path / "annotations.json", rows)


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
  frames = posed_files.open_navi(root, subset="wild_set")
  # Both spellings count; an object without a capture is left out.
  assert frames.names == tuple(
    f"{name}/wild_set/images/{i:03d}.jpg"
    for name in ("a_toy", "b_cup")
    for i in range(3)
  )
  assert frames.groups == ((0, 1, 2), (3, 4, 5))
  assert frames.metadata["objects_left_out"] == ["c_wild"]
  assert frames.stored == 1024
  captures = posed_files.open_navi(root, subset="multiview")
  assert captures.groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
  assert captures.names[3] == "a_toy/multiview_01_canon/images/000.jpg"


def test_a_photo_with_its_depth_and_pose(root):
  frames = posed_files.open_navi(root, subset="wild_set")
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


@pytest.mark.parametrize("axis", range(3))
def test_quaternions(axis):
  """A quarter turn about each axis, by quaternions of any norm."""
  q = 3 * HALF * np.array([1, *np.eye(3)[axis]])
  turned = posed_files.rotation_matrix(q) @ np.eye(3)[axis - 2]
  np.testing.assert_allclose(turned, np.eye(3)[axis - 1], atol=1e-12)
  q = np.roll([-0.5, 0.7, 0.1], axis)
  r = posed_files.rotation_matrix(np.array([0.3, *q]))
  np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-12)
  np.testing.assert_allclose(r @ q, q, atol=1e-12)


def test_figures_on_photos(root):
  options = {"size": 64, "stride": 2, "keep": 10}
  evaluator = geometric.GeometricCorrespondence(data=str(root), **options)
  got = evaluator.run(baselines.PixelEncoder(64, 8))
  # Every second of six photos starts a pair; the toy's photos are rotated.
  protocol = got.protocol
  assert (protocol["pairs"], protocol["matches_kept"]) == (3, 30)
  assert (protocol["dataset"], protocol["objects"]) == ("NAVI", 2)
  assert protocol["metres"] == [0.01, 0.02, 0.05]
  assert sum(protocol["pairs_by_angle"].values()) == 3
  assert 0 < got.chance["recall_1cm"] < got.chance["recall_5cm"] < 1


def test_half_unpacked_objects_are_explained(root):
  folder = root / "a_toy" / "wild_set"
  path = folder / "annotations.json"
  (folder / "depth" / "001.png").unlink()
  for content, message in (
    (path.read_text(), "1 of 6.*a_toy.*001.png"),
    ("[]", "a_toy.*no usable view"),
    ('[{"q": 1}]', "expected a list of .filename"),
    (None, "a_toy.*has no annotations"),
  ):
    path.write_text(content) if content else path.unlink()
    with pytest.raises((InputError, MissingFileError), match=message):
      posed_files.open_navi(root, subset="wild_set")


def test_an_object_with_one_photo_is_named(tmp_path):
  write_object(tmp_path, "cup", folders=["wild_set"], count=1)
  frames = posed_files.open_navi(tmp_path, subset="wild_set")
  with pytest.raises(ValueError, match="cup/wild_set.*1 frame"):
    posed.draw_pairs(frames, seed=8)


def test_wrong_depth_is_rejected(root):
  path = root / "b_cup" / "wild_set" / "depth" / "000.png"
  write_pixels(path, DEPTH.astype(np.uint8))
  frames = posed_files.open_navi(root, subset="wild_set")
  with pytest.raises(ValueError, match="000.png is .*mode L; expected .*I;16"):
    frames.read(3, 0)
  write_pixels(path, DEPTH.T)
  with pytest.raises(ValueError, match="6x8 .*its depth is 8x6"):
    frames.read(3, 0)


def write_frame(folder, number, *, angle, suffix="png"):
  depth = np.full((48, 64), 2000, np.uint16)
  depth[0, 0], depth[0, 1] = 0, 65535
  stem = folder / f"frame-{number:06d}"
  pixels = np.full((*depth.shape, 3), number, np.uint8)
  write_pixels(stem.with_suffix(f".color.{suffix}"), pixels)
  write_pixels(stem.with_suffix(".depth.png"), depth)
  pose = np.eye(4)
  c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
  pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = c, s, -s, c
  pose[:3, 3] = (number / 10, 0, 0)
  np.savetxt(f"{stem}.pose.txt", pose)


@pytest.fixture
def sequences(tmp_path):
  for number, angle in enumerate((0, 10, 25)):
    write_frame(tmp_path / "fire" / "seq-01", number, angle=angle)
  folder = tmp_path / "office" / "seq-02"
  for number, angle in enumerate((0, 5)):
    write_frame(folder, number, angle=angle, suffix="jpg")
  k = [[60, 0, 30], [0, 61, 26], [0, 0, 1]]
  np.savetxt(tmp_path / "office" / "camera-intrinsics.txt", k)
  return tmp_path


def test_sequences(sequences):
  frames = posed_files.open_rgbd(sequences)
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
  k = [[60, 0, 32], [0, 60, 24], [0, 0, 1]]
  np.savetxt(sequences / "camera-intrinsics.txt", k)
  for number, angle in ((3, 50), (4, 180)):
    write_frame(sequences / "fire" / "seq-01", number, angle=angle)
  frames = posed_files.open_rgbd(sequences)
  assert frames.overlaps(0, 1)
  assert not frames.overlaps(0, 3)
  assert not frames.overlaps(0, 4)
  assert frames.overlaps(2, 3)


def test_lost_frames(sequences):
  folder = sequences / "fire" / "seq-01"
  (folder / "frame-000001.pose.txt").write_text("-inf " * 16)
  frames = posed_files.open_rgbd(sequences)
  assert frames.metadata["frames_without_pose"] == 1
  assert len(frames.names) == 4
  (folder / "frame-000002.depth.png").unlink()
  with pytest.raises(FileNotFoundError, match="frame-000002.pose.txt has no"):
    posed_files.open_rgbd(sequences)
  (folder / "frame-000002.pose.txt").write_text("1 2 3")
  with pytest.raises(ValueError, match="3 numbers; expected 4 rows of 4"):
    posed_files.open_rgbd(sequences)


def test_other_data_is_rejected(tmp_path):
  empty = tmp_path / "photos"
  empty.mkdir()
  with pytest.raises(NotApplicable, match="Geometric correspondence reads"):
    geometric.GeometricCorrespondence(data=str(empty)).prepare()
  with pytest.raises(NotApplicable, match="reads posed views"):
    geometric.GeometricCorrespondence(data={"type": "tfds"}).prepare()
