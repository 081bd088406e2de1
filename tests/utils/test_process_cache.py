"""The limit of open files, and the number of cached values."""

import resource

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
