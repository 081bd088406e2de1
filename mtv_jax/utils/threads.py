"""Threaded maps, for work that waits for I/O or releases the GIL."""

import collections
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

# Threads that open or copy files; they mostly wait for the disk or network.
IO_THREADS = 16


def available_cores() -> int:
  """Number of cores that this process may use; containers limit it."""
  if hasattr(os, "sched_getaffinity"):  # Linux
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def end_with_parent(*_: Any) -> None:
  """Starts a thread that exits this worker process when its parent dies.

  Otherwise a worker whose parent was killed would wait forever.
  """

  def wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def map_threads(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  *,
  threads: int = IO_THREADS,
) -> list:
  """Maps with threads, in order; the default number suits file I/O."""
  with futures.ThreadPoolExecutor(threads) as pool:
    return list(pool.map(function, items))


def map_ahead(
  function: Callable[[Any], Any], items: Iterable[Any], *, ahead: int = 0
) -> Iterator[Any]:
  """Maps with one thread per core, in order, with a bounded number pending.

  Iterates `items` in the caller's thread. Computes `ahead` results in advance,
  by default twice the number of threads.
  """
  threads = available_cores()
  pending: collections.deque[futures.Future] = collections.deque()
  pool = futures.ThreadPoolExecutor(threads)
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > (ahead or 2 * threads):
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
