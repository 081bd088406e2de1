"""Least-recently-used cache of one process, shared by its threads."""

import collections
import contextlib
import functools
import logging
import os
import resource
import threading
from collections.abc import Callable, Hashable
from concurrent import futures
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Enough for thousands of shards with two label sets; with fewer, the readers of
# most shards are opened again for each record.
_MIN_FILES = 1 << 14
_MAX_FILES = 1 << 16  # Memory maps have a separate limit.


@functools.cache
def raise_file_limit() -> int:
  """Raises this process's limit of open files as far as allowed; returns it.

  Warns if the limit stays too low for data sets of thousands of shards.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  infinity = resource.RLIM_INFINITY
  # Systems reject an infinite limit of files.
  target = _MAX_FILES if hard == infinity else hard
  if soft != infinity and soft < target:
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
      soft = target
  limit = _MAX_FILES if soft == infinity else soft
  if limit < _MIN_FILES:
    log.warning(
      f"This process may open at most {limit:,} files (`ulimit -Hn`), too few"
      " for data sets of thousands of shards, which are then opened again and"
      f" again. Allow {_MAX_FILES:,}: `nofile` in /etc/security/limits.conf, or"
      f" `docker run --ulimit nofile={_MAX_FILES}`."
    )
  return limit


class ProcessCache(Generic[T]):
  """Cache of opened files or decoded blocks.

  Starts empty after pickling or a fork: file handles and readers' threads
  belong to one process. Threads that request the same entry wait for one load.
  An evicted value may still be in use by another thread, so it must close
  itself when deleted.

  `load` returns the value of entry `i`. The default `limit` uses a third of the
  process's limit of open files, raised as far as possible and at most 65,536,
  at `descriptors` files per value. `max_bytes` also limits the sum of the
  values' `nbytes`, unless a single value is larger.
  """

  def __init__(
    self,
    load: Callable[[Any], T],
    *,
    limit: int | None = None,
    descriptors: int = 1,
    max_bytes: int | None = None,
  ):
    self.__setstate__((load, limit, descriptors, max_bytes))

  def _reset(self) -> None:
    # A fork may happen while another thread holds the lock.
    self._pid = os.getpid()
    self._lock = threading.Lock()
    self._values = collections.OrderedDict[Hashable, futures.Future[T]]()
    self._load, limit, descriptors, self._max_bytes = self._arguments
    if limit is None:
      files = min(raise_file_limit(), _MAX_FILES)
      limit = max(8, files // 3 // descriptors)
    self.limit = limit

  def __getstate__(self) -> tuple:
    return self._arguments

  def __setstate__(self, arguments: tuple) -> None:
    self._arguments = arguments
    self._reset()

  def __len__(self) -> int:
    return len(self._values)

  def get(self, i: Hashable) -> T:
    """Returns the value of entry `i`, loading it if needed."""
    if self._pid != os.getpid():
      self._reset()
    with self._lock:
      is_missing = i not in self._values
      if is_missing:
        self._values[i] = futures.Future()
      future = self._values[i]
      self._values.move_to_end(i)
      while len(self._values) > self.limit:
        self._values.popitem(last=False)
    if is_missing:
      try:
        future.set_result(self._load(i))  # Waits for I/O: outside the lock.
      except BaseException as error:
        with self._lock:
          if self._values.get(i) is future:
            del self._values[i]
        future.set_exception(error)
      if self._max_bytes is not None:
        self._evict()
    return future.result()

  def _evict(self) -> None:
    """Evicts the oldest values beyond `max_bytes`."""
    with self._lock:
      sizes = {
        i: future.result().nbytes
        for i, future in self._values.items()
        if future.done() and not future.exception()
      }
      total = sum(sizes.values())
      for i in [*sizes][:-1]:
        if total > self._max_bytes:
          del self._values[i]
          total -= sizes[i]
