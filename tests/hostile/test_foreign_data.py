"""Hostile annotations and lists of data sets."""

import struct
import zlib

import PIL.Image
from hostile import foreign_samples as samples
from hostile.harness import Cases

from mtv_jax.data.labels import annotations
from mtv_jax.data.labels.annotations import Item
from mtv_jax.data.sources import listings
from mtv_jax.evals.datasets import registry

COCO = Cases(__file__, "COCO's annotations")
LISTS = Cases(__file__, "lists of other data sets")

HUGE, NAN = 10**400, float("nan")
IMAGE = {"id": 1, "file_name": "1.png", "height": 8, "width": 8}
BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4]}
CATEGORY = {"id": 3, "name": "cat"}
CAPTION = {"image_id": 1, "caption": "red"}
KARPATHY = {"split": "test", "filename": "1.png", "sentences": [{"raw": "a"}]}
OUTSIDE = {
  "a parent": "../../etc/hostname",
  "an absolute path": "/etc/hostname",
  "a null byte": "a\0b.png",
  "a lone surrogate": "\ud800.png",
  "a name of 5,000 bytes": "a" * 5000,
  "empty": "",
  "the folder": ".",
}


def _image(path, size=8):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new("RGB", (size, size)).save(path)


def _open_boxes(content):
  def run(folder):
    _image(folder / "images" / "1.png")
    return registry.open_boxes(
      samples.write(folder, "instances_a.json", content)
    )

  return run


def _open_captions(content, name="captions_a.json"):
  def run(folder):
    _image(folder / "images" / "1.png")
    data = registry.open_captions(samples.write(folder, name, content))
    return list(data.captions)

  return run


def _make_boxes(content):
  def run(folder):
    path = samples.write(folder, "instances_a.json", content)
    outcome = annotations.Instances([path])(Item("1", "1.png", "1", 8, 8))
    return "skip" if outcome.label is None else outcome.label

  return run


def _list_captions(content):
  def run(folder):
    (example,) = listings.read(
      samples.write(folder, "captions_a.json", content)
    )
    return ("skip", example.problem) if example.problem else example.path

  return run


def _instances(image=(), box=(), category=()):
  return {
    "images": [IMAGE | dict(image)],
    "annotations": [BOX | dict(box)],
    "categories": [CATEGORY | dict(category)],
  }


COCO.add(
  "labels: a pipe",
  lambda folder: annotations.Instances([samples.pipe(folder, "a.json")]),
  match="a pipe",
)
COCO.add("valid boxes", _open_boxes(_instances()), expects="used")
COCO.add("valid labels", _make_boxes(_instances()), expects="used")
for _label, _content in {
  "an image without a name": _instances({"file_name": None}),
  "a height of text": _instances({"height": "8"}),
  "a height of a bool": _instances({"height": True}),
  "a height of 0": _instances({"height": 0}),
  "a negative width": _instances({"width": -8}),
  "a vast width": _instances({"width": HUGE}),
  "an id that is a list": _instances({"id": [1]}),
  "an id that is a fraction": _instances({"id": 1.5}),
  "an image_id of no image": _instances(box={"image_id": 9}),
  "an image_id that is an object": _instances(box={"image_id": {}}),
  "a category of no name": _instances(box={"category_id": 9}),
  "a category that is a list": _instances(box={"category_id": [3]}),
  "a category's name of a number": _instances(category={"name": 3}),
  "a box of three": _instances(box={"bbox": [1, 1, 4]}),
  "a box of text": _instances(box={"bbox": "1 1 4 4"}),
  "a box with text": _instances(box={"bbox": ["1", 1, 4, 4]}),
  "a box with a bool": _instances(box={"bbox": [True, 1, 4, 4]}),
  "a box with null": _instances(box={"bbox": [None, 1, 4, 4]}),
  "a box of lists": _instances(box={"bbox": [[1], [1], [4], [4]]}),
  "a box of an object": _instances(box={"bbox": {"x": 1}}),
  "a key of a million characters": {
    **_instances(),
    "images": [{"x" * 1_000_000: 1}],
  },
  "images of an object": {**_instances(), "images": {"1": IMAGE}},
  "images of numbers": {**_instances(), "images": [1]},
  "annotations of null": {**_instances(), "annotations": None},
  "categories missing": {"images": [IMAGE], "annotations": [BOX]},
  **samples.BROKEN,
}.items():
  COCO.add(f"boxes: {_label}", _open_boxes(_content))
  COCO.add(f"labels: {_label}", _make_boxes(_content))
for _label, _bbox in {
  "NaN": [NAN, 1, 4, 4],
  "infinite": [1, 1, float("inf"), 4],
  "beyond all floats": [1, 1, HUGE, 4],
  "negative": [1, 1, -4, -4],
  "of no size": [1, 1, 0, 0],
  "outside": [100, 100, 4, 4],
}.items():
  _content = _instances(box={"bbox": _bbox})
  COCO.add(f"boxes: {_label}", _open_boxes(_content), expects="error used")
  COCO.add(f"labels: {_label}", _make_boxes(_content), expects="skip used")
for _label, _crowd in {"text": "0", "a list": [0], "an object": {}}.items():
  _content = _instances(box={"iscrowd": _crowd})
  COCO.add(f"boxes: iscrowd {_label}", _open_boxes(_content), match="iscrowd")


def _captions(image=(), caption=()):
  return {
    "images": [IMAGE | dict(image)],
    "annotations": [CAPTION | dict(caption)],
  }


COCO.add("valid captions", _open_captions(_captions()), expects="used")
for _label, _name in OUTSIDE.items():
  _change = {"file_name": _name}
  for _kind, _run in (
    ("boxes", _open_boxes(_instances(_change))),
    ("captions", _open_captions(_captions(_change))),
    ("Karpathy", _open_captions({"images": [KARPATHY | {"filename": _name}]})),
  ):
    COCO.add(f"{_kind}: a file name: {_label}", _run)
  _run = _list_captions(_captions(_change))
  COCO.add(f"listing: a file name: {_label}", _run, expects="skip")
for _label, _change in {
  "of a number": {"caption": 3},
  "of null": {"caption": None},
  "of a list": {"caption": ["a"]},
  "of no image": {"image_id": 9},
  "of an image_id of a list": {"image_id": [1]},
}.items():
  _run = _open_captions(_captions(caption=_change))
  COCO.add(f"captions: {_label}", _run)
  _run = _list_captions(_captions(caption=_change))
  COCO.add(f"listing: a caption {_label}", _run, expects="error skip")
for _label, _change in {
  "a split of a number": {"split": 1},
  "a split of others": {"split": "val"},
  "sentences of text": {"sentences": "a"},
  "sentences of strings": {"sentences": ["a"]},
  "a sentence of a number": {"sentences": [{"raw": 1}]},
  "a folder that is outside": {"filepath": "../../etc"},
  "a folder that is a list": {"filepath": ["a"]},
}.items():
  _run = _open_captions({"images": [KARPATHY | _change]})
  COCO.add(f"Karpathy: {_label}", _run)
for _label, _data in samples.BROKEN.items():
  COCO.add(f"captions: {_label}", _open_captions(_data))
  COCO.add(f"listing: {_label}", _list_captions(_data))
  COCO.add(f"Flickr30k: {_label}", _open_captions(_data, "results.csv"))
for _label, _data in {
  "a parent": b"image,caption\n../1.jpg,a\n",
  "an absolute path": b"image,caption\n/etc/1.jpg,a\n",
  "no caption": b"image,caption\n1.jpg\n",
  "Latin-1": b"image,caption\n1.jpg,caf\xe9\n",
}.items():
  COCO.add(f"Flickr30k: {_label}", _open_captions(_data, "results.csv"))


@COCO.add("depth images: a name that leaves the folder", expects="skip")
def _depth_name(folder):
  (folder / "depth").mkdir()
  PIL.Image.new("L", (8, 8)).save(folder / "x.png")
  read = annotations.DepthImages(folder / "depth", pattern="{name}.png")
  outcome = read(Item("1", "../x.jpg", "1", 8, 8))
  assert outcome.label is None
  return "skip", str(outcome.counts)


@COCO.add("depth images: a bomb", expects="skip")
def _depth_bomb(folder):
  header = b"IHDR" + struct.pack(
    ">IIBBBBB", side := 40_000, side, 8, 0, 0, 0, 0
  )
  chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
  (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
  read = annotations.DepthImages(folder)
  outcome = read(Item("1", "x.jpg", "1", side, side))
  assert outcome.label is None
  return "skip", str(outcome.counts)


@COCO.parametrize
def test_coco(case, hostile):
  hostile(case)


# ---------------------------------------------------------------------------
# Lists of other data sets.


def _ade20k(listing):
  def run(folder):
    _image(folder / "images" / "validation" / "a.jpg")
    samples.write(folder, "annotations/validation/a.png", b"x")
    samples.write(folder, "ADE20K_object150_val.txt", listing)
    data = registry.open_segmentation(folder, split="test")
    return data.maps[0]

  return run


def _davis(listing):
  def run(folder):
    for i in range(3):
      _image(folder / f"JPEGImages/480p/a/{i:05d}.jpg")
      _image(folder / f"Annotations/480p/a/{i:05d}.png")
    samples.write(folder, "ImageSets/2017/val.txt", listing)
    return registry.open_videos(folder)

  return run


def _kitti(listing):
  def run(folder):
    samples.write(folder, "kitti_eigen_test_files_with_gt.txt", listing)
    return registry.open_depth(folder, split="test", size=8)

  return run


def _nyu(listing):
  def run(folder):
    samples.write(folder, "nyu_test.txt", listing)
    samples.write(folder, "filename_list_test.txt", listing)
    return registry.open_depth(folder, split="test", size=8)

  return run


for _label, _data in {
  "a parent": b"../../../etc/hostname ../../../etc/hostname 1",
  "a null byte": b"a\0b a\0b 1",
  "a name of 5,000 bytes": b"a" * 5000 + b" b 1",
  "binary": bytes(range(128, 256)),
  "empty": b"",
  "a line of one": b"a",
  "missing files": b"a/b.png a/c.png 3",
}.items():
  LISTS.add(f"KITTI: {_label}", _kitti(_data))
  LISTS.add(f"NYU: {_label}", _nyu(_data))
for _label, _data in {
  "a parent": b"../../../etc/hostname",
  "an absolute path": b"/etc/hostname",
  "a null byte": b"a\0b",
  "a name of 5,000 bytes": b"a" * 5000,
  "binary": bytes(range(128, 256)),
  "empty": b"",
  "missing": b"validation/b.jpg",
}.items():
  LISTS.add(f"ADE20K: {_label}", _ade20k(_data))
  LISTS.add(f"DAVIS: {_label}", _davis(_data))

SPAIR = {
  "pair_id": 0,
  "src_imname": "a.jpg",
  "trg_imname": "a.jpg",
  "category": "cat",
  "viewpoint_variation": 0,
  "src_imsize": [8, 8, 3],
  "trg_imsize": [8, 8, 3],
  "src_kps": [[1, 1]],
  "trg_kps": [[1, 1]],
  "trg_bndbox": [0, 0, 8, 8],
}


def _spair(content):
  def run(folder):
    _image(folder / "JPEGImages/cat/a.jpg")
    samples.write(folder, "PairAnnotation/test/0.json", content)
    return registry.open_key_points(folder, split="test", count=1)

  return run


LISTS.add("SPair: valid", _spair(SPAIR), expects="used")
for _label, _change in {
  "a parent": {"src_imname": "../../a.jpg"},
  "an absolute path": {"trg_imname": "/etc/hostname"},
  "a category of a number": {"category": 3},
  "a category outside": {"category": "../.."},
  "a pair_id of text": {"pair_id": "x"},
  "a pair_id that is infinite": {"pair_id": float("inf")},
  "points of text": {"src_kps": "x", "trg_kps": "x"},
  "points of one": {"src_kps": [[1]], "trg_kps": [[1]]},
  "points of NaN": {"src_kps": [[NAN, 1]]},
  "a box of three": {"trg_bndbox": [0, 0, 8]},
  "a box of NaN": {"trg_bndbox": [0, 0, 8, NAN]},
  "a size of text": {"src_imsize": "x"},
  "a size of nothing": {"src_imsize": []},
  "a size of 0": {"src_imsize": [0, 0, 3]},
  "a viewpoint of a list": {"viewpoint_variation": [1]},
}.items():
  LISTS.add(f"SPair: {_label}", _spair(SPAIR | _change))
for _label, _data in samples.BROKEN.items():
  LISTS.add(f"SPair: {_label}", _spair(_data))


@LISTS.parametrize
def test_lists(case, hostile):
  hostile(case)
