"""Reader of SPair-71k: key points of objects of one class (Min et al. 2019).

    ROOT/JPEGImages/CLASS/2008_006987.jpg
    ROOT/PairAnnotation/test/000001-2008_006987-2010_001367:sheep.json

A pair's file lists the key points that both images show, as whole pixels.
The names contain colons, which some archivers replace, so nothing is read from
a name.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from mtv_jax.evals.core.examples import (
  Digest,
  KeyPointPair,
  KeyPointPairs,
  open_images,
)
from mtv_jax.evals.datasets.files import require_files, require_layout
from mtv_jax.utils.errors import InputError, did_you_mean

SPLITS = ("trn", "val", "test")


def matches(root: pathlib.Path) -> bool:
  """Whether a folder is laid out as SPair-71k."""
  return (root / "PairAnnotation").is_dir()


def open_key_points(root: str | pathlib.Path, *, split: str) -> KeyPointPairs:
  """All pairs of a split, sorted by their number.

  Args:
    root: the folder `SPair-71k`.
    split: `trn`, `val` or `test`.

  Raises:
    MissingFileError: for a part that is missing.
    InputError: for an annotation of another form.
  """
  if split not in SPLITS:
    raise InputError(
      f"SPair-71k: split={split!r}. {did_you_mean(split, SPLITS)}"
    )
  root = require_layout(
    root,
    [f"PairAnnotation/{split}/*.json", "JPEGImages/*/*.jpg"],
    what="SPair-71k (cvlab.postech.ac.kr)",
  )
  files = sorted((root / "PairAnnotation" / split).glob("*.json"))
  rows = sorted((_row(file) for file in files), key=lambda r: r["pair_id"])
  folder = root / "JPEGImages"
  paths = sorted(
    {
      folder / row["category"] / row[name]
      for row in rows
      for name in ("src_imname", "trg_imname")
    }
  )
  require_files(paths, root)
  index = {path: i for i, path in enumerate(paths)}
  sizes = [path.stat().st_size for path in paths]
  digest, pairs = Digest(), []
  for row in rows:
    first, second = (
      index[folder / row["category"] / row[name]]
      for name in ("src_imname", "trg_imname")
    )
    digest.add(json.dumps(row, sort_keys=True), sizes[first], sizes[second])
    pairs.append(_pair(row, first, second))
  return KeyPointPairs(
    name=str(root),
    layout="spair",
    images=open_images(paths),
    pairs=tuple(pairs),
    digest=digest.hex(),
    about={"split": split, "key_points": "those that both pictures show"},
  )


_KEYS = (
  "pair_id",
  "category",
  "viewpoint_variation",
  "src_imname",
  "trg_imname",
  "src_imsize",
  "trg_imsize",
  "src_kps",
  "trg_kps",
  "trg_bndbox",
)


def _row(path: pathlib.Path) -> dict[str, Any]:
  try:
    row = json.loads(path.read_bytes())
    row = {key: row[key] for key in _KEYS}
  except (ValueError, TypeError) as error:
    raise InputError(
      f"{path} is not an annotation of a pair: {error}"
    ) from None
  except KeyError as error:
    raise InputError(
      f"{path} has no {error}; expected the keys {', '.join(_KEYS)}"
    ) from None
  counts = [len(row[key]) for key in ("src_kps", "trg_kps")]
  if counts[0] != counts[1]:
    raise InputError(
      f"{path}: {counts[0]} key points in the first image and {counts[1]} in "
      "the second; a pair lists the same points of both"
    )
  return row


def _pair(row: dict[str, Any], first: int, second: int) -> KeyPointPair:
  points = [
    np.array(row[key], np.float64).reshape(-1, 2)
    for key in ("src_kps", "trg_kps")
  ]
  return KeyPointPair(
    category=row["category"],
    viewpoint=int(row["viewpoint_variation"]),
    first=first,
    second=second,
    first_points=points[0],
    second_points=points[1],
    second_box=np.array(row["trg_bndbox"], np.float64),
    # Width, height, channels.
    first_side=max(row["src_imsize"][:2]),
    second_side=max(row["trg_imsize"][:2]),
  )
