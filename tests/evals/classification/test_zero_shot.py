"""Zero-shot classification: the classifier, its ties, and its data."""

import dataclasses
import json

import numpy as np
import pytest

from mtv_jax.data import registry as sources
from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures, normalize
from mtv_jax.evals.classification.probe_evaluators import rank_accuracies
from mtv_jax.evals.classification.zero_shot import (
  ZeroShot,
  match_classes,
  text_classifier,
)
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.prompts import Prompts, read_prompts
from mtv_jax.evals.datasets import registry


@pytest.fixture
def folder(tmp_path, write_classes, write_image):
  write_classes(tmp_path / "set", 2)
  # One label is wrong.
  write_image(tmp_path / "set" / "blue" / "x.png", "red")
  return tmp_path / "set"


def test_accuracies_of_a_folder(colours, folder):
  result = ZeroShot(data=str(folder)).run(colours)
  # Six of seven are correct, and two of the three blue images.
  assert result.metrics["top1"] == pytest.approx(6 / 7)
  assert result.metrics["mean_per_class"] == pytest.approx((1 + 1 + 2 / 3) / 3)
  assert result.metrics["top5"] == 1.0
  assert result.chance["top1"] == pytest.approx(1 / 3)
  protocol = json.loads(json.dumps(result.protocol))
  assert protocol["images"] == 7
  assert protocol["classes"] == 3
  assert protocol["encoder"] == "colours"
  assert protocol["templates"] == list(prompts.DEFAULT_TEMPLATES)
  assert "lower index" in protocol["ties"]
  assert len(protocol["data_hash"]) == 16


def test_the_hash_depends_on_the_data(folder, write_image):
  before = registry.open_classification(str(folder)).digest
  assert registry.open_classification(str(folder)).digest == before
  write_image(folder / "red" / "new.png", "red")
  assert registry.open_classification(str(folder)).digest != before


def test_classifier_normalises_before_the_mean(colours):
  named = Prompts(("red",), ("{}", "{} and white and white and white"))
  got = text_classifier(colours.text, named)
  a = np.array([1.0, 0, 0])
  b = normalize(np.array([1.0, 3 / 4, 3 / 4]))
  np.testing.assert_allclose(got[0], normalize((a + b) / 2), atol=1e-6)
  # The opposite order would give a different result.
  raw = colours.text([t.format("red") for t in named.templates]).mean(axis=0)
  assert np.abs(got[0] - normalize(raw)).max() > 0.01


def test_equal_names_tie_and_the_first_wins(colours, folder):
  data = registry.open_classification(str(folder))
  named = Prompts(("red", "green", "blue", "red"), ("{}",))
  got = text_classifier(colours.text, named)
  np.testing.assert_array_equal(got[0], got[3])
  given, labels = match_classes(data, named, keep="all")
  assert given == named
  # Folders in sorted order are blue, green, red; red is the first of its two.
  assert [labels[data.labels == i][0] for i in range(3)] == [2, 1, 0]


def test_present_classes_only(colours, folder):
  data = registry.open_classification(str(folder))
  named = Prompts(("white", "red", "green", "blue"), ("{}",), name="file")
  given, labels = match_classes(data, named, keep="present")
  assert given.classes == ("red", "green", "blue")
  assert [labels[data.labels == i][0] for i in range(3)] == [2, 1, 0]


def test_prompts_are_embedded_in_chunks(colours):
  names = tuple(f"colour {i}" for i in range(150))
  got = text_classifier(colours.text, Prompts(names, ("{}", "a {}")))
  assert got.shape == (150, 3)
  assert colours.batches == [128, 128, 44]


def test_canonicalize_drops_punctuation(colours):
  colours.seen = []
  text = colours.text
  colours.text = lambda s, **_: (colours.seen.extend(s), text(s))[1]
  named = Prompts(("T-Shirt",), ("A photo of a {}.",))
  text_classifier(colours.text, named)
  text_classifier(colours.text, named, clean="canonicalize")
  assert colours.seen == ["A photo of a T-Shirt.", "a photo of a tshirt"]


def test_accuracies_golden():
  ranks = np.array([0, 0, 4, 5, 0])
  labels = np.array([2, 2, 2, 7, 9])
  got = rank_accuracies(ranks, labels)
  assert got.metrics == {
    "top1": pytest.approx(3 / 5),
    "top5": pytest.approx(4 / 5),
    "mean_per_class": pytest.approx((2 / 3 + 0 + 1) / 3),
  }


@pytest.mark.reference
def test_mean_per_class_is_balanced_accuracy():
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  labels, scores = rng.integers(0, 6, 300), rng.normal(size=(300, 6))
  labels[labels == 4] = 5
  own = np.take_along_axis(scores, labels[:, None], axis=1)
  ranks = np.sum(scores > own, axis=1)
  with pytest.warns(UserWarning, match="classes not in y_true"):
    want = metrics.balanced_accuracy_score(labels, scores.argmax(axis=1))
  got = rank_accuracies(ranks, labels).metrics
  assert got["mean_per_class"] == pytest.approx(want)


def test_flat_wnid_folder(tmp_path, write_image):
  write_image(tmp_path / "n00000002_great_red.JPEG", "red")
  write_image(tmp_path / "n00000001_green.JPEG", "green")
  (tmp_path / "notes.txt").write_text("not an image")
  data = registry.open_classification(tmp_path)
  assert data.ids == ("n00000001", "n00000002")
  assert data.classes == ("green", "great red")
  assert list(data.labels) == [0, 1]
  # By ids if the file has them, regardless of the names.
  named = Prompts(
    ("a", "b", "c"), ids=("n00000002", "n00000009", "n00000001"), name="f"
  )
  assert list(match_classes(data, named, keep="all")[1]) == [2, 0]


def test_all_wnids_in_sorted_order_need_no_ids(tmp_path, write_image):
  for i, colour in ((2, "red"), (1, "green")):
    write_image(tmp_path / f"n0000000{i}" / "a.png", colour)
  data = registry.open_classification(tmp_path)
  labels = match_classes(data, Prompts(("tench", "carp")), keep="all")[1]
  assert list(labels) == [0, 1]
  with pytest.raises(ValueError, match="WordNet ids"):
    match_classes(data, None, keep="all")


def test_unknown_class_is_named(folder):
  data = registry.open_classification(str(folder))
  with pytest.raises(ValueError, match="1 of 3 classes.*'green'.*'greene'"):
    match_classes(data, Prompts(("red", "greene", "blue")), keep="all")


class Numbers:
  """A source with labels and no names for them."""

  fields = frozenset({"image", "label"})

  def __len__(self):
    return 4

  def __getitem__(self, i):
    image = np.full((2, 3, 3), 10 * i, np.uint8)
    return {"key": str(i), "image": image, "label": i % 3}


def test_labels_of_a_source_are_indices_of_the_file(monkeypatch):
  monkeypatch.setattr(sources, "build_source", lambda config: Numbers())
  data = registry.open_classification({"type": "tfds", "name": "digits"})
  assert list(data.labels) == [0, 1, 2, 0]
  named = Prompts(("zero", "one", "two"))
  assert list(match_classes(data, named, keep="all")[1]) == [0, 1, 2, 0]
  with pytest.raises(ValueError, match="no class names: give a prompt file"):
    match_classes(data, None, keep="all")
  with pytest.raises(ValueError, match="labels up to 2 .* 2 classes"):
    match_classes(data, Prompts(("zero", "one")), keep="all")


def test_classes_of_one_name_are_rejected(folder, write_image):
  write_image(folder / "Red!" / "a.png", "red")
  data = registry.open_classification(str(folder))
  message = "classes 'Red!' and 'red' are both 'red' in prompts"
  with pytest.raises(ValueError, match=message):
    match_classes(data, None, keep="all")
  # Also if the file has the name twice.
  named = Prompts(("red", "green", "blue", "red"), ("{}",), name="f")
  with pytest.raises(ValueError, match=message):
    match_classes(data, named, keep="all")
  # Ids distinguish them.
  named = dataclasses.replace(named, ids=("red", "green", "blue", "Red!"))
  given, labels = match_classes(data, named, keep="all")
  assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


def test_count_is_spread_over_the_classes(folder):
  data = registry.open_classification(str(folder), count=3)
  assert len(data.images) == 3
  assert len(set(data.labels.tolist())) == 3


def test_folders_without_images_are_explained(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"expected CLASS/\*.jpg.*'empty'"):
    registry.open_classification(tmp_path)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    registry.open_classification(tmp_path / "nowhere")


def test_prompt_files(tmp_path):
  path = tmp_path / "p.json"
  with pytest.raises(FileNotFoundError, match="make_prompts"):
    read_prompts(path)
  written = Prompts(("a", "b"), ("one {}",), ("x", "y"), name="p.json")
  prompts.write_prompts(path, written)
  assert read_prompts(path) == written
  for content, message in (
    ("{", "not JSON"),
    ("[1]", "expected an object with 'classes'"),
    ("[]", "expected an object with 'classes'"),
    ('{"ids": []}', "expected an object with 'classes'"),
    ('{"classes": [1]}', "list of non-empty strings"),
    ('{"classes": "cat"}', "list of non-empty strings"),
    ('{"classes": ["a"], "templates": ["no braces"]}', "exactly once"),
    ('{"classes": ["a", "b"], "ids": ["x", "x"]}', "1 of them distinct"),
    ('{"classes": ["a", "b"], "ids": []}', "0 ids"),
  ):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
      read_prompts(path)


class SceneEncoder(Encoder):
  """Embeds held-out scenes as their class, except for the first one."""

  def __init__(self):
    self.source, self.weights = "scenes", "student"

  def protocol(self):
    return {"encoder": "scenes"}

  def image(self, images, **kwargs):
    shown = registry.open_classification(
      "scenes", count=len(images)
    ).labels.copy()
    shown[0] = (shown[0] + 1) % len(scenes.CLASS_NAMES)
    return ImageFeatures(self.rows(shown), None, None, {})

  def text(self, strings, **kwargs):
    names = [f" {name} " for name in scenes.CLASS_NAMES]
    padded = [f" {s.lower().rstrip('.')} " for s in strings]
    return self.rows([[n in s for n in names].index(True) for s in padded])

  def rows(self, classes):
    return np.eye(len(scenes.CLASS_NAMES), dtype=np.float32)[classes]


def test_scenes():
  result = ZeroShot(count=6).run(SceneEncoder())
  assert result.errors.keys() == result.metrics.keys()
  assert result.protocol["data"] == "scenes"
  assert result.protocol["images"] == 6
  assert result.metrics["top1"] == pytest.approx(5 / 6)
  assert result.chance["top1"] == 1 / len(scenes.CLASS_NAMES)


@pytest.mark.reference
def test_imagenet_prompts_and_the_samples(shared_data):
  pytest.importorskip("open_clip")
  named = prompts.imagenet_prompts()
  assert len(named.classes) == len(named.ids) == 1000
  assert len(named.templates) == 80
  assert named.ids[0] == "n01440764"
  assert named.classes[0] == "tench"
  assert len(set(named.classes)) == 998
  data = registry.open_classification(shared_data / "imagenet_samples")
  given, labels = match_classes(data, named, keep="all")
  assert len(data.images) == 500
  assert len(set(labels.tolist())) == 500
  goldfish = data.classes.index("goldfish")
  assert given.classes[labels[data.labels == goldfish][0]] == "goldfish"
  assert data.images[0].shape[-1] == 3
