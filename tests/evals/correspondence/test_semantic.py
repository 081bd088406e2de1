"""Semantic correspondence: keypoint transfer, PCK, SPair-71k and scenes."""

import functools
import json
import random

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder import baselines
from mtv_jax.encoder.features import normalize
from mtv_jax.evals import build_evaluator
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import KeyPointPair
from mtv_jax.evals.correspondence import semantic
from mtv_jax.evals.correspondence.geometric import GeometricCorrespondence
from mtv_jax.evals.correspondence.semantic import SemanticCorrespondence
from mtv_jax.evals.datasets import registry, spair

GRID, WIDTH = 6, 9
POINT, IMAGE = semantic.PckRule("point", 0.1), semantic.PckRule("image", 0.1)


def pair_of(points, second, category="cat", viewpoint=0):
  """A pair whose second image is 100 x 80, with a box of 50 x 40."""
  points, second = np.array(points, float), np.array(second, float)
  box = np.array([10.0, 20.0, 60.0, 60.0])
  sides = dict(first_side=100, second_side=100)
  return KeyPointPair(
    category, viewpoint, 0, 1, points, second, second_box=box, **sides
  )


@pytest.fixture(scope="module")
def maps():
  rng = np.random.default_rng(3)
  return rng.normal(size=(2, GRID, GRID, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def points():
  rng = np.random.default_rng(4)
  corners = [(0, 0), (1, 1), (1, 0), (0.2, 0.4)]
  return np.concatenate([rng.random((20, 2)), corners])


def find(source, target, points):
  """The patch of the target for each point of the source."""
  maps = jnp.asarray(normalize(np.stack([source, target])))
  return semantic.transfer_points(maps, 0, 1, points)


def sampled(features, points):
  """Bilinear with aligned corners, one point at a time."""
  rows = []
  for x, y in points * (GRID - 1):
    x0, y0 = min(int(x), GRID - 2), min(int(y), GRID - 2)
    a, b = x - x0, y - y0
    above = (1 - a) * features[y0, x0] + a * features[y0, x0 + 1]
    below = (1 - a) * features[y0 + 1, x0] + a * features[y0 + 1, x0 + 1]
    rows.append((1 - b) * above + b * below)
  return np.array(rows)


def test_transfer_matches_numpy(maps, points):
  first, second = (
    m / np.linalg.norm(m, axis=-1, keepdims=True) for m in maps.astype(float)
  )
  scores = sampled(first, points) @ second.reshape(-1, WIDTH).T
  best = scores.argmax(axis=1)
  want = np.stack([best % GRID, best // GRID], axis=1)
  np.testing.assert_array_equal(find(*maps, points), want)
  # Features are normalised before sampling: the reverse order differs here.
  raw = sampled(maps[0].astype(float), points) @ second.reshape(-1, WIDTH).T
  assert (raw.argmax(axis=1) != best).any()


def test_ties_go_to_the_first_patch(maps):
  same = np.broadcast_to(maps[0, :1, :1], maps[0].shape)
  got = find(same, same, np.array([[0.9, 0.3], [0.1, 0.8]]))
  assert got.tolist() == [[0, 0], [0, 0]]


def test_transfer_within_one_image_errs_by_at_most_1_5_patches(points):
  """Sampling uses G - 1 steps, the prediction corners of G: as published."""
  rng = np.random.default_rng(0)
  # Smooth and unique: similar features are near each other.
  at = np.stack(np.meshgrid(np.arange(50), np.arange(50)), axis=-1) / 50
  waves = at @ rng.normal(0, 4, (2, 40))
  features = np.concatenate([np.cos(waves), np.sin(waves)], axis=-1)
  features = features.astype(np.float32)
  error = np.abs(find(features, features, points) / 50 - points)
  assert error.max() <= 1.5 / 50 + 1e-6
  assert error.max() > 0.5 / 50


def test_keypoints_are_rounded_down():
  points = np.array([[62.0, 462.0], [499.0, 0.0], [333.0, 125.0]])
  got = semantic.points_in_square(points, 500, 800)
  assert got.tolist() == [[99, 739], [798, 0], [532, 200]]
  # 333 * 800 / 333 is 800, though 800 / 333 * 333 is less in floats.
  got = semantic.points_in_square(np.array([[333.0, 0.0]]), 333, 800)
  assert got[0, 0] == 800


def test_errors_are_relative_to_the_box():
  pair = pair_of([(1, 1), (2, 2)], [(50, 40), (25, 60)])
  predicted = np.array([(0.5, 0.45), (0.31, 0.68)])
  got = semantic.transfer_errors(predicted, pair, size=800)
  # The box's longer side is 0.5 of the padded square.
  np.testing.assert_allclose(got, [0.05 / 0.5, 0.1 / 0.5], atol=1e-9)


def test_rules_of_correct_keypoints():
  errors = np.array([0.05, 0.1, 0.2])
  assert POINT.correct(errors).tolist() == [1, 0, 0]
  assert IMAGE.correct(errors).tolist() == [1, 1, 0]
  pairs = [np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0]), np.zeros(0)]
  assert [POINT.terms(p) for p in pairs] == [(3, 4), (0, 1), (0, 0)]
  assert [IMAGE.terms(p) for p in pairs] == [(3 / 4, 1), (0, 1), (0, 0)]
  # Golden: the published rule.
  errors = np.array([0.068718, 0.25, 0.194365])
  for threshold, want in ((0.1, 1 / 3), (0.3, 1.0)):
    rule = semantic.PckRule("point", threshold)
    assert rule.correct(errors).mean() == pytest.approx(want)


def test_chance_is_the_pck_of_random_features():
  rng = np.random.default_rng(1)
  points = rng.integers(5, 75, (8, 2))
  pair = pair_of(points, points)
  rule = semantic.PckRule("point", 0.3)
  chance = semantic.uniform_pck(pair, grid=GRID, size=60, rule=rule)
  # The fraction of the 36 cells whose corner is within 0.3 * 0.5 of the point.
  corners = np.stack(np.meshgrid(*[np.arange(GRID) / GRID] * 2), axis=-1)
  for point, share in zip(points, chance, strict=True):
    true = np.floor(point * 60 / 100) / 60
    near = np.linalg.norm(corners - true, axis=-1) < 0.15
    assert share == pytest.approx(np.mean(near))
  correct = []
  for _ in range(60):
    maps = rng.normal(size=(2, GRID, GRID, 16)).astype(np.float32)
    predicted = find(*maps, points / 100) / GRID
    correct.append(semantic.transfer_errors(predicted, pair, size=60) < 0.3)
  p = chance.mean()
  assert 0.03 < p < 0.2
  assert abs(np.mean(correct) - p) < 5 * np.sqrt(p * (1 - p) / 480)


def test_pairs_are_sampled_by_a_seeded_shuffle():
  keys = [("dog", 0), ("cat", 1), ("dog", 1), ("dog", 1), ("dog", 0)] * 9
  pairs = [pair_of([(1, 1)], [(1, 1)], *key) for key in keys]
  sample = semantic.sample_pairs(pairs, limit=5, seed=20)
  # Viewpoints without a pair are left out.
  assert set(sample) == {*keys, ("dog", None), ("cat", None)}
  for (category, view), chosen in sample.items():
    members = [
      i for i, (c, v) in enumerate(keys) if c == category and view in (None, v)
    ]
    random.seed(20)
    random.shuffle(members)
    assert list(chosen) == members[:5]


def test_metrics_are_means_over_classes_with_keypoints():
  sample = {("cat", None): (0, 1), ("cat", 0): (0,), ("cat", 2): (1,)}
  sample |= {("dog", None): (2, 3), ("dog", 0): (2, 3)}
  sample |= {("owl", None): (4,), ("owl", 1): (4,)}
  values = ([1, 0], [1, 1], [0], [1, 1, 1], [])
  correct = {i: np.array(x, float) for i, x in enumerate(values)}
  got = semantic.average_pck(sample, correct, rule=POINT, report="classes")
  assert got.metrics == {
    "recall": pytest.approx((3 / 4 + 3 / 4) / 2),
    "recall_view0": pytest.approx((1 / 2 + 3 / 4) / 2),
    "recall_view2": pytest.approx(1.0),
    "avg_recall_views": pytest.approx((5 / 8 + 1) / 2),
    "recall_cat": pytest.approx(3 / 4),
    "recall_dog": pytest.approx(3 / 4),
  }
  # Keypoints of one pair are resampled together.
  assert got.errors.keys() == got.metrics.keys()
  assert got.errors["recall_cat"] > 0.15
  by_image = semantic.average_pck(sample, correct, rule=IMAGE).metrics
  assert by_image["recall"] == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_squares_are_padded_with_white_at_the_bottom_right():
  image = np.full((30, 60, 3), 7, np.uint8)
  got = semantic.pad_to_square(image, 60)
  assert (got[:28] == 7).all() and (got[32:] == 255).all()
  got = semantic.pad_to_square(image.transpose(1, 0, 2), 40)
  assert got.shape == (40, 40, 3) and (got[:, 24:] == 255).all()


@pytest.fixture
def spair_root(tmp_path):
  """Images of one noise, whose keypoints have equal positions."""
  root = tmp_path
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 255, (128, 128, 3)).astype(np.uint8)
  image = PIL.Image.fromarray(noise)
  for category, names in (("cat", "ab"), ("dog", "cd")):
    folder = root / "JPEGImages" / category
    folder.mkdir(parents=True)
    for name in names:
      image.save(folder / f"{name}.jpg", quality=95)
  points = [[13, 21], [70, 101], [90, 40]]
  annotations = root / "PairAnnotation" / "test"
  annotations.mkdir(parents=True)
  # The images of the second dog pair share no keypoint.
  for number, category, first, second, view, keypoints in (
    (12, "cat", "a", "b", 0, points),
    (3, "cat", "b", "a", 1, points[:2]),
    (7, "dog", "c", "d", 1, points),
    (8, "dog", "d", "c", 2, []),
  ):
    row = {"pair_id": number, "category": category, "viewpoint_variation": view}
    row |= {"filename": f"{number:06d}-{first}-{second}:{category}"}
    for side, name, corner in (("src", first, 120), ("trg", second, 121)):
      row[f"{side}_imname"], row[f"{side}_imsize"] = (
        f"{name}.jpg",
        [128, 128, 3],
      )
      row[f"{side}_bndbox"] = [1, 1, corner, 120 if side == "src" else 101]
      row[f"{side}_kps"] = keypoints
    row |= {"kps_ids": [str(i) for i in range(len(keypoints))], "mirror": 0}
    # File names sort in another order than the pairs.
    path = annotations / f"{'zyxw'[number % 4]}{row['filename']}.json"
    path.write_text(json.dumps(row))
  return root


def test_read_spair(spair_root):
  data = spair.open_key_points(spair_root, split="test")
  assert [len(p.first_points) for p in data.pairs] == [2, 3, 0, 3]
  assert [p.category for p in data.pairs] == ["cat", "dog", "dog", "cat"]
  assert [p.viewpoint for p in data.pairs] == [1, 1, 2, 0]
  assert len(data.images) == 4
  assert (data.pairs[0].first, data.pairs[0].second) == (1, 0)
  assert data.pairs[3].second_box.tolist() == [1, 1, 121, 101]
  assert data.images[0].shape == (128, 128, 3)
  (spair_root / "JPEGImages" / "dog" / "d.jpg").unlink()
  with pytest.raises(FileNotFoundError, match="1 of 4 files.*d.jpg"):
    spair.open_key_points(spair_root, split="test")


@pytest.mark.parametrize(
  ("fields", "options", "error", "message"),
  [
    ({"trg_kps": None}, {}, ValueError, "has no 'trg_kps'"),
    ({"trg_kps": [[1, 2]] * 9}, {}, ValueError, "and 9 in the second"),
    ({"src_kps": [], "trg_kps": []}, {}, ValueError, "none of its 4 pairs has"),
    ({}, {"split": "val"}, FileNotFoundError, "missing  PairAnnotation/val"),
    ({}, {"data": "JPEGImages"}, NotApplicable, "Semantic correspondence read"),
  ],
)
def test_damaged_sets(spair_root, fields, options, error, message):
  for path in (spair_root / "PairAnnotation" / "test").iterdir():
    row = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in row.items() if v is not None}))
  options = {**options, "data": str(spair_root / options.get("data", ""))}
  with pytest.raises(error, match=message):
    SemanticCorrespondence(**options).prepare()


@pytest.fixture(scope="module")
def pixels():
  return baselines.PixelEncoder(64, 8)


def test_equal_images_match(spair_root, pixels):
  """The error is at most 1.5 / 16 an axis, 0.142 of these boxes."""
  options = {"data": str(spair_root), "size": 128, "report": "classes"}
  build = functools.partial(build_evaluator, "semantic_correspondence")
  got = build({**options, "threshold": 0.142}).run(pixels)
  assert got.metrics["recall"] == got.metrics["recall_dog"] == 1.0
  # The images of the hard pair share no keypoint.
  assert "recall_view2" not in got.metrics
  protocol = json.loads(json.dumps(got.protocol))
  assert protocol["pairs"] == {"all": 4, "0": 1, "1": 2, "2": 1}
  assert (protocol["points"], protocol["grid"]) == (8, [16, 16])
  # The encoder's own preprocessing (64 x 64, bilinear) is not used.
  assert protocol["preprocess"] == {
    "mean": list(pixels.preprocess.mean),
    "std": list(pixels.preprocess.std),
    "resize": "squash",
    "size": 128,
    "crop": "none: padded with white to a square first",
    "interpolation": "bicubic, antialiased (Pillow)",
  }
  # Most of the error comes from sampling and corners.
  close = build({**options, "threshold": 0.05}).run(pixels)
  assert 0 < close.metrics["recall"] < 1


MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def test_probe3d_pads_patches_of_14_and_normalises_by_imagenet(spair_root):
  """Such as 800 to 812, and 512 to 518 in NAVI's protocol; here 100 to 112."""
  encoder = baselines.PixelEncoder(56, 14)
  options = {"fit": "pad", "image_mean": "imagenet"}
  evaluator = SemanticCorrespondence(data=str(spair_root), size=100, **options)
  got = evaluator.run(encoder)
  preprocess = got.protocol["preprocess"]
  assert got.protocol["input_size"] == [100, 100]
  assert (preprocess["padded"], got.protocol["grid"]) == ([112, 112], [8, 8])
  np.testing.assert_array_equal(
    [preprocess["mean"], preprocess["std"]], [MEAN, STD]
  )
  # Equal images: the source's nearest patch by its normalised position.
  data = evaluator._set[0]
  points = np.floor(data.pairs[3].first_points * 100 / 128) / 100
  grid = evaluator._resolve_grid(encoder, data.layout)
  ((i, predicted),) = evaluator._transfer_pairs(encoder, data, [3], grid)
  assert i == 3
  assert abs(predicted - np.rint(points * 7) / 8).max() < 2 / 8
  navi = GeometricCorrespondence(**options)
  assert navi._input_size(encoder, 512) == 512
  assert navi._padded_view(encoder, 800).padded == (812, 812)
  assert GeometricCorrespondence()._input_size(encoder, 512) == 448
  # Three pixels before and after, zero after normalisation.
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  padded = np.zeros((70, 70, 3))
  padded[3:67, 3:67] = (image / 255 - MEAN) / STD
  want = padded.reshape(5, 14, 5, 14, 3).swapaxes(1, 2).reshape(5, 5, -1)
  features = navi._encode(navi._with_image_mean(encoder), [image])[0]
  np.testing.assert_allclose(features, want, atol=1e-5)


@pytest.fixture(scope="module")
def result(pixels):
  return SemanticCorrespondence(count=40, pictures=2).run(pixels)


def test_scenes(result):
  assert result.metrics.keys() == {"recall"}
  assert 0 < result.metrics["recall"] < 0.5
  assert 0.01 < result.chance["recall"] < 0.1
  assert result.protocol["threshold"] == 0.25
  assert result.protocol["grid"] == [16, 16]
  assert result.protocol["points"] == 3 * result.protocol["pairs"]["all"]
  assert result.sheets["matches"].shape == (28 + 276 + 8 + 276, 552, 3)


def test_groups_of_classes_change_nothing(result, pixels, monkeypatch):
  monkeypatch.setattr(semantic, "_MAX_IMAGES", 5)
  got = SemanticCorrespondence(count=40).run(pixels)
  assert got.errors.keys() == got.metrics.keys()
  assert got.metrics == result.metrics


def test_pairs_of_scenes_share_a_class():
  data = registry.open_key_points("scenes", split="test", count=40)
  assert len(data.pairs) > 10
  for pair in data.pairs:
    assert pair.first != pair.second
    assert pair.first_points.shape == (3, 2)
    # The second and third points are 0.7 of the box's height apart.
    box = pair.second_box
    x, y = pair.second_points.T
    np.testing.assert_allclose(x, (box[0] + box[2]) / 2)
    np.testing.assert_allclose(y[2] - y[1], 0.7 * (box[3] - box[1]))
  firsts = [p.first for p in data.pairs]
  assert len(set(firsts)) == len(firsts)


def test_too_few_scenes():
  enough = len(scenes.CLASS_NAMES) + 1
  message = f"no two of 2 .*main-object classes.*count={enough} or more"
  with pytest.raises(ValueError, match=message):
    SemanticCorrespondence(count=2).prepare()
  SemanticCorrespondence(count=enough).prepare()


@pytest.mark.slow
def test_spair(shared_data, pixels):
  root = shared_data / "SPair-71k"
  data = spair.open_key_points(root, split="test")
  assert (len(data.pairs), len(data.images)) == (9, 12)
  for pair in data.pairs:
    for points, image in (
      (pair.first_points, data.images[pair.first]),
      (pair.second_points, data.images[pair.second]),
    ):
      assert (points >= 0).all()
      assert (points <= np.array(image.shape[1::-1])).all()
    assert pair.second_side == max(data.images[pair.second].shape)
  got = SemanticCorrespondence(data=str(root), aggregate="image").run(pixels)
  assert got.protocol["input_size"] == [800, 800]
  assert (got.protocol["classes"], got.protocol["points"]) == (6, 66)
  assert got.metrics["recall"] > 2 * got.chance["recall"] > 0
  assert "recall_view2" not in got.metrics
