"""J and F of DAVIS against SciPy, with the boundaries by distance."""

import numpy as np
import pytest
import scipy.ndimage

from mtv_jax.evals import video


def boundary_pixels(mask):
  """The official boundary map, pixel by pixel."""
  h, w = mask.shape
  out = np.zeros((h, w), bool)
  for y in range(h):
    for x in range(w):
      others = []
      if x + 1 < w:
        others.append(mask[y, x + 1])
      if y + 1 < h:
        others.append(mask[y + 1, x])
      if x + 1 < w and y + 1 < h:
        others.append(mask[y + 1, x + 1])
      out[y, x] = any(other != mask[y, x] for other in others)
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
