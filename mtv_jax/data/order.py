"""Data order: shuffling, mixing and skipping by index arithmetic.

The training data is an endless sequence of rows. `addresses` computes the
source and record of each row without reading data, so a run can start at any
position immediately.
"""

import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np

from mtv_jax.data.sources.base import Source, cut_blocks
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.process_cache import ProcessCache

SHUFFLES = ("global", "block", "none")

# For `block`: maximum records per block, and blocks shuffled together. Reads
# are few and long; it mixes as well as a shuffle buffer of 16,000 records.
BLOCK = 1024
WINDOW = 16

# Sources up to this size use a table for their order. Grain's cipher covers at
# least 2^16 numbers: 260 us per record for 100 records, 4 us for 100,000.
_MAX_TABLE = 1 << 16


def addresses(
  sources: Sequence[Source],
  weights: Sequence[float],
  *,
  shuffle: str,
  seed: int,
) -> grain.MapDataset:
  """Returns the endless sequence of (source index, record index).

  Each source repeats independently, in a new order every epoch. In any window
  of n rows, a source has n times its share of rows, to within one row per
  source (shares are rounded to a hundredth of the smallest). `shuffle` is
  "global", "block" (blocks of shards, then records within) or "none".
  """
  check_choice("data.shuffle", shuffle, SHUFFLES)
  check(sources, seed)
  orders = [
    _make_order(source, shuffle, source_seed(seed, k)).map(
      functools.partial(_make_address, k)
    )
    for k, source in enumerate(sources)
  ]
  if len(orders) == 1:
    return orders[0]
  return grain.MapDataset.mix(orders, weights)


def check(sources: Sequence[Source], seed: int) -> None:
  """Raises InputError if sources can't be mixed."""
  if seed < 0:
    raise InputError(f"seed={seed}: expected a number >= 0.")
  if not sources:
    raise InputError("data.train is empty: it needs at least one source.")
  for source in sources:
    if not len(source):
      raise InputError(f"{source!r} of data.train has no records.")


def source_seed(seed: int, k: int) -> int:
  """Seed of the order of source `k`.

  Grain adds the epoch to the seed. With consecutive seeds, two equal sources
  would have the same order one epoch apart, so the seeds are hashed.
  """
  return int(np.random.SeedSequence((seed, k)).generate_state(1)[0])


def _make_order(source: Source, shuffle: str, seed: int) -> grain.MapDataset:
  length = len(source)
  if shuffle == "block":
    return grain.MapDataset.source(BlockShuffle(source.blocks, seed=seed))
  if shuffle == "global" and length <= _MAX_TABLE:
    table = BlockShuffle([length], seed=seed, block=length)
    return grain.MapDataset.source(table)
  order = grain.MapDataset.range(length)
  if shuffle == "global":
    order = order.shuffle(seed=seed)
  return order.repeat()


def _make_address(k: int, record: int) -> tuple[int, int]:
  return k, record


class BlockShuffle:
  """An endless shuffled order in which nearby records stay close together.

  Every epoch permutes blocks (runs of at most `block` records of one shard),
  then shuffles the records of each window of `window` consecutive blocks.
  `shards` are cumulative record counts.
  """

  def __init__(
    self,
    shards: Sequence[int] | np.ndarray,
    *,
    seed: int,
    block: int = BLOCK,
    window: int = WINDOW,
  ):
    ends, _ = cut_blocks(np.asarray(shards, np.int64), block)
    self._sizes = np.diff(ends, prepend=0)
    self._starts = ends - self._sizes
    self._length, self._seed, self._window = int(ends[-1]), seed, window
    self._windows_per_epoch = -(-len(self._starts) // window)
    # Neighbouring positions share entries; batches are read concurrently.
    self._epochs = ProcessCache(self._shuffle_blocks, limit=4)
    self._windows = ProcessCache(self._shuffle_window, limit=8)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, position: int) -> int:
    epoch, offset = divmod(int(position), self._length)
    _, ends = self._epochs.get(epoch)
    window = int(np.searchsorted(ends, offset, side="right"))
    start = int(ends[window - 1]) if window else 0
    records = self._windows.get(epoch * self._windows_per_epoch + window)
    return int(records[offset - start])

  def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an epoch's block order and the end position of each window."""
    rng = np.random.default_rng((self._seed, epoch))
    order = rng.permutation(len(self._starts))
    ends = np.cumsum(self._sizes[order])
    last_blocks = np.arange(self._window - 1, len(ends) + self._window - 1)
    return order, ends[np.minimum(last_blocks[:: self._window], len(ends) - 1)]

  def _shuffle_window(self, number: int) -> np.ndarray:
    """Returns a window's shuffled records; numbers run across epochs."""
    epoch, window = divmod(number, self._windows_per_epoch)
    order, _ = self._epochs.get(epoch)
    blocks = order[window * self._window : (window + 1) * self._window]
    starts, sizes = self._starts[blocks], self._sizes[blocks]
    runs = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    rng = np.random.default_rng((self._seed, epoch, window))
    return rng.permutation(np.concatenate(runs))


# ---------------------------------------------------------------------------
# Batches that a run skips after a rollback.

# Ranges of batches as (first, count), ascending and not adjacent.
SkippedBatches = tuple[tuple[int, int], ...]


def batch_of_step(step: int, skipped: SkippedBatches) -> int:
  """Batch index of step `step` (from 0), given the skipped batches."""
  batch = step
  for first, count in skipped:
    if batch >= first:
      batch += count
  return batch


def is_skipped(batch: int | None, skipped: SkippedBatches) -> bool:
  """Whether the run skips this batch."""
  return isinstance(batch, int) and any(
    first <= batch < first + count for first, count in skipped
  )


def skip_steps(
  first: int, last: int, skipped: SkippedBatches
) -> SkippedBatches:
  """Adds the batches of steps `first` to `last` (from 0) to `skipped`."""
  batches = {b for start, count in skipped for b in range(start, start + count)}
  batches |= {batch_of_step(s, skipped) for s in range(first, last + 1)}
  ranges: list[tuple[int, int]] = []
  for batch in sorted(batches):
    if ranges and sum(ranges[-1]) == batch:
      ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
    else:
      ranges.append((batch, 1))
  return tuple(ranges)
