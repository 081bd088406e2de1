"""Labelled images in folders.

ROOT/CLASS/*.jpg                   a set of its own
ROOT/wnid_name.JPEG                the same, flat
ROOT/train/CLASS/*.jpg             with a set to train on; the other one is
ROOT/{test,val}/CLASS/*.jpg        called test, val or validation
"""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  SUFFIXES,
  Digest,
  Labelled,
  files,
  spaced,
)
from mtv_jax.evals.datasets import layout

# Names that the folder of a split goes by, the first that is there.
SPLITS = {
  "train": ("train", "training"),
  "test": ("test", "val", "validation"),
}
_FLAT = re.compile(r"(n\d{8})_(.+)\.\w+$")


def has_splits(root: str | os.PathLike) -> bool:
  """Whether a folder holds folders of classes for training or testing."""
  return any(_split(pathlib.Path(root), split) for split in SPLITS)


def read(
  root: str | os.PathLike, *, split: str = "test", count: int | None = None
) -> Labelled:
  """The images of a folder of classes.

  Args:
    root: see the top of the file.
    split: `train` or `test`, where the folder has both; else not read.
    count: how many images, evenly spaced; all by default.

  Raises:
    FileNotFoundError: for a folder with one split and not the other.
    NotApplicable: where there are no labelled images, or those of a data set
      that another reader knows.
  """
  root = pathlib.Path(root)
  refuse_others(root)
  if has_splits(root):
    found = _split(root, split)
    if found is None:
      # Says what is expected, what is there and what is missing.
      layout.require(
        root,
        ("train/*/*", "val/*/*"),
        what="a folder of classes with a split for training and one (test, "
        "val or validation) for testing",
      )
    root = found or root
  return _read(root, split, count)


def refuse_others(root: str | os.PathLike) -> None:
  """Raises NotApplicable for a data set whose folders are no classes."""
  kind = _other_kind(pathlib.Path(root))
  if kind is not None:
    raise NotApplicable(
      f"{root} is laid out as {kind}, whose folders are no classes. "
      "Classification reads CLASS/*.jpg, wnid_name.JPEG or train/CLASS/*.jpg "
      "beside val/CLASS/*.jpg"
    )


def _other_kind(root: pathlib.Path) -> str | None:
  # Late, as these readers' modules import this one.
  from mtv_jax.evals.datasets import ade20k, kitti, navi, nyu, spair

  if nyu.is_here(root):
    return "NYU depth"
  if kitti.is_here(root) or (root / "training" / "image_2").is_dir():
    return "KITTI"
  if spair.looks_like(root):
    return "SPair-71k"
  if navi.looks_like(root):
    return "NAVI"
  if (root / "annotations").is_dir():
    return "a data set with annotations/, such as COCO or ADE20K"
  found = ade20k.root_of(root)
  if found is not None and found != root:
    return "ADE20K"
  # A glance at one folder: ImageNet's hold 1.28 million files.
  if any(map(_has_frames, (root, *(root / n for n in _folders(root)[:1])))):
    return "RGB-D sequences (7-Scenes)"
  return None


def _has_frames(folder: pathlib.Path) -> bool:
  return any(folder.glob("frame-*.pose.txt"))


def _split(root: pathlib.Path, split: str) -> pathlib.Path | None:
  """The folder of a split: its name alone does not do, COCO has class train."""
  for name in SPLITS[split]:
    if (root / name).is_dir() and _folders(root / name):
      return root / name
  return None


def _read(root: pathlib.Path, split: str, count: int | None) -> Labelled:
  folders = _folders(root)
  found = [(f, f, p) for f in folders for p in _images_in(root / f)]
  if not found:
    flat = [(p, _FLAT.match(os.path.basename(p))) for p in _images_in(root)]
    found = [(m[1], m[2], p) for p, m in flat if m]
  if not found:
    there = sorted(p.name for p in root.iterdir())[:5]
    raise NotApplicable(
      f"{root}: expected CLASS/*.jpg or flat wnid_name.JPEG, with one of "
      f"{SUFFIXES}, or train/ and val/ with a folder a class; found "
      f"{there or 'nothing'}"
    )
  names = {key: name.replace("_", " ") for key, name, _ in found}
  ids = tuple(sorted(names))
  index = {key: i for i, key in enumerate(ids)}
  found = spaced(found, count)
  digest = Digest()
  if split == "train":
    # Uncompressed images may have the names and sizes of those of the test.
    digest.add(split)
  for key, _, path in found:
    digest.add(os.path.basename(path), os.stat(path).st_size, key)
  return Labelled(
    name=str(root),
    images=files([path for _, _, path in found]),
    labels=np.asarray([index[key] for key, _, _ in found], np.int32),
    classes=tuple(names[key] for key in ids),
    ids=ids,
    digest=digest.hex(),
  )


def _folders(root: pathlib.Path) -> list[str]:
  with os.scandir(root) as entries:
    return sorted(e.name for e in entries if e.is_dir())


def _images_in(folder: pathlib.Path) -> list[str]:
  """Paths of a folder's images; strings, as ImageNet has 1.28 million."""
  with os.scandir(folder) as entries:
    return sorted(
      e.path
      for e in entries
      if e.name.lower().endswith(SUFFIXES) and e.is_file()
    )
