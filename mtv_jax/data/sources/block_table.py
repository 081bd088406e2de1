"""Table of a data set's blocks, which replaces an index of every record.

A block is a run of a shard's records that one request reads. `mtv-jax index`
writes the table next to the shards or to another folder, as `blocks.npz`; a
start reads it and compares the shards' sizes and versions by one listing.

While the table is built, `blocks.parts` beside it has the table of each shard
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
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64

from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.leases import open_leases
from mtv_jax.utils.ranges import Range
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
_FIX = "Run `mtv-jax index` again."
_WAIT = 5.0  # Seconds between two looks at the shards that others read.


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

  def range(self, block: int) -> Range:
    """Returns the bytes of a block."""
    path = self.files[self.shard[block]]
    return Range(path, int(self.offset[block]), int(self.size[block]))

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

  def select(self, files: Sequence[PurePath]) -> "BlockTable":
    """Returns the table of some of the files, in their order.

    Raises InputError if one is not in the table, or has changed since.
    """
    known = {file.name: i for i, file in enumerate(self.files)}
    if missing := [f.name for f in files if f.name not in known]:
      raise InputError(
        f"{len(missing)} of {len(files)} shards are not in the table of blocks"
        f" of {files[0].parent}: {list_first(missing, 3)}. {self.fix}"
      )
    numbers = [known[file.name] for file in files]
    changed = [
      file.name
      for file, i, state in zip(files, numbers, read_states(files), strict=True)
      if state != (self.sizes[i], self.versions[i] or state[1])
    ]
    if changed:
      raise InputError(
        f"{len(changed)} of {len(files)} shards in {files[0].parent} have"
        " changed since their table of blocks was written:"
        f" {list_first(changed, 3)}. {self.fix}"
      )
    # Blocks of a shard are adjacent.
    starts = np.searchsorted(self.shard, [numbers, np.add(numbers, 1)])
    runs = [np.arange(a, b) for a, b in starts.T]
    rows = np.concatenate([np.zeros(0, np.int64), *runs])
    columns = {n: getattr(self, n)[rows] for n in _COLUMNS}
    counts = [len(run) for run in runs]
    columns["shard"] = np.repeat(np.arange(len(files)), counts)
    return BlockTable(
      files=tuple(files),
      sizes=tuple(self.sizes[i] for i in numbers),
      versions=tuple(self.versions[i] for i in numbers),
      per_block=self.per_block,
      **columns,
    )


def as_columns(rows: Sequence[tuple[int, int, int, int]]) -> Columns:
  """Returns columns, given (offset, size, records, captioned) of each block."""
  columns = np.array(rows, np.int64).reshape(-1, 4).T
  return dict(zip(list(_COLUMNS)[1:], columns, strict=True))


def of_file(
  file: PurePath, state: tuple[int, str], columns: Columns, *, per_block: int
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

  Several hosts may build a table at once: they share the files. Those that an
  earlier command read, for blocks of `per_block` records, are not read again,
  unless they changed.

  Args:
    files: shards of one folder.
    scan: returns the columns of a file's blocks, without `shard`; called in
      processes.
    per_block: records per block that `scan` aims at.
    folder: where to write the table; default: that of the files.
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
  tables = _find_parts(states, folder, per_block)
  missing = {f: state for f, state in states.items() if f not in tables}
  announce([size for size, _ in missing.values()])
  count = min(processes or available_cores(), len(files))
  scan_one = functools.partial(
    _scan,
    folder=folder,
    scan=scan,
    per_block=per_block,
    joint=_stat(folder / NAME),
  )
  # Not forked, which is unsafe beside the threads of bucket clients.
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(count, mp_context=context) as pool:
    while missing:
      submit = functools.partial(pool.submit, scan_one)
      tables |= _scan_missing(
        submit, missing, folder, count, len(files), progress
      )
      # What other hosts read is verified once, by the one that joins it.
      with _acquire(folder, NAME) as acquired:
        missing = {f: s for f, s in missing.items() if f not in tables}
        if missing and acquired:
          tables |= _find_parts(missing, folder, per_block)
          missing = {f: s for f, s in missing.items() if f not in tables}
        if not missing:
          return _write_joint([tables[f] for f in files], states, folder)
      time.sleep(_WAIT)
  return _write_joint([tables[file] for file in files], states, folder)


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
  with contextlib.suppress(MissingFileError):
    path_lib.remove_folder(folder / PARTS)
  return table


def _scan_missing(
  submit: Callable[..., futures.Future],
  missing: Mapping[PurePath, tuple[int, str]],
  folder: PurePath,
  count: int,
  total: int,
  progress: Callable[[int, int], None],
) -> dict[PurePath, BlockTable]:
  """Reads files, `count` at once, until this or other hosts have read all.

  Returns the tables of those that this host read.
  """
  tables: dict[PurePath, BlockTable] = {}
  pending: dict[futures.Future, PurePath] = {}
  others: set[PurePath] = set()  # Read by other hosts, now or before.
  # Hosts start at different shards.
  todo = random.SystemRandom().sample(list(missing), len(missing))
  looked = time.monotonic()
  while todo or pending:
    if time.monotonic() > looked + _WAIT:
      names = set(path_lib.list_folder(folder / PARTS))
      others |= {f for f in missing if _part(folder, f).name in names}
      looked = time.monotonic()
    while todo and len(pending) < count:
      if (file := todo.pop()) not in others:
        pending[submit(file, missing[file])] = file
    done, _ = futures.wait(pending, _WAIT, futures.FIRST_COMPLETED)
    for job in done:
      file = pending.pop(job)
      if table := job.result():
        tables[file] = table
    progress(total - len(todo) - len(pending), total)
  return tables


def _part(folder: PurePath, file: PurePath) -> PurePath:
  """Path of a shard's own table, while the joint table is built."""
  return folder / PARTS / f"{file.name}.npz"


def _scan(
  file: PurePath,
  state: tuple[int, str],
  *,
  folder: PurePath,
  scan: Callable[[PurePath], Columns],
  per_block: int,
  joint: tuple[int, int] | None,
) -> BlockTable | None:
  """Reads a shard and writes its part.

  Returns None if another process reads it, or has replaced the joint table,
  whose state was `joint`.
  """
  part = _part(folder, file)
  with _acquire(folder, file.name) as acquired:
    if not acquired:
      return None
    found = _read_parts([part] * path_lib.exists(part), {file: state})
    if file in found and found[file].per_block == per_block:
      return found[file]
    if _stat(folder / NAME) != joint:
      return None
    table = of_file(file, state, scan(file), per_block=per_block)
    table.write(part)
    return table


def _stat(file: PurePath) -> tuple[int, int] | None:
  with contextlib.suppress(FileNotFoundError):
    stat = path_lib.stat(file)
    return stat.st_size, stat.st_mtime_ns
  return None


def _acquire(
  folder: PurePath, name: str
) -> contextlib.AbstractContextManager[bool]:
  """Leases a file among hosts; yields False if another one has leased it."""
  return _open_leases(folder).acquire(name)


# A process that keeps them notices leases that are not renewed.
_open_leases = functools.cache(open_leases)


def _find_parts(
  states: Mapping[PurePath, tuple[int, str]], folder: PurePath, per_block: int
) -> dict[PurePath, BlockTable]:
  """Returns the tables of unchanged files that are in a table or a part."""
  names = set(path_lib.list_folder(folder / PARTS))
  files = [f for f in (folder / NAME,) if path_lib.exists(f)]
  parts = (_part(folder, file) for file in states)
  files += [part for part in parts if part.name in names]
  found = _read_parts(files, states)
  return {f: t for f, t in found.items() if t.per_block == per_block}


def _read_parts(
  tables: Iterable[PurePath], states: Mapping[PurePath, tuple[int, str]]
) -> dict[PurePath, BlockTable]:
  """Reads tables, and returns that of each file in one of these states."""

  def read_one(file: PurePath) -> BlockTable | None:
    # Another host may have removed it, and a damaged one is replaced.
    with contextlib.suppress(InputError, FileNotFoundError):
      return read(file)

  known = {file.name: file for file in states}
  found = {}
  for table in filter(None, map_threads(read_one, tables)):
    starts = np.searchsorted(table.shard, np.arange(len(table.files) + 1))
    entries = zip(table.files, table.sizes, table.versions, strict=True)
    for i, (file, size, version) in enumerate(entries):
      file = known.get(file.name)
      # Without a version, as `make_shards` writes it, the store's is taken.
      if file and states[file] == (size, version or states[file][1]):
        rows = slice(starts[i], starts[i + 1])
        columns = {n: getattr(table, n)[rows] for n in list(_COLUMNS)[1:]}
        found[file] = of_file(
          file, states[file], columns, per_block=table.per_block
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


def read_states(files: Sequence[PurePath]) -> list[tuple[int, str]]:
  """Returns size and version of each file; one listing per bucket folder."""
  if not path_lib.is_remote(files[0]):
    if missing := [file for file in files if not os.path.isfile(file)]:
      raise MissingFileError(f"There is no {missing[0]}.")
    stats = map(os.stat, files)
    return [(stat.st_size, str(stat.st_mtime_ns)) for stat in stats]
  listing = functools.cache(buckets.list_objects)
  infos = [listing(os.fspath(f.parent)).get(f.name) for f in files]
  if None in infos:
    raise MissingFileError(f"There is no {files[infos.index(None)]}.")
  return [(info["size"], buckets.object_version(info)) for info in infos]


def find(
  files: Sequence[PurePath], table: str | os.PathLike | None
) -> BlockTable | None:
  """Returns the table of shards; None if there is none next to them.

  Tables next to shards are used for buckets only. Raises InputError like
  `BlockTable.select`, and MissingFileError if `table` doesn't exist.
  """
  if table is not None:
    return read(path_lib.as_path(table)).select(files)
  folders = list(dict.fromkeys(file.parent for file in files))
  tables = [folder / NAME for folder in folders]
  if not path_lib.is_remote(files[0]) or not all(map(path_lib.exists, tables)):
    return None
  return join(
    [
      read(table).select([f for f in files if f.parent == folder])
      for folder, table in zip(folders, tables, strict=True)
    ]
  )


def read(file: PurePath, *, fix: str = _FIX) -> BlockTable:
  """Reads a table; InputError if it is damaged or of another version."""
  try:
    with np.load(io.BytesIO(path_lib.read_bytes(file))) as arrays:
      header = json.loads(arrays["header"].tobytes())
      columns = {n: arrays[n].astype(np.int64) for n in _COLUMNS}
    names, sizes, versions = zip(*header["files"], strict=True)
    _check(header, names, columns)
  except OSError:
    raise
  except Exception as error:  # numpy and zipfile raise many types.
    raise InputError(
      f"{file} is not a table of blocks, or damaged ({printable(error)}). {fix}"
    ) from error
  files = tuple(file.with_name(name) for name in names)
  states = tuple(sizes), tuple(versions)
  per_block = int(header.get("per_block", 0))
  return BlockTable(files, *states, **columns, per_block=per_block, fix=fix)


def _check(
  header: Mapping[str, Any], names: Sequence[str], columns: Mapping[str, Any]
) -> None:
  """Raises ValueError if the content can't be a table."""
  if header["version"] != _VERSION:
    raise ValueError(f"version {header['version']}, expected {_VERSION}")
  shard = columns["shard"]
  lengths = {len(column) for column in columns.values()}
  if len(lengths) != 1 or (np.diff(shard) < 0).any():
    raise ValueError("its columns don't fit together")
  if len(shard) and not shard[-1] < len(names):
    raise ValueError(f"shard {shard[-1]} of {len(names)}")
  if any("/" in name or "\0" in name for name in names):
    raise ValueError("a file's name is a path")
