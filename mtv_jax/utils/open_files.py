"""A limited number of open files, shared by threads and kept to a process."""

import collections
import os
import resource
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OpenFiles(Generic[T]):
  """The most recently used of many files, opened by the process that reads.

  One that is dropped is closed when the last thread that reads from it lets go
  of it, so what `open` returns must close itself when it is deleted.

  Args:
    open: opens file `i`; to be pickled with the source.
    descriptors: how many one open file takes. A third of the process's limit
      is used (`ulimit -n`); a set of more files than that is reopened often.
  """

  def __init__(self, open: Callable[[int], T], *, descriptors: int):
    self._open = open
    self._descriptors = descriptors
    self._start()

  def _start(self) -> None:
    # A fork may happen while another thread holds the lock, and some readers
    # have threads, which a fork leaves behind: each process has its own.
    self._pid = os.getpid()
    self._lock = threading.Lock()
    self._files: collections.OrderedDict[int, T] = collections.OrderedDict()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = soft if soft > 0 else 1 << 16  # no limit is -1
    self.limit = max(8, soft // 3 // self._descriptors)

  def __getstate__(self) -> tuple[Callable[[int], T], int]:
    return self._open, self._descriptors

  def __setstate__(self, state: tuple[Callable[[int], T], int]) -> None:
    self._open, self._descriptors = state
    self._start()

  def get(self, i: int) -> T:
    """File `i`, open."""
    if self._pid != os.getpid():
      self._start()
    with self._lock:
      if (file := self._files.get(i)) is not None:
        self._files.move_to_end(i)
        return file
    # Outside the lock: opening waits for the disk. If two threads open the
    # same file, one of the two is dropped, and closed when its read is done.
    file = self._open(i)
    with self._lock:
      self._files[i] = file
      while len(self._files) > self.limit:
        self._files.popitem(last=False)
    return file
