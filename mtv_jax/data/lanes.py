"""Data order in lanes: a host reads whole blocks, and each block once.

A block is a run of records that one request reads. Every epoch permutes a
source's blocks and assigns them to L lanes round-robin. A lane shuffles
the rows of each window of W of its blocks. Step t takes rows
`[t r, (t + 1) r)` of every lane, r = B / L, lane after lane; host h of n owns
lanes `[h L / n, (h + 1) L / n)`. So a step's batch doesn't depend on the number
of hosts, and no two hosts read the same block.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.sources.base import cut_blocks
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.process_cache import ProcessCache

_MAX_LANES = 256


class Window(NamedTuple):
  """Blocks of a lane that are in memory together, and their shuffled rows."""

  starts: Int64[np.ndarray, " blocks"]  # First record of each block.
  sizes: Int64[np.ndarray, " blocks"]
  records: Int64[np.ndarray, " rows"]


class LanePosition(NamedTuple):
  """Position of a row in one source's lane."""

  epoch: int
  window: int
  row: int


def choose_lanes(batch_size: int, lanes: int | None, hosts: int) -> int:
  """Returns the number of lanes; default: the largest power of two that fits.

  Raises ConfigError if `lanes` doesn't divide the batch size, or isn't a
  multiple of the hosts.
  """
  if lanes is None:
    lanes = math.gcd(batch_size, _MAX_LANES)
  if batch_size % lanes or lanes % hosts:
    valid_lanes = [
      n for n in range(hosts, batch_size + 1, hosts) if not batch_size % n
    ]
    nearest = sorted(sorted(valid_lanes, key=lambda n: abs(n - lanes))[:2])
    raise ConfigError(
      f"data.lanes={lanes} must divide the batch size {batch_size} and be a"
      f" multiple of the {hosts} hosts; the nearest valid values:"
      f" {', '.join(map(str, nearest)) or 'none'}."
    )
  return lanes


def divide_blocks(
  ends: Int64[np.ndarray, " runs"], lanes: int
) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
  """Returns the starts and sizes of blocks, from their cumulative counts.

  Cuts them smaller if there are fewer than `lanes`, down to single records.
  """
  ends = ends[np.diff(ends, prepend=0) > 0]  # Without empty blocks.
  size = int(np.diff(ends, prepend=0).max())
  while len(ends) < lanes and size > 1:
    size = (size + 1) // 2
    ends, _ = cut_blocks(ends, size)
  starts = np.concatenate([[0], ends[:-1]])
  return starts, ends - starts


class BlockLanes:
  """A source's endless order: blocks by lane, rows shuffled in windows.

  Args:
    starts, sizes: first record and number of records of each block.
    lanes: number of lanes.
    window: blocks per window of a lane.
    seed: seeds the permutations of blocks, and of each window's rows.
  """

  def __init__(
    self,
    starts: Int64[np.ndarray, " blocks"],
    sizes: Int64[np.ndarray, " blocks"],
    *,
    lanes: int,
    window: int,
    seed: int,
  ):
    self._starts, self._sizes, self._lanes = starts, sizes, lanes
    self.width, self._seed = window, seed
    self._has_equal_sizes = sizes.min() == sizes.max()
    # Rows of every lane before each epoch; computed as far as needed.
    self._rows_before_epoch = [np.zeros(lanes, np.int64)]
    self._epochs = ProcessCache(self._permute_blocks, limit=4)
    self._assigned = ProcessCache(self._assign_blocks, limit=4 * lanes)
    self._windows = ProcessCache(self._shuffle_window, limit=4 * lanes)

  def _permute_blocks(self, epoch: int) -> Int64[np.ndarray, " blocks"]:
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(len(self._starts))

  def _assign_blocks(self, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a lane's blocks in an epoch and the last row of each window."""
    epoch, lane = divmod(key, self._lanes)
    # Round-robin continues where the previous epoch ended.
    first_block = (lane - epoch * len(self._starts)) % self._lanes
    blocks = self._epochs.get(epoch)[first_block :: self._lanes]
    ends = np.cumsum(self._sizes[blocks])
    last_blocks = np.arange(0, len(blocks), self.width) + self.width - 1
    return blocks, ends[np.minimum(last_blocks, len(blocks) - 1)]

  def _shuffle_window(self, key: tuple[int, int, int]) -> Window:
    lane, epoch, number = key
    blocks, _ = self._assigned.get(epoch * self._lanes + lane)
    blocks = blocks[number * self.width : (number + 1) * self.width]
    starts, sizes = self._starts[blocks], self._sizes[blocks]
    runs = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    rng = np.random.default_rng((self._seed, epoch, lane, number))
    return Window(starts, sizes, rng.permutation(np.concatenate(runs)))

  def _find_epoch(self, lane: int, row: int) -> tuple[int, int]:
    """Returns a row's epoch, and the lane's rows before it."""
    blocks, lanes = len(self._starts), self._lanes
    if self._has_equal_sizes:
      size = int(self._sizes[0])
      epoch = (row // size * lanes + lane) // blocks
      # Blocks of this lane in earlier epochs: n with n % lanes == lane.
      return epoch, -(-(epoch * blocks - lane) // lanes) * size
    while (before := self._rows_before_epoch)[-1][lane] <= row:
      # Replaced, not extended: other threads may do the same.
      rows = self.count_rows(len(before) - 1)
      self._rows_before_epoch = [*before, before[-1] + rows]
    lower = bisect.bisect_right(before, row, key=lambda rows: rows[lane]) - 1
    return lower, int(before[lower][lane])

  def count_rows(self, epoch: int) -> Int64[np.ndarray, " lanes"]:
    """Returns the number of rows of each lane in an epoch."""
    blocks = len(self._starts)
    block_lanes = (epoch * blocks + np.arange(blocks)) % self._lanes
    sizes = self._sizes[self._epochs.get(epoch)]
    rows = np.bincount(block_lanes, weights=sizes, minlength=self._lanes)
    return rows.astype(np.int64)

  def locate(self, lane: int, row: int) -> LanePosition:
    """Returns the position of row `row` of a lane."""
    epoch, before = self._find_epoch(lane, row)
    _, ends = self._assigned.get(epoch * self._lanes + lane)
    window = int(np.searchsorted(ends, row - before, side="right"))
    start = int(ends[window - 1]) if window else 0
    return LanePosition(epoch, window, row - before - start)

  def window(self, lane: int, position: LanePosition) -> Window:
    """Returns the window of a position."""
    return self._windows.get((lane, position.epoch, position.window))

  def next_window(self, lane: int, position: LanePosition) -> LanePosition:
    """Returns the first row of the window after a position."""
    epoch, window = position.epoch, position.window + 1
    while window >= len(self._assigned.get(epoch * self._lanes + lane)[1]):
      epoch, window = epoch + 1, 0
    return LanePosition(epoch, window, 0)


class LaneOrder:
  """The endless sequence of (source index, record index), batch after batch.

  Sources keep their shares within each lane and, to within two rows,
  within each batch: lane l is `l r` rows ahead in the mixture.

  Args:
    blocks: cumulative record counts of each source's blocks.
    weights: mixing weights, rounded to a hundredth of the smallest.
    batch_size: rows of a step, over all hosts.
    lanes: number of lanes, see `choose_lanes`.
    window: records per window of a lane, shared out to the sources by weight.
    seeds: one for each source.
  """

  def __init__(
    self,
    blocks: Sequence[Int64[np.ndarray, " _"]],
    *,
    weights: Sequence[float],
    batch_size: int,
    lanes: int,
    window: int,
    seeds: Sequence[int],
  ):
    self.lanes, self._batch_size = lanes, batch_size
    self._rows = batch_size // lanes
    self._weights = [int(100 * w / min(weights)) for w in weights]
    self.sources = []
    for ends, weight, seed in zip(blocks, weights, seeds, strict=True):
      starts, sizes = divide_blocks(ends, lanes)
      rows = window * weight / sum(weights)
      width = max(round(rows / float(sizes.mean())), 1)
      self.sources.append(
        BlockLanes(starts, sizes, lanes=lanes, window=width, seed=seed)
      )

  def __getitem__(self, position: int) -> tuple[int, int]:
    source, records = self.candidates(position)
    return source, next(records)

  def candidates(self, position: int) -> tuple[int, Iterator[int]]:
    """Returns a row's source, and candidate records in order of preference.

    The first one is the row's. If it is unusable, the other records of its
    window, which are in memory, replace it, then the following records.
    """
    lane, index = self._find_lane(position)
    before, after = self._rows_before(index), self._rows_before(index + 1)
    source = next(k for k, n in enumerate(before) if after[k] > n)
    position, window = self._find_window(source, lane, before[source])
    return source, _list_candidates(window.records, position.row)

  def count_blocks(self, source: int, *, hosts: int, windows: int) -> int:
    """Counts a source's blocks in `windows` windows of all lanes of a host."""
    return self.lanes // hosts * windows * self.sources[source].width

  def upcoming(
    self, positions: range, *, windows: int
  ) -> Iterator[tuple[int, Window]]:
    """Yields (source, window) of the rows, then of the following windows.

    `positions` must cover whole lanes of one step.
    """
    starts = [
      self._find_lane(position) for position in positions[:: self._rows]
    ]
    latest = []
    for lane, index in starts:
      for source, row in enumerate(self._rows_before(index)):
        position, window = self._find_window(source, lane, row)
        latest.append((source, lane, position))
        yield source, window
    for _ in range(windows - 1):
      for i, (source, lane, position) in enumerate(latest):
        position = self.sources[source].next_window(lane, position)
        latest[i] = source, lane, position
        yield source, self.sources[source].window(lane, position)

  def _find_lane(self, position: int) -> tuple[int, int]:
    """Returns a row's lane, and its position in the mixture."""
    step, offset = divmod(int(position), self._batch_size)
    lane, row = divmod(offset, self._rows)
    return lane, (step + lane) * self._rows + row

  def _rows_before(self, index: int) -> list[int]:
    """Counts rows of each source before index `index` of the mixture."""
    counts, total = [], sum(self._weights)
    for weight in self._weights:
      other_rows = index * (total - weight) // total
      counts.append(index - other_rows)
      index, total = other_rows, total - weight
    return counts

  def _find_window(
    self, source: int, lane: int, source_row: int
  ) -> tuple[LanePosition, Window]:
    """Returns position and window of a lane's row, counted from batch 0."""
    lane_row = source_row - self._rows_before(lane * self._rows)[source]
    position = self.sources[source].locate(lane, lane_row)
    return position, self.sources[source].window(lane, position)


def _list_candidates(
  records: Int64[np.ndarray, " rows"], row: int
) -> Iterator[int]:
  for k in range(len(records)):
    yield int(records[(row + k) % len(records)])
  yield from itertools.count(int(records[row]) + 1)
