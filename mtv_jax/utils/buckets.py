"""Requests to object stores (`gs://`, `s3://`) and to the hub (`hf://`).

Callers use `utils.path`. Most requests go through fsspec: gcsfs, s3fs (extra
`buckets`) and huggingface_hub are imported on first use, and failed requests
are retried with back-off. tensorstore, which retries by itself, reads byte
ranges (`utils.ranges`) and writes objects if their generation is unchanged.
"""

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mtv_jax.utils import errors, hub, progress
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import one_line

log = logging.getLogger(__name__)
T = TypeVar("T")
AnyPath = str | os.PathLike
# Maps the names in a folder to the store's metadata.
Listing = Callable[[str], Mapping[str, Mapping[str, Any]]]

# Attempts per request, in addition to the retries of gcsfs and s3fs.
_TRIES, _FIRST_WAIT = 5, 1.0  # Seconds, doubled after each attempt.
# gcsfs repeats a request for half a minute, so a line is logged every minute.
_LONGEST_WAIT = 30.0
# Seconds until a bucket that has never answered this process gets no further
# attempt: there may be no network, or no credentials.
_CONTACT_SECONDS = 30.0
# tensorstore's retries, which it doesn't log; then `retry` takes over.
_SILENT_TRIES = 3
# Fields that change when an object is replaced, in order of preference.
_VERSIONS = ("generation", "VersionId", "etag", "ETag", "blob_id", "mtime")
_VERSIONS += ("LastModified",)


_PAGE = 1000  # Objects per request of a listing.
_requests = 0
_answering: set[str] = set()  # Buckets that have answered this process.


def count_requests() -> int:
  """Returns the number of requests of this process so far.

  Retries of the libraries, and block reads by tensorstore, are not counted.
  """
  return _requests


def _count_requests(requests: int) -> None:
  global _requests
  _requests += requests


class RangedFile(io.RawIOBase):
  """A read-only file of `size` bytes, which `read(offset, size)` reads."""

  def __init__(self, size: int, read: Callable[[int, int], bytes]):
    super().__init__()
    self._size, self._read, self._offset = size, read, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._offset

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}
    self._offset = base[whence] + offset
    return self._offset

  def readinto(self, buffer: Any) -> int:
    size = max(min(len(buffer), self._size - self._offset), 0)
    data = self._read(self._offset, size) if size else b""
    buffer[: len(data)] = data
    self._offset += len(data)
    return len(data)


def list_objects(folder: str) -> dict[str, Mapping[str, Any]]:
  """Maps each name in a folder to the store's metadata."""
  try:
    items = request(folder, "read", "ls", detail=True)
  except FileNotFoundError:
    return {}
  _count_requests(len(items) // _PAGE)
  infos = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in items}
  # Some stores also list the folder itself, as an empty object.
  folder_name = folder.rstrip("/").partition("://")[2]
  return {
    n: i for n, i in infos.items() if i["name"].rstrip("/") != folder_name and n
  }


def cached_listing() -> Listing:
  """Returns a cached `list_objects`, which lists each folder once."""
  return functools.cache(list_objects)


def list_tree(url: str) -> dict[str, Mapping[str, Any]]:
  """Maps the relative name of every object below a folder to its metadata.

  For a file, the only name is empty.
  """
  base = url.partition("://")[2]
  objects = request(url, "read", "find", detail=True)
  _count_requests(len(objects) // _PAGE)
  return {
    name[len(base) :].lstrip("/"): info
    for name, info in objects.items()
    if not name.endswith("/")
  }


def object_version(info: Mapping[str, Any]) -> str:
  return next((str(info[k]) for k in _VERSIONS if info.get(k)), "")


def check_version(path: AnyPath, info: Mapping[str, Any], version: str) -> None:
  """Raises InputError if an object lacks a version that a listing has given."""
  # The metadata of a single object may have more fields than its listing.
  if version not in [str(info.get(key, "")) for key in _VERSIONS]:
    raise replaced_error(path)


def replaced_error(path: AnyPath) -> InputError:
  """The error if an object was replaced since the process started."""
  return InputError(
    f"{os.fspath(path)} was replaced while it was read. Start again; if it is"
    " in a table of blocks, run `mtv-jax index` first."
  )


def get_store(path: AnyPath) -> Any:
  """Returns the `fsspec` file system of a URL."""
  url = os.fspath(path)
  scheme = url.partition("://")[0]
  configure()
  import fsspec

  try:
    if hub.is_hub(path):
      return hub.open_store()
    return fsspec.filesystem(scheme)
  except ImportError as error:
    raise InputError(
      f"{url} needs a package that is not installed ({error})."
      f" pip install 'mtv_jax[{'hub' if hub.is_hub(path) else 'buckets'}]'"
    ) from error


@functools.cache
def configure() -> None:
  """Configures fsspec and etils, including Orbax's use of them."""
  import fsspec.config

  # Listings must not be cached: other processes write to these folders.
  for scheme in ("gs", "gcs", "s3"):
    options = fsspec.config.conf.setdefault(scheme, {})
    options.setdefault("use_listings_cache", False)
  # Otherwise etils imports TensorFlow if it is installed.
  os.environ.setdefault("EPATH_USE_TF", "false")
  # `retry` describes a failed request in one line, gcsfs in a traceback.
  logging.getLogger("gcsfs").addFilter(_drop_traceback)


def _drop_traceback(record: logging.LogRecord) -> bool:
  record.exc_info = record.exc_text = None
  return True


def request(
  path: AnyPath, verb: str, method: str, *args: Any, **options: Any
) -> Any:
  """Calls a method of the URL's store on the URL, with `retry`."""
  function = getattr(get_store(path), method)
  return retry(path, verb, function, os.fspath(path), *args, **options)


def retry(
  path: AnyPath,
  verb: str,
  function: Callable[..., T],
  *args: Any,
  patience: float = 0.0,
  **options: Any,
) -> T:
  """Calls a function of a store, retrying with back-off.

  After five attempts, continues for `patience` seconds. A bucket that has never
  answered this process, not even by an error, gets half a minute. Raises
  MissingFileError, or StorageError if every attempt failed or access is denied;
  both name the path.
  """
  name, start = os.fspath(path), time.monotonic()
  bucket = _name_bucket(path)
  if verb != "read":
    _check_writable(path, verb)
  for attempt in itertools.count(1):
    _count_requests(1)
    is_new = bucket not in _answering
    # Of a thread, it would hide the main thread's activity.
    is_shown = is_new and threading.current_thread() is threading.main_thread()
    waiting = progress.activity(f"waiting for {bucket}")
    try:
      with waiting if is_shown else contextlib.nullcontext():
        result = function(*args, **options)
      note_answer(path)
      return result
    except errors.UserError:
      raise
    except Exception as error:  # The libraries' errors lack a common base.
      if _has_status(error):
        note_answer(path)
        is_new = False
      if hub.is_hub(path) and (reason := hub.explain(error)):
        raise errors.StorageError(f"{name}: {reason}.") from error
      if isinstance(error, FileNotFoundError):
        note_answer(path)
        raise errors.MissingFileError(f"There is no {name}.") from error
      reason = one_line(f"{type(error).__name__}: {error}")
      message = f"{name} can't be {verb}: {reason}"
      seconds = time.monotonic() - start
      is_lost = attempt >= _TRIES or (is_new and seconds >= _CONTACT_SECONDS)
      if (is_lost and seconds >= patience) or _is_final(error):
        raise errors.StorageError(message) from error
      wait = _FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
      wait = min(wait, _LONGEST_WAIT)
      log.warning("%s; retrying in %.1f s.", message, wait)
      time.sleep(wait)
  raise AssertionError


def note_answer(path: AnyPath) -> None:
  """Records that the path's bucket can be reached."""
  _answering.add(_name_bucket(path))


def _name_bucket(path: AnyPath) -> str:
  return "/".join(os.fspath(path).split("/")[:3])


def _has_status(error: Exception) -> bool:
  """Whether a store has answered, such as by 429 or 503."""
  names = "code", "status", "response"  # gcsfs, aiohttp, botocore.
  return any(getattr(error, name, None) for name in names)


def _check_writable(path: AnyPath, verb: str) -> None:
  if hub.is_hub(path):
    raise InputError(
      f"{os.fspath(path)} can't be {verb}: the hub's data sets are read-only."
      " Use a folder, gs:// or s3://."
    )


def _is_final(error: Exception) -> bool:
  """Whether retrying is pointless: permissions, arguments, an exit."""
  if isinstance(error, json.JSONDecodeError):  # A truncated response.
    return False
  if isinstance(error, PermissionError | TypeError | ValueError | ImportError):
    return True
  text = f"{type(error).__name__} {error}"
  # Executors refuse work while this process exits.
  words = "Credentials", "Forbidden", "Unauthorized", "futures after"
  return any(word in text for word in words)


# ---------------------------------------------------------------------------
# tensorstore.


def open_store(path: AnyPath) -> tuple[Any, str]:
  """Returns tensorstore's or the hub's store of a URL, and the object's key."""
  scheme, _, rest = os.fspath(path).partition("://")
  bucket, _, key = rest.partition("/")
  return _open_bucket(scheme, bucket), key


@functools.cache
def _open_bucket(scheme: str, bucket: str) -> Any:
  if scheme == hub.SCHEME:
    return hub.RangeStore(bucket)
  import tensorstore as ts  # Takes 0.3 s to import.

  driver = {"gs": "gcs"}.get(scheme, scheme)
  retries = {f"{driver}_request_retries": {"max_retries": _SILENT_TRIES}}
  spec = {"driver": driver, "bucket": bucket, "context": retries}
  names = dict(endpoint="AWS_ENDPOINT_URL", aws_region="AWS_DEFAULT_REGION")
  if scheme == "s3":
    spec |= {k: os.environ[v] for k, v in names.items() if os.environ.get(v)}
  return ts.KvStore.open(spec).result()


def read_with_generation(path: AnyPath) -> tuple[bytes | None, bytes]:
  """Returns an object's content (None if it is missing) and its generation.

  For objects that are written afterwards.
  """
  _check_writable(path, "written")
  store, key = open_store(path)
  read = retry(path, "read", lambda: store.read(key).result())
  return read.value if read.state == "value" else None, read.stamp.generation


def write_if(path: AnyPath, data: bytes, generation: bytes) -> bytes | None:
  """Writes an object if it still has this generation (or is still missing).

  Returns the new generation; None if the object's differs. The content must
  differ from what other processes write.
  """
  store, key = open_store(path)

  def write() -> bytes:
    return store.write(key, data, if_equal=generation).result().generation

  if new_generation := retry(path, "written", write):
    return new_generation
  # A repeat of a request whose response was lost fails as well.
  content, new_generation = read_with_generation(path)
  return new_generation if content == data else None


def remove_if(path: AnyPath, generation: bytes) -> None:
  """Removes an object if it has this generation."""
  store, key = open_store(path)
  retry(
    path,
    "removed",
    lambda: store.write(key, None, if_equal=generation).result(),
  )
