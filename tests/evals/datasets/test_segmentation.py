"""Readers of segmentation data, on miniatures and on the real files."""

import numpy as np
import PIL.Image
import pytest
from dataset_samples import write_pixels

from mtv_jax.data.scenes import render as scenes
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import masks, nyu, registry
from mtv_jax.evals.datasets.scenes import ignore_stuff


def write_pair(image, labels, values, *, mode="L"):
  values = np.asarray(values, np.uint8)
  rng = np.random.default_rng(values.size)
  write_pixels(image, rng.integers(0, 256, (*values.shape, 3), np.uint8))
  write_pixels(labels, values)
  if mode == "P":
    label_image = PIL.Image.fromarray(values)
    label_image.putpalette(list(range(256)) * 3)
    label_image.save(labels)


@pytest.fixture
def ade(tmp_path):
  root = tmp_path / "ADEChallengeData2016"
  for stem, count in (("training/ADE_train", 3), ("validation/ADE_val", 2)):
    for i in range(1, count + 1):
      write_pair(
        root / "images" / f"{stem}_{i:08d}.jpg",
        root / "annotations" / f"{stem}_{i:08d}.png",
        [[0, 1, 150], [i, 255, 2]],
      )
  lines = [f"{i}\t0.1\t10\t1\tthing {i}, other {i}   " for i in range(1, 151)]
  text = "Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(lines)
  (root / "objectInfo150.txt").write_text(text)
  return root


def test_ade20k(ade):
  train = registry.open_segmentation(str(ade), split="train")
  test = registry.open_segmentation(str(ade.parent), split="test")
  assert len(train.images) == len(train.maps) == 3
  assert len(test.images) == 2
  assert test.images[1].shape == (2, 3, 3)
  # 0 and 255 are ignored; the rest counts from 0.
  np.testing.assert_array_equal(train.maps[2], [[255, 0, 149], [2, 255, 1]])
  assert train.class_count == len(train.classes) == 150
  assert train.classes[:2] == ("thing 1", "thing 2")
  assert train.digest != test.digest
  some = registry.open_segmentation(ade, split="train", count=2)
  assert some.digest != train.digest
  # A list selects and orders the images.
  (ade / "ADE20K_object150_train.txt").write_text(
    "training/ADE_train_00000003.jpg\ntraining/ADE_train_00000001.jpg\n"
  )
  train = registry.open_segmentation(ade, split="train")
  assert len(train.images) == 2
  assert train.maps[0][1, 0] == 2
  assert train.maps[1][1, 0] == 0


def test_names_with_semicolons_or_none(ade):
  lines = [f"{i},0.1,10,1,0,thing {i};other" for i in range(1, 151)]
  path = ade / "objectInfo150.txt"
  path.write_text("Idx,Ratio,Train,Val,Stuff,Name\n" + "\n".join(lines))
  assert masks.read_ade20k_names(ade)[149] == "thing 150"
  path.write_text("Idx\n1\tx\n")
  with pytest.raises(ValueError, match="lists 1 classes"):
    registry.open_segmentation(ade, split="test")
  path.unlink()
  assert registry.open_segmentation(ade, split="test").classes is None


def test_palettes_are_numbers_and_colours_are_rejected(ade):
  image = ade / "images" / "training" / "ADE_train_00000009.jpg"
  labels = ade / "annotations" / "training" / "ADE_train_00000009.png"
  write_pair(image, labels, [[3, 4]], mode="P")
  np.testing.assert_array_equal(masks.read_ade20k_map(labels), [[2, 3]])
  write_pair(image, labels, [[3, 151]])
  with pytest.raises(ValueError, match="class 151"):
    masks.read_ade20k_map(labels)
  PIL.Image.new("RGB", (2, 2)).save(labels)
  with pytest.raises(ValueError, match="mode RGB"):
    masks.read_ade20k_map(labels)


def test_half_unpacked(ade):
  (ade / "annotations" / "training" / "ADE_train_00000002.png").unlink()
  with pytest.raises(FileNotFoundError, match="1 of 6 files.*00000002.png"):
    registry.open_segmentation(ade, split="train")
  for path in (ade / "images" / "validation").iterdir():
    path.unlink()
  with pytest.raises(FileNotFoundError, match="missing  images/validation"):
    registry.open_segmentation(ade, split="test")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    registry.open_segmentation(str(ade / "absent"), split="test")


def test_parts_of_the_release_are_named(ade):
  """A folder with the release's name is ADE20K even if parts are missing."""
  (ade / "images").rename(ade.parent / "moved")
  for data in (ade, ade.parent):
    with pytest.raises(FileNotFoundError, match="missing  images/training"):
      registry.open_segmentation(data, split="train")
  renamed = ade.rename(ade.parent / "ade")
  with pytest.raises(NotApplicable, match="the folder contains annotations/"):
    registry.open_segmentation(renamed, split="train")
  (ade.parent / "moved").rename(renamed / "images")
  assert len(registry.open_segmentation(renamed, split="train").images) == 3


@pytest.mark.parametrize("images", ["val2017", "images"])
def test_other_data_are_not_applicable(tmp_path, images):
  """COCO has annotations/ too, but is not an incomplete ADE20K."""
  (tmp_path / images).mkdir()
  (tmp_path / "annotations").mkdir()
  (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
  file = tmp_path / "captions.json"
  file.write_text("{}")
  with pytest.raises(NotApplicable, match="the folder contains annotations/"):
    registry.open_segmentation(tmp_path, split="test")
  for data in (file, "shards/{00..09}.tar"):
    with pytest.raises(
      NotApplicable, match=r"(another kind|names shards).*nyu_labels40"
    ):
      registry.open_segmentation(data, split="test")


def test_nyu40(tmp_path):
  for i in (7, 9, 30):
    write_pair(
      tmp_path / "nyu_images" / f"{i}.jpg",
      tmp_path / "nyu_labels40" / f"{i}.png",
      [[0, 38, 39], [i, 255, 1]],
    )
  (tmp_path / "train.txt").write_text("30 office_0001\n9 kitchen_0002\n")
  (tmp_path / "test.txt").write_text("7 office_0003\n")
  train = registry.open_segmentation(tmp_path, split="train")
  assert len(train.images) == 2
  # "otherprop" is ignored, so 39 classes are left.
  np.testing.assert_array_equal(train.maps[0], [[0, 38, 255], [30, 255, 1]])
  assert train.class_count == len(set(nyu.CLASSES)) == 39
  assert len(registry.open_segmentation(tmp_path, split="test").images) == 1
  (tmp_path / "test.txt").write_text("8 office_0003\n")
  with pytest.raises(FileNotFoundError, match="8.jpg"):
    registry.open_segmentation(tmp_path, split="test")


def test_scenes_of_the_two_splits_are_apart():
  train = registry.open_segmentation("scenes", split="train", count=2)
  test = registry.open_segmentation(
    {"type": "scenes", "size": 48}, split="test", count=2
  )
  expected = scenes.render(1_000_001, size=48)
  np.testing.assert_array_equal(test.images[1], expected.image)
  np.testing.assert_array_equal(test.maps[1], expected.segmentation)
  expected = scenes.render(2_000_000, size=96).image
  np.testing.assert_array_equal(train.images[0], expected)
  assert test.classes == scenes.SEGMENT_NAMES
  options = {"type": "scenes", "size": 48, "length": 3, "first": 1_000_100}
  train, test = (
    registry.open_segmentation(options, split=s) for s in ("train", "test")
  )
  assert len(train.images) == len(test.images) == 3
  for data, number in ((train, 3_000_101), (test, 1_000_101)):
    expected = scenes.render(number, size=48)
    np.testing.assert_array_equal(data.images[1], expected.image)
  some = registry.open_segmentation(options, split="test", count=1)
  np.testing.assert_array_equal(some.images[0], test.images[1])
  with pytest.raises(ValueError, match="split is 'val'"):
    registry.open_segmentation("scenes", split="val")


def test_things_of_scenes():
  data = registry.open_segmentation("scenes", split="test", count=1)
  things = ignore_stuff(data)
  assert things.classes == scenes.CLASS_NAMES
  labels, remapped = data.maps[0], things.maps[0]
  np.testing.assert_array_equal(remapped == 255, labels < 2)
  assert (remapped != 255).any()
  for i in np.unique(remapped[remapped != 255]):
    assert things.classes[i] == scenes.SEGMENT_NAMES[labels[remapped == i][0]]


def test_real_ade20k(shared_data):
  data = registry.open_segmentation(
    shared_data / "ade20k" / "ADEChallengeData2016", split="test"
  )
  assert len(data.images) == 3
  assert data.classes[:3] == ("wall", "building", "sky")
  for image, labels in zip(data.images, data.maps, strict=True):
    assert image.shape[:2] == labels.shape
    known = labels[labels != 255]
    assert known.size > 0.5 * labels.size
    assert known.max() < 150


def test_real_nyu40(shared_data):
  seen = np.zeros(256, int)
  for split in ("train", "test"):
    data = registry.open_segmentation(shared_data / "nyuv2", split=split)
    assert len(data.images) == 100
    for i in (0, 57):
      assert data.images[i].shape[:2] == data.maps[i].shape == (480, 640)
      seen += np.bincount(data.maps[i].ravel(), minlength=256)
  assert seen[39:255].sum() == 0
  assert seen[255] > 0
  # Walls and floors are most of a room.
  assert seen[:2].sum() > 0.1 * seen.sum()
