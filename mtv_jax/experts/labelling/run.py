"""Labels a data set with an expert, on any number of hosts.

Threads read, decode and prepare records ahead of the devices
(`Expert.prepare`), and finish labels afterwards (`Expert.finish`), which
`LabelWriter` writes. One batch runs on the devices (`Expert.run`) while the
next is assembled. Batches depend only on the order of records.

Hosts lease parts of shards (`label_writer.write_all`). They may join, leave or
be killed: the label set is byte-identical.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.labels import label_sets, label_writer
from mtv_jax.data.labels.label_sets import LabelCounts
from mtv_jax.data.labels.label_values import LabelOutcome, no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert, PreparedInput
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.grouping import Grouper
from mtv_jax.utils.threads import available_cores

# Limit of the total size of prepared records in incomplete batches.
_MAX_BYTES = 2 << 30
# Records that a waiting record may delay: labels are written in order.
_MAX_AGE = 4096

# Parts of a reason that differ between records.
_BYTES_LITERAL = re.compile(r"b'(?:[^'\\]|\\.)*'|b\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"\b0x[0-9a-f]+\b|\d+(?:\.\d+)?")

# (position, prepared record) pairs of one group.
PreparedBatch = list[tuple[int, PreparedInput]]


def run(
  expert: Expert,
  base: Source,
  out: str | os.PathLike,
  *,
  check: bool = True,
  threads: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelCounts:
  """Labels the records that no other host labels, and completes the label set.

  `threads` threads decode and prepare; default: one per core. See `LabelWriter`
  for `check`, `write_all` for `progress`. Raises FileExistsError for labels
  with different settings, LabelError if all records lack a label.
  """
  if threads is not None and threads < 1:
    raise InputError(f"threads={threads}; expected at least 1.")
  threads = threads or available_cores()
  options = {"kind": expert.kind, "settings": expert.settings}
  writer = LabelWriter(out, base=base, check=check, **options)

  def make_entries(numbers: range) -> Iterator[Entry]:
    return label_records(expert, base, numbers, threads=threads)

  return label_writer.write_all(writer, make_entries, progress=progress)


def stack_arrays(batch: PreparedBatch, rows: int) -> dict[str, np.ndarray]:
  """Stacks a batch's arrays, padded to `rows` by repetition."""
  items = [batch[i % len(batch)][1].arrays for i in range(rows)]
  return {name: np.stack([x[name] for x in items]) for name in items[0]}


def make_grouper(
  rows: int, *, max_bytes: int = _MAX_BYTES, max_age: int = _MAX_AGE
) -> Grouper[PreparedInput]:
  """Builds a grouper that collects batches of `rows`, with bounded memory."""
  return Grouper(rows, max_age=max_age, max_bytes=max_bytes, item_bytes=_nbytes)


def _nbytes(prepared: PreparedInput) -> int:
  return sum(array.nbytes for array in prepared.arrays.values())


def label_records(
  expert: Expert, base: Source, numbers: Sequence[int], *, threads: int
) -> Iterator[Entry]:
  """Labels records of a source by number; yields entries in order.

  Bad records yield entries without a label. `threads` threads decode,
  prepare and finish.
  """
  pool = futures.ThreadPoolExecutor(threads)
  pipeline = _Pipeline(expert, pool)
  pending: collections.deque[futures.Future] = collections.deque()
  try:
    for number in numbers:
      if len(pending) == expert.rows + 2 * threads:
        yield from pipeline.add(*pending.popleft().result())
      pending.append(pool.submit(_prepare, expert, base, number))
    while pending:
      yield from pipeline.add(*pending.popleft().result())
    yield from pipeline.flush()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass
class _Item:
  """A record in the pipeline; its outcome may be pending."""

  key: str
  image: str = ""
  outcome: LabelOutcome | futures.Future[LabelOutcome] | None = None


def _prepare(
  expert: Expert, base: Source, number: int
) -> tuple[_Item, PreparedInput | None]:
  """Reads a record by number; prepares the expert's input unless it is bad."""
  item = None
  try:
    record = base.read_with_metadata(number)
    item = _Item(record["key"], label_sets.hash_bytes(record["image"]))
    pixels = canvas.decode(record["image"], key=item.key)
    return item, expert.prepare(pixels, record)
  except BadRecord as error:
    item = item or _Item(error.key)
    item.outcome = no_label(format_reason(error))
    return item, None
  except Exception as error:
    key = "of unknown key" if item is None else repr(item.key)
    error.add_note(f"(while preparing record {number}, {key})")
    raise


def format_reason(error: BadRecord) -> str:
  """Returns an error's reason without parts that differ between records."""
  text = _BYTES_LITERAL.sub("...", error.reason)
  return f"record: {_NUMBER.sub('N', text)}"


class _Pipeline:
  """Pipeline stages between preparing and writing."""

  def __init__(self, expert: Expert, pool: futures.ThreadPoolExecutor):
    self._expert = expert
    self._pool = pool
    self._grouper = make_grouper(expert.rows)
    self._running: tuple[PreparedBatch, Mapping[str, jax.Array]] | None = None
    self._finishing: list[futures.Future[LabelOutcome]] = []
    # Items by position; removed in order.
    self._items: dict[int, _Item] = {}
    self._num_added = self._num_yielded = 0

  def add(self, item: _Item, prepared: PreparedInput | None) -> Iterator[Entry]:
    """Adds a record; yields finished entries in order."""
    position, self._num_added = self._num_added, self._num_added + 1
    self._items[position] = item
    if prepared is not None:
      for batch in self._grouper.add(position, prepared.group, prepared):
        self._start(batch)
    yield from self._pop_finished()

  def flush(self) -> Iterator[Entry]:
    """Yields the remaining entries."""
    for batch in self._grouper.flush():
      self._start(batch)
      yield from self._pop_finished()
    self._collect()
    futures.wait(self._finishing)
    yield from self._pop_finished()

  def _start(self, batch: PreparedBatch) -> None:
    outputs = self._expert.run(stack_arrays(batch, self._expert.rows))
    self._collect()
    self._running = (batch, outputs)

  def _collect(self) -> None:
    """Waits for the running batch and submits its rows to threads."""
    batch, outputs = self._running or ([], {})
    self._running = None
    # Bounds the number of pending labels.
    futures.wait(self._finishing)
    self._finishing = []
    host_outputs = {name: np.asarray(value) for name, value in outputs.items()}
    for row, (position, prepared) in enumerate(batch):
      item = self._items[position]
      # With the ellipsis, scalars stay arrays.
      rows = {name: value[row, ...] for name, value in host_outputs.items()}
      item.outcome = self._pool.submit(
        self._finish, item.key, rows, prepared.meta
      )
      self._finishing.append(item.outcome)

  def _finish(
    self, key: str, rows: Mapping[str, np.ndarray], meta: object
  ) -> LabelOutcome:
    try:
      return self._expert.finish(rows, meta)
    except BadRecord as error:
      return no_label(format_reason(error))
    except Exception as error:
      error.add_note(f"(while labelling the record {key!r})")
      raise

  def _pop_finished(self) -> Iterator[Entry]:
    while item := self._items.get(self._num_yielded):
      outcome = item.outcome
      if outcome is None:
        return
      if isinstance(outcome, futures.Future):
        if not outcome.done():
          return
        outcome = outcome.result()
      del self._items[self._num_yielded]
      self._num_yielded += 1
      yield Entry(item.key, outcome, item.image)
