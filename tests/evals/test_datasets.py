"""Labelled data: folders with splits, scenes, and what is held out."""

import numpy as np
import pytest

from mtv_jax.data import scenes
from mtv_jax.evals import datasets
from mtv_jax.evals.base import NotApplicable


@pytest.fixture
def tree(tmp_path, write_image):
  def make(root, **classes):
    for path, count in classes.items():
      for i in range(count):
        colour = path.rsplit("__")[-1]
        write_image(
          tmp_path / root / path.replace("__", "/") / f"{i}.png", colour
        )
    return tmp_path / root

  return make


def test_splits_of_a_folder(tree):
  root = tree("a", train__blue=2, train__green=1, train__red=3, val__red=2)
  found = datasets.train_and_test(root)
  assert found.classes == 3
  assert found.train.ids == found.test.ids == ("blue", "green", "red")
  assert list(found.train.labels) == [0, 0, 1, 2, 2, 2]
  # Red is the only class of its own folder, and still the third.
  assert list(found.test.labels) == [2, 2]
  assert found.test.images[1][0, 0].tolist() == [255, 0, 0]
  protocol = found.protocol()
  assert (protocol["images"], protocol["train_images"]) == (2, 6)
  assert protocol["data"].endswith("a/val")
  # The folder itself is its test split to whoever doesn't train.
  assert (
    datasets.labelled(root).digest == datasets.labelled(root / "val").digest
  )
  assert len(datasets.labelled(root, split="train").labels) == 6
  few = datasets.train_and_test(root, train_count=3, count=1)
  assert list(few.train.labels) == [0, 2, 2]
  assert few.train.digest != found.train.digest
  assert few.test.digest != found.test.digest


def test_train_elsewhere(tree):
  test, train = tree("b/test", red=1), tree("c", blue=1, red=1)
  with pytest.raises(NotApplicable, match="nothing to train a probe on"):
    datasets.train_and_test(test)
  found = datasets.train_and_test(test, train=train)
  assert list(found.test.labels) == [1]
  with pytest.raises(ValueError, match="1 of 2 classes .* such as 'blue'"):
    datasets.train_and_test(train, train=test)
  with pytest.raises(ValueError, match="train and test are both"):
    datasets.train_and_test(train, train=train)


def test_half_unpacked(tree):
  root = tree("d", train__red=1)
  with pytest.raises(FileNotFoundError, match="missing +val/") as error:
    datasets.train_and_test(root)
  assert "The folder holds: train/" in str(error.value)


def test_a_class_may_be_called_train(tree):
  """COCO has such a class; a split holds folders and a class images."""
  root = tree("e", red=1, blue=1)
  (root / "red").rename(root / "train")
  found = datasets.labelled(root)
  assert found.classes == ("blue", "train")


def test_scenes_are_labelled_without_drawing_them(monkeypatch):
  want = [scenes.render(datasets.HELD_OUT_SCENES + i).label for i in range(5)]
  drawn = []
  render = scenes.render
  monkeypatch.setattr(
    scenes, "render", lambda i, **kw: drawn.append(i) or render(i, **kw)
  )
  found = datasets.train_and_test("scenes", count=5, train_count=5)
  assert list(found.test.labels) == want
  assert found.classes == len(scenes.CLASS_NAMES)
  assert not drawn
  assert (
    found.test.images[3].shape == found.train.images[0].shape == (96, 96, 3)
  )
  assert drawn == [datasets.HELD_OUT_SCENES + 3, datasets.PROBE_SCENES]
  # As a mapping too, neither split is what an encoder may have trained on.
  drawn.clear()
  found = datasets.train_and_test({"type": "scenes", "length": 3})
  assert found.test.images[0].shape == found.train.images[0].shape
  assert drawn == [datasets.HELD_OUT_SCENES, datasets.PROBE_SCENES]


def test_held_out():
  labels = np.array([0] * 25 + [1] * 10 + [2] * 6 + [3] * 2 + [5])
  rng = np.random.default_rng(0)
  labels = rng.permutation(labels)
  kept, out = datasets.held_out(labels)
  assert sorted([*kept, *out]) == list(range(len(labels)))
  assert list(np.bincount(labels[out], minlength=6)) == [2, 1, 1, 1, 0, 0]
  assert list(kept) == sorted(kept)


def test_select_keeps_images_and_labels_together(tree):
  found = datasets.labelled(tree("f", blue=2, red=2))
  some = found.select(np.array([3, 0]))
  assert list(some.labels) == [1, 0]
  assert some.images[0][0, 0].tolist() == [255, 0, 0]
  assert some.images[1][0, 0].tolist() == [0, 0, 255]
  assert some.digest != found.select(np.array([0, 3])).digest


def test_real_splits(shared_data):
  found = datasets.train_and_test(shared_data / "cifar10_jpg")
  assert found.classes == 10
  assert list(np.bincount(found.train.labels)) == [100] * 10
  assert list(np.bincount(found.test.labels)) == [50] * 10
  assert found.train.images[0].shape == (32, 32, 3)


def test_captions_have_no_classes(shared_data):
  path = shared_data / "coco" / "annotations" / "captions_val2017.json"
  with pytest.raises(NotApplicable, match="captions and no classes"):
    datasets.labelled(path)
