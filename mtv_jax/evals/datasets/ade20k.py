"""ADE20K for scene parsing: the files of ADEChallengeData2016.

    images/{training,validation}/ADE_*.jpg
    annotations/{training,validation}/ADE_*.png     0 other, 1..150 a class
    objectInfo150.txt                               names

The lists that DINOv3's loader wants beside them (`ADE20K_object150_train.txt`,
`..._val.txt`) are followed where they are.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mtv_jax.evals.core.segmentation_metrics import IGNORE
from mtv_jax.evals.datasets import layout

CLASSES = 150
FOLDERS = {"train": "training", "test": "validation"}
_LISTS = {
  "train": "ADE20K_object150_train.txt",
  "test": "ADE20K_object150_val.txt",
}
_NAME = "ADEChallengeData2016"
_WHAT = (
  f"ADE20K's {_NAME}, as the zip of "
  "http://data.csail.mit.edu/places/ADEchallenge holds it"
)


@dataclasses.dataclass(frozen=True)
class Files:
  """An image and its map of classes."""

  image: pathlib.Path
  labels: pathlib.Path


def root_of(path: pathlib.Path) -> pathlib.Path | None:
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


def files(root: pathlib.Path, split: str) -> list[Files]:
  """The images of a split that have a map, sorted or in the list's order.

  Args:
    root: holds images/ and annotations/.
    split: `train` or `test` (ADE20K's validation set; its test set has no
      public labels).

  Raises:
    FileNotFoundError: where folders or files are missing.
  """
  folder = FOLDERS[split]
  listing = root / _LISTS[split]
  if listing.is_file():
    names = listing.read_text(encoding="utf-8").split()
    names = [name.removeprefix("images/") for name in names]
  else:
    layout.require(
      root,
      [f"images/{folder}/*.jpg", f"annotations/{folder}/*.png"],
      what=_WHAT,
    )
    paths = sorted((root / "images" / folder).glob("*.jpg"))
    names = [f"{folder}/{path.name}" for path in paths]
  found = [
    Files(
      root / "images" / name,
      (root / "annotations" / name).with_suffix(".png"),
    )
    for name in names
  ]
  lost = [p for f in found for p in (f.image, f.labels) if not p.is_file()]
  if lost:
    raise FileNotFoundError(
      f"{root}: {len(lost)} of {2 * len(found)} files of the {folder} set are "
      f"missing, such as {lost[0]}. Is it unpacked in full?"
    )
  return found


def class_names(root: pathlib.Path) -> tuple[str, ...] | None:
  """The first name of each class; None without objectInfo150.txt.

  Its last column holds synonyms, separated by commas in the official file and
  by semicolons in others.

  Raises:
    ValueError: for a file that does not list 150 classes.
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
  if len(names) != CLASSES:
    raise ValueError(
      f"{path} lists {len(names)} classes; expected {CLASSES}, one a line"
    )
  return tuple(names)


def read_map(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
  """Classes 0..149 of an annotation; "other" and 255 become `IGNORE`.

  Raises:
    ValueError: for a picture that is no such map.
  """
  values = read_values(path)
  known = (values <= CLASSES) | (values == IGNORE)
  if not known.all():
    raise ValueError(
      f"{path} has a class {values[~known].max()}; expected 0 to {CLASSES}. "
      "The full ontology's masks (ADE20K_2021) are no maps of 150 classes."
    )
  ignored = (values == 0) | (values == IGNORE)
  return np.where(ignored, IGNORE, values - 1).astype(np.uint8)


def read_values(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
  """The numbers that a PNG of one channel, or of a palette, holds.

  Raises:
    ValueError: for a picture with colours or more than 8 bits.
  """
  with PIL.Image.open(path) as image:
    if image.mode not in ("L", "P"):
      raise ValueError(
        f"{path} is a picture of mode {image.mode}; expected a map of classes "
        "with one channel of 8 bits"
      )
    return np.asarray(image)
