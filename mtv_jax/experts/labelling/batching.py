"""Batched inference of an expert, with host threads around it.

Threads read, decode and prepare records ahead of the devices and finish labels
behind them; one batch runs on the devices while the next one is assembled.
Batches depend on the order of the records alone, never on the threads' timing.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.label_values import Outcome, no_label
from mtv_jax.data.labels.label_writer import Entry
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.experts.base import Expert, Prepared

# Total size of prepared records that wait for others of their group.
_MAX_BYTES = 2 << 30
# Records after a waiting one; their labels wait for its label.
_MAX_AGE = 4096

# The parts of a reason that differ between records.
_BYTES = re.compile(r"b'(?:[^'\\]|\\.)*'|b\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"\b0x[0-9a-f]+\b|\d+(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Batch:
  """Records of one group, at most a full batch.

  Attributes:
    positions: of the records, ascending.
    prepared: the records.
  """

  positions: Sequence[int]
  prepared: Sequence[Prepared]

  def arrays(self, rows: int) -> dict[str, np.ndarray]:
    """Stacked arrays, padded to `rows` by repetition."""
    chosen = [self.prepared[i % len(self.prepared)] for i in range(rows)]
    return {
      name: np.stack([item.arrays[name] for item in chosen])
      for name in chosen[0].arrays
    }


class Grouper:
  """Collects records of the same group until they fill a batch.

  To bound memory and latency, the oldest batch is released incomplete when
  too much waits, which depends on the records and their order alone.

  Args:
    rows: size of a full batch.
    max_bytes: of all waiting arrays, if several groups wait.
    max_age: number of records after a waiting one.
  """

  def __init__(
    self, rows: int, *, max_bytes: int = _MAX_BYTES, max_age: int = _MAX_AGE
  ):
    self._rows = rows
    self._max_bytes = max_bytes
    self._max_age = max_age
    # By group, in the order of their first records.
    self._waiting: dict[Hashable, list[tuple[int, Prepared]]] = {}
    self._bytes = 0

  def add(self, position: int, prepared: Prepared) -> Iterator[Batch]:
    """Adds a record; yields the batches that are due."""
    waiting = self._waiting.setdefault(prepared.group, [])
    waiting.append((position, prepared))
    self._bytes += _size(prepared)
    if len(waiting) == self._rows:
      yield self._pop(prepared.group)
    while self._waiting:
      oldest = next(iter(self._waiting))
      many = len(self._waiting) > 1 and self._bytes > self._max_bytes
      if not many and position - self._waiting[oldest][0][0] < self._max_age:
        return
      yield self._pop(oldest)

  def rest(self) -> Iterator[Batch]:
    """Yields the waiting batches, oldest first."""
    while self._waiting:
      yield self._pop(next(iter(self._waiting)))

  def _pop(self, group: Hashable) -> Batch:
    positions, prepared = zip(*self._waiting.pop(group), strict=True)
    self._bytes -= sum(map(_size, prepared))
    return Batch(positions, prepared)


def _size(prepared: Prepared) -> int:
  return sum(array.nbytes for array in prepared.arrays.values())


@dataclasses.dataclass(frozen=True)
class _Read:
  """A prepared record, or the outcome of one that can't be prepared."""

  key: str
  image: str
  prepared: Prepared | None = None
  outcome: Outcome | None = None


def label(
  expert: Expert,
  read: Callable[[int], Record],
  numbers: Sequence[int],
  *,
  pool: futures.ThreadPoolExecutor,
  threads: int,
) -> Iterator[Entry]:
  """Labels records, in order.

  Args:
    expert: the model.
    read: from a record's number to the record, with `captions` and `meta`;
      a BadRecord it raises becomes a record without a label.
    numbers: of the records.
    pool: threads.
    threads: their number.
  """
  work = _Pipeline(expert, pool)
  prepare = _preparing(expert, read)
  ahead = expert.rows + 2 * threads
  try:
    for position, item in enumerate(_in_order(pool, prepare, numbers, ahead)):
      yield from work.take(position, item)
    yield from work.rest()
  finally:
    work.cancel()


def _in_order(
  pool: futures.ThreadPoolExecutor,
  function: Callable[[int], _Read],
  numbers: Sequence[int],
  ahead: int,
) -> Iterator[_Read]:
  """`pool.map` with at most `ahead` pending calls."""
  pending: collections.deque[futures.Future] = collections.deque()
  try:
    for number in numbers:
      if len(pending) == ahead:
        yield pending.popleft().result()
      pending.append(pool.submit(function, number))
    while pending:
      yield pending.popleft().result()
  finally:
    for future in pending:
      future.cancel()


def _preparing(
  expert: Expert, read: Callable[[int], Record]
) -> Callable[[int], _Read]:
  def prepare(number: int) -> _Read:
    key, image = None, ""
    try:
      record = read(number)
      key, image = record["key"], label_sets.hash_image(record["image"])
      pixels = canvas.decode(record["image"], key=key)
      return _Read(key, image, expert.prepare(pixels, record))
    except BadRecord as error:
      key = error.key if key is None else key
      return _Read(key, image, outcome=no_label(reason(error)))
    except Exception as error:
      error.add_note(f"(while preparing record {number}, {key!r})")
      raise

  return prepare


def reason(error: BadRecord) -> str:
  """The reason of an error without the parts that differ between records."""
  text = _BYTES.sub("...", error.reason)
  return f"record: {_NUMBER.sub('N', text)}"


class _Pipeline:
  """The stages between reading and writing."""

  def __init__(self, expert: Expert, pool: futures.ThreadPoolExecutor):
    self._expert = expert
    self._pool = pool
    self._grouper = Grouper(expert.rows)
    self._running: tuple[Batch, Mapping[str, jax.Array]] | None = None
    self._finishing: list[futures.Future[Outcome]] = []
    # By position; removed with the label.
    self._read: dict[int, tuple[str, str]] = {}
    self._labels: dict[int, futures.Future[Outcome] | Outcome] = {}
    self._next = 0

  def take(self, position: int, item: _Read) -> Iterator[Entry]:
    """Adds a record; yields the finished entries, in order."""
    self._read[position] = (item.key, item.image)
    if item.outcome is not None:
      self._labels[position] = item.outcome
    else:
      for batch in self._grouper.add(position, item.prepared):
        self._start(batch)
    yield from self._ready()

  def rest(self) -> Iterator[Entry]:
    """Yields the remaining entries."""
    for batch in self._grouper.rest():
      self._start(batch)
      yield from self._ready()
    self._collect()
    futures.wait(self._finishing)
    yield from self._ready()

  def cancel(self) -> None:
    """Cancels pending calls."""
    for future in self._finishing:
      future.cancel()

  def _start(self, batch: Batch) -> None:
    outputs = self._expert.run(batch.arrays(self._expert.rows))
    self._collect()
    self._running = (batch, outputs)

  def _collect(self) -> None:
    """Waits for the running batch and hands its rows to threads."""
    if self._running is None:
      return
    batch, outputs = self._running
    self._running = None
    # Bounds the number of pending labels.
    futures.wait(self._finishing)
    fetched = {name: np.asarray(value) for name, value in outputs.items()}
    self._finishing = []
    for row, (position, prepared) in enumerate(
      zip(batch.positions, batch.prepared, strict=True)
    ):
      # An array also of a scalar.
      rows = {name: value[row, ...] for name, value in fetched.items()}
      future = self._pool.submit(self._finish, position, rows, prepared.meta)
      self._finishing.append(future)
      self._labels[position] = future

  def _finish(
    self, position: int, rows: Mapping[str, np.ndarray], meta: object
  ) -> Outcome:
    try:
      return self._expert.finish(rows, meta)
    except BadRecord as error:
      return no_label(reason(error))
    except Exception as error:
      error.add_note(
        f"(while labelling the record {self._read[position][0]!r})"
      )
      raise

  def _ready(self) -> Iterator[Entry]:
    while (outcome := self._labels.get(self._next)) is not None:
      if isinstance(outcome, futures.Future):
        if not outcome.done():
          return
        outcome = outcome.result()
      del self._labels[self._next]
      key, image = self._read.pop(self._next)
      self._next += 1
      yield Entry(key, outcome, image)
