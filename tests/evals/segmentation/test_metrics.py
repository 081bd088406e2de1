"""Segmentation metrics: golden values, torchmetrics and scikit-learn."""

import numpy as np
import pytest

from mtv_jax.evals.segmentation.metrics import (
  chance,
  class_ious,
  class_sums,
  confusion,
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
  counts = sum(
    confusion(t, p, classes=5) for t, p in zip(TRUTH, PREDICTED, strict=True)
  )
  sums = class_sums(counts)
  got = scores(sums)
  np.testing.assert_allclose(
    class_ious(sums), [0.555556, 0.75, 0.666667, 0.4, np.nan], atol=1e-6
  )
  assert got["miou"] == pytest.approx(0.593056, abs=1e-6)
  assert got["macc"] == pytest.approx(0.726190, abs=1e-6)
  assert got["aacc"] == pytest.approx(0.75)


def test_a_class_that_is_only_predicted_counts_as_zero():
  predicted = PREDICTED.copy()
  predicted[0, 0, 0] = 4
  sums = class_sums(confusion(TRUTH, predicted, classes=5))
  assert scores(sums)["miou"] == pytest.approx(0.452222, abs=1e-6)
  assert class_ious(sums)[4] == 0


def test_confusion_and_invalid_classes():
  counts = confusion(TRUTH, PREDICTED, classes=5)
  assert counts.dtype == np.int64
  # Four pixels are ignored.
  assert counts.sum() == 20
  assert counts[0, 3] == 1
  with pytest.raises(ValueError, match="labels from 0 to 3"):
    confusion(TRUTH, PREDICTED, classes=3)
  with pytest.raises(ValueError, match="every pixel is ignored"):
    scores(np.zeros((3, 3), np.int64))
  with pytest.raises(ValueError, match="every pixel is ignored"):
    estimate(np.zeros((2, 3, 3), np.int64))


def test_chance_equals_a_uniform_guess():
  truth = np.repeat(np.arange(4), [50_000, 30_000, 20_000, 0])
  guessed = np.random.default_rng(0).integers(0, 4, len(truth))
  sums = class_sums(confusion(truth, guessed, classes=4))
  got, expected = scores(sums), chance(sums)
  assert got["miou"] == pytest.approx(expected["miou"], abs=2e-3)
  assert got["aacc"] == pytest.approx(expected["aacc"], abs=5e-3)
  assert expected["macc"] == 0.25


def test_errors_are_those_of_fresh_images():
  rng = np.random.default_rng(0)

  def sample(images=30):
    sums = []
    for right in rng.beta(2, 2, images):  # images differ in difficulty
      truth = rng.integers(0, 3, 60)
      wrong = rng.random(60) > right
      sums.append(class_sums(confusion(truth, (truth + wrong) % 3, classes=3)))
    return np.stack(sums)

  sets = [sample() for _ in range(300)]
  spread = np.std([scores(s.sum(axis=0))["miou"] for s in sets])
  got = [estimate(s) for s in sets[:10]]
  assert got[0].metrics == scores(sets[0].sum(axis=0))
  mean = np.mean([g.errors["miou"] for g in got])
  assert mean == pytest.approx(spread, rel=0.15)


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_torchmetrics_and_sklearn(seed):
  import sklearn.metrics
  import torch
  from torchmetrics.functional.classification import multiclass_jaccard_index

  classes = 7
  truth, predicted = random_maps(seed, classes)
  sums = class_sums(confusion(truth, predicted, classes=classes))
  ours = scores(sums)
  theirs = multiclass_jaccard_index(
    torch.from_numpy(predicted.astype(np.int64)),
    torch.from_numpy(truth.astype(np.int64)),
    num_classes=classes,
    average="macro",
    ignore_index=255,
  )
  assert ours["miou"] == pytest.approx(float(theirs), abs=1e-6)
  known = truth != 255
  present = np.union1d(truth[known], predicted[known])
  # A class occurs in neither.
  assert len(present) < classes
  sklearns = sklearn.metrics.jaccard_score(
    truth[known], predicted[known], labels=present, average="macro"
  )
  assert ours["miou"] == pytest.approx(sklearns, abs=1e-9)
  np.testing.assert_allclose(
    class_ious(sums)[present],
    sklearn.metrics.jaccard_score(
      truth[known], predicted[known], labels=present, average=None
    ),
  )
