"""The limit of open files, and the number of cached values."""

import resource

import numpy as np
import pytest

from mtv_jax.utils import process_cache
from mtv_jax.utils.process_cache import ProcessCache


@pytest.mark.parametrize("hard", [1024, 1 << 20, resource.RLIM_INFINITY])
def test_the_limit_of_open_files_is_raised_or_named(monkeypatch, caplog, hard):
  limits = [256, hard]

  def set_limits(kind, new):
    limits[:] = new

  monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
  monkeypatch.setattr(resource, "setrlimit", set_limits)
  process_cache.raise_file_limit.cache_clear()
  cache = ProcessCache(str, descriptors=2)
  process_cache.raise_file_limit.cache_clear()
  raised = 1 << 16 if hard == resource.RLIM_INFINITY else hard
  assert limits == [raised, hard]
  assert cache.limit == min(raised, 1 << 16) // 6
  assert ("at most 1,024 files" in caplog.text) == (hard == 1024)


def test_the_oldest_values_beyond_a_number_of_bytes_are_evicted():
  loaded = []

  def load(size):
    loaded.append(size)
    return np.zeros(size, np.uint8)

  cache = ProcessCache(load, limit=9, max_bytes=100)
  for size in (30, 40, 30, 50, 30):  # 50 evicts 40.
    cache.get(size)
  assert loaded == [30, 40, 50] and len(cache) == 2
  cache.get(200)  # Larger alone.
  cache.get(30)
  assert loaded[3:] == [200, 30] and len(cache) == 1
