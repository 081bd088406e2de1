"""Video segmentation: propagation, J and F against NumPy and SciPy; DAVIS."""

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from mtv_jax import load
from mtv_jax.data.scenes import render as scenes
from mtv_jax.evals import video
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.video import VideoSegmentation
from mtv_jax.utils.errors import ConfigError, InputError, MissingFileError


def propagate_by_matrix(
  features, first, *, frames, top_k, neighbourhood, temperature
):
  """All affinities in one matrix; those below the k-th largest are zero."""
  h, w, c = first.shape
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  unit = unit.reshape(len(features), h * w, -1).astype(np.float64)
  y, x = np.divmod(np.arange(h * w), w)
  far = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) > neighbourhood
  labels = [first.reshape(-1, c).astype(np.float64)]
  for t in range(1, len(features)):
    context = [0, *range(max(1, t - frames), t)]
    cosines = np.concatenate([unit[t] @ unit[s].T for s in context], axis=1)
    affinity = np.exp(cosines / temperature)
    affinity[np.tile(far, len(context))] = 0
    kth = np.sort(affinity, axis=1)[:, -top_k][:, None]
    affinity[affinity < kth] = 0
    affinity /= affinity.sum(axis=1, keepdims=True)
    labels.append(affinity @ np.concatenate([labels[s] for s in context]))
  return np.stack(labels[1:]).reshape(-1, h, w, c)


def test_propagation_against_numpy():
  """More frames than the context has, so that the oldest is replaced."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(7, 5, 6, 8)).astype(np.float32)
  first = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (5, 6))]
  options = {"frames": 3, "top_k": 4, "neighbourhood": 2, "temperature": 0.1}
  got = np.stack([*video.propagate(iter(features), first, **options)])
  want = propagate_by_matrix(features, first, **options)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(got.sum(axis=-1), 1, atol=1e-5)
  # Every option matters.
  others = ({"frames": 2}, {"top_k": 3}, {"neighbourhood": 3})
  for change in (*others, {"temperature": 0.2}):
    other = propagate_by_matrix(features, first, **options | change)
    assert abs(other - want).max() > 0.01


def test_patches_that_tie_with_the_last_one_count():
  rng = np.random.default_rng(0)
  features = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (6, 4, 5))]
  first = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (4, 5))]
  options = {"frames": 3, "top_k": 4, "neighbourhood": 2, "temperature": 0.1}
  got = np.stack([*video.propagate(iter(features), first, **options)])
  want = propagate_by_matrix(features, first, **options)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_fewer_patches_than_neighbours():
  features = np.ones((3, 1, 2, 4), np.float32)
  first = np.eye(2, dtype=np.float32)[None]
  options = {"frames": 7, "neighbourhood": 0, "temperature": 0.1}
  got = [*video.propagate(features, first, top_k=5, **options)]
  np.testing.assert_allclose(got, 0.5, atol=1e-6)


def test_largest_score_of_scaled_channels():
  """A weak object that is at its strongest wins over half the background."""
  scores = np.zeros((2, 2, 4), np.float32)
  scores[..., 0] = [[1, 0.9], [0.9, 0.45]]
  scores[..., 1] = [[0, 0.1], [0.1, 0.3]]
  scores[..., 3] = 0.2  # constant: no patch stands out
  got = np.asarray(video._argmax_map(scores, (2, 2)))
  assert got.tolist() == [[0, 0], [0, 1]]


def write_video(root, name, colours, *, frames=5, step=8, shape=(48, 64)):
  """Squares that move to the right, in the layout of DAVIS 2017."""
  images = root / "JPEGImages" / "480p" / name
  masks = root / "Annotations" / "480p" / name
  images.mkdir(parents=True)
  masks.mkdir(parents=True)
  for t in range(frames):
    pixels = np.full((*shape, 3), 60, np.uint8)
    labels = np.zeros(shape, np.uint8)
    for k, colour in enumerate(colours):
      y, x = 4 + 24 * k, 4 + step * t
      pixels[y : y + 16, x : x + 16] = colour
      labels[y : y + 16, x : x + 16] = k + 1
    labels[-1, -1] = 255
    PIL.Image.fromarray(pixels).save(images / f"{t:05}.jpg", quality=100)
    mask = PIL.Image.fromarray(labels).convert("P")
    mask.putpalette(list(range(256)) * 3)
    mask.putdata(labels.ravel().tolist())
    mask.save(masks / f"{t:05}.png")


@pytest.fixture
def davis(tmp_path):
  root = tmp_path / "DAVIS"
  write_video(root, "one", [(255, 0, 0)])
  write_video(root, "two", [(255, 0, 0), (0, 0, 255)], frames=6)
  write_video(root, "train", [(255, 0, 0)])
  (root / "ImageSets" / "2017").mkdir(parents=True)
  (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
  return root


def test_davis_layout(davis):
  for path in (davis, davis.parent):
    data = registry.open_videos(path)
    assert [video.name for video in data.videos] == ["one", "two"]
    assert [video.objects for video in data.videos] == [1, 2]
    two = data.videos[1]
    assert len(two.frames) == len(two.masks) == 6
    assert two.frames[0].shape == (48, 64, 3)
    # The void label is background.
    assert np.unique(two.masks[5]).tolist() == [0, 1, 2]
  assert len(registry.open_videos(davis, count=1).videos) == 1
  with pytest.raises(NotApplicable, match="laid out as DAVIS"):
    registry.open_classification(davis)


def test_incomplete_davis_is_explained(davis):
  mask = davis / "Annotations" / "480p" / "two" / "00003.png"
  names = davis / "ImageSets" / "2017" / "val.txt"
  empty = PIL.Image.new("L", (64, 48))
  for change, error, message in (
    (mask.unlink, MissingFileError, "1 of 6 files.*two/00003.png"),
    (lambda: empty.save(mask), None, ""),
    (
      lambda: empty.save(mask.with_name("00000.png")),
      InputError,
      "00000.png has no object",
    ),
    (
      lambda: names.write_text("one\nthree\n"),
      InputError,
      "three has 0 frames",
    ),
    (lambda: names.write_text("\n"), InputError, "names no video"),
    (names.unlink, MissingFileError, "missing +ImageSets"),
  ):
    change()
    if error:
      with pytest.raises(error, match=message):
        registry.open_videos(davis)
  with pytest.raises(NotApplicable, match="Video segmentation reads scenes"):
    registry.open_videos(davis / "ImageSets")


def test_published_sizes(davis):
  evaluator = VideoSegmentation(data=str(davis))
  assert evaluator._input_size(load("pixels:64/16"), (480, 854)) == (480, 832)
  assert evaluator._input_size(load("pixels:64/8"), (854, 480)) == (832, 480)
  # 30 x 52 patches of 14 pixels.
  assert evaluator._input_size(load("pixels:70/14"), (480, 854)) == (420, 728)
  assert evaluator._resolve_neighbourhood((30, 52)) == 12
  small = VideoSegmentation(data=str(davis), size=64)
  assert small._input_size(load("pixels:64/8"), (48, 80)) == (64, 64)
  with pytest.raises(InputError, match="not divisible"):
    small._input_size(load("pixels:70/14"), (48, 80))
  on_scenes = VideoSegmentation(count=1)
  assert on_scenes._input_size(load("pixels:70/14"), (96, 96)) == (70, 70)
  assert on_scenes._resolve_neighbourhood((14, 14)) == 6


def test_squares_are_followed(davis):
  """If colours distinguish the objects, all of them are tracked."""
  encoder = load("pixels:16/8")
  evaluator = VideoSegmentation(data=str(davis), size=96, pictures=2)
  result = evaluator.run(encoder)
  assert result.metrics["j"] > 0.95
  assert result.metrics["j_recall"] == 1.0
  assert result.chance["j_recall"] < 0.5
  # Shifted by 8, 16 and 24 of 16 pixels, and once by 32: J of the first masks.
  copied = [8 * 16 / (24 * 16), 0, 0]
  want = np.mean([np.mean(copied), *2 * [np.mean([*copied, 0])]])
  assert result.chance["j"] == pytest.approx(want)
  assert result.protocol["objects"] == 3
  assert result.protocol["input_size"] == [[96, 128]]
  assert result.sheets["video_segmentation"].ndim == 3
  assert set(result.errors) == set(result.metrics)
  with pytest.raises(ConfigError, match="final norm follows the last block"):
    VideoSegmentation(data=str(davis), layer=0).run(load("random:mu/8@16"))


def test_masks_of_another_size_are_named_before_encoding(davis, monkeypatch):
  mask = sorted((davis / "Annotations" / "480p").glob("*/00001.png"))[0]
  with PIL.Image.open(mask) as image:
    smaller = image.resize((image.width // 2, image.height))
  smaller.save(mask)
  monkeypatch.setattr(VideoSegmentation, "_predict", None)
  with pytest.raises(InputError, match="the mask of frame 1 is .* one size"):
    VideoSegmentation(data=str(davis), size=96).run(load("pixels:16/8"))


def test_videos_of_scenes_have_the_views_of_a_pair():
  first, *_, last = scenes.render_video(5, frames=4, size=32)
  pair = scenes.render_pair(5, size=32)
  for got, want in ((first, pair.first), (last, pair.second)):
    np.testing.assert_array_equal(got.instances, want.instances)
    np.testing.assert_allclose(got.camera.position, want.camera.position)
    np.testing.assert_allclose(got.camera.rotation, want.camera.rotation)
  # Objects move little from frame to frame, and far in the whole.
  data = registry.open_videos("scenes", count=3)
  for each in data.videos:
    masks = np.stack([each.masks[t] for t in range(len(each.masks))]) == 1
    assert masks[0].mean() > 0.02

    def overlap(a, b):
      return (a & b).sum() / (a | b).sum()

    steps = [overlap(*pair) for pair in zip(masks, masks[1:], strict=False)]
    assert np.mean(steps) > overlap(masks[0], masks[-1])


def test_scenes():
  result = VideoSegmentation(count=3).run(load("pixels:32/4"))
  assert result.protocol["videos"] == 3
  assert result.protocol["neighbourhood"] == [3]
  assert result.metrics["j"] > result.chance["j"] > 0.1


def boundary_pixels(mask):
  """The official boundary map, pixel by pixel."""
  out = np.zeros(mask.shape, bool)
  for y, x in np.ndindex(mask.shape):
    # The pixel, right, below and below right, as far as they exist.
    out[y, x] = (mask[y : y + 2, x : x + 2] != mask[y, x]).any()
  return out


def f_by_distance(truth, predicted):
  """F, with the disk as all pixels at most a radius away."""
  radius = np.ceil(0.008 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
  lines = boundary_pixels(truth), boundary_pixels(predicted)
  if not lines[0].any() or not lines[1].any():
    return float(lines[0].any() == lines[1].any())
  near = [scipy.ndimage.distance_transform_edt(~b) <= radius for b in lines]
  recall = near[1][lines[0]].mean()
  precision = near[0][lines[1]].mean()
  if precision + recall == 0:
    return 0.0
  return 2 * precision * recall / (precision + recall)


def blob(rng, shape):
  noise = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 5)
  return noise > np.quantile(noise, rng.uniform(0.5, 0.9))


# Diagonals of 125.0 and 125.4 pixels: radii of one and two.
@pytest.mark.parametrize("shape", [(75, 100), (60, 111), (100, 260)])
def test_boundary_f_against_distances(shape):
  rng = np.random.default_rng(0)
  values = []
  for shift in (0, 1, 2, 3, 6):
    truth = blob(rng, shape)
    predicted = np.roll(truth, shift, axis=1) ^ (rng.random(shape) < 0.002)
    np.testing.assert_array_equal(video.boundary(truth), boundary_pixels(truth))
    got = video.boundary_f(truth, predicted)
    assert got == pytest.approx(f_by_distance(truth, predicted), abs=1e-12)
    values.append(got)
  assert values[-1] < 0.9 * values[0]


def test_empty_masks():
  empty, full = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
  full[5:9, 5:9] = True
  assert video.boundary_f(empty, empty) == 1.0
  assert video.boundary_f(empty, full) == 0.0
  assert video.boundary_f(full, empty) == 0.0
  assert video.boundary_f(full, np.roll(full, 15, axis=1)) == 0.0
  # A mask of all pixels lacks a boundary.
  assert video.boundary_f(~empty, empty) == 1.0
  assert video.region_iou(empty, empty) == 1.0
  assert video.region_iou(empty, full) == 0.0
  assert video.region_iou(full, np.roll(full, 2, axis=0)) == 8 / 24


def test_a_video_is_averaged_over_frames():
  rng = np.random.default_rng(1)
  truth = [
    (blob(rng, (40, 50)) + 2 * blob(rng, (40, 50))).astype(np.uint8)
    for _ in range(4)
  ]
  predicted = [np.roll(labels, t, axis=0) for t, labels in enumerate(truth)]
  predicted[0][:] = 3
  got = video.score_video(truth, predicted, objects=3)
  for k in (1, 2, 3):
    j, f = [], []
    for a, b in zip(truth, predicted, strict=True):
      a, b = a == k, b == k
      j.append((a & b).sum() / (a | b).sum())
      f.append(f_by_distance(a, b))
    assert got["j"][k - 1] == pytest.approx(np.mean(j))
    assert got["f"][k - 1] == pytest.approx(np.mean(f))
    assert got["j_and_f"][k - 1] == pytest.approx((np.mean(j) + np.mean(f)) / 2)
    assert got["j_recall"][k - 1] == np.mean(np.array(j) > 0.5)
    assert got["f_recall"][k - 1] == np.mean(np.array(f) > 0.5)
  assert 0 < got["j_recall"].min() < 1
