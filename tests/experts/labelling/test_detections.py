"""Post-processing of detections."""

import numpy as np
import pytest
from grounding_samples import iou

from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling.detections import Detections

OPTIONS = dict(nms=0.5, max_boxes=30, min_side=0.02, max_area=0.9)


def random_boxes(count, seed=0):
  rng = np.random.default_rng(seed)
  corner, extent = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4)
  boxes = np.concatenate([corner, corner + extent], axis=1)
  return boxes.astype(np.float32), rng.permutation(count).astype(np.float32)


def make_detections(boxes, scores=None, phrases=None):
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else scores
  return Detections(
    boxes,
    np.array(scores, np.float32),
    tuple(phrases or (f"p{i}" for i in range(len(boxes)))),
  )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_is_greedy(threshold):
  boxes, scores = random_boxes(60)
  remaining, expected = sorted(range(60), key=lambda i: -scores[i]), []
  while remaining:
    best = remaining.pop(0)
    expected.append(best)
    remaining = [
      i for i in remaining if iou(boxes[best], boxes[i])[0] <= threshold
    ]
  assert detections.suppress(boxes, scores, iou=threshold).tolist() == expected
  assert 1 < len(expected) <= 60

  # The first of equal scores wins.
  boxes = np.array([[0, 0, 1, 1]] * 3, np.float32)
  selected = detections.suppress(boxes, np.ones(3, np.float32), iou=0.5)
  assert selected.tolist() == [0]


def test_dropped_boxes_are_counted_by_reason():
  boxes = [
    [0.1, 0.1, 0.5, 0.5],
    [0.1, 0.1, 0.5, 0.52],  # a duplicate
    [0.0, 0.0, 1.0, 0.99],  # everything
    [0.3, 0.3, 0.31, 0.9],  # thin
    [0.6, 0.9, 0.9, 1.3],  # more outside than inside
    [0.6, 0.9, 0.9, 1.05],  # less
    [np.nan, 0, 1, 1],
    [0.8, 0.8, 0.6, 0.9],  # inverted
  ]
  outcome = detections.select(make_detections(boxes), **OPTIONS)
  assert outcome.label.phrases == ("p0", "p5")
  np.testing.assert_allclose(
    outcome.label.boxes[1], [0.6, 0.9, 0.9, 1.0], atol=1e-7
  )
  assert outcome.counts == {
    "boxes: duplicates of better ones": 1,
    "boxes: as large as the image": 1,
    "boxes: small": 1,
    "boxes: mostly outside the image": 1,
    "boxes: NaN or infinite": 1,
    "boxes: inverted": 1,
    "boxes: reached outside the image, cut": 1,
  }

  # Dropped boxes suppress no others.
  boxes = [[0, 0, 1, 1], [0, 0, 0.9, 0.95]]
  outcome = detections.select(make_detections(boxes), **OPTIONS)
  assert outcome.label.phrases == ("p1",)


def test_the_best_scores_are_selected():
  boxes = [[0, i / 10, 0.1, (i + 1) / 10] for i in range(8)]
  scores = np.array([3, 7, 1, 8, 2, 6, 4, 5]) / 10
  options = OPTIONS | dict(max_boxes=3)
  outcome = detections.select(make_detections(boxes, scores), **options)
  assert outcome.label.phrases == ("p3", "p1", "p5")
  assert outcome.counts == {"boxes: more than wanted": 5}

  # Without a detection, a label has no boxes.
  outcome = detections.select(make_detections([]), **OPTIONS)
  assert outcome.label.boxes.shape == (0, 4)
  assert not outcome.counts
