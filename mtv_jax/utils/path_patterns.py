"""Path patterns that expand to many files.

A pattern is a brace range (`cc3m/{00000..00331}.tar`), a brace list
(`{train,restval}.tar`), a glob (`cc3m/*.tar`), several of these separated by
commas, or a list of them; for local files, buckets and hub data sets,
`hf://datasets/ORG/NAME[@REVISION]/PATH`.
"""

import fnmatch
import functools
import glob
import itertools
import math
import os
import re
from collections.abc import (
  Callable,
  Iterator,
  Mapping,
  MutableMapping,
  Sequence,
)
from pathlib import Path, PurePath
from typing import Any

from mtv_jax.utils import errors, hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.path import AnyPath, client
from mtv_jax.utils.text import list_first

_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_FILES = 1_000_000  # Files per path; more are assumed to be a typo.
_MAX_TEXT = 1 << 20  # Characters of a pattern, braces included.
_MAX_NAME = 4096  # Characters of one file's path.
# A revision is a name without a slash, or refs/convert/parquet and the like.
_HUB = re.compile(
  r"hf://(datasets/[^/@]+/[^/@]+)(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?((?:/[^@]*)?)"
)
# Maps the names in a folder to the store's metadata.
Listing = Callable[[str], Mapping[str, Mapping[str, Any]]]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def expand_path(
  path: AnyPath | Sequence[AnyPath],
  *,
  suffix: str = ".tar",
  listing: Listing | None = None,
) -> list[PurePath]:
  """Expands `path` to existing files, globs sorted, without duplicates.

  `suffix` is the usual file ending, for hints in errors; `listing` lists bucket
  folders.

  A hub revision is resolved to its commit when the process first uses it.

  Raises MissingFileError if a file is missing or a glob matches nothing;
  InputError if a file appears twice or is a folder, a pipe or a device, or if a
  brace is malformed or expands to too many files.
  """
  files: list[PurePath] = []
  missing: list[str] = []
  patterns = [p for item in split_paths(path) for p in expand_braces(item)]
  if not patterns:
    raise InputError(f"The path {_quote(path)} names no file.")
  # List each bucket folder once, instead of a request per file.
  listing = listing or client().cached_listing()
  for pattern in patterns:
    if (size := len(pattern)) > _MAX_NAME:
      what = f"{_quote(pattern, 80)} has {size:,} characters"
      raise InputError(f"{what}; a file's path has at most {_MAX_NAME:,}.")
    is_remote = path_lib.is_remote(pattern)
    key = pattern.partition("://")[2].rstrip("/").partition("/")[2]
    if is_remote and not key and not hub.is_hub(pattern):
      example = f"{pattern.rstrip('/')}/PATH/*{suffix}"
      raise InputError(f"{pattern} is a bucket; write {example!r}.")
    pattern = pin(pattern) if is_remote else os.path.expanduser(pattern)
    if hub.is_hub(pattern) and not _HUB.fullmatch(pattern)[3].strip("/"):
      raise _make_url_error(pattern)
    if _file_exists(pattern, listing):
      # Tried before globbing, because a file name may contain brackets.
      files.append(path_lib.as_path(pattern))
    elif glob.has_magic(pattern):
      matches = _expand_glob(pattern, listing)
      if not matches:
        prefix = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        hint = _describe_folder(f"{prefix}x", suffix)
        raise MissingFileError(f"{pattern!r} matches no file. {hint}")
      files.extend(map(path_lib.as_path, matches))
    else:
      missing.append(pattern)
  if missing:
    names = printable(list_first(missing, 8), 1000)
    raise MissingFileError(
      f"{len(missing)} of {len(patterns)} files are missing: {names}."
      f" {_describe_folder(missing[0], suffix)} Add them, or leave them out of"
      " the path (with a glob)."
    )
  # Not resolve(): its system calls per path component are slow on network
  # disks. Two links to one file are detected by the check of keys.
  names: set[str] = set()
  for file in files:
    is_remote = path_lib.is_remote(file)
    if _is_folder(file, listing):
      pattern = str(file / f"*{suffix}")
      raise errors.FolderError(f"{file} is a folder; write {pattern!r}.")
    path_lib.check_regular_file(file)
    name = str(file) if is_remote else os.path.abspath(file)
    if name in names:
      hint = "to see data more often, raise the `weight` of its entry"
      raise InputError(f"{file} is in the path twice; {hint}.")
    names.add(name)
  return files


def pin(url: str, commits: MutableMapping[str, str] | None = None) -> str:
  """Replaces the revision in a hub URL (default: `main`) by its commit.

  Returns other URLs unchanged. `commits` maps `datasets/ORG/NAME@REVISION` to
  known commits; new ones are added. Raises InputError for a malformed URL,
  StorageError if the hub refuses or doesn't answer.
  """
  if not hub.is_hub(url):
    return url
  if (match := _HUB.fullmatch(url)) is None:
    raise _make_url_error(url)
  repo, revision, file = match.groups()
  revision = revision or "main"
  if not _COMMIT.fullmatch(revision):
    commits = {} if commits is None else commits
    name = f"{repo}@{revision}"
    if name not in commits:
      commits[name] = _find_commit(repo, revision, hub.endpoint())
    revision = commits[name]
  return f"hf://{repo}@{revision}{file}"


def _make_url_error(url: str) -> InputError:
  return InputError(
    f"{_quote(url)} names no file of a data set; expected"
    " hf://datasets/ORG/NAME/PATH or hf://datasets/ORG/NAME@REVISION/PATH,"
    " such as hf://datasets/ORG/NAME/data/train-*.parquet."
  )


@functools.cache
def _find_commit(repo: str, revision: str, endpoint: str | None) -> str:
  del endpoint  # Part of the key.
  name = repo.removeprefix("datasets/")
  url = f"hf://{repo}@{revision}"
  client().get_store(url)  # Fails if a package is missing.
  find = hub.open_api().dataset_info
  return client().retry(url, "read", find, name, revision=revision).sha


def pin_all(value: Any, commits: MutableMapping[str, str]) -> Any:
  """Pins the hub URLs in an entry of `data.train`; see `pin`."""
  if isinstance(value, Mapping):
    return {name: pin_all(item, commits) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(pin_all(item, commits) for item in value)
  if not isinstance(value, str) or f"{hub.SCHEME}://" not in value:
    return value
  urls = [pin(url, commits) for url in split_paths(value)]
  return urls if len(urls) > 1 else urls[0]


def _file_exists(file: str, listing: Listing) -> bool:
  if not path_lib.is_remote(file):
    return os.path.exists(file)
  folder, _, name = file.rstrip("/").rpartition("/")
  # Don't list folders that contain globs: the listing may be endless.
  return not glob.has_magic(folder) and name in listing(folder)


def _is_folder(file: PurePath, listing: Listing) -> bool:
  if not path_lib.is_remote(file):
    return Path(file).is_dir()
  info = listing(os.fspath(file.parent)).get(file.name, {})
  return info.get("type") == "directory"


def _expand_glob(pattern: str, listing: Listing) -> list[str]:
  if not path_lib.is_remote(pattern):
    return sorted(glob.glob(pattern, recursive=True))
  folder, _, name = pattern.rpartition("/")
  if not glob.has_magic(folder) and "**" not in name:
    names = fnmatch.filter(listing(folder), name)
    return sorted(f"{folder}/{name}" for name in names)
  scheme = pattern.partition("://")[0]
  names = client().request(pattern, "read", "glob")
  return sorted(f"{scheme}://{name}" for name in names)


def _describe_folder(missing: str, suffix: str) -> str:
  """Describes the folder of a missing file."""
  folder = path_lib.as_path(missing).parent
  if not path_lib.is_folder(folder):
    return f"There is no folder {printable(folder)}."
  names = path_lib.list_folder(folder)
  if not names:
    return f"{folder} is empty."
  hits = [name for name in names if name.endswith(suffix)]
  sample = hits or names
  return (
    f"{len(hits)} of {len(names)} files in {folder} end in {suffix!r}; names:"
    f" {sample[0]} to {sample[-1]}."
  )


def _quote(value: object, limit: int = 400) -> str:
  return printable(repr(value), limit)


def split_paths(path: str | os.PathLike | Sequence) -> list[str]:
  """Flattens lists; splits at commas not in braces or existing local paths."""
  if isinstance(path, list | tuple):
    return [part for item in path for part in split_paths(item)]
  parts = [""]
  text = os.fspath(path) if isinstance(path, os.PathLike) else path
  if not isinstance(text, str) or len(text) > _MAX_TEXT:
    raise InputError(
      f"{_quote(text, 80)} is not a path; expected a string of at most"
      f" {_MAX_TEXT:,} characters, or a list of them."
    )
  if "," in text and os.path.exists(os.path.expanduser(text)):
    return [text]
  for piece in re.findall(r"\{[^{}]*\}|,|[^,{}]+|[{}]", text):
    if piece == ",":
      parts.append("")
    else:
      parts[-1] += piece
  return [part.strip() for part in parts if part.strip()]


def expand_braces(pattern: str) -> Iterator[str]:
  """`a{08..10}` -> a08 a09 a10; `{x,y}z` -> xz yz; products of several."""
  texts = re.split(r"(\{[^{}]*\})", pattern)
  if any("{" in text or "}" in text for text in texts[::2]):
    raise InputError(f"{_quote(pattern)} has unbalanced or nested braces.")
  options = [_expand_brace(text, pattern) for text in texts[1::2]]
  _check_count(math.prod(map(len, options)), pattern)
  for choice in itertools.product(*options):
    parts = itertools.zip_longest(texts[::2], choice, fillvalue="")
    yield "".join(itertools.chain.from_iterable(parts))


def _expand_brace(text: str, pattern: str) -> Sequence[str]:
  """Expands one brace of a pattern."""
  content = text[1:-1]
  if match := _RANGE.fullmatch(content.strip()):
    first, last = match.groups()
    is_long = max(len(first), len(last)) > 18
    _check_count(math.inf if is_long else int(last) - int(first), pattern)
    if int(last) < int(first):
      raise InputError(f"The range {text} of {_quote(pattern)} is empty.")
    # Zero-padded if the first number is, like bash.
    width = len(first) if first.startswith("0") else 0
    return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
  if "," in content:
    return [option.strip() for option in content.split(",")]
  what = f"{printable(text)} of {_quote(pattern)}"
  raise InputError(f"{what} is not a range; write {{00000..00012}} or {{a,b}}.")


def _check_count(count: float | int, pattern: str) -> None:
  if count > _MAX_FILES:
    what = f"{_quote(pattern)} stands for more than {_MAX_FILES:,} files"
    raise InputError(f"{what}. Check the numbers in its braces.")
