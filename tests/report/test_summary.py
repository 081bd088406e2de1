"""The head of a report: facts, training samples, figures with verdicts."""

import dataclasses

import numpy as np
import outcome_samples
import pytest
import study_samples

from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.hooks.samples import write_samples
from mtv_jax.report import evaluations, run_folders, runs, tables
from mtv_jax.utils import plots

SESSION = dict(
  started="2026-01-01T23:00:00+00:00", ended="2026-01-02T01:00:30+00:00",
  revision="0123456789abcdef0123456789abcdef01234567-dirty", digest="feed",
  packages={"mtv_jax": "0.1.0"}, device_kind="TPU v5 lite", devices=256,
  processes=64, cores=112, parameters={"image": 85_800_000, "text": 200_000},
  data=[{"name": "photos", "records": 12_800}],
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
  return run_folders.read_run(study_samples.write_run(tmp_path / "run"))


def test_facts_of_a_run(run):
  # The liveness of the second session has not been written.
  later = {"started": "2026-01-03T00:00:00+00:00", "ended": None}
  sessions = [SESSION, SESSION | later]
  facts = run_folders.read_facts(dataclasses.replace(run, sessions=sessions))
  assert facts["training data"] == (
    "12,800 images: 12,800 in photos; 25,600 seen in 400 steps of 64 (2 epochs)"
  )
  assert "86M parameters (image 85.8M, text 200k)" in facts["model"]
  assert facts["hardware"] == "256 × TPU v5 lite, 64 processes"
  assert facts["time"].startswith("2h00m of wall time, 0.044 chip-hours")
  assert facts["date"] == "2026-01-01 23:00 to 2026-01-03 00:00 UTC, 2 sessions"
  assert facts["revision"] == "0123456789ab-dirty, mtv_jax 0.1.0, code feed"
  cpu = SESSION | dict(device_kind="cpu", devices=8, processes=1, cores=2)
  facts = run_folders.read_facts(dataclasses.replace(run, sessions=[cpu]))
  assert facts["hardware"] == "CPU, 2 cores"
  # 8 devices share 2 cores.
  assert "0.011 core-hours" in facts["time"]
  # Of a run that recorded nothing.
  facts = run_folders.read_facts(run)
  assert facts["hardware"] == facts["date"] == facts["labels"] == ""


class Words:
  def decode(self, rows):
    return [" ".join(map(str, row)) for row in rows]


def test_samples_show_the_labels_of_a_batch(run):
  depth = np.zeros((8, 4, 4), np.uint16)
  depth[2:, 0, 1], depth[2:, 0, 2] = 1, 65535
  batch = dict(
    image=np.full((8, 32, 32, 3), 200, np.uint8),
    image_size=np.tile([300, 600], (8, 1)),
    caption=np.arange(16).reshape(8, 2),
    caption_valid=np.arange(8) < 4,
    boxes=np.tile(np.array([0.1, 0.2, 0.5, 0.6], np.float32), (8, 2, 1)),
    box_phrase=np.arange(32).reshape(8, 2, 2),
    box_valid=np.tile([True, False], (8, 1)),
    depth=depth,
  )
  write_samples(run.folder / "samples", batch, Words())
  read = run_folders.read_run(run.folder)
  coverage = run_folders.read_facts(read)["labels"]
  assert (
    coverage == "captions 50 %, boxes 100 %, depth 75 % of the first 8 images"
  )
  heading, images, _ = runs.describe_samples([read], run.folder)
  assert heading.text == "Training samples" and len(images.files) == 6
  first, *_, last = images.files
  assert first.title == "0 1" and last.title == ""
  assert first.path == "samples/0.png" and first.source.exists()
  # The longer side is `plots.THIRD`, and the aspect ratio is the file's.
  height, width = 89, plots.THIRD
  assert first.image.shape == (height, width, 3)
  # Its depth is beside the image.
  assert last.image.shape == (height, 2 * width + plots.GAP, 3)
  far, near = last.image[height // 8, [-100, -60]].astype(int)
  assert far[2] > far[0] and near[0] > near[2]
  # One box is drawn.
  assert (first.image != 200).any() and (first.image == 200).mean() > 0.5


def make_outcome(name, hits, chance):
  knn = bootstrap.means({"top1": np.asarray(hits, bool)})
  result = Result(
    knn.metrics, {"data_hash": "a", "images": len(hits)}, {"top1": chance},
    errors=knn.errors, resamples=knn.resamples,
  )  # fmt: skip
  return Outcome(name, "", "", {"zero_shot": result})


def describe(outcomes, **options):
  rows = tables.compare(outcomes, **options)
  by_name = {outcome.name: outcome for outcome in outcomes}
  _, headlines, _ = evaluations.describe_headlines(rows, by_name)
  return headlines.headlines[0]


@pytest.mark.parametrize(
  ("rate", "verdict"),
  [
    (0.5, "Better than chance."),
    (0.1, "Worse than chance."),
    (0.26, "Not distinguishable from chance."),
  ],
)
def test_verdict_on_chance(rate, verdict):
  hits = np.arange(400) < 400 * rate
  one = describe([make_outcome("a", hits, 0.25)])
  assert one.title == "Zero-shot classification"
  assert one.details == "400 images; chance 25.0 %"
  error = 100 * np.sqrt(rate * (1 - rate) / 400)
  (text,) = one.figures
  value, found = text.removesuffix(" %").split(" ± ")
  assert value == f"{100 * rate:.1f}"
  assert float(found) == pytest.approx(error, rel=0.2)
  assert one.verdicts == [verdict]


def test_verdicts_on_several_encoders_are_those_of_the_table():
  hits = np.arange(400) < 100
  outcomes = [
    make_outcome("a", hits, 0.25),
    make_outcome("b", np.arange(400) < 200, 0.25),
  ]
  found = describe(outcomes, baseline=0)
  assert found.verdicts[:2] == [
    "Not distinguishable from chance: a.", "Better than chance: b.",
  ]  # fmt: skip
  assert found.verdicts[2].startswith("b − a: +25.0 points [")
  assert found.verdicts[2].endswith("]: better.")
  assert describe(outcomes).verdicts[2:] == ["Best: b."]


def test_small_sets_and_unknown_errors():
  # Every item is right: the resamples' error is 0.
  few = describe([make_outcome("a", [True] * 9, 0.25)])
  assert few.verdicts == [
    "Better than chance, without an interval.",
    "The test set is too small for a reliable verdict.",
  ]
  equal = describe([make_outcome("a", [True] * 30, 1.0)])
  assert equal.verdicts == ["Equal to chance."]


@pytest.mark.parametrize(
  ("name", "kind", "title"),
  [
    ("retrieval", "", "Image-text retrieval"),
    ("val_retrieval", "", "Image-text retrieval (val)"),
    ("coco_zero_shot_segmentation", "", "Zero-shot segmentation (coco)"),
    ("my_own", "", "My own"),
    ("box_retrieval", "grounding", "Grounding (box retrieval)"),
    ("my_retrieval", "mine:Recall", "My retrieval"),
    ("mine:RecallAt1", "mine:RecallAt1", "RecallAt1"),
  ],
)
def test_titles_of_evaluations(name, kind, title):
  assert evaluations.name_evaluation(name, kind) == title
  outcome = outcome_samples.make_outcome("a")
  result = dataclasses.replace(outcome.results["shot"], type=kind)
  outcome = dataclasses.replace(outcome, results={name: result})
  (row,) = tables.compare([outcome])
  assert evaluations.name_row(row) == f"{title}: top-1 accuracy"
  # Metrics of retrieval are the main ones of no other type.
  assert row.is_main == ("Image-text" not in title)


def test_facts_that_differ_have_a_line_per_name():
  facts = {"a": {"seed": "0", "model": "B/16"}, "b": {"seed": "1"}}
  facts["b"] |= {"model": "B/16", "labels": ""}
  rows = evaluations.merge_facts(facts)
  assert rows[1:] == [["seed", "a: 0\nb: 1"], ["model", "B/16"]]
