"""Zero-shot classification: the classifier, its ties, and its data."""

import json

import numpy as np
import pytest

from mtv_jax.data import registry as sources
from mtv_jax.data.scenes import render as scenes
from mtv_jax.data.sources.base import Source
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures, normalize
from mtv_jax.evals.classification.probe_evaluators import rank_accuracies
from mtv_jax.evals.classification.zero_shot import (
  ZeroShot,
  match_classes,
  text_classifier,
)
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.examples import ClassificationSet, LazySequence
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
  assert (protocol["images"], protocol["classes"]) == (7, 3)
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


def test_equal_names_have_equal_vectors(colours):
  named = Prompts(("red", "green", "blue", "red"), ("{}",))
  got = text_classifier(colours.text, named)
  np.testing.assert_array_equal(got[0], got[3])


RGB = ("blue", "green", "red")
FOUR = ("red", "green", "blue", "red")
WORDNET = ("n00000001", "n00000002")
IDS = Prompts(("a", "b", "c"), ids=(WORDNET[1], "n00000009", WORDNET[0]))
TWICE = ("Red!", *RGB)
BOTH = "classes 'Red!' and 'red' are both 'red' in prompts"


@pytest.mark.parametrize(
  ("names", "given", "keep", "want"),
  [
    # Equal names tie, and the first wins.
    (RGB, Prompts(FOUR), "all", [2, 1, 0]),
    (RGB, Prompts(("white", *FOUR[:3])), "present", [2, 1, 0]),
    (RGB, Prompts(("red", "greene")), "all", "2 of 3 .*'blue'.*: greene, red"),
    # By ids if the file has them, regardless of the names.
    (WORDNET, IDS, "all", [2, 0]),
    # All WordNet ids in sorted order need no ids.
    (WORDNET, Prompts(("tench", "carp")), "all", [0, 1]),
    (WORDNET, None, "all", "WordNet ids"),
    # Labels of a source are indices of the file.
    (None, Prompts(RGB), "all", [0, 1, 2]),
    (None, None, "all", "no class names: pass a prompt file"),
    (None, Prompts(("zero", "one")), "all", "labels up to 2, .* 2 classes"),
    # Also if the file has the name twice; ids distinguish the classes.
    (TWICE, None, "all", BOTH),
    (TWICE, Prompts(FOUR), "all", BOTH),
    (TWICE, Prompts(FOUR, ids=(*FOUR[:3], "Red!")), "all", [3, 2, 1, 0]),
  ],
)
def test_match_classes(names, given, keep, want):
  count = len(names or "012")
  data = ClassificationSet(
    name="set",
    images=LazySequence(lambda i: None, count),
    labels=np.arange(count, dtype=np.int32),
    classes=names,
    ids=names,
    digest="0",
  )
  if isinstance(want, str):
    with pytest.raises(ValueError, match=want):
      match_classes(data, given, keep=keep)
    return
  named, labels = match_classes(data, given, keep=keep)
  assert labels.tolist() == want
  assert named.classes == (FOUR[:3] if keep == "present" else given.classes)


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
  entity = Prompts(("T&amp;Shirt",), ("A {}.",))
  text_classifier(colours.text, entity, clean="clip")
  assert colours.seen[2:] == ["a t&shirt."]


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
  assert data.ids == WORDNET
  assert data.classes == ("green", "great red")
  assert list(data.labels) == [0, 1]


class Numbers(Source):
  """A source with labels and no names for them."""

  name = "numbers"
  fields = frozenset({"image", "label"})
  shards = np.array([4])

  def __getitem__(self, i):
    return {
      "key": str(i),
      "image": np.zeros((2, 3, 3), np.uint8),
      "label": i % 3,
    }


def test_a_source_has_labels_without_names(monkeypatch):
  monkeypatch.setattr(sources, "build_source", lambda config: Numbers())
  data = registry.open_classification({"type": "tfds", "name": "digits"})
  assert list(data.labels) == [0, 1, 2, 0]
  assert data.classes is data.ids is None


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
    data = registry.open_classification("scenes", count=len(images))
    shown = data.labels.copy()
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
