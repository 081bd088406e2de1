"""Hostile annotations and lists of data sets."""

import struct
import zlib

import PIL.Image
from hostile import foreign_samples as samples
from hostile.harness import Cases, run_all
from hostile.samples import changed

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
OUTSIDE = {k: v for k, v in samples.OUTSIDE.items() if isinstance(v, str)}
OUTSIDE["the folder"] = "."


def _image(path, size=8):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new("RGB", (size, size)).save(path)


def _open_boxes(folder, content):
  _image(folder / "images" / "1.png")
  return registry.open_boxes(samples.write(folder, "instances_a.json", content))


def _open_captions(folder, content, name="captions_a.json"):
  _image(folder / "images" / "1.png")
  data = registry.open_captions(samples.write(folder, name, content))
  return list(data.captions)


def _open_table(folder, content):
  return _open_captions(folder, content, "results.csv")


def _make_boxes(folder, content):
  path = samples.write(folder, "instances_a.json", content)
  outcome = annotations.Instances([path])(Item("1", "1.png", "1", 8, 8))
  return "skip" if outcome.label is None else outcome.label


def _list_captions(folder, content):
  (example,) = listings.read(samples.write(folder, "captions_a.json", content))
  return ("skip", example.problem) if example.problem else example.path


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
_valid = {"valid": _instances()}
_bad = {
  **{
    f"an image's {name}": _instances(change)
    for name, change in changed(
      {},
      {
        "file_name": [None],
        "height": ["8", True, 0],
        "width": [-8, HUGE],
        "id": [[1], 1.5],
      },
    ).items()
  },
  **{
    f"a box's {name}": _instances(box=change)
    for name, change in changed(
      {},
      {
        "image_id": [9, {}],
        "category_id": [9, [3]],
        "bbox": [
          *[[1, 1, 4], "1 1 4 4", ["1", 1, 4, 4], [True, 1, 4, 4], {"x": 1}],
          *[[None, 1, 4, 4], [[1], [1], [4], [4]]],
        ],
      },
    ).items()
  },
  "a category's name of a number": _instances(category={"name": 3}),
  "a key of a million characters": _instances()
  | {"images": [{"x" * 1_000_000: 1}]},
  "categories missing": {"images": [IMAGE], "annotations": [BOX]},
  **changed(
    _instances(), {"images": [{"1": IMAGE}, [1]], "annotations": [None]}
  ),
  **samples.BROKEN,
}
_odd = {
  name: _instances(box=change)
  for name, change in changed(
    {},
    {
      "bbox": [
        *[[NAN, 1, 4, 4], [1, 1, float("inf"), 4], [1, 1, HUGE, 4]],
        *[[1, 1, -4, -4], [1, 1, 0, 0], [100, 100, 4, 4]],
      ]
    },
  ).items()
}
for _prefix, _read in (("boxes: ", _open_boxes), ("labels: ", _make_boxes)):
  COCO.add_table(_read, _valid, prefix=_prefix, expects="used")
  COCO.add_table(_read, _bad, prefix=_prefix)
COCO.add_table(_open_boxes, _odd, prefix="boxes: ", expects="error used")
COCO.add_table(_make_boxes, _odd, prefix="labels: ", expects="skip used")
_crowds = {
  name: _instances(box=change)
  for name, change in changed({}, {"iscrowd": ["0", [0], {}]}).items()
}
COCO.add_table(_open_boxes, _crowds, prefix="boxes: ", match="iscrowd")


def _captions(image=(), caption=()):
  return {
    "images": [IMAGE | dict(image)],
    "annotations": [CAPTION | dict(caption)],
  }


COCO.add_table(_open_captions, {"valid captions": _captions()}, expects="used")
_captions_of = {k: _captions({"file_name": v}) for k, v in OUTSIDE.items()}
for _prefix, _read, _contents in (
  (
    "boxes",
    _open_boxes,
    {k: _instances({"file_name": v}) for k, v in OUTSIDE.items()},
  ),
  ("captions", _open_captions, _captions_of),
  (
    "Karpathy",
    _open_captions,
    {k: {"images": [KARPATHY | {"filename": v}]} for k, v in OUTSIDE.items()},
  ),
):
  COCO.add_table(_read, _contents, prefix=f"{_prefix}: a file name: ")
COCO.add_table(
  _list_captions, _captions_of, prefix="listing: a file name: ", expects="skip"
)
_bad = {
  name: _captions(caption=change)
  for name, change in changed(
    {}, {"caption": [3, None, ["a"]], "image_id": [9, [1]]}
  ).items()
}
COCO.add_table(_open_captions, _bad, prefix="captions: ")
COCO.add_table(_list_captions, _bad, prefix="listing: ", expects="error skip")
_rows = {
  "split": [1, "val"],
  "sentences": ["a", ["a"], [{"raw": 1}]],
  "filepath": ["../../etc", ["a"]],
}
_karpathy = {k: {"images": [v]} for k, v in changed(KARPATHY, _rows).items()}
COCO.add_table(_open_captions, _karpathy, prefix="Karpathy: ")
COCO.add_table(_open_captions, samples.BROKEN, prefix="captions: ")
COCO.add_table(_list_captions, samples.BROKEN, prefix="listing: ")
COCO.add_table(
  _open_table,
  samples.BROKEN
  | {
    "a parent": b"image,caption\n../1.jpg,a\n",
    "an absolute path": b"image,caption\n/etc/1.jpg,a\n",
    "no caption": b"image,caption\n1.jpg\n",
    "Latin-1": b"image,caption\n1.jpg,caf\xe9\n",
  },
  prefix="Flickr30k: ",
)


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


# ---------------------------------------------------------------------------
# Lists of further data sets.


def _ade20k(folder, listing):
  _image(folder / "images" / "validation" / "a.jpg")
  samples.write(folder, "annotations/validation/a.png", b"x")
  samples.write(folder, "ADE20K_object150_val.txt", listing)
  return registry.open_segmentation(folder, split="test").maps[0]


def _davis(folder, listing):
  for i in range(3):
    _image(folder / f"JPEGImages/480p/a/{i:05d}.jpg")
    _image(folder / f"Annotations/480p/a/{i:05d}.png")
  samples.write(folder, "ImageSets/2017/val.txt", listing)
  return registry.open_videos(folder)


def _kitti(folder, listing):
  samples.write(folder, "kitti_eigen_test_files_with_gt.txt", listing)
  return registry.open_depth(folder, split="test", size=8)


def _nyu(folder, listing):
  samples.write(folder, "nyu_test.txt", listing)
  samples.write(folder, "filename_list_test.txt", listing)
  return registry.open_depth(folder, split="test", size=8)


_NAMES = {
  "a null byte": b"a\0b",
  "a name of 5,000 bytes": b"a" * 5000,
  "binary": bytes(range(128, 256)),
  "empty": b"",
}
_PAIRS = _NAMES | {
  "a parent": b"../../../etc/hostname ../../../etc/hostname 1",
  "a line of one": b"a",
  "missing files": b"a/b.png a/c.png 3",
}
_ONES = _NAMES | {
  "a parent": b"../../../etc/hostname",
  "an absolute path": b"/etc/hostname",
  "missing": b"validation/b.jpg",
}
LISTS.add_table(_kitti, _PAIRS, prefix="KITTI: ")
LISTS.add_table(_nyu, _PAIRS, prefix="NYU: ")
LISTS.add_table(_ade20k, _ONES, prefix="ADE20K: ")
LISTS.add_table(_davis, _ONES, prefix="DAVIS: ")

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


def _spair(folder, content):
  _image(folder / "JPEGImages/cat/a.jpg")
  samples.write(folder, "PairAnnotation/test/0.json", content)
  return registry.open_key_points(folder, split="test", count=1)


LISTS.add_table(_spair, {"SPair: valid": SPAIR}, expects="used")
LISTS.add_table(
  _spair,
  samples.BROKEN
  | changed(
    SPAIR,
    {
      "src_imname": ["../../a.jpg"],
      "trg_imname": ["/etc/hostname"],
      "category": [3, "../.."],
      "pair_id": ["x", float("inf")],
      "src_kps": ["x", [[1]], [[NAN, 1]]],
      "trg_bndbox": [[0, 0, 8], [0, 0, 8, NAN]],
      "src_imsize": ["x", [], [0, 0, 3]],
      "viewpoint_variation": [[1]],
    },
  ),
  prefix="SPair: ",
)

test_data = run_all(COCO, LISTS)
