"""SPair-71k: keypoints of object pairs within a class (Min et al. 2019).

    ROOT/JPEGImages/CLASS/2008_006987.jpg
    ROOT/PairAnnotation/test/000001-2008_006987-2010_001367:sheep.json

A pair's file lists the keypoints visible in both images, as integer pixels.
File names are not parsed, since some archivers replace their colons.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.config.options import PositiveInt
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.examples import KeyPointPair, KeyPointPairs
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError, check_choice

SPLITS = ("trn", "val", "test")
_SIZE = tuple[PositiveInt, PositiveInt, PositiveInt]  # Width, height, channels.
_POINTS = list[tuple[float, float]]
_FIELDS = {
  "pair_id": int, "category": str, "viewpoint_variation": int,
  "src_imname": str, "trg_imname": str, "src_imsize": _SIZE,
  "trg_imsize": _SIZE, "src_kps": _POINTS, "trg_kps": _POINTS,
  "trg_bndbox": tuple[float, float, float, float],
}  # fmt: skip


def matches(root: pathlib.Path) -> bool:
  """Whether a folder is laid out as SPair-71k."""
  return (root / "PairAnnotation").is_dir()


def open_key_points(root: pathlib.Path, *, split: str) -> KeyPointPairs:
  """All pairs of a split (`trn`, `val` or `test`), sorted by number."""
  check_choice("SPair-71k: split", split, SPLITS)
  files.require_layout(
    root,
    [f"PairAnnotation/{split}/*.json", "JPEGImages/*/*.jpg"],
    what="SPair-71k (cvlab.postech.ac.kr)",
  )
  paths = sorted((root / "PairAnnotation" / split).glob("*.json"))
  rows = sorted(map(_read_row, paths), key=lambda row: row["pair_id"])
  pair_images = [_image_paths(root, row) for row in rows]
  images = sorted({path for pair in pair_images for path in pair})
  files.require_files(images, root)
  index = {path: i for i, path in enumerate(images)}
  pairs, hash_keys = [], []
  for row, pair in zip(rows, pair_images, strict=True):
    pairs.append(_make_pair(row, *(index[path] for path in pair)))
    content = json.dumps(row, sort_keys=True)
    hash_keys.append((content, *files.file_sizes(pair)))
  return KeyPointPairs(
    name=str(root),
    layout="spair",
    images=examples.open_items(images),
    pairs=tuple(pairs),
    digest=examples.hash_rows(hash_keys),
    metadata={
      "dataset": "SPair-71k",
      "split": split,
      "key_points": "those that both images show",
    },
  )


def _image_paths(root: pathlib.Path, row: dict[str, Any]) -> list[pathlib.Path]:
  folder = root / "JPEGImages" / row["category"]
  return [folder / row[name] for name in ("src_imname", "trg_imname")]


def _read_row(path: pathlib.Path) -> dict[str, Any]:
  content = foreign.read_object(path)
  with foreign.errors_of(path):
    for key, kind in _FIELDS.items():
      foreign.read_field(content, key, kind)
  row = {key: content[key] for key in _FIELDS}
  for key in ("category", "src_imname", "trg_imname"):
    foreign.resolve_name("JPEGImages", row[key], where=path)
  counts = len(row["src_kps"]), len(row["trg_kps"])
  if counts[0] != counts[1]:
    raise InputError(
      f"{path}: {counts[0]} keypoints in the first image and {counts[1]} in "
      "the second; a pair lists the same keypoints in both"
    )
  return row


def _make_pair(row: dict[str, Any], first: int, second: int) -> KeyPointPair:
  first_points, second_points = (
    np.array(row[key], np.float64).reshape(-1, 2)
    for key in ("src_kps", "trg_kps")
  )
  return KeyPointPair(
    category=row["category"],
    viewpoint=row["viewpoint_variation"],
    first=first,
    second=second,
    first_points=first_points,
    second_points=second_points,
    second_box=np.array(row["trg_bndbox"], np.float64),
    first_side=max(row["src_imsize"][:2]),
    second_side=max(row["trg_imsize"][:2]),
  )
