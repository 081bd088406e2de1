"""Hostile annotations and lists of data sets."""

import PIL.Image
from hostile import foreign_samples as samples
from hostile.harness import Cases, run_all
from hostile.samples import BROKEN_JSON, changed, ihdr, png
from hostile.samples import OUTSIDE as _OUTSIDE

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
OUTSIDE = {k: v for k, v in _OUTSIDE.items() if isinstance(v, str)}
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


_INSTANCES = {
  "images": [IMAGE],
  "annotations": [BOX],
  "categories": [CATEGORY],
}
_CAPTIONS = {"images": [IMAGE], "annotations": [CAPTION]}


def _changed(content, part, values):
  """Copies of a COCO file, each with another value in one entry of a list."""
  return {
    f"{part}: {name}": content | {part: [row]}
    for name, row in changed(content[part][0], values).items()
  }


_sides = {"height": ["8", True, 0], "width": [-8, HUGE], "id": [[1], 1.5]}
_ids = {"image_id": [9, {}], "category_id": [9, [3]]}
_boxes = [[1, 1, 4], "1 1 4 4", ["1", 1, 4, 4], [True, 1, 4, 4], {"x": 1}]
_boxes += [[None, 1, 4, 4], [[1], [1], [4], [4]]]
_lists = {"images": [{"1": IMAGE}, [1], [{"x" * 1_000_000: 1}]]}
_bad = (
  _changed(_INSTANCES, "images", {"file_name": [None]} | _sides)
  | _changed(_INSTANCES, "annotations", {"bbox": _boxes} | _ids)
  | _changed(_INSTANCES, "categories", {"name": [3]})
  | changed(_INSTANCES, _lists | {"annotations": [None], "categories": [None]})
  | BROKEN_JSON
)
_boxes = [[NAN, 1, 4, 4], [1, 1, float("inf"), 4], [1, 1, HUGE, 4]]
_boxes += [[1, 1, -4, -4], [1, 1, 0, 0], [100, 100, 4, 4]]
_odd = _changed(_INSTANCES, "annotations", {"bbox": _boxes})
for _prefix, _read in (("boxes: ", _open_boxes), ("labels: ", _make_boxes)):
  COCO.add_table(_read, {"valid": _INSTANCES}, prefix=_prefix, expects="used")
  COCO.add_table(_read, _bad, prefix=_prefix)
COCO.add_table(_open_boxes, _odd, prefix="odd boxes: ", expects="error used")
COCO.add_table(_make_boxes, _odd, prefix="odd labels: ", expects="skip used")
_crowds = _changed(_INSTANCES, "annotations", {"iscrowd": ["0", [0], {}]})
COCO.add_table(_open_boxes, _crowds, prefix="boxes: ", match="iscrowd")
COCO.add(
  "labels: a pipe",
  lambda folder: annotations.Instances([samples.pipe(folder, "a.json")]),
  match="a pipe",
)

COCO.add_table(_open_captions, {"valid captions": _CAPTIONS}, expects="used")
_names = {"file_name": OUTSIDE.values()}
_captions = _changed(_CAPTIONS, "images", _names)
_values = {"filename": OUTSIDE.values(), "filepath": ["../../etc", ["a"]]}
_values |= {"split": [1, "val"], "sentences": ["a", ["a"], [{"raw": 1}]]}
_rows = changed(KARPATHY, _values)
_karpathy = {name: {"images": [row]} for name, row in _rows.items()}
_boxes = _changed(_INSTANCES, "images", _names)
COCO.add_table(_open_boxes, _boxes, prefix="boxes outside: ")
COCO.add_table(_open_captions, _captions, prefix="captions outside: ")
COCO.add_table(_open_captions, _karpathy, prefix="Karpathy: ")
_options = {"prefix": "listing outside: ", "expects": "skip"}
COCO.add_table(_list_captions, _captions, **_options)
_values = {"caption": [3, None, ["a"]], "image_id": [9, [1]]}
_bad = _changed(_CAPTIONS, "annotations", _values)
COCO.add_table(_open_captions, _bad | BROKEN_JSON, prefix="captions: ")
COCO.add_table(_list_captions, BROKEN_JSON, prefix="listing: ")
_options = {"prefix": "listing: ", "expects": "error skip"}
COCO.add_table(_list_captions, _bad, **_options)
COCO.add_table(
  _open_table,
  BROKEN_JSON
  | {
    "a parent": b"image,caption\n../1.jpg,a\n",
    "an absolute path": b"image,caption\n/etc/1.jpg,a\n",
    "no caption": b"image,caption\n1.jpg\n",
    "Latin-1": b"image,caption\n1.jpg,caf\xe9\n",
  },
  prefix="Flickr30k: ",
)


def _read_depth(folder, content):
  """Reads x.png, in the folder and outside of it, whose header has a side."""
  name, side = content
  _image(folder / "x.png")
  data = (folder / "x.png").read_bytes()
  data = png(ihdr(side, side), data[33:])
  samples.write(folder, "depth/x.png", data)
  read = annotations.DepthImages(folder / "depth", pattern="{name}.png")
  outcome = read(Item("1", name, "1", side, side))
  assert outcome.label is None
  return "skip", str(outcome.counts)


_depth = {"a name that leaves": ("../x.jpg", 8), "a bomb": ("x.jpg", 40_000)}
COCO.add_table(_read_depth, _depth, prefix="depth images: ", expects="skip")


# --- Lists of further data sets ----------------------------------------------


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
  BROKEN_JSON
  | changed(
    SPAIR,
    {
      "src_imname": ["../../a.jpg", None],
      "trg_imname": ["/etc/hostname"],
      "category": [3, "../.."],
      "pair_id": ["x", float("inf"), None],
      "src_kps": ["x", None, [[1]], [[NAN, 1]], [[1, 2, 3]]],
      "trg_kps": [[["a", 1]]],
      "trg_bndbox": [[0, 0, 8], [0, 0, 8, NAN], [None]],
      "src_imsize": ["x", None, [], [0, 0, 3]],
      "viewpoint_variation": [[1], None],
    },
  ),
  prefix="SPair: ",
  match="0.json",
)

test_data = run_all(COCO, LISTS)
