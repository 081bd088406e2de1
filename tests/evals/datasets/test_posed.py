"""Views of posed frames, their pairs, and lists of pairs."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from mtv_jax.evals.datasets import posed
from mtv_jax.evals.datasets.posed import Frame, Pair, PosedFrames


def turn(degrees, axis="y"):
  a = np.radians(degrees)
  c, s = np.cos(a), np.sin(a)
  rotation = {
    "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
  }
  pose = np.eye(4)
  pose[:3, :3] = rotation[axis]
  return pose


def frames_at(groups):
  """Frames turned about an axis; groups by name, of degrees."""
  names, indices, poses = [], [], []
  for name, degrees in groups.items():
    indices.append(tuple(range(len(names), len(names) + len(degrees))))
    names += [f"{name}/{i:03d}.jpg" for i in range(len(degrees))]
    poses += [turn(d) for d in degrees]
  return PosedFrames(
    name="frames",
    layout="navi",
    names=tuple(names),
    groups=tuple(indices),
    poses=np.stack(poses),
    read=lambda i, size: None,
    fingerprint=lambda i: (i,),
    stored=None,
    overlaps=None,
    metadata={},
  )


def test_golden_angle():
  assert posed.rotation_angle(turn(200, "z")[:3, :3]) == pytest.approx(160)
  got = posed.angles_between(np.stack([turn(d) for d in (0, 30, 150, 300)]))
  np.testing.assert_allclose(got[0], [0, 30, 150, 60], atol=1e-5)
  np.testing.assert_allclose(got[1], [30, 0, 120, 90], atol=1e-5)
  np.testing.assert_allclose(got, got.T)
  # A motion takes points from one camera to another.
  first, second = turn(30), turn(70)
  first[:3, 3], second[:3, 3] = (1, 2, 3), (-1, 0, 2)
  moved = posed.relative_pose(first, second) @ first
  np.testing.assert_allclose(moved, second, atol=1e-12)


def wall(pose, *, size=(64, 96), focal=70.0, centre=(0.0, 0.0)):
  """What a camera sees of the disc of radius 1 in the world's plane z = 4."""
  height, width = size
  v, u = np.mgrid[:height, :width]
  ray = np.stack(
    [
      (u + 0.5 - width / 2 - centre[0]) / focal,
      (v + 0.5 - height / 2 - centre[1]) / focal,
      np.ones(size),
    ],
    axis=-1,
  )
  back = np.linalg.inv(pose)
  direction, start = ray @ back[:3, :3].T, back[:3, 3]
  depth = (4 - start[2]) / direction[..., 2]
  points = start + depth[..., None] * direction
  depth[np.hypot(points[..., 0], points[..., 1]) > 1] = 0
  image = np.stack([u, v, u + v], axis=-1).astype(np.uint8)
  return Frame(image, depth.astype(np.float32), focal, pose, centre)


@pytest.mark.parametrize("stored", [None, 128, 100])
@pytest.mark.parametrize("centre", [(0.0, 0.0), (7.0, -5.0)])
def test_points_of_a_view_are_metric(stored, centre):
  """The disc stays in its plane and has its radius, from any camera."""
  pose = turn(20)
  pose[:3, 3] = (0.4, -0.2, 1.5)
  frame = wall(pose, centre=centre)
  view = posed.make_view(frame, size=64, stored=stored)
  points = view.points[view.valid] - pose[:3, 3]
  world = points @ pose[:3, :3]
  # Nearest resizing moves depth by up to a pixel.
  tolerance = 0.06 if stored == 100 else 1e-4
  np.testing.assert_allclose(world[:, 2], 4, atol=tolerance)
  radius = np.hypot(world[:, 0], world[:, 1])
  assert 0.85 < radius.max() < 1 + tolerance
  # The view's focal length agrees with its points.
  across = view.focal * view.points[..., 0] / view.points[..., 2].clip(1e-9)
  inside = view.valid[:, 1:] & view.valid[:, :-1]
  assert np.diff(across, axis=1)[inside].mean() == pytest.approx(4, abs=0.1)


def test_view_by_hand():
  """No resizing: 8 x 8 pixels with depth in a box of 4 x 3."""
  depth = np.zeros((8, 8), np.float32)
  depth[2:7, 3:7] = np.arange(1, 21).reshape(5, 4)
  image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
  view = posed.make_view(Frame(image, depth, 10.0, np.eye(4)), size=8)
  # Rows 2..6 and columns 3..6 with the last left out: 4 x 3, a square of 4
  # from column 3, brought from 4 to 8 pixels.
  rows = np.repeat(np.arange(2, 6), 2)
  columns = np.repeat(np.arange(3, 7), 2)
  np.testing.assert_array_equal(view.image, image[np.ix_(rows, columns)])
  assert view.focal == 20.0
  assert view.points.shape == (2, 2, 3)
  for i, row in enumerate((2, 4)):
    for j, column in enumerate((3, 5)):
      z = depth[row, column]
      want = ((column + 0.5 - 4) / 10 * z, (row + 0.5 - 4) / 10 * z, z)
      np.testing.assert_allclose(view.points[i, j], want, rtol=1e-6)


def triangle(size, new_size):
  """Pillow's antialiased bilinear filter, as a matrix."""
  scale = size / new_size
  centre = (np.arange(new_size) + 0.5) * scale
  distance = abs(np.arange(size) + 0.5 - centre[:, None]) / max(scale, 1)
  weights = np.maximum(1 - distance, 0)
  return weights / weights.sum(axis=1, keepdims=True)


def test_stored_images_are_bilinear():
  """Probe3D's interpolation 2; bicubic differs by up to 40 grey levels."""
  image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8)
  frame = Frame(image, np.ones((30, 45), np.float32), 20.0, np.eye(4))
  got, _ = posed._resize_shorter_side(frame, 20)
  want = np.einsum("yh,xw,hwc->yxc", triangle(30, 20), triangle(45, 30), image)
  assert got.shape == (20, 30, 3)
  assert abs(got - want).max() <= 1
  bicubic = PIL.Image.fromarray(image).resize(
    (30, 20), PIL.Image.Resampling.BICUBIC
  )
  assert abs(np.asarray(bicubic) - want).max() > 10


@pytest.mark.parametrize(
  ("low", "extent", "side", "want"),
  [
    (10, 4, 4, 10),
    (10, 4, 9, 8),  # spare of 5: two before
    (1, 4, 9, 0),  # would begin at -1
    (25, 4, 9, 20),  # would end at 32 of 30: ends at the box's edge
    (2, 20, 28, 0),
  ],
)
def test_squares_stay_inside(low, extent, side, want):
  start = posed._fit_square(low, extent, side, 30)
  assert start == want
  assert start >= 0
  assert start + side <= 30


def test_middle_of_a_longer_side():
  # 512 x 683 of an image of 768 x 1024: columns 86..597 (85.5 rounds to 86).
  columns = posed._crop_axis(1024, 768, 512)
  assert len(columns) == 512
  want = [int(i * 1024 / 682) for i in range(85, 85 + 512)]
  assert 1024 * 512 // 768 == 682
  np.testing.assert_array_equal(columns, want)
  np.testing.assert_array_equal(
    posed._crop_axis(1024, 1024, 512)[:3], [0, 2, 4]
  )


def test_frames_without_depth_have_no_view():
  frame = wall(np.eye(4))
  nothing = dataclasses.replace(frame, depth=np.zeros_like(frame.depth))
  assert posed.make_view(nothing, size=64) is None
  nothing.depth[5, 5] = 1
  assert posed.make_view(nothing, size=64) is None


def test_pairs_are_of_one_group_and_never_of_one_frame():
  degrees = [0, 10, 20, 170, 0, 60]
  frames = frames_at({"a": degrees[:4], "b": degrees[4:]})
  sample = posed.draw_pairs(frames, seed=8, max_angle=61)
  # The fourth frame lacks a partner within 61 degrees.
  assert [p.first for p in sample.pairs] == [0, 1, 2, 4, 5]
  assert sample.unpaired == 1
  for pair in sample.pairs:
    assert pair.second != pair.first
    assert (pair.second < 4) == (pair.first < 4)
    apart = abs(degrees[pair.second] - degrees[pair.first])
    assert pair.angle == pytest.approx(apart, abs=1e-4)


def test_partners_depend_on_the_group_and_the_seed_alone():
  degrees = list(range(0, 100, 7))
  single = frames_at({"b": degrees})
  behind = frames_at({"a": [0, 5, 9], "b": degrees})
  first = posed.draw_pairs(single, seed=8).pairs
  second = posed.draw_pairs(behind, seed=8).pairs[3:]
  assert [p.second for p in first] == [p.second - 3 for p in second]
  # Equal on every machine and in every release.
  assert [p.second for p in first[:8]] == [8, 5, 8, 6, 3, 4, 0, 11]
  other = posed.draw_pairs(single, seed=9).pairs
  assert [p.second for p in first] != [p.second for p in other]
  assert len({p.second for p in first}) > 5


def test_stride_and_count():
  frames = frames_at({"a": [0, 5, 9], "b": list(range(0, 50, 5))})
  every = posed.draw_pairs(frames, seed=8)
  fourth = posed.draw_pairs(frames, seed=8, stride=4)
  assert fourth.pairs == every.pairs[::4]
  few = posed.draw_pairs(frames, seed=8, count=2)
  assert few.pairs == (every.pairs[3], every.pairs[9])


def test_partners_must_overlap():
  frames = frames_at({"a": list(range(0, 60, 5))})
  calls = []

  def overlaps(i, j):
    calls.append((i, j))
    return j == 7

  frames = dataclasses.replace(frames, overlaps=overlaps)
  sample = posed.draw_pairs(frames, seed=8)
  assert {p.second for p in sample.pairs} == {7}
  assert sample.unpaired == 1  # the seventh itself
  assert len(set(calls)) == len(calls)
  frames = dataclasses.replace(frames, overlaps=lambda i, j: False)
  with pytest.raises(ValueError, match="none of 12 frames overlaps"):
    posed.draw_pairs(frames, seed=8)


def test_groups_without_a_pair_are_named():
  with pytest.raises(ValueError, match="b has no usable pair.*has 1 frame"):
    posed.draw_pairs(frames_at({"a": [0, 1], "b": [0]}), seed=8)
  with pytest.raises(ValueError, match="150.0 to 150.0 degrees apart"):
    posed.draw_pairs(frames_at({"b": [0, 150]}), seed=8)


def test_pair_lists_are_written_and_read(tmp_path):
  frames = frames_at({"a": [0, 10, 20], "b": [0, 30]})
  pairs = posed.draw_pairs(frames, seed=8).pairs
  path = tmp_path / "lists" / "pairs.txt"
  posed.write_pairs(path, frames, pairs)
  assert path.read_text().splitlines()[-1] == "b/001.jpg b/000.jpg 30.0000"
  got = posed.read_pairs(path, frames)
  assert [(p.first, p.second) for p in got] == [
    (p.first, p.second) for p in pairs
  ]
  assert got[-1].angle == pytest.approx(30, abs=1e-4)
  assert [p.name for p in path.parent.iterdir()] == ["pairs.txt"]
  for line, message in (
    ("a/000.jpg a/001.jpg", "line 1: expected 'first second degrees'"),
    ("a/000.jpg a/01.jpg 3", "no frame 'a/01.jpg'. Did you mean 'a/001.jpg'"),
    ("", "has no pairs"),
  ):
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
      posed.read_pairs(path, frames)


def test_hash_follows_the_pairs():
  frames = frames_at({"a": [0, 10, 20]})
  one = posed.hash_pairs(frames, [Pair(0, 1, 10.0)])
  assert one == posed.hash_pairs(frames, [Pair(0, 1, 10.0)])
  assert one != posed.hash_pairs(frames, [Pair(0, 2, 20.0)])
  resized = dataclasses.replace(frames, fingerprint=lambda i: (i, 1))
  assert one != posed.hash_pairs(resized, [Pair(0, 1, 10.0)])
