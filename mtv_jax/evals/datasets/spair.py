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
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.examples import KeyPointPair, KeyPointPairs
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError, check_choice

SPLITS = ("trn", "val", "test")
_KEYS = (
  "pair_id", "category", "viewpoint_variation", "src_imname", "trg_imname",
  "src_imsize", "trg_imsize", "src_kps", "trg_kps", "trg_bndbox",
)  # fmt: skip


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
  rows = sorted(map(_read_row, paths), key=lambda row: int(row["pair_id"]))
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
  content = foreign.read_untrusted_json(path)
  content = content if isinstance(content, dict) else {}
  missing = [key for key in _KEYS if key not in content]
  if missing:
    raise InputError(
      f"{path} has no {missing[0]!r}; expected the keys {', '.join(_KEYS)}"
    )
  row = {key: content[key] for key in _KEYS}
  try:
    counts = len(row["src_kps"]), len(row["trg_kps"])
    for key in ("category", "src_imname", "trg_imname"):
      foreign.resolve_name("JPEGImages", row[key], where=path)
    int(row["pair_id"])
    for side in ("src", "trg"):
      size, points = row[f"{side}_imsize"], row[f"{side}_kps"]
      if not all(type(n) is int and n > 0 for n in size) or len(size) < 2:
        raise ValueError(f"{side}_imsize is {size!r}, not positive sizes")
      if not np.isfinite(np.array(points, np.float64)).all():
        raise ValueError(f"{side}_kps has non-finite values")
    box = np.array(row["trg_bndbox"], np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
      raise ValueError(f"trg_bndbox is {row['trg_bndbox']}, not 4 numbers")
    if counts[0] == counts[1]:
      _make_pair(row, 0, 0)
  except InputError:
    raise
  except (TypeError, ValueError, OverflowError, LookupError) as error:
    raise InputError(f"{path}: {type(error).__name__}: {error}") from None
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
    viewpoint=int(row["viewpoint_variation"]),
    first=first,
    second=second,
    first_points=first_points,
    second_points=second_points,
    second_box=np.array(row["trg_bndbox"], np.float64),
    # Width, height, channels.
    first_side=max(row["src_imsize"][:2]),
    second_side=max(row["trg_imsize"][:2]),
  )
