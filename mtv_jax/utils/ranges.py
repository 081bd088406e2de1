"""Byte ranges of files, read ahead and kept in memory.

tensorstore sends the requests to buckets outside Python's interpreter lock;
threads send those to the hub.
"""

import collections
import contextlib
import functools
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable
from multiprocessing import connection
from pathlib import PurePath
from typing import Any, NamedTuple

from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, StorageError
from mtv_jax.utils.process_cache import raise_file_limit


class ByteRange(NamedTuple):
  """A byte range of a file."""

  path: PurePath
  offset: int
  size: int


class RangeReader:
  """Reads byte ranges, and keeps the most recent `limit` bytes.

  A bucket that doesn't answer is tried for `patience` seconds. Raises
  InputError if a file ends before a range, or is replaced while its ranges are
  read; StorageError if a bucket can't be read. Thread-safe; empty after
  pickling.
  """

  def __init__(self, limit: int, *, patience: float = 0.0):
    self.limit, self.patience = limit, patience
    self._lock = threading.Lock()
    self._reads: collections.OrderedDict[ByteRange, _Read] = (
      collections.OrderedDict()
    )
    self._size = 0
    self.versions: dict[PurePath, Any] = {}
    self.is_closed = False

  def __reduce__(self) -> tuple:
    return functools.partial(type(self), patience=self.patience), (self.limit,)

  def prefetch(self, spans: Iterable[ByteRange]) -> None:
    """Starts to read bucket ranges, as far as the limit allows."""
    with self._lock:
      for span in spans:
        if span in self._reads or not path_lib.is_remote(span.path):
          continue
        if self._size + span.size > self.limit:
          return
        self._add(span)

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """Returns the bytes of a range."""
    return self._get(span)

  def _get(self, span: ByteRange) -> Any:
    """Returns what is kept of a range."""
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

  def close(self) -> None:
    """Forgets everything, and cancels reads ahead."""
    self.is_closed = True
    with self._lock:
      for read in self._reads.values():
        read.cancel()
      self._reads.clear()
      self._size = 0

  def _add(self, span: ByteRange) -> "_Read":
    read = self._reads[span] = _Read(span, self)
    self._size += span.size
    return read

  def keep(self, data: bytes) -> Any:
    """Converts the bytes of a range to what is kept of them."""
    return data


class _Read:
  """The read of one range, in progress or finished."""

  def __init__(self, span: ByteRange, reader: RangeReader):
    self._span, self._reader = span, reader
    self._lock = threading.Lock()
    self._kept = self._future = None
    if path_lib.is_remote(span.path):
      store, key = buckets.open_store(span.path)
      end = span.offset + span.size
      self._future = store.read(key, byte_range=slice(span.offset, end))

  def cancel(self) -> None:
    if (future := self._future) is not None:
      future.cancel()

  def result(self) -> Any:
    with self._lock:
      if self._kept is None:
        data = self._read()
        if len(data) != self._span.size:
          raise InputError(
            f"{self._span.path} ends before offset"
            f" {self._span.offset + self._span.size}: it was replaced or cut."
            " Restore it, or write its table of blocks again."
          )
        self._kept, self._future = self._reader.keep(data), None
      return self._kept

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
          if self._reader.versions.setdefault(path, version) != version:
            raise InputError(
              f"{path} was replaced while it was read. Start again, after"
              " `mtv-jax index` has written its table of blocks."
            )
          return result.value
    patience = self._reader.patience
    return path_lib.read_range(path, offset, size, patience=patience)


# ---------------------------------------------------------------------------
# Sharing with worker processes.


class _Memory:
  """Bytes in anonymous memory that other processes of this user can map.

  The system frees it when the last process that has it open or mapped ends.
  """

  def __init__(self, data: bytes):
    self.fd = os.memfd_create("range", os.MFD_CLOEXEC)
    weakref.finalize(self, os.close, self.fd)
    self.size = len(data)
    view = memoryview(data)
    while view:
      view = view[os.write(self.fd, view) :]


class RangeServer(RangeReader):
  """A reader whose bytes are shared by this host's worker processes.

  Pickled, it becomes a `RangeClient` in the worker, whose requests it answers.
  """

  def __init__(self, limit: int, *, patience: float = 0.0):
    super().__init__(limit, patience=patience)
    raise_file_limit()  # One descriptor per range.
    try:
      self._listener = connection.Listener(family="AF_UNIX")
    except OSError as error:
      raise StorageError(
        "A socket for the worker processes can't be opened in"
        f" {tempfile.gettempdir()} ({error}). Set TMPDIR to a writable folder"
        " with a short path, or use data.workers=0."
      ) from error
    threading.Thread(target=self._accept, daemon=True).start()

  def __reduce__(self) -> tuple:
    return RangeClient, (self._listener.address, os.getpid())

  def close(self) -> None:
    """As in the base class; answers no further requests."""
    self._listener.close()
    super().close()

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """As in the base class."""
    memory = self._get(span)
    return os.pread(memory.fd, memory.size, 0)

  def keep(self, data: bytes) -> _Memory:
    return _Memory(data)

  def _accept(self) -> None:
    while True:
      try:
        client = self._listener.accept()
      except OSError:  # Closed.
        return
      answer = threading.Thread(target=self._answer, args=[client], daemon=True)
      answer.start()

  def _answer(self, client: connection.Connection) -> None:
    with client, contextlib.suppress(EOFError, OSError):
      while True:
        spans, only_prefetch = client.recv()
        spans = [ByteRange(path_lib.as_path(p), *rest) for p, *rest in spans]
        if only_prefetch:
          self.prefetch(spans)
          continue
        try:
          # Kept open here until the client, which has opened it, asks again.
          memory = self._get(*spans)
          client.send((memory.fd, memory.size))
        except Exception as error:
          client.send(error)


class RangeClient:
  """A worker's access to the `RangeServer` of its host."""

  _MAPS = 512  # Mapped ranges.
  _ASKED = 1 << 16  # Ranges that are not requested in advance again.
  is_closed = False  # A loader's workers end with it.

  def __init__(self, address: str, pid: int):
    self._arguments = address, pid
    self._lock = threading.Lock()
    self._client: connection.Connection | None = None
    self._maps: collections.OrderedDict[ByteRange, mmap.mmap] = (
      collections.OrderedDict()
    )
    self._asked: collections.OrderedDict[ByteRange, None] = (
      collections.OrderedDict()
    )

  def __reduce__(self) -> tuple:
    return RangeClient, self._arguments

  def _send(self, spans: Iterable[ByteRange], *, only_prefetch: bool) -> None:
    if self._client is None:
      self._client = connection.Client(self._arguments[0], family="AF_UNIX")
    message = [(os.fspath(path), *rest) for path, *rest in spans]
    self._client.send((message, only_prefetch))

  def prefetch(self, spans: Iterable[ByteRange]) -> None:
    """As in `RangeReader`."""
    with self._lock:
      spans = [span for span in spans if span not in self._asked]
      self._asked |= dict.fromkeys(spans)
      while len(self._asked) > self._ASKED:
        self._asked.popitem(last=False)
      if spans:
        self._send(spans, only_prefetch=True)

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """As in `RangeReader`."""
    with self._lock:
      if span not in self._maps:
        self._send([span], only_prefetch=False)
        answer = self._client.recv()
        if isinstance(answer, Exception):
          raise answer
        fd, size = answer
        with open(f"/proc/{self._arguments[1]}/fd/{fd}", "rb") as file:
          access = mmap.ACCESS_READ
          self._maps[span] = mmap.mmap(file.fileno(), size, access=access)
        if len(self._maps) > self._MAPS:
          self._maps.popitem(last=False)
      self._maps.move_to_end(span)
      return self._maps[span]
