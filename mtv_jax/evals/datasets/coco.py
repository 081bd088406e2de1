"""COCO, Flickr30k and similar: captions, Karpathy's splits, instances.

captions_*.json      COCO's captions (Chen et al. 2015)
*_karpathy.json      Karpathy's test split of COCO in that format, from
                     CLIP_benchmark
dataset_*.json       Karpathy's splits of COCO or Flickr30k
*.token, *.csv, *.txt    Flickr30k's captions (Young et al. 2014) as released,
                     Kaggle's results.csv, or CLIP_benchmark's "image,caption"
xtd10-de.json, ...   CLIP_benchmark's captions in other languages:
                     `image_paths` and `annotations`
instances_*.json     COCO's boxes (Lin et al. 2014)
FOLDER               captions: the first of `CAPTION_FILES` there; boxes:
                     annotations/instances_val2017.json

The image folder (val2017/, val2014/, flickr30k-images/, ...) is beside the file
or its folder, or passed as `images`.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.data.sources import coco as coco_json
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError, MissingFileError

# Caption files in a folder, in order of preference: Karpathy's test split, the
# published retrieval split, comes first.
CAPTION_FILES = (
  "coco_test_karpathy.json",
  "dataset_coco.json",
  "annotations/coco_test_karpathy.json",
  "annotations/dataset_coco.json",
  "annotations/captions_val2017.json",
  "annotations/captions_val2014.json",
  "dataset_flickr30k.json",
  "flickr30k_test_karpathy.txt",
  "results_20130124.token",
  "results.csv",
)
_IMAGE_FOLDERS = (
  "val2014", "val2017", "train2014", "train2017", "images", "Images",
  "flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images",
)  # fmt: skip
_INSTANCES = "annotations/instances_val2017.json"
_MIN_SIDE = 1.0  # smallest side of a box, in pixels

_JPEG = re.compile(r"\.jpe?g\b")

Rows = Sequence[tuple[str, list[str]]]


def matches(root: pathlib.Path) -> bool:
  """Whether a folder has an annotations/ folder."""
  return (root / "annotations").is_dir()


def find_captions(path: pathlib.Path) -> pathlib.Path | None:
  """The caption file: `path` itself, or the first match in a folder."""
  if path.is_dir():
    return files.find_list(path, CAPTION_FILES)
  suffixes = (".json", ".token", ".csv", ".txt")
  return path if path.is_file() and path.suffix in suffixes else None


def read_annotations(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises NotApplicable for other JSON types."""
  content = foreign.read_untrusted_json(path)
  if not isinstance(content, dict):
    raise NotApplicable(
      f"{path} contains a {type(content).__name__}; expected an object"
    )
  return content


def open_captions(
  path: pathlib.Path,
  *,
  images: pathlib.Path | None,
  split: str,
  count: int | None,
  max_captions: int | None,
) -> examples.CaptionSet:
  """Opens a caption file, see `registry.open_captions`."""
  stem = path.stem.removeprefix("captions_")
  if path.suffix == ".json":
    content = read_annotations(path)
    if "sentences" in _first_row(content, "images"):
      rows = _read_karpathy_rows(path, content, split)
    elif "image_paths" in content:
      (rows, stem), split = _read_path_rows(path, content), None
    elif "annotations" in content:
      rows, split = _read_caption_rows(path, content), None
    else:
      raise NotApplicable(
        f"{path} has keys {sorted(content)}; expected COCO's captions (images, "
        "annotations) or Karpathy's splits (images with sentences)"
      )
  else:
    rows, split = _read_flickr_rows(path), None
  rows = examples.subsample([row for row in rows if row[1]], count)
  rows = [(name, tuple(texts)[:max_captions]) for name, texts in rows]
  paths = find_images(path, images, stem, [name for name, _ in rows])
  sizes = files.file_sizes(paths)
  return examples.CaptionSet.from_records(
    [*zip(rows, paths, sizes, strict=True)],
    read=lambda record: examples.read_image(record[1]),
    captions=lambda record: record[0][1],
    hash_key=lambda record: (record[0][0], record[2], *record[0][1]),
    name=str(path),
    split=split,
  )


def _read_path_rows(
  path: pathlib.Path, content: Mapping[str, Any]
) -> tuple[Rows, str]:
  """Rows with one caption per image, and the image folder."""
  with foreign.errors_of(path):
    names, texts = (
      foreign.read_field(content, key, tuple[str, ...])
      for key in ("image_paths", "annotations")
    )
  if len(names) != len(texts) or not names:
    raise InputError(
      f"{path} has {len(texts)} captions for {len(names)} images; expected one "
      "per image"
    )
  # Paths on the machine that wrote the file: ROOT/xtd10/images/NAME.jpg.
  paths = [pathlib.PurePosixPath(name) for name in names]
  folder = "/".join(paths[0].parts[-3:-1])
  foreign.resolve_name(path.parent, folder or ".", where=path)
  rows = [(p.name, [text]) for p, text in zip(paths, texts, strict=True)]
  return rows, folder


def _read_caption_rows(path: pathlib.Path, content: Mapping[str, Any]) -> Rows:
  """File name and captions of each image of a captions_*.json."""
  first = _first_row(content, "annotations")
  if first and "caption" not in first:
    raise NotApplicable(
      f"{path}: annotations have {sorted(first)} but no 'caption'; expected "
      "COCO's captions_*.json"
    )
  images = coco_json.group_images(
    path, content, image={"file_name": str}, annotation={"caption": str}
  )
  return [
    (image.info["file_name"], [row["caption"] for row in image.annotations])
    for image in images.values()
  ]


def _read_karpathy_rows(
  path: pathlib.Path, content: Mapping[str, Any], split: str
) -> Rows:
  rows = []
  fields = {"split": str, "filename": str, "sentences": list}
  images = foreign.read_rows(path, content, "images", fields)
  for row in images:
    if row["split"] == split:
      folder = str(row.get("filepath") or "")  # Missing in Flickr30k.
      name = pathlib.PurePosixPath(folder, row["filename"])
      texts = foreign.read_rows(path, row, "sentences", {"raw": str})
      rows.append((str(name), [text["raw"] for text in texts]))
  if not rows:
    splits = sorted({row["split"] for row in images})
    raise InputError(f"{path} has no split {split!r}; it has {splits}")
  return rows


def _read_flickr_rows(path: pathlib.Path) -> Rows:
  """File name and captions of each image in a text file."""
  lines = foreign.read_text(path).splitlines() or [""]
  header = "" if _JPEG.search(lines[0]) else lines.pop(0)
  if "|" in header:
    # One line of Kaggle's file lacks the second bar.
    separator = r"\s*\|\s*\d+\s*\|?\s*"
  elif header:
    separator = r",\s*\d+,\s*" if header.count(",") == 2 else r",\s*"
  else:
    separator = r"#\d+\t"
  pattern = re.compile(rf"([^|,#]+?\.jpe?g){separator}(.*\S)\s*$")
  captions = collections.defaultdict(list)
  for number, line in enumerate(lines, start=2 if header else 1):
    match = pattern.match(line)
    if match:
      name, text = match.groups()
      quoted = len(text) > 1 and text[0] == text[-1] == '"'
      captions[name].append(text[1:-1].replace('""', '"') if quoted else text)
    elif line.strip():
      raise InputError(
        f"{path}, line {number}: {line[:60]!r} is not an image with a caption; "
        "expected 'NAME.jpg#0<tab>caption' (Flickr30k's results.token), "
        "'NAME.jpg| 0| caption' or 'NAME.jpg,caption' below a header"
      )
  return list(captions.items())


def _first_row(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
  """The first object of a list in JSON content; empty if missing."""
  rows = content.get(key)
  row = rows[0] if isinstance(rows, list) and rows else None
  return row if isinstance(row, dict) else {}


def find_images(path, images, default: str, names: Sequence[str]) -> list:
  """Paths of images in the folder `images`, else in the first usual folder.

  A usual folder must have one of them; `default` comes first, such as val2017.
  """
  usual = (default, "", f"images/{default}")
  if default not in _IMAGE_FOLDERS:
    usual += _IMAGE_FOLDERS
  above = (path.parent, path.parent.parent)
  folders = [images] if images else [r / name for name in usual for r in above]
  for folder in folders:
    paths = [foreign.resolve_name(folder, name, where=path) for name in names]
    if images or not names or any(p.is_file() for p in paths):
      files.require_files(paths, path)
      return paths
  raise MissingFileError(
    f"{path}: its images ({names[0]}, ...) are not beside it; set "
    "images= to their folder"
  )


def open_boxes(
  path: pathlib.Path, *, images: pathlib.Path | None, count: int | None
) -> examples.BoxSet:
  """Images and boxes of COCO's instances.

  Drops crowds, boxes thinner than a pixel, and images without annotations
  (which are unlabelled, not empty). `path` is the JSON or COCO's folder; see
  `registry.open_boxes`.
  """
  if path.is_dir():
    files.require_layout(path, [_INSTANCES], what="COCO 2017's instances")
    path = path / _INSTANCES
  content = read_annotations(path)
  row = _first_row(content, "annotations")
  if "bbox" not in row or "categories" not in content:
    raise NotApplicable(
      f"{path} has no named boxes; expected COCO's instances_*.json"
    )
  images_by_id = coco_json.group_images(
    path,
    content,
    image={"file_name": str, "height": int, "width": int},
    annotation={"category_id": coco_json.ID, "bbox": list},
  )
  fields = {"id": coco_json.ID, "name": str}
  categories = foreign.read_rows(path, content, "categories", fields)
  index = {row["id"]: i for i, row in enumerate(categories)}
  left_out = {"crowds": 0, "thinner than a pixel": 0}
  records = []
  for image in images_by_id.values():
    boxes, labels, dropped = [], [], []
    for row in image.annotations:
      _check_annotation(path, row, index)
      box = read_box(path, row, image.info)
      sides = (box[2:] - box[:2]) * (image.info["height"], image.info["width"])
      reason = "crowds" if row.get("iscrowd") else None
      if reason is None and min(sides) < _MIN_SIDE:
        reason = "thinner than a pixel"
      label = index[row["category_id"]]
      if reason:
        left_out[reason] += 1
        dropped.append(categories[label]["name"])
      else:
        boxes.append(box)
        labels.append(label)
    if boxes:
      boxes = np.asarray(boxes, np.float32)
      labels = np.asarray(labels, np.int32)
      records.append((image.info, boxes, labels, tuple(dropped)))
  records = examples.subsample(records, count)
  columns = zip(*records, strict=True) if records else [()] * 4
  infos, boxes, labels, dropped = columns
  names = [info["file_name"] for info in infos]
  stem = path.stem.removeprefix("instances_")
  paths = find_images(path, images, stem, names)
  sizes = files.file_sizes(paths)
  classes = tuple(row["name"] for row in categories)
  return examples.BoxSet.from_records(
    [*zip(paths, infos, sizes, boxes, labels, strict=True)],
    read=lambda row: read_checked(row[0], row[1]),
    hash_key=lambda row: (
      row[1]["file_name"],
      row[2],
      *row[3].ravel().tolist(),
      *row[4].tolist(),
    ),  # fmt: skip
    name=str(path),
    boxes=boxes,
    phrases=tuple(tuple(classes[i] for i in row) for row in labels),
    labels=labels,
    classes=classes,
    dropped=dropped,
    left_out=left_out,
  )


def _check_annotation(
  path: pathlib.Path, row: Mapping[str, Any], index: Mapping[Any, int]
) -> None:
  if row["category_id"] not in index:
    raise InputError(
      f"{path}: an annotation has category_id {row['category_id']!r}; expected "
      "the id of a category"
    )
  if row.get("iscrowd") not in (None, 0, 1):
    raise InputError(
      f"{path}: an annotation has iscrowd "
      f"{options.shorten_repr(row['iscrowd'])}; expected 0 or 1"
    )


def read_box(
  path: pathlib.Path, row: Mapping[str, Any], info: Mapping[str, Any]
) -> np.ndarray:
  """An annotation's bbox in pixels as unit-square corners."""
  bbox = row["bbox"]
  if len(bbox) != 4 or not all(
    type(v) in (int, float) and abs(v) <= coco_json.MAX_SIDE for v in bbox
  ):
    raise InputError(
      f"{path}: an annotation has bbox {options.shorten_repr(bbox)}; expected "
      "[x, y, width, height] in pixels"
    )
  x, y, width, height = bbox
  size = np.tile((info["height"], info["width"]), 2)
  return np.clip(np.array((y, x, y + height, x + width)) / size, 0.0, 1.0)


def read_checked(path: pathlib.Path, info: Mapping[str, Any]) -> np.ndarray:
  """Reads an image; InputError if its size differs from the annotated size."""
  image = examples.read_image(path)
  if image.shape[:2] != (info["height"], info["width"]):
    raise InputError(
      f"{path} is {image.shape[0]}x{image.shape[1]}, but its boxes are for "
      f"{info['height']}x{info['width']}: it is not the original image"
    )
  return image
