"""Byte ranges of files, read ahead and kept in memory.

tensorstore sends the requests to buckets outside Python's interpreter lock.
"""

import collections
import functools
import os
import threading
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError


class Range(NamedTuple):
  """A byte range of a file."""

  path: PurePath
  offset: int
  size: int


class RangeReader:
  """Reads byte ranges, and keeps the most recent `limit` bytes.

  Raises InputError if a file ends before a range, or is replaced while its
  ranges are read; StorageError if a bucket can't be read. Thread-safe; empty
  after pickling.
  """

  def __init__(self, limit: int):
    self.limit = limit
    self._start()

  def _start(self) -> None:
    self._lock = threading.Lock()
    self._reads: collections.OrderedDict[Range, _Read] = (
      collections.OrderedDict()
    )
    self._size = 0
    self.versions: dict[PurePath, Any] = {}

  def __getstate__(self) -> int:
    return self.limit

  def __setstate__(self, limit: int) -> None:
    self.limit = limit
    self._start()

  def prefetch(self, spans: Iterable[Range]) -> None:
    """Starts to read bucket ranges, as far as the limit allows."""
    with self._lock:
      for span in spans:
        if span in self._reads or not path_lib.is_remote(span.path):
          continue
        if self._size + span.size > self.limit:
          return
        self._add(span)

  def get(self, span: Range) -> bytes:
    """Returns the bytes of a range."""
    with self._lock:
      read = self._reads.get(span) or self._add(span)
      self._reads.move_to_end(span)
      while self._size > self.limit and len(self._reads) > 1:
        old, _ = self._reads.popitem(last=False)
        self._size -= old.size
    try:
      return read.result()
    except BaseException:
      with self._lock:
        if self._reads.get(span) is read:
          del self._reads[span]
          self._size -= span.size
      raise

  def _add(self, span: Range) -> "_Read":
    read = self._reads[span] = _Read(span, self.versions)
    self._size += span.size
    return read


class _Read:
  """The read of one range, in progress or finished."""

  def __init__(self, span: Range, versions: dict[PurePath, Any]):
    self._span, self._versions = span, versions
    self._lock = threading.Lock()
    self._data: bytes | None = None
    self._future = None
    if path_lib.is_remote(span.path):
      store, key = _open_store(os.fspath(span.path))
      end = span.offset + span.size
      self._future = store.read(key, byte_range=slice(span.offset, end))

  def result(self) -> bytes:
    with self._lock:
      if self._data is None:
        data = self._read()
        if len(data) != self._span.size:
          raise InputError(
            f"{self._span.path} ends before offset"
            f" {self._span.offset + self._span.size}: it was replaced or cut."
            " Restore it, or write its table of blocks again."
          )
        self._data, self._future = data, None
      return self._data

  def _read(self) -> bytes:
    path, offset, size = self._span
    if self._future is not None:
      try:
        result = self._future.result()
      except Exception:  # tensorstore's errors have no common base.
        # Retried below, by the client that explains errors and credentials.
        self._future = None
      else:
        if result.state == "value":
          version = result.stamp.generation
          if self._versions.setdefault(path, version) != version:
            raise InputError(
              f"{path} was replaced while it was read. Start again, after"
              " `mtv-jax index` has written its table of blocks."
            )
          return result.value
    return path_lib.read_range(path, offset, size)


def _open_store(url: str) -> tuple[Any, str]:
  """Returns tensorstore's store of a URL's bucket, and the object's key."""
  scheme, _, rest = url.partition("://")
  bucket, _, key = rest.partition("/")
  return _open_bucket(scheme, bucket), key


@functools.cache
def _open_bucket(scheme: str, bucket: str) -> Any:
  import tensorstore as ts  # Takes 0.3 s to import.

  if scheme == "gs":
    return ts.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
  spec = {"driver": "s3", "bucket": bucket}
  names = dict(endpoint="AWS_ENDPOINT_URL", aws_region="AWS_DEFAULT_REGION")
  spec |= {k: os.environ[v] for k, v in names.items() if os.environ.get(v)}
  return ts.KvStore.open(spec).result()
