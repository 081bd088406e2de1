"""CLIP_benchmark's tar folders (github.com/LAION-AI).

ROOT/{train,test}/0.tar ...                  KEY.webp (jpg, png) with KEY.cls,
                                             or with KEY.txt for retrieval
ROOT/{train,test}/nshards.txt                number of tars
ROOT/classnames.txt                          one name per line
ROOT/zeroshot_classification_templates.txt   one template per line, {c}: name
ROOT/dataset_type.txt                        `retrieval`, or missing

KEY.cls is the class index; KEY.txt has one caption per line.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data import canvas
from mtv_jax.data.sources import tar_scan
from mtv_jax.evals.core import examples, prompts
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError, MissingFileError


class _Record(NamedTuple):
  """An image in a tar, and its .cls or .txt."""

  key: str
  tar: pathlib.Path
  image: tar_scan.Span
  label: str


def matches(root: pathlib.Path) -> bool:
  """Whether a folder has tars in a split folder."""
  return any(has_split(root, split) for split in ("train", "test"))


def has_split(root: pathlib.Path, split: str) -> bool:
  """Whether a folder has tars of a split."""
  return any((root / split).glob("*.tar"))


def is_retrieval(root: pathlib.Path) -> bool:
  """Whether the images have captions, not classes."""
  path = root / "dataset_type.txt"
  return path.is_file() and foreign.read_text(path).strip() == "retrieval"


def open_classification(
  root: pathlib.Path, *, split: str, count: int | None = None
) -> examples.ClassificationSet:
  """Images of a split, with the folder's class names and templates."""
  if is_retrieval(root):
    raise NotApplicable(
      f"{root}: dataset_type.txt is 'retrieval', whose images have captions "
      "and no classes"
    )
  given = prompts.read_prompts(root)
  rows = examples.subsample(_read_records(root, split, "cls"), count)
  labels = []
  for row in rows:
    number = row.label.strip()
    if not number.isdecimal() or int(number) >= len(given.classes):
      raise InputError(
        f"{row.tar}: {row.key}.cls is {number!r}; expected the number of a "
        f"line of classnames.txt, 0 to {len(given.classes) - 1}"
      )
    labels.append(int(number))
  return examples.ClassificationSet.from_records(
    rows,
    read=_read_image,
    hashed=lambda row: (row.key, row.image.size, row.label.strip()),
    name=str(root / split),
    labels=np.asarray(labels, np.int32),
    classes=given.classes,
    ids=None,
    templates=given.templates,
  )


def open_captions(
  root: pathlib.Path,
  *,
  split: str,
  count: int | None = None,
  max_captions: int | None = None,
) -> examples.CaptionSet:
  """Images of a split with their captions."""

  def captions(row: _Record) -> tuple[str, ...]:
    lines = [line.strip() for line in row.label.splitlines()]
    texts = tuple(line for line in lines if line)[:max_captions]
    if not texts:
      raise InputError(f"{row.tar}: {row.key}.txt has no caption")
    return texts

  return examples.CaptionSet.from_records(
    examples.subsample(_read_records(root, split, "txt"), count),
    read=_read_image,
    captions=captions,
    hashed=lambda row: (row.key, row.image.size, *captions(row)),
    name=str(root / split),
    split=split,
  )


def _read_image(row: _Record) -> np.ndarray:
  return canvas.decode(files.read_span(row.tar, row.image), key=row.key)


def _read_records(root: pathlib.Path, split: str, suffix: str) -> list[_Record]:
  """Records of a split with both an image and a `suffix` file."""
  records = [
    row for tar in _list_tars(root, split) for row in _scan(tar, suffix)
  ]
  if not records:
    raise InputError(
      f"{root / split}: its tars have no KEY.webp (jpg, png) with KEY.{suffix}"
    )
  return records


def _list_tars(root: pathlib.Path, split: str) -> list[pathlib.Path]:
  """Tars of a split; their number is in nshards.txt, if it exists."""
  folder = root / split
  if not has_split(root, split):
    files.require_layout(root, [f"{split}/*.tar"], what="CLIP_benchmark's data")
  listing = folder / "nshards.txt"
  if not listing.is_file():
    return sorted(folder.glob("*.tar"), key=lambda p: (len(p.name), p.name))
  number = foreign.read_text(listing).strip()
  if not number.isdecimal():
    raise InputError(f"{listing}: expected a number of tars, got {number!r}")
  tars = [folder / f"{i}.tar" for i in range(int(number))]
  missing = [tar.name for tar in tars if not tar.is_file()]
  if missing:
    raise MissingFileError(
      f"{folder}: nshards.txt is {number}, and {len(missing)} tars are "
      f"missing, such as {missing[0]}"
    )
  return tars


def _scan(tar: pathlib.Path, suffix: str) -> Iterator[_Record]:
  """Records of a tar, in the order of their first members."""
  groups: dict[str, dict[str, tar_scan.Span]] = {}
  for name, span in tar_scan.members(tar):
    key, extension = tar_scan.split_name(name)
    groups.setdefault(key, {})[extension] = span
  for key, members in groups.items():
    images = [e for e in members if f".{e}" in examples.SUFFIXES]
    if images and suffix in members:
      try:
        label = files.read_span(tar, members[suffix]).decode("utf-8")
      except UnicodeDecodeError as error:
        raise InputError(
          f"{tar}: {key}.{suffix} is not UTF-8 text: {error}"
        ) from None
      yield _Record(key, tar, members[images[0]], label)
