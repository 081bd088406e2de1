"""Geometric correspondence: synthetic views, averages, end-to-end runs."""

import json

import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals import build_evaluator
from mtv_jax.evals.correspondence import geometric
from mtv_jax.evals.correspondence.geometric import (
  GeometricCorrespondence,
  MatchOptions,
  PairErrors,
  PatchMatches,
)
from mtv_jax.evals.datasets import posed

CELLS = 24
OPTIONS = MatchOptions(size=4 * CELLS, keep=60)
FOCAL = 110.0


def look_at_origin(degrees, distance):
  """Pose of a camera on a circle around the origin, looking at it."""
  pose = np.eye(4)
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  pose[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
  pose[2, 3] = distance
  return pose


def ball_view(pose, radius=0.2):
  """A view of a ball around the origin."""
  at = (np.arange(CELLS) * 4 + 0.5 - OPTIONS.size / 2) / FOCAL
  ray = np.stack([*np.meshgrid(at, at), np.ones((CELLS, CELLS))], axis=-1)
  centre = pose[:3, 3]
  # The nearer root of a z^2 - 2 b z + c = 0, if it exists.
  a, b, c = (ray**2).sum(axis=-1), ray @ centre, centre @ centre - radius**2
  discriminant = b**2 - a * c
  z = (b - np.sqrt(np.maximum(discriminant, 0))) / a * (discriminant > 0)
  image = np.zeros((OPTIONS.size, OPTIONS.size, 3), np.uint8)
  points = (ray * z[..., None]).astype(np.float32)
  return posed.PosedView(image, points, FOCAL, pose)


def world_points(view):
  """The points of a view in world coordinates."""
  return (view.points - view.pose[:3, 3]) @ view.pose[:3, :3]


def position_features(points, width=48):
  """Descriptors of the 3D position; near points are similar."""
  rng = np.random.default_rng(5)
  waves = points @ rng.normal(0, 12, (3, width // 2))
  features = np.concatenate([np.cos(waves), np.sin(waves)], axis=-1)
  return features.astype(np.float32)


@pytest.fixture(scope="module")
def views():
  return ball_view(look_at_origin(0, 0.9)), ball_view(look_at_origin(35, 1.0))


def test_unique_features_match_identical_views(views):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(CELLS, CELLS, 48)).astype(np.float32)
  errors = geometric.match_pair(
    np.stack([features, features]), (views[0], views[0]), options=OPTIONS
  )
  assert len(errors.metres) == 60
  np.testing.assert_array_equal(errors.matches.first, errors.matches.second)
  assert errors.metres.max() < 1e-9
  assert errors.pixels.max() < 1e-6
  estimate, _ = geometric.average_recalls([errors], options=OPTIONS)
  metrics = estimate.metrics
  assert metrics["avg_recall_all"] == 1.0
  # At an angle of 0, the pair is in the first bin.
  assert metrics["recall_2cm_0_30deg"] == 1.0


def test_position_features_match_after_a_known_motion(views):
  """The nearest descriptor belongs to the nearest point in space."""
  maps = np.stack([position_features(world_points(view)) for view in views])
  errors = geometric.match_pair(maps, views, options=OPTIONS)
  first, second = (world_points(v)[v.valid].astype(np.float64) for v in views)
  apart = np.linalg.norm(first[:, None] - second, axis=-1)
  cells = np.argwhere(views[0].valid)
  row = [
    np.flatnonzero((cells == c).all(axis=1))[0] for c in errors.matches.first
  ]
  np.testing.assert_allclose(errors.metres, apart[row].min(axis=1), atol=2e-3)
  # Cells are 3.3 cm wide at 0.9 m, and both views show half of the ball.
  assert (errors.metres < 0.02).mean() > 0.8
  assert (apart.min(axis=1) < 0.02).mean() < 0.8
  # The pixel error from the projections into the second image.
  pose = views[1].pose
  moved = first[row] @ pose[:3, :3].T + pose[:3, 3]
  seen = views[1].points[tuple(errors.matches.second.T)]
  focal = FOCAL * 512 / OPTIONS.size
  pixels = [p[:, :2] / p[:, 2:] * focal for p in (moved, seen)]
  np.testing.assert_allclose(
    errors.pixels, np.linalg.norm(pixels[0] - pixels[1], axis=1), atol=2e-3
  )


def test_random_features_are_at_chance(views):
  rng = np.random.default_rng(3)
  scored = [
    geometric.match_pair(
      rng.normal(size=(2, CELLS, CELLS, 16)).astype(np.float32),
      views,
      options=OPTIONS,
    )
    for _ in range(12)
  ]
  estimate, chance = geometric.average_recalls(scored, options=OPTIONS)
  metrics = estimate.metrics
  # 720 matches: five standard deviations.
  for name in ("recall_5cm", "recall_50px"):
    p = chance[name]
    assert 0.005 < p < 0.4
    assert abs(metrics[name] - p) < 5 * np.sqrt(p * (1 - p) / 720)
  # Chance from a sample of points is near the chance from all points.
  first, second = (world_points(v)[v.valid] for v in views)
  apart = np.linalg.norm(first[:, None] - second, axis=-1)
  assert chance["recall_5cm"] == pytest.approx((apart < 0.05).mean(), rel=0.1)


def test_a_view_behind_the_camera_is_far_in_pixels():
  at = geometric.project(
    np.array([[1.0, 2.0, 4.0], [1.0, 0.0, -1.0]]), focal=2.0
  )
  np.testing.assert_allclose(at, [[0.5, 1.0], [2e9, 0.0]])


def pair_errors(metres, angle):
  cells, metres = np.zeros((len(metres), 2), int), np.array(metres)
  matches = PatchMatches(cells, cells, np.zeros(len(metres)))
  return PairErrors(matches, metres, 1000 * metres, np.arange(6) / 10, angle)


def test_averages():
  pairs = [
    pair_errors([0.005, 0.01, 0.03, 0.06], 10.0),
    pair_errors([0.015, 0.9], 30.0),
    pair_errors([0.019, 0.9], 59.0),
    pair_errors([0.9, 0.9], 120.0),
  ]
  estimate, chance = geometric.average_recalls(pairs, options=OPTIONS)
  metrics = estimate.metrics
  # Strictly below, over all ten matches; bins exclude 120 degrees, and 60 to 90
  # is empty.
  want = dict(recall_1cm=1 / 10, recall_2cm=4 / 10, recall_5cm=5 / 10)
  want |= dict(recall_5px=0, recall_25px=4 / 10, recall_50px=5 / 10)
  want |= dict(avg_recall=1 / 3, avg_recall_pixel=0.3, avg_recall_all=19 / 60)
  want |= dict(recall_2cm_0_30deg=0.5, recall_2cm_30_60deg=0.5)
  want |= dict(avg_recall_angle=0.5, recall_2cm_per_pair=(0.5 + 0.5 + 0.5) / 4)
  assert metrics == pytest.approx(want)
  assert next(iter(metrics)) == "avg_recall"
  assert chance.keys() == metrics.keys()
  assert chance["recall_2cm"] == pytest.approx(0.1)
  assert chance["recall_50px"] == pytest.approx(0.5)
  # By the linear approximation: over pairs, the residuals of the ratio, with
  # n / (n - 1) of four pairs.
  hits, counts = np.array([2, 1, 1, 0]), np.array([4, 2, 2, 2])
  residuals = hits - 0.4 * counts
  want = np.sqrt(4 / 3 * np.sum(residuals**2)) / 10
  assert estimate.errors["recall_2cm"] == pytest.approx(want, rel=0.15)
  assert estimate.errors.keys() == metrics.keys()


@pytest.fixture(scope="module")
def pixels():
  return baselines.PixelEncoder(64, 8)


@pytest.fixture(scope="module")
def result(pixels):
  options = {"type": "geometric_correspondence", "count": 4, "pictures": 2}
  return build_evaluator("geometric", options).run(pixels)


def test_scenes(result):
  assert 3 * result.chance["avg_recall"] < result.metrics["avg_recall"] < 1
  assert set(result.chance) == set(result.metrics)
  protocol = json.loads(json.dumps(result.protocol))
  assert (protocol["pairs"], protocol["matches_kept"]) == (4, 400)
  assert protocol["input_size"] == [128, 128]
  assert protocol["metres"] == [0.05, 0.1, 0.25]
  assert "five times NAVI's" in protocol["metres_are"]
  assert (protocol["layer"], protocol["final_norm"]) == (-1, False)
  assert len(protocol["data_hash"]) == 16
  # The encoder's own preprocessing (64 x 64, bilinear) is not used.
  assert protocol["preprocess"] == {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "resize": "squash",
    "size": 128,
    "crop": "square around the depth",
    "interpolation": "nearest",
  }
  assert sum(protocol["pairs_by_angle"].values()) == 4
  assert result.sheets["matches"].shape == (28 + 276 + 8 + 276, 552, 3)


def test_features_after_the_final_norm(result, pixels):
  got = GeometricCorrespondence(count=4, norm="final").run(pixels)
  assert got.errors.keys() == got.metrics.keys()
  assert got.protocol["final_norm"] is True
  # Raw pixels are not normalised, so the results are equal.
  assert got.metrics == result.metrics
  assert got.chance == result.chance


def test_correspondence_of_scenes_agrees_with_depth_and_pose():
  """Moved points project to the renderer's correspondence."""
  from mtv_jax.data.scenes import render as scenes
  from mtv_jax.evals.datasets import registry
  from mtv_jax.evals.datasets.scenes import HELD_OUT_SCENES

  frames = registry.open_posed("scenes", subset="wild_set", count=1)
  first, second = (frames.read(i, 48) for i in (0, 1))
  pair = scenes.render_pair(HELD_OUT_SCENES, size=96)
  np.testing.assert_array_equal(first.image, pair.first.image)
  move = posed.relative_pose(*frames.poses)
  np.testing.assert_allclose(move[:3, :3], pair.rotation, atol=1e-9)
  np.testing.assert_allclose(move[:3, 3], pair.translation, atol=1e-9)
  # The depth of a visible point in the second view is the moved point's.
  y, x = np.nonzero(pair.visible & (first.depth > 0))
  z = first.depth[y, x]
  point = np.stack([x + 0.5 - 48, y + 0.5 - 48, 0 * x], axis=1) / first.focal
  point = (point + [0, 0, 1]) * z[:, None]
  moved = point @ move[:3, :3].T + move[:3, 3]
  projected = moved[:, :2] / moved[:, 2:] * second.focal / 96 + 0.5
  want = pair.correspondence[y, x][:, ::-1]
  np.testing.assert_allclose(projected, want, atol=1e-4)
  columns, rows = (projected * 96).astype(int).T
  seen = second.depth[rows, columns]
  close = np.abs(seen - moved[:, 2]) < 0.05
  assert len(z) > 200
  assert close.mean() > 0.85  # edges fall on the next pixel


def test_pair_lists_are_written_and_read(tmp_path, pixels):
  path = tmp_path / "pairs.txt"
  drawn = GeometricCorrespondence(count=3, pairs=str(path))
  drawn.prepare()
  lines = path.read_text().splitlines()
  assert len(lines) == 3
  path.write_text("\n".join(lines[:2]))
  again = GeometricCorrespondence(count=3, pairs=str(path))
  again.prepare()
  assert again._set.sample.pairs == drawn._set.sample.pairs[:2]
  assert again._set.digest != drawn._set.digest
  # For a list that was read, the sampling is unknown.
  first, second = (each.run(pixels).protocol for each in (drawn, again))
  how = {"pair_seed", "max_angle", "stride", "frames_without_partner"}
  assert how <= first.keys()
  assert not how & second.keys()
  assert first["pairs_are"] == "drawn"
  assert second["pairs_are"] == "read from the list"
  assert second["pair_list"] == "pairs.txt"


@pytest.mark.slow
def test_seven_scenes(shared_data, pixels):
  """Real depth and poses: raw pixels are far above chance."""
  evaluator = GeometricCorrespondence(
    data=str(shared_data / "rgbd_7scenes"), count=3, size=256
  )
  got = evaluator.run(pixels)
  assert got.protocol["dataset"] == "RGB-D"
  assert got.protocol["pairs"] == 3
  assert got.protocol["matches_kept"] == 3000
  assert got.metrics["recall_5cm"] > 10 * got.chance["recall_5cm"]
  assert got.metrics["recall_50px"] > 5 * got.chance["recall_50px"]


@pytest.mark.slow
def test_seven_scenes_are_consistent(shared_data):
  """Position features of two frames match, by depth and pose."""
  from mtv_jax.evals.datasets import posed_files

  frames = posed_files.open_rgbd(shared_data / "rgbd_7scenes")
  drawn = posed.draw_pairs(frames, seed=8, count=2)
  options = MatchOptions()
  for pair in drawn.pairs:
    views = [
      posed.make_view(frames.read(i, 512), size=512, stored=1024)
      for i in (pair.first, pair.second)
    ]
    points = [world_points(view) * 0.2 for view in views]
    maps = np.stack([position_features(p) for p in points])
    errors = geometric.match_pair(maps, views, options=options)
    assert (errors.metres < 0.05).mean() > 0.95
