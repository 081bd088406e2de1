"""Depth metrics: golden values, masks, alignment, and reference libraries."""

import numpy as np
import pytest

from mtv_jax.evals.depth import metrics as dm

GT = np.array([[1, 2, 4], [5, 0, 9.0]])
PREDICTED = np.array([[2.1, 1.2, 0.7], [0.5, 3, -0.3]])


def random_depths(seed=0, size=2000):
  """Depths with invalid pixels, and predictions."""
  rng = np.random.default_rng(seed)
  truth = rng.uniform(0.5, 9.5, size)
  truth[rng.random(size) < 0.3] = 0
  predicted = np.clip(truth * rng.lognormal(0, 0.3, size), 0.1, 10)
  return predicted.astype(np.float32), truth.astype(np.float32)


def test_metrics_by_hand():
  p, g = np.array([1.0, 2.0, 8.0]), np.array([1.25, 2.0, 4.0])
  got = dm.image_metrics(p, g)
  e = np.log([0.8, 1, 2])
  assert got == {
    "rmse": pytest.approx(np.sqrt((0.0625 + 16) / 3)),
    "abs_rel": pytest.approx((0.2 + 0 + 1) / 3),
    "sq_rel": pytest.approx((0.05 + 0 + 4) / 3),
    "rmse_log": pytest.approx(np.sqrt(np.mean(e**2))),
    "log10": pytest.approx((np.log10(1.25) + np.log10(2)) / 3),
    "silog": pytest.approx(100 * np.std(e)),
    # A ratio of 1.25 is not below 1.25.
    "delta1": pytest.approx(1 / 3),
    "delta2": pytest.approx(2 / 3),
    "delta3": pytest.approx(2 / 3),
  }
  assert tuple(got) == tuple(dm.METRICS)


def test_silog_is_scale_invariant():
  p, g = random_depths()
  p, g = p[g > 0], g[g > 0]
  assert dm.image_metrics(3 * g, g)["silog"] == pytest.approx(0, abs=1e-5)
  once, twice = (dm.image_metrics(k * p, g) for k in (1, 2))
  assert once["silog"] == pytest.approx(twice["silog"], rel=1e-9)
  assert once["rmse_log"] != pytest.approx(twice["rmse_log"], rel=0.1)


def test_negative_predictions_fail_delta_and_are_rejected():
  g = np.array([1.0, 1.0])
  for p in ([-1.0, 1.0], [0.0, 1.0]):
    assert dm.image_metrics(np.array(p), g, ("delta1",)) == {"delta1": 0.5}
  with pytest.raises(ValueError, match="2 pixels, 0 true and 1 predicted"):
    dm.image_metrics(np.array([-1.0, 1.0]), g)
  with pytest.raises(ValueError, match="got 0 pixels"):
    dm.image_metrics(g[:0], g[:0])


@pytest.mark.reference
def test_metrics_agree_with_sklearn():
  from sklearn import metrics

  p, g = random_depths()
  valid = dm.valid_mask(g.reshape(40, 50), high=9.0).ravel()
  assert 0 < valid.sum() < (g > 0).sum()
  p, g = p[valid].astype(np.float64), g[valid].astype(np.float64)
  near = np.abs(np.log(p / g)) < np.log(1.25)
  want = {
    "rmse": metrics.root_mean_squared_error(g, p),
    "abs_rel": metrics.mean_absolute_percentage_error(g, p),
    "rmse_log": metrics.root_mean_squared_error(np.log(g), np.log(p)),
    "log10": metrics.mean_absolute_error(np.log10(g), np.log10(p)),
    "delta1": metrics.accuracy_score(np.ones(len(p)), near),
  }
  got = dm.image_metrics(p, g)
  for name, value in want.items():
    assert got[name] == pytest.approx(value, abs=1e-9), name


def test_mean_is_over_images():
  got = dm.average([{"rmse": 1.0}, {"rmse": 4.0}])
  assert got.metrics == {"rmse": 2.5}
  assert got.errors == {"rmse": pytest.approx(1.5)}
  with pytest.raises(ValueError, match="none of 2 images"):
    dm.average([], skipped=2)


def test_crops():
  eigen = dm.crop_mask((480, 640), "nyu_eigen")
  rows, columns = np.flatnonzero(eigen.any(1)), np.flatnonzero(eigen.any(0))
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 600)
  assert eigen.sum() == 426 * 560
  # For 352 x 1216: int(.40810811 * 352) = 143, int(.99189189 * 352) = 349,
  # int(.03594771 * 1216) = 43, int(.96405229 * 1216) = 1172.
  garg = dm.crop_mask((352, 1216), "garg")
  rows, columns = np.flatnonzero(garg.any(1)), np.flatnonzero(garg.any(0))
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (143, 348, 43, 1171)
  rows = np.flatnonzero(dm.crop_mask((352, 1216), "kitti_eigen").any(1))
  assert (rows[0], rows[-1]) == (117, 320)
  assert dm.crop_mask((3, 4), "none").all()
  with pytest.raises(ValueError, match="480 x 640, but this one is 3 x 4"):
    dm.crop_mask((3, 4), "nyu_eigen")


def test_limits_are_open():
  depth = np.array([[0, 1e-3, 0.5, 9.99, 10, np.nan, np.inf]])
  assert dm.valid_mask(depth, high=10).tolist() == [
    [False, False, True, True, False, False, False]
  ]
  assert dm.valid_mask(depth, low=0).sum() == 4


def test_alignment_golden():
  valid = GT > 0
  got = dm.fit_affine(PREDICTED[valid], 1 / GT[valid])
  assert got.scale == pytest.approx(0.38398900, abs=5e-9)
  assert got.shift == pytest.approx(0.08967146, abs=5e-9)
  got = dm.fit_affine(PREDICTED[valid], GT[valid])
  assert got.scale == pytest.approx(-3.343909, abs=5e-7)
  assert got.shift == pytest.approx(7.008883, abs=5e-7)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_alignment_is_least_squares(offset):
  rng = np.random.default_rng(1)
  d = (rng.normal(size=500) + offset).astype(np.float32)
  g = rng.uniform(0.1, 1, size=500)
  centred = np.stack([d.astype(np.float64) - offset, np.ones(500)], axis=1)
  want, _, _, _ = np.linalg.lstsq(centred, g, rcond=None)
  got = dm.fit_affine(d, g)
  assert got.scale == pytest.approx(want[0], rel=1e-9)
  np.testing.assert_allclose(got(d), centred @ want, atol=1e-9)


@pytest.mark.parametrize(
  "d", [[], [0.3], [0.1] * 7, [1e8] * 3], ids=["none", "one", "same", "large"]
)
def test_degenerate_alignment_is_zero(d):
  g = np.linspace(1, 2, len(d))
  assert dm.fit_affine(np.array(d), g) == dm.ScaleAndShift(0.0, 0.0)
