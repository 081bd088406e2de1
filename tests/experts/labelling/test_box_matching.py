"""Agreement of two box label sets."""

import itertools
import json

import grounding_samples as samples
import label_samples
import numpy as np
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import BoxLabel, LabelOutcome
from mtv_jax.experts.labelling import box_matching


def labels(boxes, phrases, scores=None):
  scores = np.ones(len(boxes)) if scores is None else scores
  return BoxLabel(
    np.array(boxes, np.float32).reshape(-1, 4),
    tuple(phrases),
    np.asarray(scores, np.float32),
  )


def matched(label, truth, iou):
  """The rule, a box at a time."""
  free, pairs = set(range(len(truth.boxes))), {}
  for i in sorted(range(len(label.boxes)), key=lambda i: -label.scores[i]):
    can = [j for j in free if truth.phrases[j] == label.phrases[i]]
    can.sort(key=lambda j: -samples.iou(label.boxes[i], truth.boxes[j])[0])
    if can and samples.iou(label.boxes[i], truth.boxes[can[0]])[0] >= iou:
      pairs[i] = can[0]
      free.remove(can[0])
  return pairs


def random_label(rng, count):
  low = rng.uniform(0, 0.5, (count, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.3, 0.5, (count, 2))], 1)
  return labels(boxes, rng.choice(["a", "b"], count), rng.uniform(0, 1, count))


def test_boxes_are_matched_one_to_one_best_first():
  rng = np.random.default_rng(0)
  total = 0
  for sizes in itertools.product((0, 1, 5, 12), repeat=2):
    label, truth = (random_label(rng, n) for n in sizes)
    matches, ious = box_matching.match(label, truth, iou=0.4)
    want = matched(label, truth, 0.4)
    assert {i: j for i, j in enumerate(matches) if j >= 0} == want
    for i, j in want.items():
      expected, _ = samples.iou(label.boxes[i], truth.boxes[j])
      assert abs(ious[i] - expected) < 1e-6
    assert not ious[matches < 0].any()
    total += len(want)
  assert total > 10


SQUARE = [0.1, 0.1, 0.5, 0.5]


def write(folder, base, entries):
  label_samples.make_set(
    folder, base, "boxes", of=lambda kind, i: LabelOutcome(entries[i])
  )
  return LabelSet(folder, kind="boxes")


@pytest.fixture
def sets(tmp_path):
  base = label_samples.open_base(label_samples.make_base(tmp_path, count=5))
  moved = [0.1, 0.1, 0.5, 0.4]
  cat = labels([SQUARE], ["cat"])
  truth = [labels([SQUARE, SQUARE], ["couch", "cat"]), cat]
  truth += [None, labels([], []), None]
  boxes = [SQUARE, moved, moved]
  predicted = [labels(boxes, ["Sofa.", "cat", "cat"], [0.9, 0.8, 0.7])]
  predicted += [None, cat, labels([SQUARE], ["ufo"]), None]
  return (
    write(tmp_path / "boxes", base, predicted),
    write(tmp_path / "truth", base, truth),
  )


def test_metrics_of_two_sets(sets, tmp_path, capsys):
  predicted, truth = sets
  got = box_matching.compare(predicted, truth, renamed={"sofa": "couch"})
  assert (got.images, got.unlabelled, got.never_true) == (3, 1, ["ufo"])
  total = got.to_dict()
  assert (total["truth"], total["boxes"], total["matched"]) == (3, 4, 2)
  assert total["recall"] == 2 / 3 and total["precision"] == 0.5
  assert abs(total["mean_iou"] - (1 + 0.75) / 2) < 1e-4
  assert total["phrases"]["cat"]["recall"] == 0.5
  assert total["phrases"]["ufo"]["recall"] is None
  strict = box_matching.compare(predicted, truth, iou=0.8)
  assert strict.total.matched == 0
  file = tmp_path / "figures.json"
  argv = [f"--labels={predicted.folder}", f"--truth={truth.folder}"]
  argv += ["--phrases=1", "--rename", "sofa=couch", f"--json={file}"]
  run_command("match_boxes", argv)
  assert json.loads(file.read_text()) == total
  output = capsys.readouterr().out
  assert "| all | 3 | 4 | 2 | 66.7 % | 50.0 % | 87.5 % |" in output
  assert "| cat | 2 | 2 | 1 | 50.0 % | 50.0 % | 75.0 % |" in output
  assert "ufo |" not in output and "in no true box: ufo" in output


def test_incomparable_sets(sets, tmp_path):
  predicted, truth = sets
  with pytest.raises(ValueError, match="iou=0"):
    box_matching.compare(predicted, truth, iou=0)
  argv = [f"--labels={predicted.folder}", f"--truth={truth.folder}"]
  with pytest.raises(SystemExit, match="match_boxes: 'sofa'.*LABEL=TRUTH"):
    run_command("match_boxes", [*argv, "--rename", "sofa"])
  folder = label_samples.make_base(tmp_path / "other", count=3)
  base = label_samples.open_base(folder)
  other = write(tmp_path / "set", base, [labels([SQUARE], ["a"])] * 3)
  with pytest.raises(LabelError, match="different shards"):
    box_matching.compare(other, truth)
