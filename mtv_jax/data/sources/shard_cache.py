"""Bounded local cache of whole remote shards.

Readers of ArrayRecord and TFRecord open only local files. With
`shuffle="lanes"` (data/lanes.py), a block of such a source is a shard, or part
of one if there are fewer shards than lanes. The host that owns the block copies
the shard and later deletes the copy.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path, PurePath
from typing import Any, TypeVar

import filelock
import numpy as np

from mtv_jax.data.sources.base import Blocks, Source
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import ByteRange, RangeReader

T = TypeVar("T")
_THREADS = 4  # Concurrent copies.


class ShardCache:
  """Local copies of remote shards: at most `limit`, plus copies in progress.

  Processes of a host share the copies. The ones opened or prefetched least
  recently are removed. Thread-safe; pickled without copies in progress.

  Args:
    files: shards.
    sizes: bytes of each shard.
    versions: version of each shard in remote storage.
  """

  def __init__(
    self,
    files: Sequence[PurePath],
    sizes: Sequence[int],
    versions: Sequence[str],
  ):
    self._files, self._sizes, self._versions = files, sizes, versions
    self.limit, self.patience = len(files), 0.0
    self._has_checked_space = False
    self.reader: RangeReader | None = None  # Closing it stops the prefetching.
    # One per process: threads don't survive a fork or pickling.
    self._pools = ProcessCache(_start_pool, limit=1)
    names = zip(map(str, files), versions, strict=True)
    digest = hashlib.blake2b(repr(list(names)).encode(), digest_size=12)
    self._folder = path_lib.cache_folder() / f"shards-{digest.hexdigest()}"
    # Shards of several folders may share a name.
    folders = {
      folder: i for i, folder in enumerate({f.parent: 0 for f in files})
    }
    self._targets = [
      self._folder / f"{folders[file.parent]}-{file.name}" for file in files
    ]

  def span(self, shard: int) -> ByteRange:
    """Returns the bytes of a shard."""
    return ByteRange(self._files[shard], 0, self._sizes[shard])

  def check_space(self) -> None:
    """Announces the size of the copies; InputError if the disk lacks space."""
    atomic.remove_abandoned(self._folder)
    needed_bytes = sum(sorted(self._sizes)[-self.limit - _THREADS :])
    present_bytes = sum(f.stat().st_size for _, f in self._list_copies())
    shards = f"{self.limit:,} of the {len(self._files):,} shards"
    path_lib.check_space(
      max(needed_bytes - present_bytes, 0),
      f"{shards} in {self._files[0].parent}",
      path_lib.cache_folder(),
    )
    self._has_checked_space = True

  def open(self, shard: int, function: Callable[[Path], T]) -> T:
    """Calls a function with a shard's local path, copying it if needed.

    The copy may be removed afterwards; an open file remains readable.
    """
    if not self._has_checked_space:
      self.check_space()
    target = self._targets[shard]
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
      if not target.exists():
        path_lib.copy_object(
          self._files[shard],
          target,
          self._sizes[shard],
          version=self._versions[shard],
          patience=self.patience,
        )
        self._remove_old()
      _touch(target)
      return function(target)

  def prefetch(self, shards: Iterable[int]) -> None:
    pool, pending = self._pools.get(0)
    for shard in shards:
      if shard in pending:
        continue
      # Readers stay open: a copy in use may have been opened long ago.
      try:
        _touch(self._targets[shard])
      except OSError:
        pending.add(shard)
        pool.submit(self._try_copy, shard, pending)

  def _try_copy(self, shard: int, pending: set[int]) -> None:
    try:
      if self.reader and self.reader.is_closed:
        return
      # `open` raises the error.
      with contextlib.suppress(Exception):
        self.open(shard, lambda path: None)
    finally:
      pending.discard(shard)

  def _list_copies(self) -> list[tuple[int, Path]]:
    """Returns the copies and when they were used, the oldest one first."""
    names = {file.name for file in self._targets}
    files = []
    for file in self._folder.glob("*"):
      with contextlib.suppress(FileNotFoundError):
        if file.name in names:
          files.append((file.stat().st_mtime_ns, file))
    return sorted(files)

  def _remove_old(self) -> None:
    copies = self._list_copies()
    for used, file in copies[: max(len(copies) - self.limit, 0)]:
      # Skip it while another process opens it, or if it has been used since.
      lock = filelock.FileLock(f"{file}.lock", blocking=False)
      with contextlib.suppress(filelock.Timeout, FileNotFoundError), lock:
        if file.stat().st_mtime_ns == used:
          file.unlink()


def _touch(file: Path) -> None:
  # The default is the kernel's time of the last tick, equal for several files.
  now = time.time_ns()
  os.utime(file, ns=(now, now))


def _start_pool(_: int) -> tuple[futures.ThreadPoolExecutor, set[int]]:
  """Returns a pool of copying threads, and the set of pending shards."""
  return futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="copy"), set()


class CachedShardsSource(Source):
  """A source whose shards are copied whole from a bucket, one by one.

  Subclasses set `_cache` if their shards are in a bucket, then call
  `_open_shards`.
  """

  _cache: ShardCache | None = None

  def _open_shards(
    self, load: Callable[[int, Path], Any], files: Sequence[Path] = ()
  ) -> None:
    """Opens shards by `load`, which takes a shard's number and local path.

    `files` are the local shards, if they are not in a bucket.
    """
    self._load = load
    if not self._cache:
      opener = functools.partial(_open_local, load, files)
      self._readers = ProcessCache(opener)
      return
    opener = functools.partial(_open_copy, load, self._cache)
    # A removed copy takes up space until its reader is closed.
    self._readers = ProcessCache(opener, limit=self._cache.limit)

  @property
  def lane_blocks(self) -> Blocks:
    """As in the base class: whole shards in a bucket."""
    if not self._cache:
      return super().lane_blocks
    return Blocks(self.shards, np.arange(len(self.shards)), self.shards)

  def use_reader(self, reader: RangeReader) -> None:
    if self._cache:
      self._cache.patience, self._cache.reader = reader.patience, reader

  def keep_blocks(self, count: int) -> None:
    if self._cache:
      self._cache.limit = min(count, len(self.shards))
      self._cache.check_space()
      self._open_shards(self._load)

  def prefetch(self, first: int, count: int) -> None:
    if not self._cache:
      return
    begin, end = (self._locate(i)[0] for i in (first, first + count - 1))
    shards = range(begin, end + 1)
    spans = [*map(self._cache.span, shards)]
    if not self._cache.reader or self._cache.reader.allows_copies(spans):
      self._cache.prefetch(shards)


def _open_local(
  load: Callable[[int, Path], T], files: Sequence[Path], shard: int
) -> T:
  return load(shard, files[shard])


def _open_copy(
  load: Callable[[int, Path], T], cache: ShardCache, shard: int
) -> T:
  return cache.open(shard, functools.partial(load, shard))
