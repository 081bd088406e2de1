"""Hugging Face hub: client, model names, files as `hf://` (extra `hub`).

huggingface_hub reads `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HOME`.
"""

import functools
import os
import pathlib
import re
import types
from concurrent import futures
from typing import Any

from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.threads import IO_THREADS

SCHEME = "hf"  # Of files of data sets.
PREFIX = "hf:"  # Of names of models.
_REPO = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"[\w./-]+")


def is_hub(path: str | os.PathLike) -> bool:
  """Whether a path is a file on the hub."""
  return os.fspath(path).startswith(f"{SCHEME}://")


def is_repo(name: str) -> bool:
  """Whether a name is a valid `ORG/NAME` on the hub."""
  return bool(_REPO.fullmatch(name)) and not re.search(r"--|\.\.", name)


def is_name(path: str | os.PathLike) -> bool:
  """Whether a path names a hub model.

  Hub names are `hf:ORG/NAME`, or `ORG/NAME` unless a folder ORG exists, each
  with an optional `@REVISION`.
  """
  text = os.fspath(path)
  if text.startswith(PREFIX):
    return True
  parts = _split_name(text)
  return bool(parts) and not os.path.exists(parts[0].partition("/")[0])


def _split_name(name: str) -> tuple[str, str | None] | None:
  """Splits `ORG/NAME@REVISION`; None for other names."""
  repo, at, revision = name.partition("@")
  if not is_repo(repo) or (at and not _REVISION.fullmatch(revision)):
    return None
  return repo, revision or None


@functools.lru_cache
def download(name: str, files: tuple[str, ...]) -> pathlib.Path:
  """Downloads a model's `files` (patterns) that are not cached.

  Returns the folder, which is named by the commit. A name resolves once per
  process. Offline, it resolves to the revision that was downloaded last.
  """
  parts = _split_name(name.removeprefix(PREFIX))
  if parts is None:
    raise InputError(
      f"{printable(name)!r} is not a hub model; expected hf:ORG/NAME or "
      "hf:ORG/NAME@REVISION."
    )
  try:
    hub = import_hub()
  except ImportError as error:
    raise MissingFileError(f"{name} is not a local path; {error}") from error
  options = {"allow_patterns": list(files), "endpoint": endpoint()}
  try:
    folder = hub.snapshot_download(parts[0], revision=parts[1], **options)
  except error_types(hub) as error:
    reason = printable(" ".join(str(error).split()))
    raise MissingFileError(
      f"{name} is not a local path, and can't be read from the hub: {reason}"
    ) from error
  return pathlib.Path(folder)


def error_types(hub: Any) -> tuple[type[Exception], ...]:
  """Exceptions of huggingface_hub, including connection failures.

  The bases of `HfHubHTTPError` depend on the HTTP library.
  """
  return (*hub.errors.HfHubHTTPError.__bases__, OSError, ValueError)


def import_hub() -> Any:
  """Imports huggingface_hub, an optional dependency; ImportError without it."""
  try:
    import huggingface_hub
    import huggingface_hub.errors
  except ImportError as error:
    raise ImportError(
      "huggingface_hub is not installed: pip install 'mtv_jax[hub]', or "
      "download the folder and pass its path."
    ) from error
  return huggingface_hub


def endpoint() -> str | None:
  """`HF_ENDPOINT`, read now; huggingface_hub reads it only at import."""
  return os.environ.get("HF_ENDPOINT") or None


def open_api() -> Any:
  """Returns the hub's API; ImportError without huggingface_hub."""
  return import_hub().HfApi(endpoint=endpoint())


def open_store() -> Any:
  """Returns the hub's `fsspec` file system, one for all threads."""
  return _open_store(endpoint())


@functools.cache
def _open_store(url: str | None) -> Any:
  store = import_hub().HfFileSystem(endpoint=url, skip_instance_cache=True)
  # By default, megabytes after a range are read too.
  store.cat_file = functools.partial(store.cat_file, cache_type="none")
  return store


class RangeStore:
  """Files below a root, read in threads with the interface of tensorstore."""

  def __init__(self, root: str):
    self._root = root
    self._pool = futures.ThreadPoolExecutor(IO_THREADS)

  def read(self, key: str, *, byte_range: slice) -> futures.Future:
    """Starts to read a range of a file."""
    return self._pool.submit(self._read_range, key, byte_range)

  def _read_range(self, key: str, byte_range: slice) -> types.SimpleNamespace:
    span = dict(start=byte_range.start, end=byte_range.stop)
    data = open_store().cat_file(f"{SCHEME}://{self._root}/{key}", **span)
    # The files of a commit don't change.
    stamp = types.SimpleNamespace(generation=b"")
    return types.SimpleNamespace(state="value", value=data, stamp=stamp)


def explain(error: BaseException) -> str | None:
  """Explains why the hub refused a request; None for other errors."""
  errors = import_hub().errors
  login = "set HF_TOKEN or run `hf auth login`"
  reasons = {
    errors.GatedRepoError: "the repository is gated: accept its terms on the"
    f" hub, and {login}",
    errors.RepositoryNotFoundError: "the hub has no such repository, or it is"
    f" private: check the name, or {login}",
    errors.RevisionNotFoundError: "the repository has no such revision",
    errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
  }
  causes = (error, error.__cause__)
  for kind, reason in reasons.items():
    if any(isinstance(cause, kind) for cause in causes):
      return reason
  status = getattr(getattr(error, "response", None), "status_code", None)
  return f"access is denied: {login}" if status in (401, 403) else None
