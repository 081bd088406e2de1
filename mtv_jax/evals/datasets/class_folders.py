"""Labelled images in class folders, and CLIP_benchmark's folders of tars.

Class folders:

    ROOT/CLASS/*.jpg                   a single set
    ROOT/wnid_name.JPEG                a single set, flat
    ROOT/train/CLASS/*.jpg             training set
    ROOT/{test,val}/CLASS/*.jpg        test set: test, val or validation
    ROOT/FOLDER/CLASS/*.jpg            an unpacked archive with one folder

Classes are sorted by name, numbers by value: ImageNet-V2's folders 0 to 999 are
ImageNet's labels (Recht et al. 2019). If the classes are 200 WordNet ids, as in
ImageNet-A and -R (Hendrycks et al. 2021), zero-shot classification scores only
these classes by default.

CLIP_benchmark (github.com/LAION-AI):

    ROOT/{train,test}/0.tar ...     KEY.webp (jpg, png) with KEY.cls, the class
                                    index, or KEY.txt, one caption per line
    ROOT/{train,test}/nshards.txt   number of tars
    ROOT/classnames.txt             one name per line
    ROOT/zeroshot_classification_templates.txt   one per line; {c} is a name
    ROOT/dataset_type.txt           `retrieval`, or missing
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data import canvas
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.sources import listings, tar_scan
from mtv_jax.evals.core import examples, prompts
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import files, imagenet
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError

# Folder names of each split, in order of preference.
SPLITS = {
  "train": ("train", "training"),
  "test": ("test", "val", "validation"),
}
WORDNET_ID = re.compile(r"n\d{8}")
_FLAT = re.compile(r"(n\d{8})_(.+)\.\w+$")
_SUBSET_COUNT = 200  # classes in ImageNet-A, ImageNet-R and Tiny ImageNet


def has_splits(root: pathlib.Path) -> bool:
  """Whether a folder has class folders for training or testing."""
  return any(_find_split_folder(root, split) for split in SPLITS)


def are_numbers(names: Sequence[str]) -> bool:
  """Whether all class names are decimal numbers."""
  return all(map(str.isdecimal, names))


def open_folder(
  root: pathlib.Path,
  *,
  split: str,
  count: int | None,
  real_labels: str | os.PathLike | None,
) -> examples.ClassificationSet:
  """Opens class folders, see `registry.open_classification`."""
  if has_splits(root):
    folder = _find_split_folder(root, split)
    if folder is None:
      imagenet.reject_train_tar(root / imagenet.TRAIN_TAR)
      what = "a folder of classes with a training and a test split"
      files.require_layout(root, ("train/*/*", "val/*/*"), what=what)
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
      f" and val/CLASS/*.jpg (or another of {IMAGE_SUFFIXES}); got "
      f"{content or 'an empty folder'}"
    )
  if {key for key, _, _ in rows} <= {n for ns in SPLITS.values() for n in ns}:
    raise NotApplicable(f"{root}: its folders are splits, not classes")
  names = {key: name.replace("_", " ") for key, name, _ in rows}
  ids = tuple(sorted(names, key=int if are_numbers([*names]) else None))
  index = {key: i for i, key in enumerate(ids)}
  rows = examples.subsample(rows, count)
  paths = [path for _, _, path in rows]
  return examples.ClassificationSet.from_records(
    rows,
    read=lambda row: examples.read_image(row[2]),
    hash_key=lambda row: (
      os.path.basename(row[2]),
      os.stat(row[2]).st_size,
      row[0],
    ),
    # Uncompressed training and test images may share names and sizes.
    prefix=("train",) if split == "train" else (),
    name=str(root),
    labels=np.asarray([index[key] for key, _, _ in rows], np.int32),
    classes=tuple(names[key] for key in ids),
    ids=ids,
    subset=len(ids) == _SUBSET_COUNT and all(map(WORDNET_ID.fullmatch, ids)),
    accepted=None
    if real_labels is None
    else imagenet.read_real(real_labels, paths),
  )


def reject_captioned(data: Any) -> None:
  """Raises NotApplicable if a folder's first image has a `.txt` beside it."""
  is_folder = isinstance(data, str | os.PathLike) and os.path.isdir(data)
  image = listings.find_image(data) if is_folder else None
  if image and (caption := image.with_suffix(".txt")).is_file():
    raise NotApplicable(
      f"{data}: its images have captions beside them ({caption.name}), so its"
      " folders are not taken as classes"
    )


def _list_classes(root: pathlib.Path) -> list[tuple[str, str, str]]:
  """Id, name and path of each image in class folders."""
  folders = list_folders(root)
  return [(c, c, p) for c in folders for p in _list_images(root / c)]


def _find_split_folder(root: pathlib.Path, split: str) -> pathlib.Path | None:
  """Folder of a split; needs subfolders, as COCO has a class `train`."""
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
      if e.name.lower().endswith(IMAGE_SUFFIXES) and e.is_file()
    )


def has_tars(root: pathlib.Path, *splits: str) -> bool:
  """Whether a folder has CLIP_benchmark's tars for one of the splits."""
  return any(any((root / split).glob("*.tar")) for split in splits)


def is_retrieval(root: pathlib.Path) -> bool:
  """Whether CLIP_benchmark's images have captions, not classes."""
  path = root / "dataset_type.txt"
  return path.is_file() and foreign.read_text(path).strip() == "retrieval"


def open_labelled_tars(
  root: pathlib.Path, *, split: str, count: int | None
) -> examples.ClassificationSet:
  """Images of a split, with the folder's class names and templates."""
  if is_retrieval(root):
    raise NotApplicable(
      f"{root}: dataset_type.txt says 'retrieval': the images have captions "
      "but no classes"
    )
  if not (root / prompts.CLASS_NAMES).is_file():
    raise NotApplicable(
      f"{root}: expected {prompts.CLASS_NAMES}, the names of the tars' classes"
    )
  folder_prompts = prompts.read_prompts(root)
  rows = examples.subsample(_read_tars(root, split, "cls"), count)
  labels = []
  for row in rows:
    number = row.label.strip()
    if not number.isdecimal() or int(number) >= len(folder_prompts.classes):
      raise InputError(
        f"{row.tar}: {row.key}.cls is {number!r}; expected the number of a "
        f"line of classnames.txt, 0 to {len(folder_prompts.classes) - 1}"
      )
    labels.append(int(number))
  return examples.ClassificationSet.from_records(
    rows,
    read=_Record.read_image,
    hash_key=lambda row: (row.key, row.image.size, row.label.strip()),
    name=str(root / split),
    labels=np.asarray(labels, np.int32),
    classes=folder_prompts.classes,
    ids=None,
    templates=folder_prompts.templates,
  )


def open_captioned_tars(
  root: pathlib.Path,
  *,
  split: str,
  count: int | None,
  max_captions: int | None,
) -> examples.CaptionSet:
  """Images of a split with their captions."""

  def read_captions(row: _Record) -> tuple[str, ...]:
    lines = [line.strip() for line in row.label.splitlines()]
    texts = tuple(line for line in lines if line)[:max_captions]
    if not texts:
      raise InputError(f"{row.tar}: {row.key}.txt has no caption")
    return texts

  return examples.CaptionSet.from_records(
    examples.subsample(_read_tars(root, split, "txt"), count),
    read=_Record.read_image,
    captions=read_captions,
    hash_key=lambda row: (row.key, row.image.size, *read_captions(row)),
    name=str(root / split),
    split=split,
  )


class _Record(NamedTuple):
  """An image in a tar, and its .cls or .txt."""

  key: str
  tar: pathlib.Path
  image: tar_scan.Span
  label: str

  def read_image(self) -> np.ndarray:
    return canvas.decode(files.read_span(self.tar, self.image), key=self.key)


def _read_tars(root: pathlib.Path, split: str, suffix: str) -> list[_Record]:
  """Records of a split with both an image and a `suffix` file."""
  tars = _list_tars(root, split)
  # Each host reads its share of the tars; paths may differ between hosts.
  scans = shared_map(lambda tar: list(_scan_tar(tar, suffix)), tars)
  records = [
    _Record(key, tar, image, label)
    for tar, rows in zip(tars, scans, strict=True)
    for key, image, label in rows
  ]
  if not records:
    raise InputError(
      f"{root / split}: its tars have no KEY.webp (jpg, png) with KEY.{suffix}"
    )
  return records


def _list_tars(root: pathlib.Path, split: str) -> list[pathlib.Path]:
  """Tars of a split: as many as nshards.txt says, if it exists."""
  folder = root / split
  files.require_layout(root, [f"{split}/*.tar"], what="CLIP_benchmark's data")
  listing = folder / "nshards.txt"
  if not listing.is_file():
    return sorted(folder.glob("*.tar"), key=lambda p: (len(p.name), p.name))
  number = foreign.read_text(listing).strip()
  if not number.isdecimal():
    raise InputError(f"{listing}: expected the number of tars, got {number!r}")
  tars = [folder / f"{i}.tar" for i in range(int(number))]
  missing = [tar.name for tar in tars if not tar.is_file()]
  if missing:
    raise MissingFileError(
      f"{folder}: nshards.txt is {number}, but {len(missing)} tars are "
      f"missing, such as {missing[0]}"
    )
  return tars


def _scan_tar(
  tar: pathlib.Path, suffix: str
) -> Iterator[tuple[str, tar_scan.Span, str]]:
  """Key, image and label of a tar's records, ordered by first member."""
  groups: dict[str, dict[str, tar_scan.Span]] = {}
  for name, span in tar_scan.members(path_lib.fetch(tar)):
    key, extension = tar_scan.split_name(name)
    groups.setdefault(key, {})[extension] = span
  for key, members in groups.items():
    images = [e for e in members if f".{e}" in IMAGE_SUFFIXES]
    if images and suffix in members:
      try:
        label = files.read_span(tar, members[suffix]).decode("utf-8")
      except UnicodeDecodeError as error:
        raise InputError(
          f"{tar}: {key}.{suffix} is not UTF-8: {error}"
        ) from None
      yield key, members[images[0]], label


def match_splits(
  train: examples.ClassificationSet,
  test: examples.ClassificationSet,
  keep: str | None = None,
) -> examples.Splits:
  """Maps test labels to the classes of `train`; `keep`: see `open_splits`."""
  are_scenes = train.name == test.name == "scenes"
  path = os.path.realpath(test.name)
  if os.path.realpath(train.name) == path and not are_scenes:
    raise InputError(
      f"train and test are both {path}: a probe would be tested on its "
      "training images"
    )
  if train.ids is None or test.ids is None:
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    classes = max(classes, len(train.classes or ()))
    is_partial = keep == "present"
    scored = np.unique(test.labels).tolist() if is_partial else range(classes)
    return examples.Splits(train, test, classes, scored)
  index = {key: i for i, key in enumerate(train.ids)}
  if len(train.ids) == imagenet.CLASS_COUNT and not {*test.ids} & {*index}:
    # ImageNet-V2's folders are indices into the sorted WordNet ids.
    index = {str(i): i for i in range(len(train.ids))}
  missing = [key for key in test.ids if key not in index]
  if missing:
    raise InputError(
      f"{len(missing)} of {len(test.ids)} classes of {test.name} are not in "
      f"{train.name}, such as {missing[0]!r}. Is train= another data set, or "
      "unpacked only in part?"
    )
  train_indices = np.asarray([index[key] for key in test.ids], np.int32)
  labels = train_indices[test.labels]
  keep = keep or ("dataset" if test.subset else "all")
  scored_by_keep = {
    "all": range(len(train.ids)),
    "dataset": train_indices,
    "present": labels,
  }
  test = dataclasses.replace(
    test, labels=labels, ids=train.ids, classes=train.classes
  )
  scored = np.unique(scored_by_keep[keep]).tolist()
  return examples.Splits(train, test, len(train.ids), scored)
