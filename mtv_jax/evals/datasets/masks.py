"""Data sets of segmentation masks: ADE20K (classes), DAVIS 2017 (objects).

ADE20K scene parsing, in ADEChallengeData2016/:

    images/{training,validation}/ADE_*.jpg
    annotations/{training,validation}/ADE_*.png     0: unlabelled, 1..150: class
    objectInfo150.txt                               class names

DINOv3's lists `ADE20K_object150_{train,val}.txt`, if beside them, select the
images.

DAVIS (Pont-Tuset et al. 2017), semi-supervised, 480p, in DAVIS/:

    ImageSets/2017/val.txt              video names
    JPEGImages/480p/NAME/00000.jpg
    Annotations/480p/NAME/00000.png     palette: 0 background, 1.. objects

Mask value 255 is background, as in the official evaluation.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError

CLASS_COUNT = 150
# Folder and list of each split. The labels of ADE20K's test set aren't public.
_SPLITS = {
  "train": ("training", "ADE20K_object150_train.txt"),
  "test": ("validation", "ADE20K_object150_val.txt"),
}
_ADE20K = "ADEChallengeData2016"
_IMAGES, _MASKS = "JPEGImages/480p", "Annotations/480p"
_VIDEOS = "ImageSets/2017/val.txt"
# Scored frames exclude the first, whose masks are given, and the last.
MIN_FRAMES = 3


def find_ade20k(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with images/ and annotations/: `path`, or a folder in it.

  A folder with the release's name may be incomplete. COCO may have both folders
  too, but its annotations are JSON.
  """
  for root in (path, path / _ADE20K):
    if root.name == _ADE20K and root.is_dir():
      return root
    has_both = (root / "images").is_dir() and (root / "annotations").is_dir()
    if has_both and not any((root / "annotations").glob("*.json")):
      return root
  return None


def open_ade20k(
  path: pathlib.Path, *, split: str, count: int | None
) -> examples.SegmentationSet:
  """Images of a split with maps, sorted or in the list's order."""
  root, (folder, listing) = find_ade20k(path), _SPLITS[split]
  if (root / listing).is_file():
    names = foreign.read_text(root / listing).split()
    names = [name.removeprefix("images/") for name in names]
    if not names:
      raise InputError(f"{root / listing} names no image; use one per line")
    for name in names:
      foreign.resolve_name(root, name, where=root / listing)
  else:
    files.require_layout(
      root,
      [f"images/{folder}/*.jpg", f"annotations/{folder}/*.png"],
      what=f"ADE20K's {_ADE20K} (data.csail.mit.edu/places/ADEchallenge)",
    )
    paths = sorted((root / "images" / folder).glob("*.jpg"))
    names = [f"{folder}/{path.name}" for path in paths]
  images, maps = root / "images", root / "annotations"
  return files.open_pairs(
    examples.SegmentationSet,
    [(images / name, (maps / name).with_suffix(".png")) for name in names],
    read_label=lambda _, label: read_ade20k_map(label),
    count=count,
    kind="ade20k",
    name=f"{path} {listing}",
    classes=read_ade20k_names(root),
    class_count=CLASS_COUNT,
  )


def read_ade20k_names(root: pathlib.Path) -> tuple[str, ...] | None:
  """The first name of each class; None if objectInfo150.txt is missing.

  The file's last column has synonyms, separated by commas in the official file
  and by semicolons elsewhere.
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


def read_ade20k_map(path: pathlib.Path) -> np.ndarray:
  """Maps an annotation's 1..150 to classes 0..149; 0 and 255 to `IGNORE`."""
  values = files.read_class_map(
    path,
    largest=CLASS_COUNT,
    hint="The masks of the full ontology (ADE20K_2021) have other classes.",
  )
  is_ignored = (values == 0) | (values == examples.IGNORE)
  return np.where(is_ignored, examples.IGNORE, values - 1).astype(np.uint8)


def find_davis(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with JPEGImages/480p: `path`, or DAVIS in it."""
  roots = (path, path / "DAVIS")
  return next((root for root in roots if (root / _IMAGES).is_dir()), None)


def open_davis(path: pathlib.Path, *, count: int | None) -> examples.VideoSet:
  """Validation videos with masks."""
  folder = find_davis(path)
  files.require_layout(
    folder,
    [_VIDEOS, f"{_IMAGES}/*/*.jpg", f"{_MASKS}/*/*.png"],
    what="DAVIS 2017's TrainVal at 480p (davischallenge.org)",
  )
  names = foreign.read_text(folder / _VIDEOS).split()
  if not names:
    raise InputError(f"{folder / _VIDEOS} names no video; use one per line")
  rows, videos = [], []
  for name in examples.subsample(names, count):
    foreign.resolve_name(folder / _IMAGES, name, where=folder / _VIDEOS)
    frames = sorted((folder / _IMAGES / name).glob("*.jpg"))
    masks = [folder / _MASKS / name / f"{f.stem}.png" for f in frames]
    if len(frames) < MIN_FRAMES:
      raise InputError(
        f"{folder / _IMAGES / name} has {len(frames)} frames (*.jpg); expected "
        f"{MIN_FRAMES} or more, as the first and the last are not scored"
      )
    files.require_files(masks, folder)
    for frame, mask in zip(frames, masks, strict=True):
      sizes = frame.stat().st_size, mask.stat().st_size
      rows.append((name, frame.name, *sizes))
    num_objects = int(_read_mask(masks[0]).max())
    if not num_objects:
      raise InputError(f"{masks[0]} has no object to propagate")
    images = examples.open_items(frames)
    masks = examples.open_items(masks, _read_mask)
    videos.append(examples.Video(name, images, masks, num_objects))
  return examples.VideoSet(
    kind="davis",
    name=f"{folder} val",
    videos=tuple(videos),
    digest=examples.hash_rows(rows),
  )


def _read_mask(path: pathlib.Path) -> np.ndarray:
  mask = files.read_channel(path, "P", "L")
  return np.where(mask == 255, 0, mask).astype(np.uint8)
