"""Requests to object stores (`gs://`, `s3://`) through fsspec.

gcsfs and s3fs (extra `buckets`) are imported at the first use. Requests that
fail are repeated with back-off. Callers use `utils.path`.
"""

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  StorageError,
  UserError,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
AnyPath = str | os.PathLike

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://|^pipe:", re.IGNORECASE)
_STORES = ("gs", "s3")
# Tries of a request, besides what gcsfs and s3fs repeat themselves.
_TRIES, _FIRST_WAIT = 5, 1.0  # Seconds, doubled after each.
# In this order; what changes when an object is replaced.
_VERSIONS = ("generation", "VersionId", "etag", "ETag", "mtime", "LastModified")


def is_remote(path: AnyPath) -> bool:
  """Whether a path is in a bucket; InputError for a URL of another kind."""
  match = _SCHEME.match(os.fspath(path))
  if match is None:
    return False
  if match[1] not in _STORES:
    raise InputError(
      f"{os.fspath(path)!r} is neither a file nor in a bucket; expected a path,"
      " gs://BUCKET/PATH or s3://BUCKET/PATH. Copy the files there."
    )
  return True


def list_objects(folder: str) -> dict[str, Mapping[str, Any]]:
  """What the store says of each name in a folder."""
  try:
    listed = request(folder, "read", "ls", detail=True)
  except FileNotFoundError:
    return {}
  infos = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in listed}
  # Some stores list the folder itself, as an empty object.
  own = folder.rstrip("/").partition("://")[2]
  return {n: i for n, i in infos.items() if i["name"].rstrip("/") != own and n}


def list_tree(url: str) -> dict[str, Mapping[str, Any]]:
  """What the store says of all objects below a folder, by their names in it.

  A file is listed alone, with an empty name.
  """
  base = url.partition("://")[2]
  return {
    name[len(base) :].lstrip("/"): info
    for name, info in request(url, "read", "find", detail=True).items()
    if not name.endswith("/")
  }


def object_version(info: Mapping[str, Any]) -> str:
  return next((str(info[k]) for k in _VERSIONS if info.get(k)), "")


def get_store(path: AnyPath) -> Any:
  """The `fsspec` file system of a URL."""
  url = os.fspath(path)
  scheme = url.partition("://")[0]
  configure()
  import fsspec

  try:
    return fsspec.filesystem(scheme)
  except ImportError as error:
    raise InputError(
      f"{url}: buckets need a package that is not installed ({error})."
      " pip install 'mtv_jax[buckets]'"
    ) from error


@functools.cache
def configure() -> None:
  """Settings of fsspec and etils, also for Orbax's use of them."""
  import fsspec.config

  # Other processes write to these folders, too.
  for scheme in ("gs", "gcs", "s3"):
    options = fsspec.config.conf.setdefault(scheme, {})
    options.setdefault("use_listings_cache", False)
  # etils would import TensorFlow where it is installed.
  os.environ.setdefault("EPATH_USE_TF", "false")


def request(
  path: AnyPath, verb: str, method: str, *args: Any, **options: Any
) -> Any:
  """Calls a method of a URL's store on the URL, with `retry`."""
  function = getattr(get_store(path), method)
  return retry(path, verb, function, os.fspath(path), *args, **options)


def retry(
  path: AnyPath,
  verb: str,
  function: Callable[..., T],
  *args: Any,
  **options: Any,
) -> T:
  """Calls a function of a store, several times with back-off.

  Raises MissingFileError, or StorageError if it failed each time or is not
  allowed; both name the path.
  """
  name = os.fspath(path)
  for left in reversed(range(_TRIES)):
    try:
      return function(*args, **options)
    except UserError:
      raise
    except FileNotFoundError as error:
      raise MissingFileError(f"There is no {name}.") from error
    except Exception as error:  # The libraries' errors share no base.
      if not left or _is_final(error):
        raise StorageError(f"{name} can't be {verb}: {error!r}") from error
      wait = _FIRST_WAIT * 2 ** (_TRIES - 1 - left) * random.uniform(0.5, 1.0)
      log.warning(
        "%s can't be %s (%r); again in %.1f s.", name, verb, error, wait
      )
      time.sleep(wait)
  raise AssertionError


def _is_final(error: Exception) -> bool:
  """Whether another try would fail too: credentials, permissions, arguments."""
  if isinstance(error, PermissionError | TypeError | ValueError | ImportError):
    return True
  text = f"{type(error).__name__} {error}"
  return any(w in text for w in ("Credentials", "Forbidden", "Unauthorized"))
