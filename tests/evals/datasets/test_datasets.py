"""Registry of data sets and splits of classification data."""

import functools

import numpy as np
import pytest
from dataset_samples import write_jpeg, write_json, write_tar

from mtv_jax.data.scenes import render as scenes
from mtv_jax.evals.core import base
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import (
  HELD_OUT_SCENES,
  MAX_DEPTH,
  PROBE_SCENES,
)
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError


@pytest.fixture
def tree(tmp_path, write_image):
  def write_tree(root, **classes):
    for name, count in classes.items():
      folder = tmp_path / root / name.replace("__", "/")
      for i in range(count):
        write_image(folder / f"{i}.png", folder.name)
    return tmp_path / root

  return write_tree


@pytest.mark.slow
def test_class_folders_in_a_bucket(bucket, tmp_path, tree, monkeypatch):
  monkeypatch.setenv(path_lib.CACHE_VARIABLE, str(tmp_path / "cache"))
  root = tree("classes", train__red=2, train__blue=2, val__red=2, val__blue=2)
  url = f"{bucket}/classes"
  path_lib.upload_folder(root, path_lib.as_path(url))
  for split in ("train", "test"):
    expected = registry.open_classification(root, split=split)
    actual = registry.open_classification(url, split=split)
    assert actual.digest == expected.digest
    np.testing.assert_array_equal(actual.labels, expected.labels)
    np.testing.assert_array_equal(actual.images[3], expected.images[3])
  with pytest.raises(FileNotFoundError, match=f"nothing at {bucket}/absent"):
    registry.open_classification(f"{bucket}/absent")
  with pytest.raises(NotApplicable, match="no shards in .*Retrieval reads"):
    registry.open_captions(url)
  record = {"png": (root / "val/red/0.png").read_bytes(), "txt": b"red"}
  write_tar(tmp_path / "tars" / "0.tar", {"a": record})
  url = f"{bucket}/tars"
  path_lib.upload_folder(tmp_path / "tars", path_lib.as_path(url))
  assert registry.open_captions(url).captions == ("red",)


def test_splits_of_a_folder(tree):
  root = tree("a", train__blue=2, train__green=1, train__red=3, val__red=2)
  data = registry.open_splits(root)
  assert data.classes == 3
  assert data.train.ids == data.test.ids == ("blue", "green", "red")
  assert list(data.train.labels) == [0, 0, 1, 2, 2, 2]
  # Red is the only class of its folder, and the third of the set.
  assert list(data.test.labels) == [2, 2]
  assert data.test.images[1][0, 0].tolist() == [255, 0, 0]
  protocol = data.protocol()
  assert (protocol["images"], protocol["train_images"]) == (2, 6)
  assert protocol["data"].endswith("a/val")
  # Without training, the folder is its test split.
  val = registry.open_classification(root / "val")
  assert registry.open_classification(root).digest == val.digest
  assert len(registry.open_classification(root, split="train").labels) == 6
  few = registry.open_splits(root, train_count=3, count=1)
  assert list(few.train.labels) == [0, 2, 2]
  assert few.train.digest != data.train.digest
  assert few.test.digest != data.test.digest


def test_training_images_of_another_folder(tree):
  test, train = tree("b/test", red=1), tree("c", blue=1, red=1)
  with pytest.raises(NotApplicable, match="no training images for a probe"):
    registry.open_splits(test)
  data = registry.open_splits(test, train=train)
  assert list(data.test.labels) == [1]
  with pytest.raises(ValueError, match="1 of 2 classes .* such as 'blue'"):
    registry.open_splits(train, train=test)


def test_one_set_under_two_names(tree, tmp_path, monkeypatch):
  root = tree("one", red=1, blue=1)
  (tmp_path / "link").symlink_to(root)
  monkeypatch.chdir(tmp_path)
  for other in (root, tmp_path / "link", "one", f"{root}/../one/"):
    with pytest.raises(ValueError, match="train and test are both .*one"):
      registry.open_splits(root, train=other)
  splits = tree("two", train__red=1, val__red=1)
  with pytest.raises(ValueError, match="train and test are both .*train"):
    registry.open_splits("two/train", train=splits)


def test_missing_split_is_an_error(tree):
  message = r"(?s)missing +val/.*The folder contains: train/"
  with pytest.raises(FileNotFoundError, match=message):
    registry.open_splits(tree("d", train__red=1))


def test_a_class_may_be_called_train(tree):
  """COCO has a class `train`; splits contain folders, classes images."""
  root = tree("e", red=1, blue=1)
  (root / "red").rename(root / "train")
  data = registry.open_classification(root)
  assert data.classes == ("blue", "train")


def test_scenes_are_labelled_without_rendering(monkeypatch):
  want = [scenes.render(HELD_OUT_SCENES + i).label for i in range(5)]
  rendered = []
  render = scenes.render
  monkeypatch.setattr(
    scenes, "render", lambda i, **kw: rendered.append(i) or render(i, **kw)
  )
  data = registry.open_splits("scenes", count=5, train_count=5)
  assert list(data.test.labels) == want
  assert data.classes == len(scenes.CLASS_NAMES)
  assert not rendered
  assert data.test.images[3].shape == data.train.images[0].shape == (96, 96, 3)
  assert rendered == [HELD_OUT_SCENES + 3, PROBE_SCENES]
  easy = {"type": "scenes", "length": 5, "difficulty": "easy"}
  data = registry.open_splits(easy)
  want = [
    render(HELD_OUT_SCENES + i, difficulty="easy").label for i in range(5)
  ]
  assert list(data.test.labels) == want
  rendered.clear()
  _ = data.test.images[0], data.train.images[0]
  assert rendered == [HELD_OUT_SCENES, PROBE_SCENES]


def test_select_keeps_images_and_labels_together(tree):
  data = registry.open_classification(tree("f", blue=2, red=2))
  some = data.select(np.array([3, 0]))
  assert list(some.labels) == [1, 0]
  assert some.images[0][0, 0].tolist() == [255, 0, 0]
  assert some.images[1][0, 0].tolist() == [0, 0, 255]
  assert some.digest != data.select(np.array([0, 3])).digest


def test_real_splits(shared_data):
  data = registry.open_splits(shared_data / "cifar10_jpg")
  assert data.classes == 10
  assert list(np.bincount(data.train.labels)) == [100] * 10
  assert list(np.bincount(data.test.labels)) == [50] * 10
  assert data.train.images[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
  "kind, images",
  [
    ("NYU", "nyu_images/1.jpg"),
    ("KITTI", "training/image_2/0.png"),
    ("SPair", "PairAnnotation/test/1.png"),
    ("NAVI", "toy/wild_set/images/1.jpg"),
    ("DAVIS", "DAVIS/JPEGImages/480p/a/1.jpg"),
    ("RGB-D", "a/frame-000000.pose.txt"),
    ("annotations/", "annotations/1.jpg"),
    ("ADE20K", "ADEChallengeData2016/images/training/1.jpg"),
  ],
)
def test_folders_of_another_layout_are_rejected(
  tmp_path, write_image, kind, images
):
  write_jpeg(write_image, tmp_path / images, "red")
  write_image(tmp_path / "others" / "1.png", "red")
  for opener in (registry.open_classification, registry.open_splits):
    with pytest.raises(NotApplicable, match=f"laid out as.*{kind}"):
      opener(tmp_path)


def test_other_data_is_not_applicable_and_missing_data_an_error(tmp_path):
  """The first skips an evaluation, the second is a mistake."""
  weights, other = tmp_path / "weights.onnx", tmp_path / "other.json"
  weights.write_text("")
  other.write_text("{}")
  images = [{"id": 1, "file_name": "1.jpg"}]
  boxes = [{"image_id": 1, "bbox": [0, 0, 1, 1]}]
  content = {"images": images, "annotations": boxes}
  boxes = write_json(tmp_path / "instances.json", content)
  for opener in (registry.open_classification, registry.open_captions):
    for path in (tmp_path, weights, boxes, other):
      with pytest.raises(NotApplicable):
        opener(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
      opener(tmp_path / "nowhere")
  with pytest.raises(NotApplicable, match="no 'caption'"):
    registry.open_captions(boxes)


# The kinds of data of each real folder, as the registry opens them.
_KINDS = {
  "SPair-71k": {"key_points"},
  "ade20k": {"segmentation"},
  "cifar10_jpg": {"classification", "splits"},
  "coco": {"captions", "boxes", "questions"},
  "imagenet_samples": {"classification"},
  "kitti_object": {"depth"},
  "nyuv2": {"segmentation", "depth", "normals"},
  "rgbd_7scenes": {"posed"},
  "tokenizers": set(),
  "weights_fastestdet": set(),
}
# The sample of ADE20K lacks training images.
# Two images are too few for feature ranks.
_INCOMPLETE = {
  ("ade20k", "segmentation"): MissingFileError,
  ("kitti_object", "feature_rank"): InputError,
}


@pytest.fixture
def opened(monkeypatch):
  """The kinds of data that evaluations ask the registry for."""
  kinds, depth = [], [0]

  def record(kind, opener, *args, **kwargs):
    # An opener may call another.
    kinds.extend([kind] * (not depth[0]))
    depth[0] += 1
    try:
      return opener(*args, **kwargs)
    finally:
      depth[0] -= 1

  for name, opener in vars(registry).copy().items():
    if name.startswith("open_"):
      spy = functools.partial(record, name.removeprefix("open_"), opener)
      monkeypatch.setattr(registry, name, spy)
  return kinds


def test_every_evaluation_on_every_real_folder(shared_data, opened):
  """Ready or not applicable; any further error is a mistake."""
  wrong = {}
  for folder, kinds in _KINDS.items():
    kinds = kinds and {"images", *kinds}
    for name in base.EVALUATORS:
      evaluator = base.build_evaluator(
        name, {"data": str(shared_data / folder)}
      )
      opened.clear()
      try:
        evaluator.prepare()
        got = None
      except Exception as error:
        got = type(error)
      ready = opened and kinds.issuperset(opened)
      want = None if ready else NotApplicable
      want = _INCOMPLETE.get((folder, name), want)
      if got is not want:
        wrong[folder, name] = got, want
  assert not wrong


SCENE_OPENERS = {
  "captions": registry.open_captions,
  "segmentation": functools.partial(registry.open_segmentation, split="test"),
  "depth": functools.partial(registry.open_depth, split="test", size=96),
  "normals": functools.partial(registry.open_normals, split="test", size=96),
  "boxes": registry.open_boxes,
  "videos": registry.open_videos,
  "posed": lambda data, count=2: registry.open_posed(
    data, subset="", count=count
  ),
  "key points": lambda data, count=21: registry.open_key_points(
    data, split="test", count=count
  ),
}


@pytest.mark.parametrize("kind", SCENE_OPENERS)
def test_scenes_as_a_source(kind):
  """`{type="scenes"}` is `scenes` with other defaults."""
  open_set, count = SCENE_OPENERS[kind], 21 if kind == "key points" else 2

  def digest(data, **options):
    opened = open_set(data, **options)
    return opened.fingerprint(1) if kind == "posed" else opened.digest

  same = {"type": "scenes", "length": count}
  hashes = {digest("scenes", count=count), digest(same)}
  assert len(hashes) == 1
  for option in (
    {"seed": 3},
    {"size": 64},
    {"first": HELD_OUT_SCENES + 1},
    {"difficulty": "easy"},
  ):
    hashes.add(digest({**same, **option}))
  assert len(hashes) == 5
  with pytest.raises(ValueError, match="Did you mean 'size'|no option 'sizes'"):
    open_set({**same, "sizes": 3})
  if kind not in ("captions", "boxes"):
    with pytest.raises(NotApplicable):
      open_set({"type": "tfds", "name": "coco"})


def test_options_of_scenes_reach_the_renderer():
  options = {"size": 32, "seed": 3, "difficulty": "easy"}
  data, number = {"type": "scenes", "length": 2, **options}, HELD_OUT_SCENES + 1
  want = scenes.render(number, **options)
  pair = scenes.render_pair(number, **options)
  video = scenes.render_video(number, frames=8, **options)
  sets = {
    name: opener(data)
    for name, opener in SCENE_OPENERS.items()
    if name != "key points"
  }
  assert {*want.captions} <= {*sets["captions"].captions}
  for got, expected in (
    (sets["captions"].images[1], want.image),
    (sets["segmentation"].maps[1], want.segmentation),
    (sets["depth"].maps[1], want.depth),
    (sets["boxes"].boxes[1], want.boxes),
    (sets["posed"].read(3, 32).image, pair.second.image),
    (sets["videos"].videos[1].frames[4], video[4].image),
  ):
    np.testing.assert_array_equal(got, expected)
  assert sets["depth"].maps[1].max() < MAX_DEPTH
  points = SCENE_OPENERS["key points"]({**data, "length": 21})
  assert points.metadata["scenes"] == {"first": HELD_OUT_SCENES, **options}
  first = scenes.render(HELD_OUT_SCENES, **options)
  np.testing.assert_array_equal(points.images[0], first.image)
