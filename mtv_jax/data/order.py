"""Data order: shuffling and mixing of records by index arithmetic.

The training data is one endless sequence of rows, and `addresses` says for
each position which source and which of its records stands there, without
reading anything. A run therefore starts at any position at once.
"""

import functools
import math
import sys
import threading
from collections.abc import Sequence

import grain
import numpy as np

from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError, did_you_mean

SHUFFLES = ("global", "block", "none")

# Our choice for `block`: blocks are runs of at most this many records of one
# shard, and this many blocks are mixed with each other. Reading them costs a
# disk or an object store few long reads; 16 thousand records mix as well as a
# shuffle buffer of that size.
BLOCK = 1024
WINDOW = 16

# Up to this size a source's order is a table. Grain computes it from a cipher
# over at least 2^16 numbers, walking past those too large for the source:
# 260 microseconds a record for 100 records, 4 for 100 thousand.
_TABLE = 1 << 16


def addresses(
  sources: Sequence[Source],
  *,
  weights: Sequence[float],
  shuffle: str,
  seed: int,
) -> grain.MapDataset:
  """The endless sequence of (number of the source, number of the record).

  Each source repeats by itself and is shuffled anew every time it does: in
  any stretch of a source's rows as long as the source, beginning at a multiple
  of its length, each of its records stands once. The mixture is even: of any
  n rows, n times its share are a source's, to within a row for each source
  (shares are rounded to a hundredth of the smallest).

  Args:
    sources: at least one.
    weights: of each source, proportional to its rows.
    shuffle: "global" over a whole source, "block" by blocks of its shards and
      then within, "none".
    seed: of all shuffles; >= 0.

  Raises:
    InputError: an unknown shuffle, an empty source or a weight <= 0.
  """
  if shuffle not in SHUFFLES:
    raise InputError(
      f"data.shuffle={shuffle!r} is unknown. {did_you_mean(shuffle, SHUFFLES)}"
    )
  if seed < 0:
    raise InputError(f"seed={seed}: expected a number >= 0.")
  if not sources:
    raise InputError("data.train is empty: it needs at least one source.")
  for source, weight in zip(sources, weights, strict=True):
    if not len(source):
      raise InputError(f"{source!r} of data.train has no records.")
    if not weight > 0 or not math.isfinite(weight):
      raise InputError(
        f"{source!r} of data.train has weight={weight}; expected a number > 0"
        " (leave the source out to give it no weight)."
      )
  orders = [
    _order(source, shuffle, seed, k).map(functools.partial(_address, k))
    for k, source in enumerate(sources)
  ]
  if len(orders) == 1:
    return orders[0]
  return grain.MapDataset.mix(orders, weights)


def _order(source: Source, shuffle: str, seed: int, k: int) -> grain.MapDataset:
  """The endless sequence of one source's record numbers."""
  # Seeds of sources are far apart: Grain adds the epoch to them, and with
  # consecutive ones two equal sources would go in the same order one behind.
  (own,) = np.random.SeedSequence((seed, k)).generate_state(1)
  if shuffle == "block":
    return grain.MapDataset.source(BlockShuffle(source.blocks, seed=int(own)))
  if shuffle == "global" and (length := len(source)) <= _TABLE:
    table = BlockShuffle([length], seed=int(own), block=length)
    return grain.MapDataset.source(table)
  order = grain.MapDataset.range(len(source))
  if shuffle == "global":
    order = order.shuffle(seed=int(own))
  return order.repeat()


def _address(k: int, record: int) -> tuple[int, int]:
  return k, record


class BlockShuffle:
  """An endless order that keeps neighbouring records near each other.

  Every epoch, blocks (runs of records of one shard) are put in random order;
  each `window` of them is then shuffled record by record.

  Args:
    shards: cumulative record counts of the shards.
    seed: of the shuffle.
    block: records a block, at most.
    window: blocks that are mixed.
  """

  def __init__(
    self,
    shards: Sequence[int] | np.ndarray,
    *,
    seed: int,
    block: int = BLOCK,
    window: int = WINDOW,
  ):
    ends = np.asarray(shards, np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    self._starts = np.concatenate(
      [np.arange(a, b, block) for a, b in zip(starts, ends, strict=True)]
    )
    self._sizes = np.diff(np.append(self._starts, ends[-1]))
    self._length, self._seed, self._window = int(ends[-1]), seed, window
    self._cache: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, position: int) -> int:
    epoch, at = divmod(int(position), self._length)
    with self._lock:
      order, ends = self._cached((epoch,), self._blocks)
      number = int(np.searchsorted(ends, at, side="right"))
      first = int(ends[number - 1]) if number else 0
      blocks = order[number * self._window : (number + 1) * self._window]
      (records,) = self._cached(
        (epoch, number), functools.partial(self._records, blocks)
      )
    return int(records[at - first])

  def _blocks(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of an epoch in order, and where each window ends."""
    order = rng.permutation(len(self._starts))
    ends = np.cumsum(self._sizes[order])
    last = np.arange(self._window - 1, len(ends) + self._window - 1)
    return order, ends[np.minimum(last[:: self._window], len(ends) - 1)]

  def _records(
    self, blocks: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray]:
    """The records of a window in order."""
    starts, sizes = self._starts[blocks], self._sizes[blocks]
    runs = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    return (rng.permutation(np.concatenate(runs)),)

  def _cached(self, key: tuple[int, ...], make) -> tuple[np.ndarray, ...]:
    if key not in self._cache:
      # Neighbouring positions share these, and two batches are read at once.
      while len(self._cache) >= 8:
        del self._cache[next(iter(self._cache))]
      self._cache[key] = make(np.random.default_rng((self._seed, *key)))
    return self._cache[key]

  def __getstate__(self) -> dict:
    return {k: v for k, v in vars(self).items() if k not in ("_cache", "_lock")}

  def __setstate__(self, state: dict) -> None:
    vars(self).update(state, _cache={}, _lock=threading.Lock())
