"""Batching of items by group, such as arrays by shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Grouper(Generic[T]):
  """Collects items per group until they fill a batch.

  The oldest batch is released incomplete after `max_age` more items, or if
  several groups together exceed `max_bytes` (measured by `item_bytes`). Batches
  depend only on the order of items, so all hosts of a pod get equal ones.
  """

  def __init__(
    self,
    batch_size: int,
    *,
    max_age: int,
    max_bytes: float | int = math.inf,
    item_bytes: Callable[[T], int] = lambda item: 0,
  ):
    self._batch_size = batch_size
    self._max_age = max_age
    self._max_bytes = max_bytes
    self._item_bytes = item_bytes
    # Keyed by group, ordered by each group's first item.
    self._waiting: dict[Hashable, list[tuple[int, T]]] = {}
    self._bytes = 0

  def add(
    self, position: int, group: Hashable, item: T
  ) -> Iterator[list[tuple[int, T]]]:
    """Adds an item; yields batches that are due, as (position, item) pairs."""
    waiting = self._waiting.setdefault(group, [])
    waiting.append((position, item))
    self._bytes += self._item_bytes(item)
    if len(waiting) == self._batch_size:
      yield self._pop_batch(group)
    while self._waiting:
      oldest = next(iter(self._waiting))
      is_full = len(self._waiting) > 1 and self._bytes > self._max_bytes
      if not is_full and position - self._waiting[oldest][0][0] < self._max_age:
        return
      yield self._pop_batch(oldest)

  def flush(self) -> Iterator[list[tuple[int, T]]]:
    """Yields the remaining batches, oldest first."""
    while self._waiting:
      yield self._pop_batch(next(iter(self._waiting)))

  def _pop_batch(self, group: Hashable) -> list[tuple[int, T]]:
    batch = self._waiting.pop(group)
    self._bytes -= sum(self._item_bytes(item) for _, item in batch)
    return batch
