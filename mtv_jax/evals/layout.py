"""Whether a data set is unpacked as it should be, said in full if not."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence


def require(
  root: str | os.PathLike, expected: Sequence[str], *, what: str
) -> pathlib.Path:
  """The folder of a data set, once every expected pattern has a match.

  Args:
    root: the folder.
    expected: glob patterns under it, such as `images/training/*.jpg`.
    what: the data set's name, and where a user finds it.

  Raises:
    FileNotFoundError: with the expected tree, what of it is missing and what
      was found instead.
  """
  root = pathlib.Path(root)
  lost = [p for p in expected if not any(root.glob(p))]
  if not lost:
    return root
  if root.is_dir():
    there = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    found = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    found = found or "an empty folder"
  else:
    found = "a file" if root.exists() else "nothing there"
  tree = "\n".join(
    f"  {'missing' if p in lost else 'found  '}  {p}" for p in expected
  )
  raise FileNotFoundError(
    f"{root}: this is not {what}, or only a part of it. Expected under it:\n"
    f"{tree}\nThe folder holds: {found}"
  )
