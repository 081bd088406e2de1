"""Cores, and maps by threads: order, errors, how far they read ahead."""

import os
import threading
import time

import pytest

from mtv_jax.utils.threads import available_cores, map_ahead, map_threads


def test_available_cores(monkeypatch):
  affinity = lambda pid: {0, 2, 5}  # noqa: E731
  monkeypatch.setattr(os, "sched_getaffinity", affinity, raising=False)
  assert available_cores() == 3
  monkeypatch.delattr(os, "sched_getaffinity")
  monkeypatch.setattr(os, "cpu_count", lambda: 8)
  assert available_cores() == 8


@pytest.mark.parametrize("map_", [map_threads, map_ahead])
def test_results_and_errors_come_in_order(map_):
  def invert(x):
    time.sleep(0.002 * (x % 3))
    return 1 / (5 - x)

  expected = [1 / (5 - x) for x in range(5)]
  assert list(map_(invert, range(5))) == expected
  results = []
  with pytest.raises(ZeroDivisionError):
    for result in map_(invert, range(9)):
      results.append(result)  # noqa: PERF402
  assert results == ([] if map_ is map_threads else expected)
  assert list(map_(invert, [])) == []


def test_a_bounded_number_is_computed_ahead():
  drawn, done = [], []
  numbers = (drawn.append(i) or i for i in range(100))
  results = map_ahead(done.append, numbers, ahead=3)
  for count in range(1, 6):
    next(results)
    assert len(drawn) <= count + 3
  threads = threading.active_count()
  results.close()
  # The work and the threads end if the caller stops.
  assert len(done) <= len(drawn) <= 8
  assert threading.active_count() <= threads
