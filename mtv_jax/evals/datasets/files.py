"""Files of data sets: layouts, image-label pairs, lists, label images."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from mtv_jax.config import foreign
from mtv_jax.data.sources import tar_scan
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError
from mtv_jax.utils.text import list_first

# An image file and its label file (depth map, class map or sweep).
LabelledFile = tuple[pathlib.Path, pathlib.Path]


def open_pairs(
  cls: type[examples.DenseSet],
  files: Sequence[LabelledFile],
  *,
  read_label: Callable[[pathlib.Path, pathlib.Path], np.ndarray],
  count: int | None,
  **fields: Any,
) -> Any:
  """Opens images with maps; `read_label` takes image and label file."""
  files = examples.subsample(files, count)
  require_files([*itertools.chain(*files)], fields["name"])
  return cls.from_records(
    files,
    read=lambda pair: examples.read_image(pair[0]),
    hash_key=lambda pair: (*(p.name for p in pair), *file_sizes(pair)),
    maps=examples.open_items(files, lambda pair: read_label(*pair)),
    **fields,
  )


def file_sizes(paths: Sequence[pathlib.Path]) -> tuple[int, ...]:
  """Sizes of files in bytes, which identify them in digests."""
  return tuple(path.stat().st_size for path in paths)


def require_files(
  paths: Sequence[pathlib.Path], name: str | os.PathLike
) -> None:
  """Raises MissingFileError if files of the data set `name` are missing."""
  missing = [path for path in paths if not path.is_file()]
  if missing:
    raise MissingFileError(
      f"{name}: {len(missing)} of {len(paths)} files are missing, such as "
      f"{missing[0]}. Is the data set unpacked in full?"
    )


def require_layout(
  root: str | os.PathLike, expected: Sequence[str], *, what: str
) -> pathlib.Path:
  """Returns a data set's folder; raises MissingFileError if files are missing.

  `expected` are glob patterns that must each match a file, such as
  `images/training/*.jpg`; `what` is the data set's name and origin.
  """
  root = pathlib.Path(root)
  states = {p: "present" if any(root.glob(p)) else "missing" for p in expected}
  if "missing" in states.values():
    tree = "\n".join(f"  {state}  {p}" for p, state in states.items())
    raise MissingFileError(
      f"{root} is not {what}, or only part of it. Expected under it:\n{tree}"
      f"\nThe folder contains: {_list_folder(root)}"
    )
  return root


def unknown_layout(
  data: str | os.PathLike, expected: str
) -> MissingFileError | NotApplicable:
  """Builds the error for data that an evaluation can't read.

  MissingFileError for a missing path; NotApplicable for an existing path or a
  tar pattern, which another evaluation may read. `expected` says, in full
  sentences, what the evaluation reads.
  """
  text = os.fspath(data)
  path = path_lib.as_path(text)
  is_pattern = ".tar" in text and any(c in text for c in "{*?[")
  if not is_pattern and not path_lib.exists(path):
    return MissingFileError(f"data={text!r} does not exist. {expected}")
  content = "a file of another kind"
  if path_lib.is_folder(path):
    content = f"the folder contains {_list_folder(path)}"
  return NotApplicable(f"data={text!r}: {content}. {expected}")


def _list_folder(root: pathlib.PurePath) -> str:
  if not path_lib.is_folder(root):
    return "nothing (it is not a folder)"
  names = path_lib.list_folder(root)
  if not path_lib.is_remote(root):
    names = [name + "/" * (root / name).is_dir() for name in names]
  return list_first(names, 8) or "nothing"


def find_list(
  root: pathlib.Path, names: Sequence[str], split: str = ""
) -> pathlib.Path | None:
  """The first existing file among `names`, which may contain `{split}`."""
  paths = [root / name.format(split=split) for name in names]
  return next((path for path in paths if path.is_file()), None)


def read_file_list(path: pathlib.Path) -> list[tuple[str, str]]:
  """Relative paths of image and depth from lines "rgb depth focal"."""
  rows = [line.split() for line in foreign.read_text(path).splitlines() if line]
  bad = [row for row in rows if len(row) not in (2, 3)]
  if bad or not rows:
    got = f"the line {' '.join(bad[0])[:80]!r}" if bad else "an empty file"
    raise InputError(f"{path}: expected lines 'rgb depth focal', got {got}")
  pairs = [(row[0].lstrip("/"), row[1].lstrip("/")) for row in rows]
  for name in itertools.chain(*pairs):
    foreign.resolve_name(path.parent, name, where=path)
  return pairs


def read_span(path: pathlib.Path, span: tar_scan.Span) -> bytes:
  """Reads the bytes of a tar member."""
  return path_lib.read_range(path_lib.origin(path), *span)


def read_channel(path: pathlib.Path, *modes: str) -> np.ndarray:
  """Reads a single-channel image, `[h, w]`.

  `modes` are the accepted Pillow modes, by default "L" (8 bits) and "I;16" (16
  bits); "P" returns palette indices.
  """
  modes, path = modes or ("L", "I;16"), path_lib.fetch(path)
  try:
    with PIL.Image.open(path) as image:
      mode, values = image.mode, np.asarray(image)
  # Pillow raises many error types for damaged files.
  except Exception as error:
    raise InputError(f"{path} can't be read as an image: {error}") from None
  if mode not in modes:
    raise InputError(
      f"{path} is an image of mode {mode}; expected one channel of mode "
      f"{' or '.join(modes)}"
    )
  return values


def read_class_map(
  path: pathlib.Path, *, largest: int, hint: str
) -> np.ndarray:
  """Reads classes, uint8 `[h, w]`, from a single-channel or palette image.

  Classes above `largest`, except `IGNORE`, raise InputError with `hint`.
  """
  values = read_channel(path, "L", "P")
  unknown = values[(values > largest) & (values != examples.IGNORE)]
  if unknown.size:
    raise InputError(
      f"{path} has class {unknown.max()}; expected 0 to {largest}, or "
      f"{examples.IGNORE}. {hint}"
    )
  return values
