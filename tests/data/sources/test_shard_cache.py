"""Local copies of bucket shards."""

import shutil

import pytest

from mtv_jax.data.sources.shard_cache import ShardCache
from mtv_jax.utils import path
from mtv_jax.utils.ranges import RangeReader


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Three shards with one name; local files stand for objects."""
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  monkeypatch.setattr(
    path, "copy_object", lambda url, to, *_, **__: shutil.copy(url, to)
  )
  files = [tmp_path / name / "0.array_record" for name in "abc"]
  for file in files:
    file.parent.mkdir()
    file.write_text(file.parent.name)
  return ShardCache(files, [1, 1, 1], ["", "", ""])


def test_shards_of_two_folders_may_share_a_name(cache):
  assert [cache.open(k, lambda f: f.read_text()) for k in (0, 1)] == ["a", "b"]


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_closed_reader_stops_the_copies_ahead(cache, tmp_path, is_closed):
  cache.reader = RangeReader(0)
  if is_closed:
    cache.reader.close()
  cache.prefetch([0, 1])
  cache._pools.get(0)[0].shutdown()
  copies = list((tmp_path / "cache").rglob("*.array_record"))
  assert len(copies) == (0 if is_closed else 2)


def test_a_prefetched_shard_outlives_a_copy_that_was_opened_later(
  cache, tmp_path
):
  cache.limit = 2
  for shard in (0, 1):
    cache.open(shard, lambda f: None)
  cache.prefetch([0, 2])  # Shard 0 is still in use.
  cache._pools.get(0)[0].shutdown()
  copies = (tmp_path / "cache").rglob("*.array_record")
  assert {file.read_text() for file in copies} == {"a", "c"}
