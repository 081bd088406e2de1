"""ADE20K scene parsing (ADEChallengeData2016).

    images/{training,validation}/ADE_*.jpg
    annotations/{training,validation}/ADE_*.png     0: unlabelled, 1..150: class
    objectInfo150.txt                               class names

DINOv3's lists `ADE20K_object150_{train,val}.txt`, if beside them, select the
images.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np
from jaxtyping import UInt8

from mtv_jax.config import foreign
from mtv_jax.evals.core.examples import IGNORE, SegmentationSet
from mtv_jax.evals.datasets import files
from mtv_jax.evals.datasets.files import LabelledFile
from mtv_jax.utils.errors import InputError

CLASS_COUNT = 150
# Folder and list of each split. The labels of ADE20K's test set aren't public.
_SPLITS = {
  "train": ("training", "ADE20K_object150_train.txt"),
  "test": ("validation", "ADE20K_object150_val.txt"),
}
_NAME = "ADEChallengeData2016"


def find_root(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with images/ and annotations/: `path`, or a folder in it.

  A folder with the release's name may be incomplete. COCO may have both folders
  too, but its annotations are JSON.
  """
  for root in (path, path / _NAME):
    if root.name == _NAME and root.is_dir():
      return root
    both = (root / "images").is_dir() and (root / "annotations").is_dir()
    if both and not any((root / "annotations").glob("*.json")):
      return root
  return None


def matches(root: pathlib.Path) -> bool:
  """Whether a folder is or contains ADE20K."""
  return find_root(root) is not None


def open_segmentation(
  root: pathlib.Path, *, split: str, count: int | None = None
) -> SegmentationSet:
  """Images of a split with maps, sorted or in the list's order."""
  folder = find_root(root)
  return files.open_pairs(
    SegmentationSet,
    _list_files(folder, *_SPLITS[split]),
    read_label=lambda pair: read_map(pair.label),
    count=count,
    kind="ade20k",
    name=f"{root} {_SPLITS[split][0]}",
    classes=class_names(folder),
    class_count=CLASS_COUNT,
  )


def _list_files(
  root: pathlib.Path, folder: str, listing: str
) -> list[LabelledFile]:
  if (root / listing).is_file():
    names = foreign.read_text(root / listing).split()
    names = [name.removeprefix("images/") for name in names]
    if not names:
      raise InputError(f"{root / listing} names no image; expected one a line")
    for name in names:
      foreign.resolve_name(root, name, where=root / listing)
  else:
    files.require_layout(
      root,
      [f"images/{folder}/*.jpg", f"annotations/{folder}/*.png"],
      what=f"ADE20K's {_NAME} (data.csail.mit.edu/places/ADEchallenge)",
    )
    paths = sorted((root / "images" / folder).glob("*.jpg"))
    names = [f"{folder}/{path.name}" for path in paths]
  maps = root / "annotations"
  return [
    LabelledFile(root / "images" / name, (maps / name).with_suffix(".png"))
    for name in names
  ]


def class_names(root: pathlib.Path) -> tuple[str, ...] | None:
  """The first name of each class; None if objectInfo150.txt is missing.

  Its last column has synonyms, separated by commas in the official file and by
  semicolons elsewhere.
  """
  path = root / "objectInfo150.txt"
  if not path.is_file():
    return None
  names = []
  for line in foreign.read_text(path).splitlines():
    if re.match(r"\s*\d", line):
      cells = line.split("\t") if "\t" in line else line.split(",", 5)
      names.append(re.split("[;,]", cells[-1])[0].strip())
  if len(names) != CLASS_COUNT:
    raise InputError(
      f"{path} lists {len(names)} classes; expected {CLASS_COUNT}, one per line"
    )
  return tuple(names)


def read_map(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
  """Maps an annotation's 1..150 to classes 0..149; 0 and 255 to `IGNORE`."""
  values = files.read_class_map(
    path,
    largest=CLASS_COUNT,
    hint="The masks of the full ontology (ADE20K_2021) have other classes.",
  )
  ignored = (values == 0) | (values == IGNORE)
  return np.where(ignored, IGNORE, values - 1).astype(np.uint8)
