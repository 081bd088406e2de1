"""Byte ranges of files, read ahead and kept in memory.

tensorstore requests ranges from buckets without holding the GIL; threads
request ranges from the hub.
"""

import collections
import contextlib
import functools
import logging
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from multiprocessing import connection
from pathlib import PurePath
from typing import Any, NamedTuple

from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, StorageError
from mtv_jax.utils.process_cache import raise_file_limit
from mtv_jax.utils.text import format_bytes

log = logging.getLogger(__name__)

# Seconds without a request after which a range that was read counts as used up.
_USED_UP = 2.0


class ByteRange(NamedTuple):
  """A byte range of a file."""

  path: PurePath
  offset: int
  size: int


class RangeReader:
  """Reads byte ranges, and keeps the most recent `limit` bytes.

  A bucket that doesn't answer is retried for `patience` seconds. Raises
  InputError if a file is shorter than a range, or is replaced while it is read;
  StorageError if a bucket can't be read. Thread-safe; empty after pickling.
  """

  def __init__(self, limit: int, *, patience: float = 0.0):
    self.limit, self.patience = limit, patience
    self._lock = threading.Lock()
    self._reads: collections.OrderedDict[ByteRange, _Read] = (
      collections.OrderedDict()
    )
    self._size = 0
    # Ranges evicted while in use; None once a repeated read is logged.
    self._evicted_in_use: set[ByteRange] | None = set()
    self.versions: dict[PurePath, Any] = {}
    self.is_closed = False

  def __reduce__(self) -> tuple:
    return functools.partial(type(self), patience=self.patience), (self.limit,)

  def prefetch(self, spans: Iterable[ByteRange]) -> None:
    """Starts to read bucket ranges, as far as the limit allows.

    Evicts only ranges that are used up.
    """
    with self._lock:
      for span in spans:
        if span in self._reads:
          self._mark_requested(span)
        elif path_lib.is_remote(span.path):
          while self._size + span.size > self.limit:
            oldest_read = next(iter(self._reads.values()), None)
            if oldest_read is None or not oldest_read.is_used_up:
              return
            self._evict_oldest()
          self._start_read(span)

  def allows_copies(self, spans: Sequence[ByteRange]) -> bool:
    """Whether whole files may be copied to the disk in advance."""
    del spans
    return not self.is_closed

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """Returns the bytes of a range."""
    return self._get_stored(span)

  def read(self, span: ByteRange) -> bytes:
    """Returns the bytes of a range, without keeping them."""
    return _Read(span, self).result()

  def _get_stored(self, span: ByteRange) -> Any:
    """Returns the stored form of a range; see `keep`."""
    with self._lock:
      read = self._reads.get(span) or self._start_read(span)
      self._mark_requested(span)
      self._warn_if_evicted(span)
      while self._size > self.limit and len(self._reads) > 1:
        oldest_span, oldest_read = next(iter(self._reads.items()))
        if self._evicted_in_use is not None and not oldest_read.is_used_up:
          self._evicted_in_use.add(oldest_span)
        self._evict_oldest()
    try:
      return read.result()
    except BaseException:
      with self._lock:
        if self._reads.get(span) is read:
          del self._reads[span]
          self._size -= span.size
      raise

  def close(self) -> None:
    """Drops all ranges, and cancels pending reads."""
    self.is_closed = True
    with self._lock:
      for read in self._reads.values():
        read.cancel()
      self._reads.clear()
      self._size = 0

  def _start_read(self, span: ByteRange) -> "_Read":
    read = self._reads[span] = _Read(span, self)
    self._size += span.size
    return read

  def _mark_requested(self, span: ByteRange) -> None:
    self._reads.move_to_end(span)
    self._reads[span].requested_at = time.monotonic()

  def _warn_if_evicted(self, span: ByteRange) -> None:
    if self._evicted_in_use and span in self._evicted_in_use:
      log.warning(
        "Blocks are read again, because blocks in use exceed the"
        f" {format_bytes(self.limit)} of data.block_memory: raise it, or lower"
        " data.window."
      )
      self._evicted_in_use = None

  def _evict_oldest(self) -> None:
    span, _ = self._reads.popitem(last=False)
    self._size -= span.size

  def keep(self, data: bytes) -> Any:
    """Converts the bytes of a range to their stored form."""
    return data


class _Read:
  """The read of one range, in progress or finished."""

  def __init__(self, span: ByteRange, reader: RangeReader):
    self._span, self._reader = span, reader
    self._lock = threading.Lock()
    self.requested_at = time.monotonic()
    self._stored = self._future = None
    if path_lib.is_remote(span.path):
      store, key = buckets.open_store(span.path)
      end = span.offset + span.size
      self._future = store.read(key, byte_range=slice(span.offset, end))

  @property
  def is_used_up(self) -> bool:
    age = time.monotonic() - self.requested_at
    return self._stored is not None and age > _USED_UP

  def cancel(self) -> None:
    if (future := self._future) is not None:
      future.cancel()

  def result(self) -> Any:
    with self._lock:
      if self._stored is None:
        data = self._read_bytes()
        if len(data) != self._span.size:
          raise InputError(
            f"{self._span.path} ends before offset"
            f" {self._span.offset + self._span.size}: it was replaced or cut."
            " Restore it, or write its table of blocks again."
          )
        self._stored, self._future = self._reader.keep(data), None
      return self._stored

  def _read_bytes(self) -> bytes:
    path, offset, size = self._span
    if self._future is not None:
      try:
        result = self._future.result()
      except Exception:  # tensorstore's errors lack a common base.
        # Retried below, by a client that explains why access failed.
        self._future = None
      else:
        if result.state == "value":
          buckets.note_answer(path)
          version = result.stamp.generation
          if self._reader.versions.setdefault(path, version) != version:
            raise buckets.replaced_error(path)
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
  """`RangeReader` that shares its bytes with this host's worker processes.

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
    self._address = self._listener.address
    threading.Thread(target=self._accept_clients, daemon=True).start()

  def __reduce__(self) -> tuple:
    return RangeClient, (self._address, os.getpid(), self.limit)

  def close(self) -> None:
    """As in the base class; accepts no further clients."""
    self.is_closed = True
    with contextlib.suppress(OSError):  # Already closed.
      # Closing the listener doesn't wake its thread.
      connection.Client(self._address, family="AF_UNIX").close()
    self._listener.close()
    super().close()

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """As in the base class."""
    memory = self._get_stored(span)
    return os.pread(memory.fd, memory.size, 0)

  def keep(self, data: bytes) -> _Memory:
    return _Memory(data)

  def _accept_clients(self) -> None:
    while not self.is_closed:
      try:
        client = self._listener.accept()
      except OSError:  # Closed.
        return
      thread = threading.Thread(target=self._serve, args=[client], daemon=True)
      thread.start()

  def _serve(self, client: connection.Connection) -> None:
    with client, contextlib.suppress(EOFError, OSError):
      while True:
        spans, only_prefetch = client.recv()
        spans = [ByteRange(path_lib.as_path(p), *rest) for p, *rest in spans]
        if only_prefetch:
          self.prefetch(spans)
          continue
        try:
          # Stays open until the next request: the client has opened it then.
          memory = self._get_stored(*spans)
          client.send((memory.fd, memory.size))
        except Exception as error:
          client.send(error)


class RangeClient:
  """A worker's access to the `RangeServer` of its host."""

  _MAX_MAPS = 512  # Mapped ranges, of `limit` bytes at most.
  _MAX_PREFETCHED = 1 << 16  # Ranges whose last prefetch is remembered.
  is_closed = False  # Workers end with their loader.
  allows_copies = RangeReader.allows_copies

  def __init__(self, address: str, pid: int, limit: int):
    self._arguments = address, pid, limit
    self._size = 0
    # `_receive_lock` is held while a range arrives; `_lock` stays free.
    self._lock, self._receive_lock = threading.Lock(), threading.Lock()
    # Connections by `only_prefetch`.
    self._clients: dict[bool, connection.Connection] = {}
    self._maps: collections.OrderedDict[ByteRange, mmap.mmap] = (
      collections.OrderedDict()
    )
    self._prefetched: collections.OrderedDict[ByteRange, float] = (
      collections.OrderedDict()
    )

  def __reduce__(self) -> tuple:
    return RangeClient, self._arguments

  def _send(
    self, spans: Iterable[ByteRange], *, only_prefetch: bool
  ) -> connection.Connection:
    if (client := self._clients.get(only_prefetch)) is None:
      client = connection.Client(self._arguments[0], family="AF_UNIX")
      self._clients[only_prefetch] = client
    message = [(os.fspath(path), *rest) for path, *rest in spans]
    client.send((message, only_prefetch))
    return client

  def prefetch(self, spans: Iterable[ByteRange]) -> None:
    """As in `RangeReader`."""
    with self._lock:
      now = time.monotonic()
      # Repeated before they count as used up, but not at every step.
      cutoff = now - _USED_UP / 2
      spans = [s for s in spans if self._prefetched.get(s, cutoff) <= cutoff]
      self._prefetched |= dict.fromkeys(spans, now)
      while len(self._prefetched) > self._MAX_PREFETCHED:
        self._prefetched.popitem(last=False)
      if spans:
        self._send(spans, only_prefetch=True)

  def get(self, span: ByteRange) -> bytes | mmap.mmap:
    """As in `RangeReader`."""
    if (data := self._find_map(span)) is not None:
      return data
    with self._receive_lock:
      if (data := self._find_map(span)) is not None:
        return data
      answer = self._send([span], only_prefetch=False).recv()
      if isinstance(answer, Exception):
        raise answer
      fd, size = answer
      with open(f"/proc/{self._arguments[1]}/fd/{fd}", "rb") as file:
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
      self._keep_map(span, data)
      return data

  def _find_map(self, span: ByteRange) -> mmap.mmap | None:
    """Returns a range if it is mapped."""
    with self._lock:
      if span in self._maps:
        self._maps.move_to_end(span)
      return self._maps.get(span)

  def _keep_map(self, span: ByteRange, data: mmap.mmap) -> None:
    """Keeps a range mapped; unmaps the oldest ranges beyond the limits."""
    with self._lock:
      self._maps[span] = data
      self._size += span.size
      limit = self._arguments[2]
      while len(self._maps) > 1 and (
        len(self._maps) > self._MAX_MAPS or self._size > limit
      ):
        old_span, _ = self._maps.popitem(last=False)
        self._size -= old_span.size
