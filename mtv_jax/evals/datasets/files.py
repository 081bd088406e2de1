"""Files of data sets: checks of folders, pairs of files, PNGs of values."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  DepthMaps,
  DepthSet,
  Digest,
  LabelMaps,
  SegmentationSet,
  open_images,
  subsample,
)
from mtv_jax.utils.errors import InputError, MissingFileError


@dataclasses.dataclass(frozen=True)
class LabelledFile:
  """An image file and the file of its labels: a depth map, a map of classes."""

  image: pathlib.Path
  label: pathlib.Path


def select_files(
  files: Sequence[LabelledFile], count: int | None, *, name: str
) -> tuple[list[LabelledFile], str]:
  """Evenly spaced files of a data set and the hash of their names and sizes.

  Args:
    files: all there are.
    count: how many to select; None for all.
    name: of the data set, for the error.

  Raises:
    MissingFileError: if some of the selected files are missing.
  """
  files = subsample(files, count)
  require_files([p for f in files for p in (f.image, f.label)], name)
  digest = Digest()
  for f in files:
    sizes = f.image.stat().st_size, f.label.stat().st_size
    digest.add(f.image.name, f.label.name, *sizes)
  return files, digest.hex()


def open_depth_files(
  files: Sequence[LabelledFile],
  *,
  read_depth: Callable[[LabelledFile], np.ndarray],
  count: int | None,
  **fields: str,
) -> DepthSet:
  """A depth set of files.

  Args:
    files: all there are.
    read_depth: from a pair of files to metres.
    count: how many to use, evenly spaced; None for all.
    **fields: kind, name and source of the `DepthSet`.
  """
  files, digest = select_files(files, count, name=fields["name"])
  return DepthSet(
    images=open_images([f.image for f in files]),
    depths=DepthMaps(lambda i: read_depth(files[i]), len(files)),
    digest=digest,
    **fields,
  )


def open_segmentation_files(
  files: Sequence[LabelledFile],
  *,
  read_map: Callable[[pathlib.Path], np.ndarray],
  count: int | None,
  **fields: Any,
) -> SegmentationSet:
  """A segmentation set of files; arguments as of `open_depth_files`."""
  files, digest = select_files(files, count, name=fields["name"])
  return SegmentationSet(
    images=open_images([f.image for f in files]),
    maps=LabelMaps(lambda i: read_map(files[i].label), len(files)),
    digest=digest,
    **fields,
  )


def require_files(
  paths: Sequence[pathlib.Path], name: str | os.PathLike
) -> None:
  """Raises MissingFileError if files of the data set `name` are missing."""
  lost = [path for path in paths if not path.is_file()]
  if lost:
    raise MissingFileError(
      f"{name}: {len(lost)} of {len(paths)} files are missing, such as "
      f"{lost[0]}. Is the data set unpacked in full?"
    )


def require_layout(
  root: str | os.PathLike, expected: Sequence[str], *, what: str
) -> pathlib.Path:
  """The folder of a data set, once every expected pattern has a match.

  Args:
    root: the folder.
    expected: glob patterns under it, such as `images/training/*.jpg`.
    what: the data set's name, and where a user gets it.

  Raises:
    MissingFileError: with the expected tree, the part of it that is missing
      and what the folder holds instead.
  """
  root = pathlib.Path(root)
  lost = [p for p in expected if not any(root.glob(p))]
  if not lost:
    return root
  tree = "\n".join(
    f"  {'missing' if p in lost else 'present'}  {p}" for p in expected
  )
  raise MissingFileError(
    f"{root}: this is not {what}, or only a part of it. Expected under it:\n"
    f"{tree}\nThe folder holds: {_list_folder(root)}"
  )


def unknown_layout(
  data: str | os.PathLike, expected: str
) -> MissingFileError | NotApplicable:
  """The error for data that no reader of an evaluation recognises.

  A path with nothing there is a mistake. Other data may well suit another
  evaluation, and a pattern of tars always does.

  Args:
    data: a path.
    expected: what the evaluation reads, in whole sentences.
  """
  text = os.fspath(data)
  path = pathlib.Path(text)
  if path.is_dir():
    return NotApplicable(
      f"data={text!r}: the folder holds {_list_folder(path)}. {expected}"
    )
  pattern = ".tar" in text and any(c in text for c in "{*?[")
  if path.exists() or pattern:
    return NotApplicable(f"data={text!r}: a file of another kind. {expected}")
  return MissingFileError(f"data={text!r}: nothing there. {expected}")


def _list_folder(root: pathlib.Path) -> str:
  if not root.is_dir():
    return "a file" if root.exists() else "nothing there"
  names = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
  text = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
  return text or "an empty folder"


def read_file_list(path: pathlib.Path) -> list[tuple[str, str]]:
  """Image and depth of each line "rgb depth focal", as paths from a root.

  Raises:
    InputError: for another kind of file.
  """
  rows = [line.split() for line in path.read_text().splitlines() if line]
  bad = [row for row in rows if len(row) not in (2, 3)]
  if bad or not rows:
    got = f"the line {' '.join(bad[0])!r}" if bad else "an empty file"
    raise InputError(f"{path}: expected lines 'rgb depth focal', got {got}")
  return [(row[0].lstrip("/"), row[1].lstrip("/")) for row in rows]


def read_png_values(
  path: pathlib.Path, *dtypes: type[np.integer]
) -> np.ndarray:
  """The values of a PNG with one channel, `[h, w]`.

  Args:
    path: the file.
    dtypes: that are accepted, `np.uint8` and `np.uint16` by default.

  Raises:
    InputError: for a damaged file, one with colours or of another dtype.
  """
  dtypes = dtypes or (np.uint8, np.uint16)
  data = np.frombuffer(path.read_bytes(), np.uint8)
  values = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
  if values is None or values.ndim != 2 or values.dtype not in dtypes:
    got = "no image" if values is None else f"{values.dtype} {values.shape}"
    names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    raise InputError(
      f"{path}: expected a grey PNG of one channel, {names}; got {got}"
    )
  return values


def read_class_map(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
  """The numbers that a PNG of one channel, or of a palette, holds.

  Raises:
    InputError: for an image with colours or more than 8 bits.
  """
  with PIL.Image.open(path) as image:
    if image.mode not in ("L", "P"):
      raise InputError(
        f"{path} is an image of mode {image.mode}; expected a map of classes "
        "with one channel of 8 bits"
      )
    return np.asarray(image)
