"""Captions from JSON: COCO's own files and Karpathy's splits."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  Captioned,
  Digest,
  captioned,
  files,
  spaced,
)

Rows = Sequence[tuple[str, list[str]]]


def coco(
  path: pathlib.Path,
  content: Mapping[str, Any],
  *,
  images: str | os.PathLike | None,
  count: int | None,
  max_captions: int | None,
) -> Captioned:
  """COCO's captions_*.json, in the order of its images."""
  names = {row["id"]: row["file_name"] for row in content["images"]}
  captions = collections.defaultdict(list)
  for row in content["annotations"]:
    if "caption" not in row:
      raise NotApplicable(
        f"{path}: annotations have {sorted(row)} and no 'caption'. Use the "
        "captions_*.json file, not the instances or key points."
      )
    captions[row["image_id"]].append(row["caption"])
  unknown = captions.keys() - names.keys()
  if unknown:
    raise ValueError(
      f"{path}: {len(unknown)} annotated image ids are not among its images, "
      f"such as {min(unknown)}"
    )
  # captions_val2017.json lies in annotations/, its images in val2017/.
  stem = path.stem.removeprefix("captions_")
  near = [path.parent.parent / stem, path.parent / stem, path.parent]
  rows = [(names[i], captions[i]) for i in names if captions[i]]
  root = _image_root(images, near, rows)
  return _read(path, spaced(rows, count), root, max_captions)


def karpathy(
  path: pathlib.Path,
  content: Mapping[str, Any],
  *,
  images: str | os.PathLike | None,
  split: str,
  count: int | None,
  max_captions: int | None,
) -> Captioned:
  """A split of Karpathy's dataset_*.json."""
  chosen = [row for row in content["images"] if row["split"] == split]
  if not chosen:
    splits = sorted({row["split"] for row in content["images"]})
    raise ValueError(f"{path} has no split {split!r}; it has {splits}")
  rows = []
  for row in chosen:
    name = pathlib.PurePosixPath(row.get("filepath", ""), row["filename"])
    rows.append((str(name), [s["raw"] for s in row["sentences"]]))
  near = [path.parent, path.parent / "images"]
  root = _image_root(images, near, rows)
  return _read(path, spaced(rows, count), root, max_captions)


def _image_root(
  given: str | os.PathLike | None, near: Iterable[pathlib.Path], rows: Rows
) -> pathlib.Path:
  """The folder that was given, or the first near one with the first file."""
  if given is not None:
    return pathlib.Path(given)
  near = list(near)
  for folder in near:
    if rows and (folder / rows[0][0]).is_file():
      return folder
  raise FileNotFoundError(
    f"the images ({rows[0][0] if rows else 'none listed'}, ...) are in none of "
    f"{[str(p) for p in near]}; say where with images="
  )


def _read(
  source: pathlib.Path,
  rows: Rows,
  root: pathlib.Path,
  max_captions: int | None,
) -> Captioned:
  paths = [root / name for name, _ in rows]
  missing = [p for p in paths if not p.is_file()]
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} images of {source} are missing, "
      f"such as {missing[0]}"
    )
  digest, captions = Digest(), []
  for (name, own), path in zip(rows, paths, strict=True):
    captions.append(tuple(own)[:max_captions])
    digest.add(name, path.stat().st_size, *captions[-1])
  return captioned(str(source), files(paths), captions, digest)
