"""Input pipeline: the batch of a step is a function of the step alone.

Step t takes rows `[t B, (t + 1) B)` of the endless sequence
(`order.addresses`); host h of n takes the h-th of n equal parts. A row's random
numbers derive from the seed and its position. So the rows don't depend on the
number of hosts, and a run resumes at any step without reading earlier ones.
Batches that a run skips (`order.SkippedBatches`) shift the later ones.

Threads fill the rows of a batch: reading, decoding and resizing release the
GIL. Grain prefetches whole batches, in this process or in worker processes.
Workers copy batches between processes, so they help only if one process can't
feed the accelerators.

No module of `mtv_jax.data` imports JAX, and no worker starts a JAX backend.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import cv2
import grain
import numpy as np
from absl import flags

from mtv_jax.config import sections
from mtv_jax.config.feature_layout import FeatureLayout
from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  PositiveInt,
  Range,
)
from mtv_jax.data import order
from mtv_jax.data.ops import SOURCE, Field, Ops, build_ops
from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source, read_weight
from mtv_jax.data.sources.base import Source
from mtv_jax.data.stats import CorruptDataError, Stats, describe_bad
from mtv_jax.data.tokenizers.base import Tokenizer
from mtv_jax.utils.errors import InputError, WorkerError
from mtv_jax.utils.threads import available_cores, end_with_parent

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Windows of each lane in memory: the current step's and the next one.
_WINDOWS = 2
# More consecutive bad records than this are not accidental.
_MAX_BAD_RUN = 256
# Batches that may be prefetched beyond the step whose counts are requested.
_MAX_AHEAD = 16


@dataclasses.dataclass(eq=False, repr=False)
class HostBatches:
  """Random-access source for Grain: this host's rows of each step's batch.

  An element has `rows` (the batch) and what worker processes report: `bad`
  (source, key, reason) of each bad record, `dropped` (source, reason, count) of
  dropped label parts, and `texts`, the counts of encoded texts.
  """

  sources: Sequence[Source]
  addresses: Any  # A `grain.MapDataset` or `lanes.LaneOrder`.
  ops: Ops
  _: dataclasses.KW_ONLY
  seed: int
  batch_size: int
  first_row: int
  rows: int
  start_step: int
  threads: int
  skipped: order.SkippedBatches = ()
  in_lanes: bool = False

  def __post_init__(self):
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._lock, self._is_closed = threading.Lock(), False

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> dict[str, Any]:
    positions = self._list_positions(self.start_step + int(index))
    with self._lock:
      if self._is_closed:
        raise concurrent.futures.CancelledError
      if self.in_lanes:
        self._prefetch_blocks(positions)
      # Grain sets up its datasets on first access, which is not thread-safe.
      candidates = [self._find_candidates(position) for position in positions]
      if self._pool is None:
        # Rows already run in parallel; OpenCV's own threads would contend.
        cv2.setNumThreads(1)
        self._pool = concurrent.futures.ThreadPoolExecutor(
          self.threads, thread_name_prefix="row"
        )
      pool = self._pool
    batch = {
      name: np.empty((self.rows, *field.shape), field.dtype)
      for name, field in self.ops.fields.items()
    }
    outcomes: list[Any] = [concurrent.futures.CancelledError()] * self.rows
    # Each thread takes the next row when it is free: a future for every row
    # would cost more of the GIL than reading it.
    jobs = iter(list(zip(range(self.rows), positions, candidates, strict=True)))

    def fill_rows() -> None:
      for row, *job in jobs:
        if self._is_closed:
          return
        try:
          outcomes[row] = self._fill_row(batch, *job)
        except BaseException as error:
          outcomes[row] = error
          collections.deque(jobs, maxlen=0)  # Stops the other threads.

    fillers = [pool.submit(fill_rows) for _ in range(self.threads)]
    for filler in fillers:
      filler.result()  # CancelledError if closed, unlike `wait`.
    for outcome in outcomes:
      if isinstance(outcome, BaseException):
        raise outcome
    bad, dropped, texts = [], [], collections.Counter()
    for outcome in outcomes:
      bad += outcome[0]
      dropped += outcome[1]
      texts.update(outcome[2])
    return {"rows": batch, "bad": bad, "dropped": dropped, "texts": texts}

  def _find_candidates(self, position: int) -> tuple[int, Iterable[int]]:
    """Returns a row's source, and candidate records in order of preference."""
    if self.in_lanes:
      return self.addresses.candidates(position)
    source, record = self.addresses[position]
    return source, range(record, record + len(self.sources[source]))

  def _prefetch_blocks(self, positions: range) -> None:
    """Starts to read the blocks of these rows and of the next windows."""
    for source, window in self.addresses.upcoming(positions, windows=_WINDOWS):
      for first, count in zip(window.starts, window.sizes, strict=True):
        self.sources[source].prefetch(int(first), int(count))

  def _list_positions(self, step: int) -> range:
    """Positions of this host's rows in a step's batch."""
    batch = order.batch_of_step(step, self.skipped)
    first = batch * self.batch_size + self.first_row
    return range(first, first + self.rows)

  def read_keys(self, step: int) -> list[str]:
    """Returns "source/key" of this host's rows of a step; bad records too."""
    keys = []
    for position in self._list_positions(step):
      source, record = self.addresses[position]
      source = self.sources[source]
      keys.append(f"{source.name}/{source.read_metadata(record)['key']}")
    return keys

  def _fill_row(
    self, batch: Batch, position: int, candidates: tuple[int, Iterable[int]]
  ) -> tuple[list, list, Mapping[str, int]]:
    """Fills the row of `position`; returns `bad`, `dropped` and `texts`."""
    index, numbers = candidates
    source = self.sources[index]
    tries = min(len(source), _MAX_BAD_RUN)
    bad: list[tuple[str, str, str]] = []
    for number in itertools.islice(numbers, tries):
      number %= len(source)
      try:
        rng = np.random.default_rng((self.seed, position))
        record = self.ops(source[number], rng) | {SOURCE: index}
        row = (position - self.first_row) % self.batch_size
        for name, values in batch.items():
          values[row] = record[name]
        counts = record.get("dropped", {}).items()
        dropped = [(source.name, reason, n) for reason, n in counts]
        return bad, dropped, record.get("texts", {})
      except BadRecord as error:
        bad.append((source.name, error.key, error.reason))
      except Exception as error:
        error.add_note(f"in record {number} of {source!r} (row {position})")
        raise
    raise CorruptDataError(
      f"None of the {tries} records of {source!r} that were tried for one row"
      f" can be used. The first: {describe_bad(*bad[0])}."
    )

  def close(self) -> None:
    """Stops this process's threads after they finish the rows in progress."""
    with self._lock:
      self._is_closed = True
      if self._pool is not None:
        self._pool.shutdown(wait=True, cancel_futures=True)

  def __getstate__(self) -> dict:
    return {k: v for k, v in vars(self).items() if k not in ("_pool", "_lock")}

  def __setstate__(self, state: dict) -> None:
    vars(self).update(state, _pool=None, _lock=threading.Lock())


@dataclasses.dataclass(eq=False, repr=False)
class Loader(Iterator[Batch], contextlib.AbstractContextManager):
  """Endless iterator over this host's batches, see `make_loader`."""

  batches: HostBatches
  iterator: grain.DatasetIterator
  fields: dict[str, Field]  # Row shape and dtype of each batch field.
  _: dataclasses.KW_ONLY
  step: int  # Step of the next batch.
  examples_per_epoch: int  # Records of all sources.
  max_corrupt: float
  workers: int = 0
  stats: Stats = dataclasses.field(default_factory=Stats)
  reader: Any = None  # A `RangeReader`. Reads blocks; closed with the loader.

  def __post_init__(self):
    self._snapshots = {self.step: self.stats.snapshot()}

  def stats_at(self, step: int) -> Stats:
    """The counts after `step` batches; more may have been prefetched."""
    return self._snapshots[step]

  def __next__(self) -> Batch:
    """Returns the next batch.

    Raises CorruptDataError if there are too many bad records, WorkerError if a
    worker process was killed.
    """
    try:
      element = next(self.iterator)
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):
        raise
      raise WorkerError(
        f"One of {self.workers} worker processes was killed or crashed, often"
        " for lack of memory. Rerun the same command to resume, with fewer"
        " data.workers or a smaller data.block_memory."
      ) from error
    rows, bad = element["rows"], element["bad"]
    self.step += 1
    self.stats.read += len(next(iter(rows.values()))) + len(bad)
    for entry in bad:
      self.stats.count_bad(*entry)
    for entry in element["dropped"]:
      self.stats.count_dropped(*entry)
    epoch = self.examples_per_epoch
    self.stats.count_texts(element["texts"], ops=self.batches.ops, epoch=epoch)
    self.stats.check_corrupt(self.max_corrupt, epoch=epoch)
    self._snapshots[self.step] = self.stats.snapshot()
    self._snapshots.pop(self.step - _MAX_AHEAD, None)
    return {name: rows[name] for name in self.fields}

  def close(self) -> None:
    """Stops prefetching and ends the iteration."""
    self.iterator.close()
    self.batches.close()
    if self.reader:
      self.reader.close()

  def __exit__(self, *exception: object) -> None:
    self.close()


_Count = Annotated[int, Range(1, 1024)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """`config.data`."""

  # Sources: dict(type, weight=1.0, and the arguments of the source).
  train: tuple[Any, ...] = ()
  # Commits of Hugging Face data sets, by "datasets/ORG/NAME@REVISION". A run
  # records them at its first start; later starts read the same commits.
  commits: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ops: str  # Host ops: "decode|canvas(224)|caption(64)".
  # Worker processes; 0: threads of this process.
  workers: Annotated[int, Range(0, 1024)] = 0
  threads: _Count | None = None  # Per process; None: one per core.
  prefetch: _Count | None = None  # Batches ahead, per process; None: 2.
  max_corrupt: Fraction = 0.01  # Maximum share of unusable records.
  # "lanes": whole blocks, each read by one host. "global": single records.
  # "block": blocks of shards, then the records in each. "none": not shuffled.
  shuffle: Literal["lanes", "global", "block", "none"] = "global"
  # For lanes. None: the largest power of two up to 256 that divides the batch.
  lanes: PositiveInt | None = None
  window: PositiveInt = 1024  # Records that a lane shuffles together.
  block_memory: PositiveInt = 4096  # MiB a host, for blocks read from buckets.
  # With lanes: seconds to retry a bucket that doesn't answer. A stalled step
  # ends the run after `watchdog.min_seconds`.
  storage_seconds: NonNegativeFloat = 240.0


def make_loader(
  config: DataConfig | Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  skipped: order.SkippedBatches = (),
  process_index: int = 0,
  process_count: int = 1,
  tokenizer: Tokenizer | None = None,
  batch_fields: Collection[str] | None = None,
  sources: Sequence[Source] | None = None,
  stats: Stats | None = None,
  features: Mapping[str, FeatureLayout] | None = None,
) -> Loader:
  """Builds the loader of a config's `data` section; it begins at `start_step`.

  `batch_size` is global. `sources` replace the sources in `train`; if `train`
  is empty, all weights are 1. `stats` are the counts of the run's earlier
  batches. For `batch_fields` and `features`, see `build_ops`.
  """
  if batch_size % process_count or batch_size < 1:
    problem = f"is not a multiple of the {process_count} processes"
    raise InputError(f"batch_size={batch_size} {problem} that share a batch.")
  if not isinstance(config, DataConfig):
    config = sections.read(DataConfig, config, "data")
  ops = build_ops(
    config.ops,
    tokenizer=tokenizer,
    batch_fields=batch_fields,
    features=features or {},
  )
  if sources is None:
    sources = [build_source(entry) for entry in config.train]
  _check_labels(ops, sources)
  rows, cores = batch_size // process_count, available_cores()
  addresses = build_order(
    config, sources, batch_size=batch_size, hosts=process_count, seed=seed
  )
  reader = _open_reader(config, sources, addresses, process_count)
  batches = HostBatches(
    sources,
    addresses,
    ops,
    seed=seed,
    batch_size=batch_size,
    first_row=process_index * rows,
    rows=rows,
    start_step=start_step,
    skipped=skipped,
    in_lanes=config.shuffle == "lanes",
    threads=config.threads or max(cores // max(config.workers, 1), 1),
  )
  return Loader(
    batches,
    _prefetch_batches(batches, config),
    ops.fields,
    step=start_step,
    examples_per_epoch=sum(len(source) for source in sources),
    max_corrupt=config.max_corrupt,
    workers=config.workers,
    stats=stats or Stats(),
    reader=reader,
  )


def _prefetch_batches(
  batches: HostBatches, config: DataConfig
) -> grain.DatasetIterator:
  ahead = config.prefetch or 2
  options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
  if config.workers:
    if not flags.FLAGS.is_parsed():
      # Grain's workers read absl flags, which only absl apps parse.
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers=config.workers)
    dataset = dataset.mp_prefetch(workers, worker_init_fn=end_with_parent)
  return iter(dataset)


def build_order(
  config: DataConfig,
  sources: Sequence[Source],
  *,
  batch_size: int,
  hosts: int,
  seed: int,
) -> Any:
  """Returns a run's (source, record) indices: a MapDataset or LaneOrder."""
  weights = [read_weight(e) for e in config.train] or [1.0] * len(sources)
  if config.shuffle != "lanes":
    return order.addresses(sources, weights, shuffle=config.shuffle, seed=seed)
  order.check(sources, seed)
  from mtv_jax.data import lanes

  return lanes.LaneOrder(
    [source.lane_blocks.ends for source in sources],
    weights=weights,
    batch_size=batch_size,
    lanes=lanes.choose_lanes(batch_size, config.lanes, hosts),
    window=config.window,
    seeds=[order.source_seed(seed, k) for k in range(len(sources))],
  )


def _open_reader(
  config: DataConfig, sources: Sequence[Source], addresses: Any, hosts: int
) -> Any:
  """With lanes, returns the `RangeReader` of all sources' blocks, else None."""
  if config.shuffle != "lanes":
    return None
  from mtv_jax.utils.ranges import RangeReader, RangeServer

  # Workers may be in different windows.
  windows = _WINDOWS + (config.workers > 0)
  for k, source in enumerate(sources):
    source.keep_blocks(addresses.count_blocks(k, hosts=hosts, windows=windows))
  cls = RangeServer if config.workers else RangeReader
  reader = cls(config.block_memory << 20, patience=config.storage_seconds)
  for source in sources:
    source.use_reader(reader)
  return reader


def _check_labels(ops: Ops, sources: Sequence[Source]) -> None:
  """Rejects an op whose fields would be all zeros."""
  available = frozenset().union(*(source.fields for source in sources))
  missing = sorted(ops.labels - available)
  missing += [" or ".join(sorted(c)) for c in ops.choices if not c & available]
  if sources and missing:
    raise InputError(
      f"{ops!r} needs the record fields {missing}; data.train has only"
      f" {sorted(available)}. Add labels=dict(...) to a source, or drop the op."
    )
