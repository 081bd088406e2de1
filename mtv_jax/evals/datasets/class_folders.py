"""Labelled images in class folders.

ROOT/CLASS/*.jpg                   one set
ROOT/wnid_name.JPEG                one set, flat
ROOT/train/CLASS/*.jpg             training set
ROOT/{test,val}/CLASS/*.jpg        test set: test, val or validation
ROOT/FOLDER/CLASS/*.jpg            an unpacked archive; FOLDER is alone in ROOT

Classes are sorted by name, numbers by value: ImageNet-V2's folders 0 to 999 are
ImageNet's labels (Recht et al. 2019). For 200 WordNet ids, such as ImageNet-A's
and -R's (Hendrycks et al. 2021), zero-shot classification by default scores
only these classes.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import imagenet
from mtv_jax.evals.datasets.files import require_layout

# Folder names of each split, in order of preference.
SPLITS = {
  "train": ("train", "training"),
  "test": ("test", "val", "validation"),
}
WORDNET_ID = re.compile(r"n\d{8}")
_FLAT = re.compile(r"(n\d{8})_(.+)\.\w+$")
_SUBSET_COUNT = 200  # classes in ImageNet-A, ImageNet-R and Tiny ImageNet


def has_splits(root: str | os.PathLike) -> bool:
  """Whether a folder has class folders for training or testing."""
  return any(_split_folder(pathlib.Path(root), split) for split in SPLITS)


def are_numbers(names: Sequence[str]) -> bool:
  """Whether all class names are decimal numbers."""
  return all(map(str.isdecimal, names))


def open_folder(
  root: pathlib.Path,
  *,
  split: str = "test",
  count: int | None = None,
  real: str | os.PathLike | None = None,
) -> examples.ClassificationSet:
  """Opens class folders, see `registry.open_classification`."""
  if has_splits(root):
    folder = _split_folder(root, split)
    if folder is None:
      require_layout(
        root,
        ("train/*/*", "val/*/*"),
        what="a folder of classes with a training and a test split",
      )
    root = folder or root
  rows = _list_classes(root)
  folders = list_folders(root)
  if not rows and len(folders) == 1 and not _list_images(root):
    rows = _list_classes(root / folders[0])
  if not rows:
    flat = [(p, _FLAT.match(os.path.basename(p))) for p in _list_images(root)]
    rows = [(match[1], match[2], path) for path, match in flat if match]
  if not rows:
    content = sorted(p.name for p in root.iterdir())[:5]
    raise NotApplicable(
      f"{root}: expected CLASS/*.jpg, flat wnid_name.JPEG, or train/CLASS/*.jpg"
      f" and val/CLASS/*.jpg (or another of {examples.SUFFIXES}); got "
      f"{content or 'an empty folder'}"
    )
  names = {key: name.replace("_", " ") for key, name, _ in rows}
  ids = tuple(sorted(names, key=int if are_numbers([*names]) else None))
  index = {key: i for i, key in enumerate(ids)}
  rows = examples.subsample(rows, count)
  # Uncompressed training images may match the test images' names and sizes.
  prefix = ("train",) if split == "train" else ()
  paths = [path for _, _, path in rows]
  return examples.ClassificationSet.from_records(
    rows,
    read=lambda row: examples.read_image(row[2]),
    hashed=lambda row: (
      os.path.basename(row[2]),
      os.stat(row[2]).st_size,
      row[0],
    ),
    prefix=prefix,
    name=str(root),
    labels=np.asarray([index[key] for key, _, _ in rows], np.int32),
    classes=tuple(names[key] for key in ids),
    ids=ids,
    subset=len(ids) == _SUBSET_COUNT and all(map(WORDNET_ID.fullmatch, ids)),
    accepted=None if real is None else imagenet.read_real(real, paths),
  )


def _list_classes(root: pathlib.Path) -> list[tuple[str, str, str]]:
  """Id, name and path of each image in class folders."""
  folders = list_folders(root)
  return [(c, c, p) for c in folders for p in _list_images(root / c)]


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path | None:
  """Folder of a split, with subfolders: COCO has a class train."""
  for name in SPLITS[split]:
    if (root / name).is_dir() and list_folders(root / name):
      return root / name
  return None


def list_folders(root: pathlib.Path) -> list[str]:
  """Names of subfolders, sorted."""
  with os.scandir(root) as entries:
    return sorted(e.name for e in entries if e.is_dir())


def _list_images(folder: pathlib.Path) -> list[str]:
  """Image paths; strings to save memory, as ImageNet has 1.28 million."""
  with os.scandir(folder) as entries:
    return sorted(
      e.path
      for e in entries
      if e.name.lower().endswith(examples.SUFFIXES) and e.is_file()
    )
