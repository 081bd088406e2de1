"""Table of a data set's blocks, which replaces an index of every record.

A block is a run of a shard's records that one request reads. `mtv-jax index`
writes the table next to the shards or to another folder, as `blocks.npz`; a
start reads it and compares the shards' sizes and versions by one listing.

While the table is built, the folder `blocks.parts` has the table of each shard
that was read, and hosts lease the shards that they read: none is read twice, by
any host or after a kill.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64

from mtv_jax.utils import atomic, buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.buckets import Listing
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  WorkerError,
  printable,
)
from mtv_jax.utils.leases import Jobs, open_leases, run_jobs
from mtv_jax.utils.ranges import ByteRange
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import available_cores, map_threads

NAME, PARTS = "blocks.npz", "blocks.parts"
_VERSION = 1
# Stored type of each column.
_COLUMNS = {
  "shard": "<u4",
  "offset": "<u8",
  "size": "<u8",
  "records": "<u4",
  "captioned": "<u4",
}
Columns = Mapping[str, Int64[np.ndarray, " blocks"]]
# A block of more records has a byte for each; Parquet's may have fewer.
_MAX_ROWS = 1 << 22
_FIX = "Run `mtv-jax index` again."
_WAIT = 5.0  # Seconds between two looks at what other hosts read.


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
  """Blocks of shards, in order.

  `captioned` counts the records with captions; columns have one entry a block.
  """

  files: tuple[PurePath, ...]
  sizes: tuple[int, ...]  # Bytes of each file.
  versions: tuple[str, ...]  # "" is not compared.
  shard: Int64[np.ndarray, " blocks"]
  offset: Int64[np.ndarray, " blocks"]
  size: Int64[np.ndarray, " blocks"]
  records: Int64[np.ndarray, " blocks"]
  captioned: Int64[np.ndarray, " blocks"]
  per_block: int = 0  # Records per block, as requested; 0: row groups.
  fix: str = _FIX  # Closing sentence of errors about changed files.

  def __len__(self) -> int:
    return len(self.shard)

  def range(self, block: int) -> ByteRange:
    """Returns the bytes of a block."""
    path = self.files[self.shard[block]]
    return ByteRange(path, int(self.offset[block]), int(self.size[block]))

  def count_records(self, *, captioned: bool = False) -> list[int]:
    """Returns the number of records, or of captioned ones, of each file."""
    records = self.captioned if captioned else self.records
    counts = np.bincount(self.shard, records, len(self.files))
    return counts.astype(np.int64).tolist()

  @property
  def digest(self) -> str:
    """A hash of the table."""
    return hashlib.blake2b(self._to_bytes(), digest_size=16).hexdigest()

  def _to_bytes(self) -> bytes:
    names = [file.name for file in self.files]
    header = {
      "version": _VERSION,
      "per_block": self.per_block,
      "files": list(zip(names, self.sizes, self.versions, strict=True)),
    }
    columns = {n: getattr(self, n).astype(t) for n, t in _COLUMNS.items()}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, header=text, **columns)
    return stream.getvalue()

  def write(self, file: PurePath) -> None:
    """Writes the table."""
    path_lib.write_bytes(file, self._to_bytes())

  def select(
    self, files: Sequence[PurePath], listing: Listing | None = None
  ) -> "BlockTable":
    """Returns the table of some of the files, in their order.

    Raises InputError if one is not in the table, or has changed since; with a
    bucket's listing, also if a shard of the table was removed.
    """
    parts = {part.files[0].name: part for part in self.split()}
    if missing := [f.name for f in files if f.name not in parts]:
      raise InputError(
        f"{len(missing)} of {len(files)} shards are not in the table of blocks"
        f" of {files[0].parent}: {list_first(missing, 3)}. {self.fix}"
      )
    chosen = [parts[file.name] for file in files]
    states = read_states(files, listing)
    changed = [
      file.name
      for file, part, state in zip(files, chosen, states, strict=True)
      if state != (part.sizes[0], part.versions[0] or state[1])
    ]
    if changed:
      raise InputError(
        f"{len(changed)} of {len(files)} shards in {files[0].parent} have"
        " changed since their table of blocks was written:"
        f" {list_first(changed, 3)}. {self.fix}"
      )
    folder = files[0].parent
    if listing and path_lib.is_remote(folder):
      present = listing(os.fspath(folder))
      if gone := [name for name in parts if name not in present]:
        raise InputError(
          f"{len(gone)} of {len(parts)} shards of the table of blocks of"
          f" {folder} are no longer there: {list_first(gone, 3)}. {self.fix}"
        )
    return dataclasses.replace(join(chosen), files=tuple(files))

  def split(self) -> list["BlockTable"]:
    """Returns the table of each file."""
    starts = np.searchsorted(self.shard, np.arange(len(self.files) + 1))
    rows = map(slice, starts[:-1], starts[1:])
    return [
      of_file(
        file,
        state,
        {name: getattr(self, name)[chosen] for name in list(_COLUMNS)[1:]},
        per_block=self.per_block,
      )
      for file, *state, chosen in zip(
        self.files, self.sizes, self.versions, rows, strict=True
      )
    ]


def as_columns(rows: Sequence[tuple[int, int, int, int]]) -> Columns:
  """Returns columns, given (offset, size, records, captioned) of each block."""
  columns = np.array(rows, np.int64).reshape(-1, 4).T
  return dict(zip(list(_COLUMNS)[1:], columns, strict=True))


def of_file(
  file: PurePath, state: Sequence[Any], columns: Columns, *, per_block: int
) -> BlockTable:
  """Returns the table of one file, of a size and version."""
  shard = np.zeros(len(columns["offset"]), np.int64)
  return BlockTable(
    *((value,) for value in (file, *state)),
    shard=shard,
    per_block=per_block,
    **columns,
  )


def build(
  files: Sequence[PurePath],
  scan: Callable[[PurePath], Columns],
  *,
  per_block: int,
  folder: PurePath | None = None,
  processes: int | None = None,
  announce: Callable[[Sequence[int]], None] = lambda sizes: None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> BlockTable:
  """Builds and writes the table of files of one folder.

  Several hosts may build a table at once: they share the files. Files that an
  earlier command read, for blocks of `per_block` records, are read again only
  if they changed.

  Args:
    files: shards of one folder.
    scan: returns the columns of a file's blocks, without `shard`; called in
      processes.
    per_block: records per block that `scan` aims at.
    folder: where to write the table; default: the files' folder.
    processes: default: one per core.
    announce: called once, with the sizes of the files to read, in bytes.
    progress: called with the numbers of finished and of all files.
  """
  if len({file.parent for file in files}) > 1:
    raise InputError("The shards are in several folders; index each by itself.")
  folder = folder or files[0].parent
  if not path_lib.is_remote(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
  states = dict(zip(files, read_states(files), strict=True))
  joint = _stat(folder / NAME)
  tables = _find_parts(states, folder, per_block)
  missing = {f: state for f, state in states.items() if f not in tables}
  announce([size for size, _ in missing.values()])
  count = min(processes or available_cores(), len(files))
  # Not forked, which is unsafe beside the threads of bucket clients.
  context = multiprocessing.get_context("spawn")
  stopped = context.Event()
  options = dict(initializer=_start_worker, initargs=(stopped,))
  with (
    _explain_killed(),
    futures.ProcessPoolExecutor(count, context, **options) as pool,
  ):
    while missing:
      scans = _Scans(missing, folder, scan, per_block, joint)
      jobs = {pool.submit(scans.run) for _ in range(count)}
      try:
        while jobs:
          done, jobs = futures.wait(jobs, _WAIT, futures.FIRST_COMPLETED)
          for job in done:
            job.result()
          progress(len(files) - len(scans.list()), len(files))
      except BaseException:
        stopped.set()
        raise
      # What was read is verified once, by the host that joins it.
      with open_leases(folder).acquire(NAME) as acquired:
        if acquired:
          joint = _stat(folder / NAME)
          tables |= _find_parts(missing, folder, per_block)
          missing = {f: s for f, s in missing.items() if f not in tables}
          if not missing:
            return _write_joint([tables[f] for f in files], states, folder)
      time.sleep(_WAIT)
  return _write_joint([tables[f] for f in files], states, folder)


@contextlib.contextmanager
def _explain_killed() -> Iterator[None]:
  """Raises WorkerError if a process of the pool was killed."""
  try:
    yield
  except futures.process.BrokenProcessPool as error:
    raise WorkerError(
      "A process that read shards was killed or crashed, often for lack of"
      " memory. Run this again, with fewer processes; finished shards are not"
      " read again."
    ) from error


def _write_joint(
  tables: Sequence[BlockTable],
  states: Mapping[PurePath, tuple[int, str]],
  folder: PurePath,
) -> BlockTable:
  """Joins and writes the tables of files, and removes the parts."""
  if read_states(list(states)) != list(states.values()):
    raise InputError("Shards changed while they were read. Run this again.")
  table = join(tables)
  table.write(folder / NAME)
  if not path_lib.is_remote(folder):
    atomic.remove_abandoned(Path(folder), name=f"{NAME}.")
  with contextlib.suppress(MissingFileError):
    path_lib.remove_folder(folder / PARTS)
  return table


@dataclasses.dataclass(frozen=True)
class _Scans:
  """Shards that processes of any host read, each into a part."""

  missing: Mapping[PurePath, tuple[int, str]]
  folder: PurePath  # The table's.
  scan: Callable[[PurePath], Columns]
  per_block: int
  joint: tuple[int, int] | None  # State of the table; changed by who joins it.

  def run(self) -> None:
    """Reads shards until this or other processes have read all."""
    run_jobs(open_leases(self.folder), self.list)

  def list(self) -> Jobs:
    """Returns the shards that no process has read."""
    names = set(path_lib.list_folder(self.folder / PARTS))
    joint = _stat(self.folder / NAME)
    if (_stopped and _stopped.is_set()) or joint != self.joint:
      return {}
    files = [f for f in self.missing if self._part(f).name not in names]
    return {f.name: functools.partial(self._read, f) for f in files}

  def _read(self, file: PurePath) -> bool:
    if _stopped.is_set():
      raise futures.CancelledError
    joint = _stat(self.folder / NAME)
    if path_lib.exists(self._part(file)) or joint != self.joint:
      return False
    state, columns = self.missing[file], self.scan(file)
    table = of_file(file, state, columns, per_block=self.per_block)
    table.write(self._part(file))
    return True

  def _part(self, file: PurePath) -> PurePath:
    return _part(self.folder, file)


_stopped: Any = None  # Set once a process of this host has failed.


def _start_worker(stopped: Any) -> None:
  global _stopped
  _stopped = stopped
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this process when its parent was killed; it would wait forever."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _part(folder: PurePath, file: PurePath) -> PurePath:
  """Path of a shard's own table, while the joint table is built."""
  return folder / PARTS / f"{file.name}.npz"


def _stat(file: PurePath) -> tuple[int, int] | None:
  with contextlib.suppress(FileNotFoundError):
    stat = path_lib.stat(file)
    return stat.st_size, stat.st_mtime_ns
  return None


def _find_parts(
  states: Mapping[PurePath, tuple[int, str]], folder: PurePath, per_block: int
) -> dict[PurePath, BlockTable]:
  """Returns the tables of unchanged files that are in a table or a part.

  Removes other parts: a shard without one is read.
  """
  names = set(path_lib.list_folder(folder / PARTS))
  parts = {f: _part(folder, f) for f in states}
  parts = {f: part for f, part in parts.items() if part.name in names}
  files = [f for f in (folder / NAME,) if path_lib.exists(f)]
  found = _read_parts([*files, *parts.values()], states)
  found = {f: t for f, t in found.items() if t.per_block == per_block}
  map_threads(path_lib.remove, [p for f, p in parts.items() if f not in found])
  return found


def _read_parts(
  tables: Iterable[PurePath], states: Mapping[PurePath, tuple[int, str]]
) -> dict[PurePath, BlockTable]:
  """Reads tables; returns the table of each file that has its state."""

  def read_one(file: PurePath) -> BlockTable | None:
    # Another host may have removed it, and a damaged one is replaced.
    with contextlib.suppress(InputError, FileNotFoundError):
      return read(file)

  known = {file.name: file for file in states}
  found = {}
  for table in map_threads(read_one, tables):
    # A table without blocks is false, too.
    for part in () if table is None else table.split():
      file = known.get(part.files[0].name)
      # Without a version, as `make_shards` writes it, the store's is taken.
      if file and states[file] == (
        part.sizes[0],
        part.versions[0] or states[file][1],
      ):
        versions = (states[file][1],)
        found[file] = dataclasses.replace(
          part, files=(file,), versions=versions
        )
  return found


def join(tables: Sequence[BlockTable]) -> BlockTable:
  """Joins the tables of different files."""
  first = np.cumsum([0] + [len(table.files) for table in tables])
  columns = {
    n: np.concatenate([getattr(t, n) for t in tables]) for n in _COLUMNS
  }
  columns["shard"] += np.repeat(first[:-1], [len(t) for t in tables])
  return BlockTable(
    files=tuple(itertools.chain(*(t.files for t in tables))),
    sizes=tuple(itertools.chain(*(t.sizes for t in tables))),
    versions=tuple(itertools.chain(*(t.versions for t in tables))),
    per_block=tables[0].per_block,
    **columns,
  )


def read_states(
  files: Sequence[PurePath], listing: Listing | None = None
) -> list[tuple[int, str]]:
  """Returns size and version of each file; one listing per bucket folder."""
  if not path_lib.is_remote(files[0]):
    if missing := [file for file in files if not os.path.isfile(file)]:
      raise MissingFileError(f"There is no {missing[0]}.")
    stats = map(os.stat, files)
    return [(stat.st_size, str(stat.st_mtime_ns)) for stat in stats]
  listing = listing or buckets.cached_listing()
  infos = [listing(os.fspath(f.parent)).get(f.name) for f in files]
  if None in infos:
    raise MissingFileError(f"There is no {files[infos.index(None)]}.")
  return [(info["size"], buckets.object_version(info)) for info in infos]


def find(
  files: Sequence[PurePath],
  table: str | os.PathLike | None,
  listing: Listing = buckets.list_objects,
) -> BlockTable | None:
  """Returns the table of shards; None if there is none next to them.

  Tables next to shards are used for buckets only. Raises InputError like
  `BlockTable.select`, and MissingFileError if `table` doesn't exist.
  """
  if table is not None:
    return read(path_lib.as_path(table)).select(files, listing)
  folders = list(dict.fromkeys(file.parent for file in files))
  if not path_lib.is_remote(files[0]) or not all(
    NAME in listing(os.fspath(folder)) for folder in folders
  ):
    return None
  parts = {}
  for folder in folders:
    of_folder = [file for file in files if file.parent == folder]
    chosen = read(folder / NAME).select(of_folder, listing)
    parts |= {part.files[0]: part for part in chosen.split()}
  return join([parts[file] for file in files])


def read(file: PurePath, *, fix: str = _FIX) -> BlockTable:
  """Reads a table.

  Raises InputError if it is damaged or of another version; MissingFileError.
  """
  try:
    with np.load(io.BytesIO(path_lib.read_bytes(file))) as arrays:
      header = json.loads(arrays["header"].tobytes())
      # Integers only; what exceeds a column's type would wrap around.
      columns = {
        n: arrays[n].astype(np.int64, casting="same_kind") for n in _COLUMNS
      }
    names, sizes, versions = zip(*header["files"], strict=True)
    files = tuple(file.with_name(name) for name in names)
    per_block = int(header.get("per_block", 0))
    _check(header, names, sizes, columns)
  except FileNotFoundError as error:
    raise MissingFileError(
      f"There is no table of blocks {file}. {fix}"
    ) from error
  except OSError:
    raise
  except Exception as error:  # numpy and zipfile raise many types.
    raise InputError(
      f"{file} is not a table of blocks, or damaged ({printable(error)}). {fix}"
    ) from error
  states = tuple(sizes), tuple(versions)
  return BlockTable(files, *states, **columns, per_block=per_block, fix=fix)


def _check(
  header: Mapping[str, Any],
  names: Sequence[str],
  sizes: Sequence[int],
  columns: Mapping[str, Any],
) -> None:
  """Raises ValueError if the content can't be a table."""
  if header["version"] != _VERSION:
    raise ValueError(f"version {header['version']}, expected {_VERSION}")
  shard, offset, size, records, captioned = (columns[n] for n in _COLUMNS)
  shapes = {column.shape for column in columns.values()}
  if shapes != {(len(shard),)} or (np.diff(shard) < 0).any():
    raise ValueError("its columns don't fit together")
  if len(shard) and not 0 <= shard[0] <= shard[-1] < len(names):
    raise ValueError(f"shards {shard[0]} to {shard[-1]} of {len(names)}")
  ends = np.array(sizes, np.int64)[shard]
  least = min(offset.min(initial=0), size.min(initial=0))
  if least < 0 or (size > ends - offset).any():
    raise ValueError("a block is outside of its file")
  if captioned.min(initial=0) < 0 or (captioned > records).any():
    raise ValueError("a block has more captioned records than records")
  if (records > np.maximum(size, _MAX_ROWS)).any():
    raise ValueError("a block has more records than bytes")
  if any("/" in name or "\0" in name for name in names):
    raise ValueError("a file's name is a path")
