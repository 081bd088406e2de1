"""Orders in lanes: every record once an epoch, equal batches for all hosts."""

import collections

import numpy as np
import pytest

from mtv_jax.data import lanes
from mtv_jax.data.lanes import LaneOrder
from mtv_jax.data.sources.base import cut_blocks
from mtv_jax.utils.errors import ConfigError

# Shards of different sizes, in blocks of at most 16 records.
ENDS, _ = cut_blocks(np.cumsum([100, 37, 260, 5, 98, 140]), 16)


def make_order(blocks=(ENDS,), weights=(1.0,), batch_size=32, **options):
  options = dict(lanes=8, window=64, seeds=range(len(blocks))) | options
  return LaneOrder(blocks, weights=weights, batch_size=batch_size, **options)


def lane_rows(order, steps):
  """(source, record) of each lane, in order."""
  rows = np.array([order[p] for p in range(steps * 32)]).reshape(steps, 8, 4, 2)
  return rows.transpose(1, 0, 2, 3).reshape(8, -1, 2)


def test_an_epoch_has_every_record_once():
  order = make_order()
  counts = collections.Counter()
  blocks = range(len(ENDS))
  for lane, rows in enumerate(lane_rows(order, 61)[..., 1]):
    # A lane's part of the first epoch: the blocks that are dealt to it.
    owned = len(blocks[lane::8])
    starts = np.searchsorted(ENDS, rows, side="right")
    first = list(dict.fromkeys(starts))[:owned]
    part = rows[: np.diff(ENDS, prepend=0)[first].sum()]
    assert set(np.searchsorted(ENDS, part, side="right")) == set(first)
    counts.update(part.tolist())
  assert counts == collections.Counter(range(ENDS[-1]))


@pytest.mark.parametrize("blocks", [ENDS, np.arange(16, 641, 16)])
def test_epochs_follow_each_other(blocks):
  """Equal blocks are located by arithmetic, others by counting."""
  order = make_order([blocks])
  rows = lane_rows(order, 200)[..., 1]
  counts = collections.Counter(rows.ravel().tolist())
  assert set(counts) == set(range(blocks[-1]))
  assert max(counts.values()) - min(counts.values()) <= 2


def test_a_window_shuffles_its_blocks():
  rows = lane_rows(make_order(), 16)[0, :, 1]
  window = np.searchsorted(ENDS, rows[:40], side="right")
  assert len(set(window)) > 1 and len(set(window[:8])) > 1
  assert (np.diff(rows) != 1).mean() > 0.9


def test_seeds_and_epochs_differ():
  first = lane_rows(make_order(), 10)
  assert (first != lane_rows(make_order(seeds=[7]), 10)).any()
  np.testing.assert_array_equal(first, lane_rows(make_order(), 10))


def test_shares_of_a_mixture():
  blocks = [ENDS, np.array([3]), np.array([500])]
  order = make_order(blocks, weights=(3.0, 1.0, 0.5))
  rows = lane_rows(order, 90)
  expected = np.array([3, 1, 0.5]) / 4.5
  for step in range(90):
    batch = rows[:, 4 * step : 4 * step + 4, 0].ravel()
    counts = np.bincount(batch, minlength=3)
    np.testing.assert_allclose(counts, 32 * expected, atol=2)
  for lane in rows[..., 0]:
    counts = np.bincount(lane, minlength=3)
    np.testing.assert_allclose(counts, len(lane) * expected, atol=2)
  # Each source's own order is complete, even with fewer records than lanes.
  small = rows[rows[..., 0] == 1][:, 1]
  counts = np.bincount(small)
  assert len(counts) == 3 and counts.max() - counts.min() <= 4


def test_upcoming_windows_have_the_rows():
  order = make_order([ENDS, np.array([200])], weights=(1.0, 1.0))
  for step in (0, 3, 17):
    positions = range(step * 32 + 8, step * 32 + 16)  # Host 1 of 4.
    upcoming = list(order.upcoming(positions, windows=2))
    ready = {(s, r) for s, window in upcoming for r in window.records.tolist()}
    # The next step, too, unless a lane crosses more than one window.
    for ahead in (0, 32):
      assert {order[p + ahead] for p in positions} <= ready
    for source, window in upcoming:
      runs = zip(window.starts, window.sizes, strict=True)
      records = [r for a, n in runs for r in range(a, a + n)]
      assert sorted(window.records.tolist()) == sorted(records)
      assert source in (0, 1)


def test_replacements_are_in_memory():
  order = make_order()
  source, candidates = order.candidates(40)
  (_, window) = next(iter(order.upcoming(range(40, 44), windows=1)))
  first = [next(candidates) for _ in range(len(window.records))]
  assert source == 0 and sorted(first) == sorted(window.records.tolist())
  assert next(candidates) == first[0] + 1


def test_ten_thousand_shards_of_ten_thousand():
  """100 million records: a step's rows are arithmetic."""
  blocks, _ = cut_blocks(np.arange(1, 10_001) * 10_000, 64)
  order = make_order([blocks], batch_size=16_384, lanes=256, window=1024)
  rows = [order[16_384 * 9_000 + i][1] for i in range(256)]
  assert len({row // 10_000 for row in rows}) > 30
  assert max(rows) < 100_000_000


def test_the_number_of_lanes():
  assert lanes.choose_lanes(16_384, None, 64) == 256
  assert lanes.choose_lanes(96, None, 4) == 32
  assert lanes.choose_lanes(96, 12, 4) == 12
  with pytest.raises(ConfigError, match="nearest valid values: 8, 12"):
    lanes.choose_lanes(96, 10, 4)
  with pytest.raises(ConfigError, match="multiple of the 5 hosts.* none"):
    lanes.choose_lanes(96, None, 5)
