"""Segmentation metrics: golden values, torchmetrics and scikit-learn."""

import numpy as np
import pytest

from mtv_jax.evals.segmentation.metrics import (
  chance,
  class_ious,
  class_sums,
  confusion_matrix,
  estimate,
  scores,
)

TRUTH = np.array(
  [
    [[0, 0, 1, 255], [1, 1, 2, 255], [3, 3, 3, 0]],
    [[0, 0, 0, 0], [1, 1, 1, 1], [255, 255, 2, 2]],
  ],
  np.uint8,
)
PREDICTED = np.array(
  [
    [[0, 1, 1, 2], [1, 1, 2, 2], [3, 0, 3, 0]],
    [[0, 0, 0, 3], [1, 1, 0, 1], [2, 2, 2, 3]],
  ],
  np.uint8,
)


def random_maps(seed=0, classes=7):
  """Label maps with ignored pixels, and classes that one or both lack."""
  rng = np.random.default_rng(seed)
  truth = rng.integers(0, classes - 2, (3, 20, 30))
  predicted = np.where(
    rng.random(truth.shape) < 0.4, truth, rng.integers(0, classes - 1, (1,))
  )
  truth[rng.random(truth.shape) < 0.2] = 255
  return truth.astype(np.uint8), predicted.astype(np.uint8)


def test_golden():
  each = [
    confusion_matrix(t, p, classes=5)
    for t, p in zip(TRUTH, PREDICTED, strict=True)
  ]
  sums = class_sums(sum(each))
  got = scores(sums)
  want = [0.555556, 0.75, 0.666667, 0.4, np.nan]
  np.testing.assert_allclose(class_ious(sums), want, atol=1e-6)
  assert got["miou"] == pytest.approx(0.593056, abs=1e-6)
  assert got["macc"] == pytest.approx(0.726190, abs=1e-6)
  assert got["aacc"] == pytest.approx(0.75)
  estimated = estimate(class_sums(np.stack(each)))
  assert estimated.metrics == got
  # A resample of two images is the first, the second, or both.
  drawn = [scores(class_sums(x))["miou"] for x in (*each, *[sum(each)] * 2)]
  want = np.std(drawn) * np.sqrt(2 / 1)  # n / (n - 1) of two images
  assert estimated.errors["miou"] == pytest.approx(want, rel=0.15)


def test_a_class_that_is_only_predicted_counts_as_zero():
  predicted = PREDICTED.copy()
  predicted[0, 0, 0] = 4
  sums = class_sums(confusion_matrix(TRUTH, predicted, classes=5))
  assert scores(sums)["miou"] == pytest.approx(0.452222, abs=1e-6)
  assert class_ious(sums)[4] == 0


def test_confusion_and_invalid_classes():
  counts = confusion_matrix(TRUTH, PREDICTED, classes=5)
  assert counts.dtype == np.int64
  # Four pixels are ignored.
  assert counts.sum() == 20
  assert counts[0, 3] == 1
  with pytest.raises(ValueError, match="labels from 0 to 3"):
    confusion_matrix(TRUTH, PREDICTED, classes=3)
  with pytest.raises(ValueError, match="every pixel is ignored"):
    scores(np.zeros((3, 3), np.int64))
  with pytest.raises(ValueError, match="every pixel is ignored"):
    estimate(np.zeros((2, 3, 3), np.int64))


def test_chance_equals_a_uniform_guess():
  truth = np.repeat(np.arange(4), [50_000, 30_000, 20_000, 0])
  guessed = np.random.default_rng(0).integers(0, 4, len(truth))
  sums = class_sums(confusion_matrix(truth, guessed, classes=4))
  got, expected = scores(sums), chance(sums)
  assert got["miou"] == pytest.approx(expected["miou"], abs=2e-3)
  assert got["aacc"] == pytest.approx(expected["aacc"], abs=5e-3)
  assert expected["macc"] == 0.25


@pytest.mark.reference
def test_metrics_equal_sklearn():
  from sklearn.metrics import jaccard_score

  truth, predicted = random_maps(classes=7)
  sums = class_sums(confusion_matrix(truth, predicted, classes=7))
  known = truth != 255
  present = np.union1d(truth[known], predicted[known])
  assert len(present) < 7  # A class occurs in neither.
  options = {"labels": present, "average": None}
  want = jaccard_score(truth[known], predicted[known], **options)
  np.testing.assert_allclose(class_ious(sums)[present], want)
  assert scores(sums)["miou"] == pytest.approx(want.mean(), abs=1e-9)
