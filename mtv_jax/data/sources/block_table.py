"""Table of a data set's blocks, which replaces an index of every record.

A block is a run of a shard's records that one request reads. `mtv-jax index`
writes the table next to the shards or to another folder, as `blocks.npz`; a
start reads it and compares the shards' sizes and versions by one listing.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64

from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.buckets import Listing
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  printable,
)
from mtv_jax.utils.ranges import ByteRange
from mtv_jax.utils.text import list_first

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
# Above this, a block must have at least one byte per record.
_MAX_ROWS = 1 << 22
_FIX = "Run `mtv-jax index` again."


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
  """Blocks of shards, in order.

  Columns have one entry per block. `captioned` counts records with captions.
  """

  files: tuple[PurePath, ...]
  sizes: tuple[int, ...]  # Bytes of each file.
  versions: tuple[str, ...]  # "": not compared.
  shard: Int64[np.ndarray, " blocks"]
  offset: Int64[np.ndarray, " blocks"]
  size: Int64[np.ndarray, " blocks"]
  records: Int64[np.ndarray, " blocks"]
  captioned: Int64[np.ndarray, " blocks"]
  per_block: int = 0  # Records per block, as requested; 0: row groups.

  def __len__(self) -> int:
    return len(self.shard)

  def range(self, block: int) -> ByteRange:
    """Returns the byte range of a block."""
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

  def has_state(self, state: tuple[int, str]) -> bool:
    """Whether the table of one file has this size and version."""
    return state == (self.sizes[0], self.versions[0] or state[1])

  def select(
    self,
    files: Sequence[PurePath],
    listing: Listing | None = None,
    *,
    fix: str = _FIX,
  ) -> "BlockTable":
    """Returns the table of some of the files, in their order.

    Raises InputError if one is not in the table, or has changed since; with a
    bucket's listing, also if a shard of the table was removed.
    """
    parts = {part.files[0].name: part for part in self.split()}
    if missing := [f.name for f in files if f.name not in parts]:
      raise InputError(
        f"{len(missing)} of {len(files)} shards are not in the table of blocks"
        f" of {files[0].parent}: {list_first(missing, 3)}. {fix}"
      )
    selected_parts = [parts[file.name] for file in files]
    states = read_states(files, listing)
    changed = [
      file.name
      for file, part, state in zip(files, selected_parts, states, strict=True)
      if not part.has_state(state)
    ]
    if changed:
      raise InputError(
        f"{len(changed)} of {len(files)} shards in {files[0].parent} have"
        " changed since their table of blocks was written:"
        f" {list_first(changed, 3)}. {fix}"
      )
    folder = files[0].parent
    if listing and path_lib.is_remote(folder):
      present = listing(os.fspath(folder))
      if removed := [name for name in parts if name not in present]:
        raise InputError(
          f"{len(removed)} of {len(parts)} shards of the table of blocks of"
          f" {folder} are no longer there: {list_first(removed, 3)}. {fix}"
        )
    return dataclasses.replace(join(selected_parts), files=tuple(files))

  def split(self) -> list["BlockTable"]:
    """Returns the table of each file."""
    starts = np.searchsorted(self.shard, np.arange(len(self.files) + 1))
    rows = map(slice, starts[:-1], starts[1:])
    return [
      of_file(
        file,
        state,
        {name: getattr(self, name)[part] for name in list(_COLUMNS)[1:]},
        per_block=self.per_block,
      )
      for file, *state, part in zip(
        self.files, self.sizes, self.versions, rows, strict=True
      )
    ]


def as_columns(
  rows: Sequence[tuple[int, int, int, int]] | Int64[np.ndarray, "blocks 4"],
) -> Columns:
  """Returns columns, given (offset, size, records, captioned) of each block."""
  columns = np.array(rows, np.int64).reshape(-1, 4).T
  return dict(zip(list(_COLUMNS)[1:], columns, strict=True))


def of_file(
  file: PurePath, state: Sequence[Any], columns: Columns, *, per_block: int
) -> BlockTable:
  """Returns the table of one file; `state` is its size and version."""
  shard = np.zeros(len(columns["offset"]), np.int64)
  return BlockTable(
    *((value,) for value in (file, *state)),
    shard=shard,
    per_block=per_block,
    **columns,
  )


def join(tables: Sequence[BlockTable]) -> BlockTable:
  """Joins the tables of different files."""
  first_files = np.cumsum([0] + [len(table.files) for table in tables])
  columns = {
    n: np.concatenate([getattr(t, n) for t in tables]) for n in _COLUMNS
  }
  columns["shard"] += np.repeat(first_files[:-1], [len(t) for t in tables])
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
  *,
  required: bool = False,
) -> BlockTable | None:
  """Returns the table of shards; None if there is none next to them.

  Tables next to shards are used for buckets only. Raises MissingFileError if
  `table` doesn't exist; InputError like `BlockTable.select`, and if a bucket
  lacks a `required` table.
  """
  if table is not None:
    return read(path_lib.as_path(table)).select(files, listing)
  folders = list(dict.fromkeys(file.parent for file in files))
  if not path_lib.is_remote(files[0]):
    return None
  missing = [f for f in folders if NAME not in listing(os.fspath(f))]
  if missing and required:
    raise InputError(
      f"{missing[0]} has no table of blocks, by which shards in a bucket are"
      f" read. Run `mtv-jax index '{missing[0]}/*{files[0].suffix}'`, or set"
      f" blocks='FOLDER/{NAME}' in data.train."
    )
  if missing:
    return None
  parts = {}
  for folder in folders:
    folder_files = [file for file in files if file.parent == folder]
    selected = read(folder / NAME).select(folder_files, listing)
    parts |= {part.files[0]: part for part in selected.split()}
  return join([parts[file] for file in files])


def read(file: PurePath, *, fix: str = _FIX) -> BlockTable:
  """Reads a table.

  Raises MissingFileError, or InputError if it is damaged or of another version.
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
    _check_content(header, names, sizes, columns)
  except FileNotFoundError as error:
    raise MissingFileError(
      f"There is no table of blocks {file}. {fix}"
    ) from error
  except OSError:
    raise
  except Exception as error:  # numpy and zipfile raise many types.
    raise InputError(
      f"{file} is not a valid table of blocks ({printable(error)}). {fix}"
    ) from error
  states = tuple(sizes), tuple(versions)
  return BlockTable(files, *states, **columns, per_block=per_block)


def _check_content(
  header: Mapping[str, Any],
  names: Sequence[str],
  sizes: Sequence[int],
  columns: Mapping[str, Any],
) -> None:
  if header["version"] != _VERSION:
    raise ValueError(f"version {header['version']}, expected {_VERSION}")
  shard, offset, size, records, captioned = (columns[n] for n in _COLUMNS)
  shapes = {column.shape for column in columns.values()}
  if shapes != {(len(shard),)} or (np.diff(shard) < 0).any():
    raise ValueError("its columns don't fit together")
  if len(shard) and not 0 <= shard[0] <= shard[-1] < len(names):
    raise ValueError(f"shards {shard[0]} to {shard[-1]} of {len(names)}")
  ends = np.array(sizes, np.int64)[shard]
  minimum = min(offset.min(initial=0), size.min(initial=0))
  if minimum < 0 or (size > ends - offset).any():
    raise ValueError("a block is outside of its file")
  if captioned.min(initial=0) < 0 or (captioned > records).any():
    raise ValueError("a block has more captioned records than records")
  if (records > np.maximum(size, _MAX_ROWS)).any():
    raise ValueError("a block has more records than bytes")
  if any("/" in name or "\0" in name for name in names):
    raise ValueError("a file's name is a path")
