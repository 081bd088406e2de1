"""Whether a data set is there and unpacked as it should be, said in full."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from mtv_jax.evals.core.base import NotApplicable


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
  found = _found(root)
  tree = "\n".join(
    f"  {'missing' if p in lost else 'found  '}  {p}" for p in expected
  )
  raise FileNotFoundError(
    f"{root}: this is not {what}, or only a part of it. Expected under it:\n"
    f"{tree}\nThe folder holds: {found}"
  )


def unknown(
  data: str | os.PathLike, expected: str
) -> FileNotFoundError | NotApplicable:
  """The error for data that no reader of an evaluation knows.

  A path with nothing there is a mistake; what is there may well suit another
  evaluation, and a pattern of tars always does.

  Args:
    data: a path.
    expected: what the evaluation reads, in whole sentences.
  """
  text = os.fspath(data)
  path = pathlib.Path(text)
  if path.is_dir():
    return NotApplicable(
      f"data={text!r}: the folder holds {_found(path)}. {expected}"
    )
  pattern = ".tar" in text and any(c in text for c in "{*?[")
  if path.exists() or pattern:
    return NotApplicable(f"data={text!r}: a file of another kind. {expected}")
  return FileNotFoundError(f"data={text!r}: nothing there. {expected}")


def _found(root: pathlib.Path) -> str:
  if not root.is_dir():
    return "a file" if root.exists() else "nothing there"
  there = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
  found = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
  return found or "an empty folder"
