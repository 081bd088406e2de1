"""Data order in lanes: a host reads whole blocks, and each block once.

A block is a run of records that one request reads. Every epoch permutes a
source's blocks and deals them to L lanes, one after the other. A lane shuffles
the rows of each window of W of its blocks. Step t takes rows
`[t r, (t + 1) r)` of every lane, r = B / L, lane after lane; host h of n owns
lanes `[h L / n, (h + 1) L / n)`. So a step's batch doesn't depend on the number
of hosts, and no two hosts read the same block.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.process_cache import ProcessCache

# Records per block, and blocks per window of a lane.
BLOCK = 64
WINDOW = 16
_MAX_LANES = 256


class Window(NamedTuple):
  """Blocks of a lane that are in memory together, and their shuffled rows."""

  blocks: Int64[np.ndarray, " blocks"]
  records: Int64[np.ndarray, " rows"]


class Place(NamedTuple):
  """Position of a row in a lane of a source."""

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
    fits = [
      n
      for n in range(hosts, batch_size + 1, hosts)
      if not batch_size % n
    ]
    nearest = sorted(sorted(fits, key=lambda n: abs(n - lanes))[:2])
    raise ConfigError(
      f"data.lanes={lanes} doesn't divide the batch size {batch_size} into a"
      f" multiple of {hosts} hosts; the nearest that do:"
      f" {', '.join(map(str, nearest)) or 'none'}."
    )
  return lanes


def cut_blocks(
  ends: Int64[np.ndarray, " runs"], *, size: int, at_least: int
) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
  """Cuts runs of records into blocks; returns their starts and sizes.

  `ends` are cumulative record counts. Blocks have at most `size` records, fewer
  if there would be less than `at_least` blocks, down to single records.
  """
  ends = np.asarray(ends, np.int64)
  starts = np.concatenate([[0], ends[:-1]])
  counts = ends - starts
  while size > 1 and np.sum(-(-counts // size)) < at_least:
    size = (size + 1) // 2
  parts = -(-counts // size)
  first = np.repeat(starts, parts)
  number = np.arange(len(first)) - np.repeat(np.cumsum(parts) - parts, parts)
  first = first + number * size
  return first, np.diff(np.append(first, ends[-1]))


class BlockLanes:
  """A source's endless order: blocks dealt to lanes, rows shuffled in windows.

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
    self._window, self._seed = window, seed
    self._equal = len(np.unique(sizes)) == 1
    # Rows of every lane before each epoch; computed as far as needed.
    self._before = [np.zeros(lanes, np.int64)]
    self._epochs = ProcessCache(self._permute, limit=4)
    self._dealt = ProcessCache(self._deal, limit=4 * lanes)
    self._windows = ProcessCache(self._shuffle, limit=4 * lanes)

  def _permute(self, epoch: int) -> Int64[np.ndarray, " blocks"]:
    """Returns an epoch's order of the blocks."""
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(len(self._starts))

  def _deal(self, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a lane's blocks of an epoch and the last row of each window."""
    epoch, lane = divmod(key, self._lanes)
    # The dealing goes on where the last epoch ended.
    first = (lane - epoch * len(self._starts)) % self._lanes
    blocks = self._epochs.get(epoch)[first :: self._lanes]
    ends = np.cumsum(self._sizes[blocks])
    last = np.arange(0, len(blocks), self._window) + self._window - 1
    return blocks, ends[np.minimum(last, len(blocks) - 1)]

  def _shuffle(self, key: tuple[int, int, int]) -> Window:
    lane, epoch, number = key
    blocks, _ = self._dealt.get(epoch * self._lanes + lane)
    blocks = blocks[number * self._window : (number + 1) * self._window]
    runs = [
      np.arange(a, a + n)
      for a, n in zip(self._starts[blocks], self._sizes[blocks], strict=True)
    ]
    rng = np.random.default_rng((self._seed, epoch, lane, number))
    return Window(blocks, rng.permutation(np.concatenate(runs)))

  def _epoch_of(self, lane: int, row: int) -> tuple[int, int]:
    """Returns a row's epoch, and the lane's rows before it."""
    blocks, lanes = len(self._starts), self._lanes
    if self._equal:
      size = int(self._sizes[0])
      epoch = (row // size * lanes + lane) // blocks
      # Blocks of this lane in earlier epochs: n with n % lanes == lane.
      return epoch, -(-(epoch * blocks - lane) // lanes) * size
    while self._before[-1][lane] <= row:
      epoch = len(self._before) - 1
      at = (epoch * blocks + np.arange(blocks)) % lanes
      sizes = self._sizes[self._epochs.get(epoch)]
      rows = np.bincount(at, weights=sizes, minlength=lanes)
      self._before.append(self._before[-1] + rows.astype(np.int64))
    lower, upper = 0, len(self._before) - 1
    while upper - lower > 1:
      middle = (lower + upper) // 2
      inside = self._before[middle][lane] <= row
      lower, upper = (middle, upper) if inside else (lower, middle)
    return lower, int(self._before[lower][lane])

  def locate(self, lane: int, row: int) -> Place:
    """Returns the place of row `row` of a lane."""
    epoch, before = self._epoch_of(lane, row)
    _, ends = self._dealt.get(epoch * self._lanes + lane)
    window = int(np.searchsorted(ends, row - before, side="right"))
    first = int(ends[window - 1]) if window else 0
    return Place(epoch, window, row - before - first)

  def window(self, lane: int, place: Place) -> Window:
    """Returns the window of a place."""
    return self._windows.get((lane, place.epoch, place.window))

  def record(self, lane: int, row: int) -> int:
    """Returns the record of row `row` of a lane."""
    place = self.locate(lane, row)
    return int(self.window(lane, place).records[place.row])


class LaneOrder:
  """The endless sequence of (source index, record index), batch after batch.

  Sources keep their shares within each lane, and, to within one row per source,
  within each batch: lane l is `l r` rows ahead in the mixture.
  """

  def __init__(
    self,
    ends: Sequence[Int64[np.ndarray, " runs"]],
    *,
    weights: Sequence[float],
    batch_size: int,
    lanes: int,
    seeds: Sequence[int],
    block: int = BLOCK,
    window: int = WINDOW,
  ):
    self.lanes, self._batch_size = lanes, batch_size
    self._rows = batch_size // lanes
    shares = np.asarray(weights) / np.sum(weights)
    self.sources = []
    for runs, share, seed in zip(ends, shares, seeds, strict=True):
      starts, sizes = cut_blocks(runs, size=block, at_least=lanes)
      blocks = max(round(window * float(share)), 1)
      self.sources.append(
        BlockLanes(starts, sizes, lanes=lanes, window=blocks, seed=seed)
      )
    endless = [grain.MapDataset.range(sys.maxsize).map(_Tag(k)) for k in
               range(len(ends))]
    self._mixture = grain.MapDataset.mix(endless, list(weights))
    # Rows of each source before the first row of each lane.
    taken = np.zeros((batch_size + 1, len(ends)), np.int64)
    if len(ends) > 1:
      for at in range(batch_size):
        taken[at + 1, self._mixture[at][0]] = 1
    else:
      taken[1:] = 1
    self._skipped = np.cumsum(taken, axis=0)[:: self._rows]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, position: int) -> tuple[int, int]:
    source, lane, row = self.place(position)
    return source, self.sources[source].record(lane, row)

  def place(self, position: int) -> tuple[int, int, int]:
    """Returns the source, the lane, and the source's row in the lane."""
    step, at = divmod(int(position), self._batch_size)
    lane, row = divmod(at, self._rows)
    row += step * self._rows
    if len(self.sources) == 1:
      return 0, lane, row
    source, row = self._mixture[row + lane * self._rows]
    return source, lane, row - int(self._skipped[lane, source])


class _Tag:
  """Pairs an index with its source; a class, as workers unpickle it."""

  def __init__(self, source: int):
    self._source = source

  def __call__(self, row: int) -> tuple[int, int]:
    return self._source, row
