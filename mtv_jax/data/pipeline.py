"""Input pipeline: the batch of a step is a function of the step alone.

Of the endless sequence of rows (`order.addresses`), step t takes rows
`[t B, (t + 1) B)`, and host h of n those from `t B + h B / n` on. A row's
random numbers derive from the seed and its position. So any number of hosts
sees the same rows, and a run resumes at any step without reading what came
before.

A batch is allocated once, and its rows are filled by threads: reading,
decoding and resizing release the GIL. Grain prefetches whole batches, in this
process or in worker processes. Worker processes pay for themselves only where
one process can't feed the accelerators: batches are copied between processes.

No module of `mtv_jax.data` imports JAX, and no worker starts a JAX backend.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from mtv_jax.data import order
from mtv_jax.data.ops import Field, Ops, build_ops
from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources.base import Source
from mtv_jax.data.tokenizers import Tokenizer
from mtv_jax.utils.cores import available_cores
from mtv_jax.utils.errors import InputError, UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# So many bad records in a row are no accident of the data.
_MAX_IN_A_ROW = 256
# The share of bad records is judged after this many, or after an epoch.
_JUDGED_AFTER = 1000
# Lines in the log: the first ones, then one of many.
_LOGGED, _LOGGED_EVERY = 20, 100


class CorruptDataError(UserError, RuntimeError):
  """More records can't be used than `data.max_corrupt` allows."""


@dataclasses.dataclass
class Stats:
  """What the batches handed out so far were made of, on this host.

  Attributes:
    read: records read, bad ones included.
    corrupt: bad records among them; one that comes back every epoch counts
      every time.
    reasons: "source/key" of bad records and why, the first thousand.
    dropped: by "source: reason", what was left out of labels, or missing.
  """

  read: int = 0
  corrupt: int = 0
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)
  dropped: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )


class HostBatches:
  """Step -> this host's rows of the batch, as a source that Grain reads.

  An element is `rows` (the batch), `bad`, (source, key, reason) of each record
  that was passed over, and `dropped`, (source, reason, count) of what was left
  out of labels, so that worker processes report them too.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    addresses: grain.MapDataset,
    ops: Ops,
    *,
    seed: int,
    batch_size: int,
    first_row: int,
    rows: int,
    start_step: int,
    threads: int,
  ):
    self._sources = sources
    self._addresses = addresses
    self._ops = ops
    self._seed = seed
    self._batch_size = batch_size
    self._first_row = first_row
    self._rows = rows
    self._start_step = start_step
    self._threads = threads
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> dict[str, Any]:
    step = self._start_step + int(index)
    first = step * self._batch_size + self._first_row
    positions = range(first, first + self._rows)
    with self._lock:
      # Grain sets its datasets up on first use, for one thread.
      addresses = [self._addresses[position] for position in positions]
      pool = self._started()
    batch = {
      name: np.empty((self._rows, *field.shape), field.dtype)
      for name, field in self._ops.fields.items()
    }
    filled = list(
      pool.map(self._fill, [batch] * self._rows, positions, addresses)
    )
    return {
      "rows": batch,
      "bad": [entry for bad, _ in filled for entry in bad],
      "dropped": [entry for _, dropped in filled for entry in dropped],
    }

  def _fill(
    self, batch: Batch, position: int, address: tuple[int, int]
  ) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, int]]]:
    """Writes the row of `position`; returns what there is to report."""
    source, first = self._sources[address[0]], address[1]
    tries = min(len(source), _MAX_IN_A_ROW)
    bad: list[tuple[str, str, str]] = []
    for number in range(first, first + tries):
      number %= len(source)
      try:
        rng = np.random.default_rng((self._seed, position))
        record = self._ops(source[number], rng)
        row = (position - self._first_row) % self._batch_size
        for name, values in batch.items():
          values[row] = record[name]
        dropped = record.get("dropped", {}).items()
        return bad, [(source.name, reason, n) for reason, n in dropped]
      except BadRecord as error:
        bad.append((source.name, error.key, error.reason))
      except Exception as error:
        error.add_note(f"in record {number} of {source!r} (row {position})")
        raise
    raise CorruptDataError(
      f"{tries} records of {source!r} in a row, from {first} on, can't be used."
      f" The first: {_described(bad[0])}. The last: {_described(bad[-1])}."
    )

  def _started(self) -> concurrent.futures.ThreadPoolExecutor:
    if self._pool is None:
      # Rows are parallel already; OpenCV's own threads would only contend.
      cv2.setNumThreads(1)
      self._pool = concurrent.futures.ThreadPoolExecutor(
        self._threads, thread_name_prefix="row"
      )
    return self._pool

  def close(self) -> None:
    """Stops this process's threads; rows being read are finished."""
    with self._lock:
      if self._pool is not None:
        self._pool.shutdown(wait=True, cancel_futures=True)

  def __getstate__(self) -> dict:
    return {k: v for k, v in vars(self).items() if k not in ("_pool", "_lock")}

  def __setstate__(self, state: dict) -> None:
    vars(self).update(state, _pool=None, _lock=threading.Lock())


class Loader:
  """Iterates over the host's batches, from `start_step` on, without end.

  Made by `make_loader`. Use it in one thread, and close it (or use `with`).

  Attributes:
    fields: of the batch, each with the shape and dtype of a row.
    step: of the batch that comes next.
    stats: what the batches so far were made of.
    examples_per_epoch: records in all sources together.
  """

  def __init__(
    self,
    source: HostBatches,
    iterator: grain.DatasetIterator,
    fields: dict[str, Field],
    *,
    step: int,
    examples_per_epoch: int,
    max_corrupt: float,
  ):
    self._source = source
    self._iterator = iterator
    self._max_corrupt = max_corrupt
    self.fields = fields
    self.step = step
    self.stats = Stats()
    self.examples_per_epoch = examples_per_epoch

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """The next batch: arrays of [rows, ...] for each of `fields`.

    Raises:
      CorruptDataError: too many of the records read so far can't be used.
    """
    element = next(self._iterator)
    rows, bad = element["rows"], element["bad"]
    self.step += 1
    self.stats.read += len(next(iter(rows.values()))) + len(bad)
    for entry in bad:
      self._note(entry)
    for entry in element["dropped"]:
      self._note_dropped(*entry)
    self._judge()
    return {name: rows[name] for name in self.fields}

  def _note(self, entry: tuple[str, str, str]) -> None:
    stats, (source, key, reason) = self.stats, entry
    stats.corrupt += 1
    if len(stats.reasons) < 1000:
      stats.reasons[f"{source}/{key}"] = reason
    if stats.corrupt <= _LOGGED or stats.corrupt % _LOGGED_EVERY == 0:
      log.warning(
        "Bad record %d of %d read: %s",
        stats.corrupt,
        stats.read,
        _described(entry),
      )

  def _note_dropped(self, source: str, reason: str, count: int) -> None:
    name = f"{source}: {reason}"
    before = self.stats.dropped[name]
    after = self.stats.dropped[name] = before + count
    # The first one, and then each time that there are ten times as many.
    if not before or len(str(after)) > len(str(before)):
      log.warning(
        "Labels of %s (%d in %d records read)", name, after, self.stats.read
      )

  def _judge(self) -> None:
    stats = self.stats
    if stats.read < min(_JUDGED_AFTER, self.examples_per_epoch):
      return
    if stats.corrupt > self._max_corrupt * stats.read:
      some = [f"{key}: {reason}" for key, reason in stats.reasons.items()]
      raise CorruptDataError(
        f"{stats.corrupt} of {stats.read} records read can't be used,"
        f" {stats.corrupt / stats.read:.2%}; data.max_corrupt allows"
        f" {self._max_corrupt:.2%}. Repair or remove them, or raise"
        " data.max_corrupt. Among them:\n  " + "\n  ".join(some[:10])
      )

  def close(self) -> None:
    """Stops prefetching. No batch can be asked for after it."""
    self._iterator.close()
    self._source.close()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def make_loader(
  data_config: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer: Tokenizer | None = None,
  wanted: Collection[str] | None = None,
  sources: Sequence[Source] | None = None,
) -> Loader:
  """The loader of a config's `data` section.

  Args:
    data_config: `train`, `ops`, and optionally `shuffle`, `workers`, `threads`
      (a worker's, or this process's; default: a core each), `prefetch`
      (batches ahead, a process; default 2) and `max_corrupt`.
    batch_size: global, over all hosts.
    seed: of the order and of all random choices.
    start_step: of the first batch.
    process_index: this host's number.
    process_count: how many hosts there are.
    tokenizer: of the text tower, for the op `caption`.
    wanted: fields of the batch that somebody reads; see `build_ops`.
    sources: instead of building those that `train` describes, one for each
      entry; without `train` all weigh the same.

  Raises:
    InputError: for what can't be, naming the field.
  """
  if batch_size % process_count or batch_size < 1:
    raise InputError(
      f"batch_size={batch_size} is no multiple of the {process_count}"
      " processes; each takes an equal share of every batch."
    )
  if not 0 <= process_index < process_count:
    raise InputError(
      f"process_index={process_index} is not in [0, {process_count})."
    )
  entries = data_config.get("train")
  if sources is None:
    sources = [build_source(entry) for entry in entries or ()]
  weights = [float(entry.get("weight", 1.0)) for entry in entries or ()]
  ops = build_ops(data_config["ops"], tokenizer=tokenizer, wanted=wanted)
  _require_labels(ops, sources)
  workers = _at_least(data_config, "workers", 0, 0)
  threads = max(available_cores() // max(workers, 1), 1)
  prefetch = _at_least(data_config, "prefetch", 2, 1)
  rows = batch_size // process_count
  batches = HostBatches(
    sources,
    order.addresses(
      sources,
      weights=weights or [1.0] * len(sources),
      shuffle=data_config.get("shuffle") or "global",
      seed=seed,
    ),
    ops,
    seed=seed,
    batch_size=batch_size,
    first_row=process_index * rows,
    rows=rows,
    start_step=start_step,
    threads=_at_least(data_config, "threads", threads, 1),
  )
  dataset = grain.MapDataset.source(batches).to_iter_dataset(
    grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
  )
  if workers:
    if not flags.FLAGS.is_parsed():
      # Grain's worker processes read absl flags, which a program that is not
      # an absl app (a notebook, a test) never parses.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers)
    )
  return Loader(
    batches,
    iter(dataset),
    ops.fields,
    step=start_step,
    examples_per_epoch=sum(len(source) for source in sources),
    max_corrupt=float(data_config.get("max_corrupt", 0.01)),
  )


def _require_labels(ops: Ops, sources: Sequence[Source]) -> None:
  """Refuses an op that would make nothing but zeros."""
  given = frozenset().union(*(source.fields for source in sources))
  if sources and (missing := sorted(ops.labels - given)):
    raise InputError(
      f"{ops!r} needs the record fields {missing}, which no source of"
      f" data.train gives; there are: {sorted(given)}. Add labels=dict(...) to"
      " a source, or leave the op out of data.ops."
    )


def _described(entry: tuple[str, str, str]) -> str:
  source, key, reason = entry
  return f"{source}: record {key!r}: {reason}"


def _at_least(
  config: Mapping[str, Any], name: str, default: int, least: int
) -> int:
  value = config.get(name)
  value = default if value is None else value
  if value < least:
    raise InputError(f"data.{name}={value}: expected at least {least}.")
  return int(value)
