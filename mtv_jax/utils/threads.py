"""Maps by threads, for work that waits for the disk or releases the GIL."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from mtv_jax.utils.cores import available_cores

# Threads that open or copy files, which wait for the disk or the network.
IO_THREADS = 16


def map_threads(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  *,
  threads: int = IO_THREADS,
) -> list:
  """The results for all items, in order; by default for files."""
  with futures.ThreadPoolExecutor(threads) as pool:
    return list(pool.map(function, items))


def map_ahead(
  function: Callable[[Any], Any], items: Iterable[Any], *, ahead: int = 0
) -> Iterator[Any]:
  """`map` by a thread per core, in order, with a bounded number pending.

  Items are iterated in the caller's thread; `ahead` results are computed in
  advance, by default twice the threads.
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
