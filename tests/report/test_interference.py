"""Estimates of interference on gradients of known mean and covariance."""

import numpy as np
import pytest

from mtv_jax.report import interference
from mtv_jax.report.interference import GradientMoments, Interval

# Two objectives in conflict, one without a signal, one without a gradient in
# the second block.
SETS, PER_SET, DIMS = 12, 2, 60
SIGNAL, NOISE, SHARED = 0.5, 1.0, 0.4
COSINE = -0.6


def draw_products(rng):
  """Inner products of the mean gradients of sets, in two equal blocks."""
  mean = np.zeros((4, DIMS))
  basis = np.eye(DIMS)[[0, DIMS // 2]].sum(0) / np.sqrt(2)  # In both blocks.
  other = np.eye(DIMS)[[1, DIMS // 2 + 1]].sum(0) / np.sqrt(2)
  mean[0] = basis
  mean[1] = COSINE * basis + np.sqrt(1 - COSINE**2) * other
  mean[3] = np.sqrt(2) * np.eye(DIMS)[0]
  shared = rng.standard_normal((SETS, 1, DIMS))
  noise = rng.standard_normal((SETS, 4, DIMS))
  noise = np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * noise
  gradients = np.sqrt(SIGNAL) * mean + np.sqrt(NOISE / DIMS / PER_SET) * noise
  gradients[:, 3, DIMS // 2 :] = 0
  blocks = np.split(gradients, 2, axis=-1)
  return np.stack([np.einsum("aid,bjd->aibj", b, b) for b in blocks], axis=-1)


def covers(estimates, expected):
  """Share of 95 % intervals that contain the expected value."""
  inside = [(e.low <= expected) & (expected <= e.high) for e in estimates]
  return np.mean(inside, axis=0)


def test_estimates_recover_known_signal_and_noise():
  rng = np.random.default_rng(0)
  moments = [GradientMoments.of_sets(draw_products(rng)) for _ in range(300)]
  rel = [m.estimate(interference.reliability) for m in moments]
  cosines = [m.estimate(interference.corrected_cosines) for m in moments]
  noise = [m.estimate(interference.noise_cosines) for m in moments]

  expected = SIGNAL / (SIGNAL + NOISE / PER_SET)
  assert np.mean([r.value[0, -1] for r in rel]) == pytest.approx(
    expected, abs=0.01
  )
  assert np.mean([r.value[2, -1] for r in rel]) == pytest.approx(0, abs=0.01)
  for i, true in ((0, expected), (1, expected), (2, 0.0)):
    assert covers([Interval(*(x[i, -1] for x in r)) for r in rel], true) >= 0.93
  pair = [Interval(*(x[0, 1, -1] for x in c)) for c in cosines]
  assert np.mean([c.value for c in pair]) == pytest.approx(COSINE, abs=0.02)
  assert covers(pair, COSINE) >= 0.93
  # The sign is known, although the noise on one batch has the other one.
  assert np.mean([c.high < 0 for c in pair]) > 0.95
  shared = [Interval(*(x[0, 1, -1] for x in c)) for c in noise]
  assert covers(shared, SHARED) >= 0.93

  # A block without a gradient has no value; the encoder has.
  for estimates in (rel[0].value[3], cosines[0].value[0, 3]):
    assert np.isnan(estimates[1])
    assert np.isfinite(estimates[[0, 2]]).all()


def test_reliability_of_more_batches():
  r = SIGNAL / (SIGNAL + NOISE / 4)
  known = np.array([r, 0.0, -0.1, np.nan])
  longer = interference.extrapolate(3)(known)
  expected = [SIGNAL / (SIGNAL + NOISE / 12), 0, 0, np.nan]
  np.testing.assert_allclose(longer, expected)
  needed = interference.batches_needed(4, 0.5)(known)
  np.testing.assert_allclose(needed, [NOISE / SIGNAL, np.inf, np.inf, np.nan])


def test_halves_are_pooled_over_batches():
  rng = np.random.default_rng(1)
  gradients = np.sqrt(SIGNAL) * np.eye(DIMS)[0]
  gradients = gradients + np.sqrt(NOISE / DIMS) * rng.standard_normal(
    (200, 2, 1, DIMS)
  )
  products = np.einsum("taid,tbjd->taibj", gradients, gradients)[..., None]
  half = GradientMoments.of_halves(products).estimate(interference.reliability)
  expected = SIGNAL / (SIGNAL + NOISE)
  assert half.value[0, -1] == pytest.approx(expected, abs=0.02)
  assert 0.02 < half.high[0, -1] - half.low[0, -1] < 0.05


def test_tables_say_what_cannot_be_told():
  values = np.array([[0.1, 0.2], [0.3, np.nan]])
  known = Interval(values, values - 0.1, values + 0.1).to_dict()
  cosines = np.full((2, 2, 2), -0.25)
  cosines = Interval(cosines, cosines - 0.5, cosines + 0.5).to_dict()
  measured = dict(
    objectives=["a", "b"],
    batches=32,
    reliability=[dict(batches=0.5, **known), dict(batches=2, **known)],
    mean_reliability=known,
    batches_needed=Interval(values, 20 * values, np.inf * values).to_dict(),
    cosines=cosines,
    noise_cosines=cosines,
    told=[[True, True], [True, False]],
  )
  tables = [b.rows for b in interference.describe_measurement(measured)]
  head = ["half a batch", "2 batches", "16 (extrapolated)", "needed"]
  first = ["0.20 [0.10, 0.30]"] * 3 + ["0.20 [4.00, –]"]
  assert tables[0] == [
    ["reliability", *head], ["a", *first], ["b", *["–"] * 4]
  ]  # fmt: skip
  noise = "−0.25 [−0.75, 0.25]"
  assert tables[1][1] == ["a, b", "can't be told", noise]
  measured["told"][1][1] = True
  tables = [b.rows for b in interference.describe_measurement(measured)]
  assert tables[1][1] == ["a, b", noise, noise]
