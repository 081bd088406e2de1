"""Paths in configs: brace ranges, globs and lists.

A path may be a brace range (`cc3m/{00000..00331}.tar`), a brace list
(`{train,restval}.tar`), a glob (`cc3m/*.tar`), several of these separated by
commas, or a list of any of them.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mtv_jax.utils.errors import InputError, MissingFileError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMOTE = re.compile(r"^[a-z][a-z0-9+.-]*://|^pipe:", re.IGNORECASE)


def expand_path(
  path: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  suffix: str = ".tar",
) -> list[Path]:
  """The existing files that `path` stands for, globs sorted, no file twice.

  Args:
    path: brace ranges, brace lists, globs, commas or a list of them.
    suffix: how such files end, for the hint in errors.

  Raises:
    MissingFileError: if a glob matches nothing, or files that a range or a
      plain name stands for are absent: it says how many and which.
    InputError: if a file appears twice, a brace is malformed or the path is
      on an object store.
  """
  files: list[Path] = []
  missing: list[str] = []
  patterns = [p for item in _as_list(path) for p in _braces(item)]
  if not patterns:
    raise InputError(f"The path {path!r} names no file.")
  for pattern in patterns:
    if _REMOTE.match(pattern):
      raise InputError(
        f"{pattern!r} is not on a file system. Records are read at random"
        " offsets: mount the bucket (gcsfuse, s3fs) or copy the files, and"
        " give the path they have then."
      )
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
      # Before the glob, so that a name with brackets in it can be given.
      files.append(Path(pattern))
    elif glob.has_magic(pattern):
      matches = sorted(glob.glob(pattern, recursive=True))
      if not matches:
        raise MissingFileError(_nothing(pattern, suffix))
      files.extend(map(Path, matches))
    else:
      missing.append(pattern)
  if missing:
    raise MissingFileError(_absent(missing, len(patterns), suffix))
  for file in files:
    if file.is_dir():
      raise IsADirectoryError(
        f"{file} is a folder; write {str(file / ('*' + suffix))!r}."
      )
  _refuse_twice(files)
  return files


def _as_list(path: str | os.PathLike | Sequence) -> list[str]:
  """Splits lists and commas, the latter only outside braces."""
  if not isinstance(path, str | os.PathLike):
    return [part for item in path for part in _as_list(item)]
  parts = re.split(r",(?![^{]*\})", os.fspath(path))
  return [part.strip() for part in parts if part.strip()]


def _braces(pattern: str) -> list[str]:
  """`a{08..10}` -> a08 a09 a10; `{x,y}z` -> xz yz; products of several."""
  if (start := pattern.find("{")) < 0:
    if "}" in pattern:
      raise InputError(f"{pattern!r} has a '}}' without a '{{'.")
    return [pattern]
  if (end := pattern.find("}", start)) < 0:
    raise InputError(f"{pattern!r} has a '{{' without a '}}'.")
  before, inside, after = (
    pattern[:start],
    pattern[start + 1 : end],
    pattern[end + 1 :],
  )
  if match := _RANGE.fullmatch(inside.strip()):
    first, last = match.groups()
    if int(last) < int(first):
      raise InputError(f"The range {{{inside}}} of {pattern!r} is empty.")
    # Leading zeros as in the first number, like bash.
    width = len(first) if first.startswith("0") else 0
    options = [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
  elif "," in inside:
    options = [option.strip() for option in inside.split(",")]
  else:
    raise InputError(
      f"{{{inside}}} of {pattern!r} is no range; write {{00000..00012}} or"
      " {a,b}."
    )
  tails = _braces(after)
  return [before + option + tail for option in options for tail in tails]


def _nothing(pattern: str, suffix: str) -> str:
  folder = Path(re.split(r"[*?\[]", pattern, maxsplit=1)[0] + "x").parent
  if not folder.is_dir():
    return f"{pattern!r} matches no file: there is no folder {folder}."
  names = sorted(entry.name for entry in folder.iterdir())
  if not names:
    return f"{pattern!r} matches no file: {folder} is empty."
  ending = sum(name.endswith(suffix) for name in names)
  return (
    f"{pattern!r} matches no file. {folder} has {ending} names in {suffix!r},"
    f" and in all {len(names)}: {_some(names)}."
  )


def _absent(missing: list[str], total: int, suffix: str) -> str:
  folder = Path(missing[0]).parent
  there = "there is no such folder"
  if folder.is_dir():
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(suffix))
    there = (
      f"it has {len(names)} in {suffix!r}, {names[0]} to {names[-1]}"
      if names
      else f"it has none in {suffix!r}"
    )
  return (
    f"{len(missing)} of {total} files are missing: {_some(missing)}. In"
    f" {folder}: {there}. Fetch the missing ones, or leave them out of the"
    " path (a glob takes what is there)."
  )


def _refuse_twice(files: list[Path]) -> None:
  seen: set[str] = set()
  for file in files:
    # Not resolve(): one system call a file and component adds up on network
    # disks, and the keys' check finds a file behind two links as well.
    name = os.path.abspath(file)
    if name in seen:
      raise InputError(
        f"{file} is in the path twice; to see data more often, raise the"
        " `weight` of its entry."
      )
    seen.add(name)


def _some(names: Sequence[str], limit: int = 8) -> str:
  shown = ", ".join(str(name) for name in names[:limit])
  more = len(names) - limit
  return f"{shown} and {more} more" if more > 0 else shown
