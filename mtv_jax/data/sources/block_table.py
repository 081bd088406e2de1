"""Table of a data set's blocks, which replaces an index of every record.

A block is a run of a shard's records that one request reads. `mtv-jax index`
writes the table next to the shards, as `blocks.npz`; a start reads it and
compares the shards' sizes and versions by one listing.
"""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64

from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.ranges import Range
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import available_cores

NAME = "blocks.npz"
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
      **columns,
    )


def as_columns(rows: Sequence[tuple[int, int, int, int]]) -> Columns:
  """Returns columns, given (offset, size, records, captioned) of each block."""
  columns = np.array(rows, np.int64).reshape(-1, 4).T
  return dict(zip(list(_COLUMNS)[1:], columns, strict=True))


def build(
  files: Sequence[PurePath],
  scan: Callable[[PurePath], Columns],
  *,
  processes: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> BlockTable:
  """Builds the table of files of one folder, which `scan` reads in processes.

  `scan` returns the columns of a file's blocks, without `shard`.
  """
  if len({file.parent for file in files}) > 1:
    raise InputError("The shards are in several folders; index each by itself.")
  states = read_states(files)
  count = min(processes or available_cores(), len(files))
  columns: list[Columns] = []
  # Not forked, which is unsafe beside the threads of bucket clients.
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(count, mp_context=context) as pool:
    for of_file in pool.map(scan, files):
      columns.append(of_file)
      progress(len(columns), len(files))
  if read_states(files) != states:
    raise InputError("Shards changed while they were read. Run this again.")
  counts = [len(of_file["offset"]) for of_file in columns]
  return BlockTable(
    files=tuple(files),
    sizes=tuple(size for size, _ in states),
    versions=tuple(version for _, version in states),
    shard=np.repeat(np.arange(len(files)), counts),
    **{n: np.concatenate([c[n] for c in columns]) for n in columns[0]},
  )


def join(tables: Sequence[BlockTable]) -> BlockTable:
  """Joins the tables of different files."""
  first = np.cumsum([0] + [len(table.files) for table in tables])
  columns = {
    n: np.concatenate([getattr(t, n) for t in tables]) for n in _COLUMNS
  }
  columns["shard"] += np.repeat(first[:-1], [len(t) for t in tables])
  return BlockTable(
    files=sum((t.files for t in tables), ()),
    sizes=sum((t.sizes for t in tables), ()),
    versions=sum((t.versions for t in tables), ()),
    **columns,
  )


def read_states(files: Sequence[PurePath]) -> list[tuple[int, str]]:
  """Returns size and version of each file; one listing of a bucket folder."""
  if not path_lib.is_remote(files[0]):
    if missing := [file for file in files if not os.path.isfile(file)]:
      raise MissingFileError(f"There is no {missing[0]}.")
    stats = map(os.stat, files)
    return [(stat.st_size, str(stat.st_mtime_ns)) for stat in stats]
  infos = buckets.list_objects(os.fspath(files[0].parent))
  if missing := [file for file in files if file.name not in infos]:
    raise MissingFileError(f"There is no {missing[0]}.")
  of_files = (infos[file.name] for file in files)
  return [(info["size"], buckets.object_version(info)) for info in of_files]


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
  return BlockTable(files, *states, **columns, fix=fix)


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
