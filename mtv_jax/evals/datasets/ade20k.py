"""Reader of ADE20K for scene parsing: the files of ADEChallengeData2016.

    images/{training,validation}/ADE_*.jpg
    annotations/{training,validation}/ADE_*.png     0 other, 1..150 a class
    objectInfo150.txt                               names

The lists that DINOv3's loader wants beside them (`ADE20K_object150_train.txt`,
`..._val.txt`) are followed where they are.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np
from jaxtyping import UInt8

from mtv_jax.evals.core.examples import IGNORE, SegmentationSet
from mtv_jax.evals.datasets.files import (
  LabelledFile,
  open_segmentation_files,
  read_class_map,
  require_files,
  require_layout,
)
from mtv_jax.utils.errors import InputError

CLASS_COUNT = 150
_FOLDERS = {"train": "training", "test": "validation"}
_LISTS = {
  "train": "ADE20K_object150_train.txt",
  "test": "ADE20K_object150_val.txt",
}
_NAME = "ADEChallengeData2016"
_WHAT = (
  f"ADE20K's {_NAME}, as the zip of "
  "http://data.csail.mit.edu/places/ADEchallenge holds it"
)


def find_root(path: pathlib.Path) -> pathlib.Path | None:
  """The folder that holds images/ and annotations/: `path`, or one in it.

  One that has the release's name is it even if parts are missing. COCO may have
  two folders of these names too, and is told by its JSON.
  """
  for root in (path, path / _NAME):
    if root.name == _NAME and root.is_dir():
      return root
    both = (root / "images").is_dir() and (root / "annotations").is_dir()
    if both and not any((root / "annotations").glob("*.json")):
      return root
  return None


def matches(root: pathlib.Path) -> bool:
  """Whether a folder is ADE20K's, or holds it."""
  return find_root(root) is not None


def open_segmentation(
  root: pathlib.Path, *, split: str, count: int | None = None
) -> SegmentationSet:
  """Images of a split that have a map, sorted or in the list's order.

  Args:
    root: `find_root` has a folder of it.
    split: `train` or `test` (ADE20K's validation set; its test set has no
      public labels).
    count: how many images to use, evenly spaced; all by default.

  Raises:
    MissingFileError: for missing folders or files.
  """
  name = f"{root} {_FOLDERS[split]}"
  folder = find_root(root)
  files = _list_files(folder, split)
  require_files([p for f in files for p in (f.image, f.label)], folder)
  return open_segmentation_files(
    files,
    read_map=read_map,
    count=count,
    kind="ade20k",
    name=name,
    classes=class_names(folder),
    class_count=CLASS_COUNT,
  )


def _list_files(root: pathlib.Path, split: str) -> list[LabelledFile]:
  folder = _FOLDERS[split]
  listing = root / _LISTS[split]
  if listing.is_file():
    names = listing.read_text(encoding="utf-8").split()
    names = [name.removeprefix("images/") for name in names]
  else:
    require_layout(
      root,
      [f"images/{folder}/*.jpg", f"annotations/{folder}/*.png"],
      what=_WHAT,
    )
    paths = sorted((root / "images" / folder).glob("*.jpg"))
    names = [f"{folder}/{path.name}" for path in paths]
  return [
    LabelledFile(
      root / "images" / name,
      (root / "annotations" / name).with_suffix(".png"),
    )
    for name in names
  ]


def class_names(root: pathlib.Path) -> tuple[str, ...] | None:
  """The first name of each class; None without objectInfo150.txt.

  Its last column holds synonyms, separated by commas in the official file and
  by semicolons in others.

  Raises:
    InputError: for a file that does not list 150 classes.
  """
  path = root / "objectInfo150.txt"
  if not path.is_file():
    return None
  lines = path.read_text(encoding="utf-8").splitlines()
  rows = [line for line in lines if re.match(r"\s*\d", line)]
  names = []
  for row in rows:
    cells = row.split("\t") if "\t" in row else row.split(",", 5)
    names.append(re.split("[;,]", cells[-1])[0].strip())
  if len(names) != CLASS_COUNT:
    raise InputError(
      f"{path} lists {len(names)} classes; expected {CLASS_COUNT}, one a line"
    )
  return tuple(names)


def read_map(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
  """Classes 0..149 of an annotation; "other" and 255 become `IGNORE`.

  Raises:
    InputError: for another kind of image.
  """
  values = read_class_map(path)
  known = (values <= CLASS_COUNT) | (values == IGNORE)
  if not known.all():
    raise InputError(
      f"{path} has a class {values[~known].max()}; expected 0 to "
      f"{CLASS_COUNT}. The full ontology's masks (ADE20K_2021) have other "
      "classes."
    )
  ignored = (values == 0) | (values == IGNORE)
  return np.where(ignored, IGNORE, values - 1).astype(np.uint8)
