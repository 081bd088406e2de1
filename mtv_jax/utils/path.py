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
    MissingFileError: a glob matches nothing, or files of a range or a plain
      name are missing.
    InputError: a file appears twice, a brace is malformed or the path is on an
      object store.
  """
  files: list[Path] = []
  missing: list[str] = []
  patterns = [p for item in _as_list(path) for p in _braces(item)]
  if not patterns:
    raise InputError(f"The path {path!r} names no file.")
  for pattern in patterns:
    if _REMOTE.match(pattern):
      raise InputError(
        f"{pattern!r} is not on a file system. Mount the bucket (gcsfuse, s3fs)"
        " or copy the files: records are read at random offsets."
      )
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
      # Before the glob, since a file's name may have brackets.
      files.append(Path(pattern))
    elif glob.has_magic(pattern):
      matches = sorted(glob.glob(pattern, recursive=True))
      if not matches:
        prefix = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        raise MissingFileError(
          f"{pattern!r} matches no file. "
          + _describe_folder(Path(prefix + "x").parent, suffix)
        )
      files.extend(map(Path, matches))
    else:
      missing.append(pattern)
  if missing:
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    raise MissingFileError(
      f"{len(missing)} of {len(patterns)} files are missing:"
      f" {', '.join(missing[:8])}{more}."
      f" {_describe_folder(Path(missing[0]).parent, suffix)} Add the missing"
      " files, or leave them out of the path (with a glob)."
    )
  # Not resolve(): a system call per file and component adds up on network
  # disks, and the check of the keys detects two links to a file.
  names: set[str] = set()
  for file in files:
    if file.is_dir():
      raise IsADirectoryError(
        f"{file} is a folder; write {str(file / ('*' + suffix))!r}."
      )
    if os.path.abspath(file) in names:
      raise InputError(
        f"{file} is in the path twice; to see data more often, raise the"
        " `weight` of its entry."
      )
    names.add(os.path.abspath(file))
  return files


def _as_list(path: str | os.PathLike | Sequence) -> list[str]:
  """Splits lists and commas, the latter only outside braces."""
  if not isinstance(path, str | os.PathLike):
    return [part for item in path for part in _as_list(item)]
  parts = re.split(r",(?![^{]*\})", os.fspath(path))
  return [part.strip() for part in parts if part.strip()]


def _braces(pattern: str) -> list[str]:
  """`a{08..10}` -> a08 a09 a10; `{x,y}z` -> xz yz; products of several."""
  before, opening, rest = pattern.partition("{")
  inside, closing, after = rest.partition("}")
  if not opening and "}" not in pattern:
    return [pattern]
  if not closing:
    raise InputError(f"{pattern!r} has unbalanced braces.")
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
      f"{{{inside}}} of {pattern!r} is not a range; write {{00000..00012}} or"
      " {a,b}."
    )
  tails = _braces(after)
  return [before + option + tail for option in options for tail in tails]


def _describe_folder(folder: Path, suffix: str) -> str:
  if not folder.is_dir():
    return f"There is no folder {folder}."
  names = sorted(entry.name for entry in folder.iterdir())
  if not names:
    return f"{folder} is empty."
  ending = [name for name in names if name.endswith(suffix)]
  shown = ending or names
  return (
    f"{folder} has {len(ending)} of {len(names)} names in {suffix!r},"
    f" {shown[0]} to {shown[-1]}."
  )
