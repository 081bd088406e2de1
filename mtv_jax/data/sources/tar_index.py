"""Offset index of a tar, for random access to its records.

Each tar has its own index file: a few dozen bytes per record, memory-mapped, so
that 100 million records cost address space but little memory.

Layout, little-endian: a `HEADER`, `count` times an `ENTRY`, the concatenated
UTF-8 keys, the smallest key, the largest key. Records without a caption come
last, so that a prefix of the entries excludes them.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtv_jax.data.sources import tar_scan
from mtv_jax.data.sources.tar_scan import Scan, TarError
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import StorageError
from mtv_jax.utils.path import check_regular_file
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import IO_THREADS, available_cores, map_threads

log = logging.getLogger(__name__)

_MAGIC = b"MTVTAR01"
HEADER = struct.Struct("<8sQqQQQIIII")
_ROLES = ("image", "text", "json")
ENTRY = np.dtype(
  [(role, "<u8") for role in _ROLES]  # Offsets.
  + [(f"{role}_size", "<u4") for role in _ROLES]
  + [("key_end", "<u4")]
)
_LOG_EVERY = 15.0  # Seconds.
# With at least this many tars, worker processes build missing indices: one per
# `_MIN_TARS // 2` of them.
_MIN_TARS = 64
_MAX_WORKERS = 15


# Folder of missing indices, see `temporary_indices`.
_temporary: contextvars.ContextVar[Path | None] = contextvars.ContextVar(
  "folder of missing indices", default=None
)


class Header(NamedTuple):
  """The values of a `HEADER`."""

  magic: bytes
  tar_size: int  # Bytes.
  tar_time: int  # Nanoseconds.
  count: int  # Records with an image.
  captioned: int  # Records with a .txt or .json; they come first.
  keys_size: int  # Bytes of all keys.
  smallest_size: int  # Bytes of the smallest key.
  largest_size: int
  no_image: int  # Groups of members without an image; not in the index.
  others: int  # Members that don't belong to a record.


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """An index file: its header, smallest key and largest key."""

  tar: Path
  file: Path
  header: Header
  smallest: str
  largest: str

  def open(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns memory-mapped entries [count] and the bytes of all keys."""
    keys_start = HEADER.size + self.header.count * ENTRY.itemsize
    data = np.memmap(self.file, np.uint8, "r").view(np.ndarray)
    entries = data[HEADER.size : keys_start].view(ENTRY)
    return entries, data[keys_start : keys_start + self.header.keys_size]

  def read_keys(self) -> list[str]:
    """Returns all keys, in order."""
    entries, keys = self.open()
    data = keys.tobytes()
    ends = entries["key_end"].tolist()
    return [data[a:b].decode() for a, b in itertools.pairwise([0, *ends])]


def index_file(tar: Path, index_dir: Path | None) -> Path:
  """Path of a tar's index."""
  if index_dir is None:
    return tar.with_name(tar.name + ".index")
  # Tars in different folders may share names such as 00000.tar.
  folder = hashlib.blake2s(os.path.abspath(tar.parent).encode(), digest_size=4)
  return index_dir / f"{tar.stem}-{folder.hexdigest()}{tar.suffix}.index"


@contextlib.contextmanager
def temporary_indices() -> Iterator[None]:
  """Writes missing indices to a temporary folder, not beside the tars."""
  with tempfile.TemporaryDirectory() as folder:
    token = _temporary.set(Path(folder))
    try:
      yield
    finally:
      _temporary.reset(token)


def build_indices(
  tars: Sequence[Path], *, index_dir: Path | None = None
) -> list[TarIndex]:
  """Returns the index of each tar; builds missing ones.

  Concurrent processes, even on several hosts, share the work. Threads wait for
  I/O; if many indices are missing, worker processes parse the tars.
  """
  # Read in this order; missing indices are written to the last one.
  folders = (index_dir, *filter(None, [_temporary.get()]))
  for folder in {index_file(tar, folders[-1]).parent for tar in tars}:
    with contextlib.suppress(OSError):  # Read-only, or missing.
      atomic.remove_abandoned(folder)
  with _run_workers(tars, folders):
    indices, errors = _build(tars, folders, IO_THREADS)
  if len(errors) == 1:
    raise errors.popitem()[1]
  if errors:
    lines = [f"{len(errors)} of {len(tars)} tars can't be used:"]
    lines += [str(errors[i]) for i in sorted(errors)[:10]]
    if len(errors) > 10:
      lines.append(f"and {len(errors) - 10} more.")
    raise TarError("\n".join(lines))
  return [indices[i] for i in range(len(tars))]


def _build(
  tars: Sequence[Path], folders: Sequence[Path | None], threads: int
) -> tuple[dict[int, TarIndex], dict[int, TarError]]:
  indices: dict[int, TarIndex] = {}
  errors: dict[int, TarError] = {}
  last_log, num_built = time.monotonic(), 0
  # Shuffled, so that concurrent processes work on different tars.
  order = random.Random().sample(range(len(tars)), len(tars))
  with futures.ThreadPoolExecutor(min(threads, len(tars))) as pool:
    jobs = {pool.submit(_load_or_build, tars[i], folders): i for i in order}
    for job in futures.as_completed(jobs):
      try:
        indices[jobs[job]], is_new = job.result()
        num_built += is_new
      except TarError as error:
        errors[jobs[job]] = error
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
      if time.monotonic() - last_log > _LOG_EVERY:
        last_log = time.monotonic()
        done = len(indices) + len(errors)
        log.info("Indexing tars: %d of %d.", done, len(tars))
  if num_built:
    log.info("Indexed %d of %d tars.", num_built, len(tars))
    if _temporary.get():
      log.info("A dry run discards its indices: the run builds these again.")
  return indices, errors


@contextlib.contextmanager
def _run_workers(
  tars: Sequence[Path], folders: Sequence[Path | None]
) -> Iterator[None]:
  """Runs worker processes that build indices, as additional hosts would.

  Not forked, which is unsafe in a process that runs JAX. Not
  `multiprocessing`, which would import the caller's script again.
  """
  if len(tars) < _MIN_TARS:
    yield
    return
  files = [index_file(tar, folders[0]) for tar in tars]
  missing = map_threads(Path.exists, files).count(False)
  count = missing // (_MIN_TARS // 2)
  count = min(available_cores() - 1, _MAX_WORKERS, count)
  names = [str(folder or "") for folder in folders]
  job = json.dumps([[os.path.abspath(tar) for tar in tars], names])
  path = os.pathsep.join(filter(None, sys.path))
  workers = []
  try:
    for _ in range(count):
      worker = subprocess.Popen(
        [sys.executable, "-m", "mtv_jax.data.sources.tar_index"],
        stdin=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=path),
      )
      workers.append(worker)
      with worker.stdin as pipe:
        pipe.write(job.encode())
    yield
    # All indices exist now, so the workers exit soon.
    for worker in workers:
      worker.wait()
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()


def _load_or_build(
  tar: Path, folders: Sequence[Path | None]
) -> tuple[TarIndex, bool]:
  """Returns the index of a tar, and whether it was just built."""
  state = tar.stat()
  reason = "it has none"
  for folder in folders:
    file = index_file(tar, folder)
    if not file.exists():
      continue
    check_regular_file(file)
    index, reason = _load_index(file, tar, state)
    if index is not None:
      return index, False
    log.warning("%s: its index %s is rebuilt: %s.", tar, file, reason)
  data = _serialise(tar_scan.scan(tar), state, tar)
  try:
    path_lib.write_bytes(file, data)
  except OSError as error:
    raise StorageError(
      f"{tar} needs an index ({reason}) and {file} can't be written"
      f" ({error.strerror or error}). Set index_dir to a writable folder."
    ) from error
  index, reason = _load_index(file, tar, tar.stat())
  if index is None:
    raise TarError(f"{tar} changed while it was indexed: {reason}.")
  return index, True


def _load_index(
  file: Path, tar: Path, state: os.stat_result
) -> tuple[TarIndex | None, str]:
  """Loads an index; returns None and the reason if it doesn't fit the tar."""
  with file.open("rb") as stream:
    data = stream.read(HEADER.size)
    if len(data) < HEADER.size or not data.startswith(_MAGIC):
      return None, "it is not an index of this version"
    header = Header._make(HEADER.unpack(data))
    size, time_ns = state.st_size, state.st_mtime_ns
    if header.tar_size != size:
      return None, f"the tar has {size} bytes, but had {header.tar_size}"
    if header.tar_time != time_ns:
      times = _format_time(time_ns), _format_time(header.tar_time)
      return None, "the tar was modified at {}, not at {}".format(*times)
    start = HEADER.size + header.count * ENTRY.itemsize + header.keys_size
    split = header.smallest_size
    size = split + header.largest_size
    is_complete = os.fstat(stream.fileno()).st_size == start + size
    if not is_complete or header.captioned > header.count:
      return None, "it is truncated or damaged"
    stream.seek(start)
    keys = stream.read(size)
  try:
    smallest, largest = keys[:split].decode(), keys[split:].decode()
  except UnicodeDecodeError:
    return None, "it is damaged"
  return TarIndex(tar, file, header, smallest, largest), ""


def _serialise(scan: Scan, stat: os.stat_result, tar: Path) -> bytes:
  records = scan.records
  no_image = [group.key for group in scan.groups if not group.has_image]
  no_caption = [record.key for record in records if not record.is_captioned]
  for problem, keys in (
    ("no image", no_image),
    ("neither .txt nor .json", no_caption),
  ):
    if keys:
      some = list_first(keys, 5)
      log.warning("%s: %d records have %s: %s.", tar, len(keys), problem, some)
  # The stable sort keeps the tar's order within both parts.
  records.sort(key=lambda record: not record.is_captioned)
  names = [record.key.encode() for record in records]
  entries = np.zeros(len(records), ENTRY)
  spans = np.array([record.spans for record in records], np.uint64)
  spans = spans.reshape(-1, 3, 2)
  for role, field in enumerate(_ROLES):
    entries[field] = spans[:, role, 0]
    entries[field + "_size"] = spans[:, role, 1]
  entries["key_end"] = np.cumsum([len(name) for name in names], dtype=np.int64)
  smallest, largest = min(names, default=b""), max(names, default=b"")
  header = Header(
    magic=_MAGIC,
    tar_size=stat.st_size,
    tar_time=stat.st_mtime_ns,
    count=len(records),
    captioned=len(records) - len(no_caption),
    keys_size=sum(map(len, names)),
    smallest_size=len(smallest),
    largest_size=len(largest),
    no_image=len(no_image),
    others=scan.others,
  )
  parts = [HEADER.pack(*header), entries.tobytes(), *names, smallest, largest]
  return b"".join(parts)


def _format_time(nanoseconds: int) -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))


def _run_worker() -> None:
  """Entry point of a worker process; reads its job from stdin."""
  tars, names = json.load(sys.stdin)
  folders = [Path(name) if name else None for name in names]
  # The parent process raises and reports these errors itself.
  with contextlib.suppress(OSError):
    # Few threads: work is wasted if the parent builds the same index, too.
    _build([Path(tar) for tar in tars], folders, threads=2)


if __name__ == "__main__":
  _run_worker()
