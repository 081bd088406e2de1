"""Local copies of bucket shards."""

import shutil

from mtv_jax.data.sources.shard_cache import ShardCache
from mtv_jax.utils import path


def test_shards_of_two_folders_may_share_a_name(tmp_path, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  # Local files in place of objects.
  monkeypatch.setattr(
    path, "copy_object", lambda url, to, *_, **__: shutil.copy(url, to)
  )
  files = [tmp_path / name / "0.array_record" for name in "ab"]
  for file in files:
    file.parent.mkdir()
    file.write_text(file.parent.name)
  cache = ShardCache(files, [1, 1], ["", ""])
  assert [cache.open(k, lambda f: f.read_text()) for k in (0, 1)] == ["a", "b"]
