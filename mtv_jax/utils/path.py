"""Paths in configs, on file systems and on object stores (`gs://`, `s3://`).

A local path is a `pathlib.Path`, a bucket path an `epath.Path`. Both are
`PurePath`s, and the functions here accept both.
"""

import contextlib
import datetime
import fnmatch
import functools
import glob
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat as stat_lib
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import filelock

from mtv_jax.utils import atomic, hub
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.text import format_bytes
from mtv_jax.utils.threads import map_threads

log = logging.getLogger(__name__)

# Environment variable: this machine's folder for copies of bucket files.
CACHE_VARIABLE = "MTV_JAX_CACHE_DIR"
# Sizes above which a copy is logged: as information, as a warning.
_LOGGED_BYTES, _WARNED_BYTES = 1 << 26, 1 << 33
_READ_AHEAD = 1 << 24  # Bytes per request in sequential reads.
MAX_JSON = 1 << 26  # Bytes of a file that this package wrote.

AnyPath = str | os.PathLike
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://|^pipe:", re.IGNORECASE)
_STORES = ("gs", "s3", hub.SCHEME)


@functools.cache
def client() -> types.ModuleType:
  """The client of object stores, imported for the first bucket path."""
  from mtv_jax.utils import buckets

  return buckets


def is_remote(path: AnyPath) -> bool:
  """Whether a path is in a bucket; InputError for unsupported URLs."""
  match = _SCHEME.match(os.fspath(path))
  if match is None:
    return False
  if match[1] not in _STORES:
    raise InputError(
      f"{os.fspath(path)!r} is neither a file nor in a bucket; expected a path,"
      " gs://BUCKET/PATH, s3://BUCKET/PATH or hf://datasets/ORG/NAME/PATH. Copy"
      " the files to one of these."
    )
  return True


def as_path(path: AnyPath) -> PurePath:
  """Returns a `pathlib.Path`, or an `epath.Path` for a URL."""
  if not is_remote(path):
    return Path(path)
  from etils import epath

  client().configure()
  return epath.Path(path)


def is_same(path: AnyPath, other: AnyPath) -> bool:
  """Whether two paths refer to one file or folder."""

  def normalize(path: AnyPath) -> str:
    return str(path).rstrip("/") if is_remote(path) else os.path.realpath(path)

  return normalize(path) == normalize(other)


def refuse_remote(path: AnyPath, what: str, instead: str) -> None:
  """Raises InputError if a path that must be local is in a bucket."""
  if is_remote(path):
    raise InputError(f"{what} {os.fspath(path)} is in a bucket. {instead}")


class Stat(NamedTuple):
  """Size and modification time, named as in `os.stat_result`."""

  st_size: int
  st_mtime_ns: int


def stat(path: PurePath) -> os.stat_result | Stat:
  """Size and modification time of a file; FileNotFoundError if missing."""
  if not is_remote(path):
    return os.stat(path)
  info = client().request(path, "read", "info")
  modified = info.get("LastModified") or info.get("mtime")
  if not isinstance(modified, datetime.datetime):
    return Stat(info["size"], 0)
  # Integer arithmetic: a float lacks nanosecond precision.
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  microseconds = (modified - epoch) // datetime.timedelta(microseconds=1)
  return Stat(info["size"], 1000 * microseconds)


def exists(path: AnyPath) -> bool:
  """Whether a file or folder exists."""
  if not is_remote(path):
    return os.path.exists(path)
  return client().request(path, "read", "exists")


def is_file(path: AnyPath) -> bool:
  """Whether a path is an existing file."""
  if not is_remote(path):
    return os.path.isfile(path)
  return client().request(path, "read", "isfile")


def is_folder(path: AnyPath) -> bool:
  """Whether a path is a folder; in a bucket, whether it has objects below."""
  if not is_remote(path):
    return os.path.isdir(path)
  return client().request(path, "read", "isdir")


def list_folder(path: AnyPath, *, prefix: str = "") -> list[str]:
  """Sorted names in a folder; empty if the folder doesn't exist.

  With a `prefix`, lists only files whose names begin with it; in a bucket, also
  files in subfolders, as relative paths.
  """
  if not is_remote(path):
    names = os.listdir(path) if os.path.isdir(path) else []
    return sorted(name for name in names if name.startswith(prefix))
  if not prefix:
    return sorted(client().list_objects(os.fspath(path)))
  url = os.fspath(path).rstrip("/")
  base = url.partition("://")[2]
  objects = client().request(url, "read", "find", prefix=prefix)
  return sorted(name[len(base) + 1 :] for name in objects)


def open_file(path: PurePath, *, buffering: int = -1) -> io.BufferedReader:
  """Opens a file for sequential reads; buckets are read in long ranges."""
  if not is_remote(path):
    return open(path, "rb", buffering=buffering)
  read = functools.partial(read_range, path)
  file = client().RangedFile(stat(path).st_size, read)
  return io.BufferedReader(file, _READ_AHEAD)


def read_bytes(path: PurePath) -> bytes:
  """Returns the content of a file."""
  if not is_remote(path):
    return Path(path).read_bytes()
  return client().request(path, "read", "cat_file")


def read_json(path: PurePath, *, tolerant: bool = False) -> Any:
  """Parses a JSON file; None if it is missing or malformed.

  For files that a run writes for its later sessions; a crash may truncate them.
  With `tolerant`, also returns None for an unreadable file.
  """
  try:
    return json.loads(read_regular(path, limit=MAX_JSON))
  except InputError:
    if tolerant:
      return None
    raise
  except (
    ValueError,
    RecursionError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
  ):
    return None
  except OSError:
    if tolerant:
      return None
    raise


def check_regular_file(file: PurePath) -> None:
  """Raises InputError for a pipe or device, whose content may be endless."""
  if is_remote(file):
    return
  mode = os.stat(file).st_mode
  if not stat_lib.S_ISREG(mode):
    kinds = {"d": "a folder", "p": "a pipe", "s": "a socket"}
    kind = kinds.get(stat_lib.filemode(mode)[0], "a device")
    raise InputError(f"{file} is {kind}, expected a regular file.")


def read_regular(file: PurePath, *, limit: int | None = None) -> bytes:
  """Reads a regular file of at most `limit` bytes; InputError otherwise."""
  check_regular_file(file)
  if limit is not None and (size := stat(file).st_size) > limit:
    raise InputError(f"{file} has {size:,} bytes; at most {limit:,} are read.")
  return read_bytes(file)


def read_range(
  path: PurePath, offset: int, size: int, *, patience: float = 0.0
) -> bytes:
  """Reads a byte range in one request; fewer bytes at the end of the file.

  `patience`: see `buckets.retry`.
  """
  if not is_remote(path):
    with open(path, "rb", buffering=0) as file:
      return os.pread(file.fileno(), size, offset)
  span = dict(start=offset, end=offset + size)
  return client().request(path, "read", "cat_file", patience=patience, **span)


def write_bytes(path: PurePath, data: bytes) -> None:
  """Writes a file; readers see either the old or the new content.

  Creates the parent folder. A bucket object appears once it is complete.
  """
  if is_remote(path):
    client().request(path, "written", "pipe_file", data)
    return
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  atomic.write(Path(path), data)


def write_if_absent(path: PurePath, data: bytes) -> bytes:
  """Writes a file unless another writer has; returns the file's content."""
  if not is_remote(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return atomic.write_if_absent(Path(path), data)
  content, generation = client().read_with_generation(path)
  if content is not None:
    return content
  if client().write_if(path, data, generation) is not None:
    return data
  return read_bytes(path)


@contextlib.contextmanager
def replace_file(path: PurePath) -> Iterator[Path]:
  """Yields a temporary local path; its content replaces the file on success.

  Creates the parent folder. A bucket object is uploaded at the end.
  """
  if not is_remote(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(Path(path)) as temporary:
      yield temporary
    return
  with tempfile.TemporaryDirectory(prefix="mtv_jax") as folder:
    yield Path(folder) / path.name
    upload(Path(folder) / path.name, path)


def remove(path: PurePath) -> None:
  """Removes a file if it exists."""
  if not is_remote(path):
    Path(path).unlink(missing_ok=True)
  else:
    with contextlib.suppress(FileNotFoundError):
      client().request(path, "removed", "rm_file")


def remove_folder(path: PurePath) -> None:
  """Removes a folder and everything below it, if it exists."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
  elif glob.has_magic(os.fspath(path)):
    # The stores' clients would expand the name as a pattern.
    names = client().list_tree(os.fspath(path))
    map_threads(lambda name: remove(path / name), names)
  elif exists(path):
    client().request(path, "removed", "rm", recursive=True)


def upload(file: Path, path: PurePath) -> None:
  """Copies a local file to a bucket."""
  put = client().get_store(path).put_file
  client().retry(path, "written", put, os.fspath(file), os.fspath(path))


def upload_folder(
  folder: Path, path: PurePath, *, last: Sequence[str] = ()
) -> None:
  """Copies the files of a local folder to a bucket.

  Names in `last` are removed first and written last, in this order: they mark
  the folder as complete.
  """
  files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
  names = [file.relative_to(folder).as_posix() for file in files]
  for name in last:
    remove(path / name)
  for name in (*(n for n in names if n not in last), *last):
    if name in names:
      upload(folder / name, path / name)


def cache_folder() -> Path:
  """This machine's folder for copies of bucket files."""
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = os.environ.get(CACHE_VARIABLE) or f"{base}/mtv_jax"
  return Path(folder).expanduser()


def local_copy(path: AnyPath, *, cache: AnyPath | None = None) -> Path:
  """Returns a local copy of a bucket file or folder; local paths unchanged.

  Copies go to `cache_folder()` by default, and are renewed when the object
  changes. Only one process copies.

  Raises MissingFileError, StorageError, or InputError if an object's name would
  escape the folder, or the disk lacks the space.
  """
  base = cache_folder() if cache is None else Path(cache).expanduser()
  copy = _plan_copy(base, path)
  if not copy.target.exists():
    if size := sum(info["size"] for info in copy.files.values()):
      atomic.remove_abandoned(base)
      check_space(size, copy.url, base)
    _make_copy(copy)
  return copy.target


def lazy_copy(
  path: AnyPath, is_lazy: Callable[[str], bool], *, share: float
) -> Path:
  """Returns a local copy like `local_copy`, without the content of some files.

  Files whose names `is_lazy` accepts have their size, but no content until
  `fetch` copies them. `share` is the fraction of their bytes that this machine
  is expected to copy.
  """
  copy = _plan_copy(cache_folder(), path, is_lazy)
  if not copy.url:
    return copy.target
  _lazy_copies[copy.target] = copy.url
  if not copy.target.exists():
    sizes = {name: info["size"] for name, info in copy.files.items()}
    lazy_size = sum(sizes[name] for name in copy.lazy)
    size = sum(sizes.values()) - lazy_size + int(share * lazy_size)
    part = f"the needed part of {copy.url} ({format_bytes(sum(sizes.values()))}"
    check_space(size, f"{part} in all)", cache_folder())
    _make_copy(copy)
  return copy.target


# URLs of the folders that `lazy_copy` returned.
_lazy_copies: dict[Path, str] = {}


def origin(file: AnyPath) -> PurePath:
  """Returns the object of a lazy file without content; others unchanged."""
  file = Path(file)
  parents = () if os.stat(file).st_mtime_ns else (file, *file.parents)
  root = next((p for p in parents if p in _lazy_copies), None)
  if root is None:
    return file
  name = file.relative_to(root).as_posix()
  url = _lazy_copies[root]
  return as_path(url if name == "." else f"{url}/{name}")


def fetch(file: AnyPath) -> Path:
  """Returns a file, after copying its content if it is lazy."""
  file, url = Path(file), origin(file)
  if is_remote(url):
    size = os.stat(file).st_size
    check_space(size, os.fspath(url), file.parent)
    copy_object(url, file, size)
  return file


def copy_object(
  url: PurePath,
  target: Path,
  size: int,
  *,
  version: str = "",
  patience: float = 0.0,
) -> None:
  """Copies an object of this size and version (if any); see `buckets.retry`."""
  with atomic.replace_file(target) as temporary:
    client().request(url, "read", "get_file", str(temporary), patience=patience)
    if (copied := temporary.stat().st_size) != size:
      raise InputError(
        f"{url} has {copied:,} bytes, expected {size:,}: it was replaced."
        " Start again."
      )
    if version:
      client().check_version(
        url, client().request(url, "read", "info"), version
      )


class _Copy(NamedTuple):
  """A local copy of a bucket file or folder, which may not exist yet."""

  url: str
  files: Mapping[str, Mapping[str, Any]]  # The store's metadata by name.
  target: Path
  lazy: Sequence[str] = ()  # Names of files without content.


def _plan_copy(
  base: Path,
  path: AnyPath,
  is_lazy: Callable[[str], bool] = lambda name: False,
) -> _Copy:
  if not is_remote(path):
    return _Copy("", {}, Path(path))
  url = os.fspath(path).rstrip("/")
  if not (files := client().list_tree(url)):
    raise MissingFileError(f"There is nothing at {url}.")
  lazy = [name for name in files if is_lazy(name or url)]
  lines = [
    f"{n}\0{i['size']}\0{client().object_version(i)}"
    for n, i in sorted(files.items())
  ]
  lines += sorted(lazy)
  digest = hashlib.blake2b("\n".join([url, *lines]).encode(), digest_size=12)
  folder = base / digest.hexdigest()
  target = _resolve_object(folder, url.rsplit("/", 1)[-1], url)
  return _Copy(url, files, target, lazy)


def _make_copy(copy: _Copy) -> None:
  url, files, target, lazy = copy
  if not url:
    return
  folder = target.parent
  folder.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(f"{folder}.lock"):
    if not target.exists():
      with atomic.replace_folder(folder) as temporary:
        eager = files.keys() - lazy
        _download_objects(url, eager, temporary / target.name)
        copied = client().list_tree(url)
        for name in eager:
          old, new = files[name], copied.get(name, {})
          client().check_version(url, new, client().object_version(old))
        for name in lazy:
          file = _resolve_object(temporary / target.name, name, url)
          file.parent.mkdir(parents=True, exist_ok=True)
          file.touch()
          os.truncate(file, files[name]["size"])
          os.utime(file, (0, 0))  # Marks it as lazy.


def check_space(size: int, what: str, folder: Path) -> None:
  """Logs a copy of `size` bytes; InputError if the disk lacks the space.

  Creates the folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder).free
  if size > free:
    raise InputError(
      f"A copy of {what} takes {format_bytes(size)}; {folder} has only"
      f" {format_bytes(free)}. Use a larger disk ({CACHE_VARIABLE}), or"
      " data that is read in blocks: see docs/data.md, Buckets."
    )
  if size > _LOGGED_BYTES:
    level = logging.WARNING if size > _WARNED_BYTES else logging.INFO
    log.log(level, f"Copying {what} ({format_bytes(size)}) to {folder}.")


def download_folder(
  path: AnyPath, folder: Path, *, ignore: Sequence[str] = ()
) -> None:
  """Copies a bucket folder, if it exists, to a local one.

  Skips top-level names that match a pattern in `ignore`.
  """
  url = os.fspath(path).rstrip("/")
  names = [*client().list_tree(url)]
  for pattern in ignore:
    names = [n for n in names if not fnmatch.fnmatch(n.split("/")[0], pattern)]
  _download_objects(url, names, folder)


def _download_objects(url: str, names: Iterable[str], target: Path) -> None:
  """Copies objects below a URL; the name of a single file is empty."""
  files = {name: _resolve_object(target, name, url) for name in names}

  def copy(name: str) -> None:
    files[name].parent.mkdir(parents=True, exist_ok=True)
    source = f"{url}/{name}" if name else url
    client().request(source, "read", "get_file", str(files[name]))

  map_threads(copy, files)


def _resolve_object(folder: Path, name: str, url: str) -> Path:
  """Local path of an object; InputError if it would be outside `folder`.

  Anyone who can write to the bucket chooses its name, which may contain `..`.
  """
  path = PurePath(name)
  if path.is_absolute() or ".." in path.parts or "\0" in name:
    raise InputError(
      f"{url} has an object named {printable(repr(name))}; expected a relative"
      " path without '..'. Rename or remove it."
    )
  return folder / path
