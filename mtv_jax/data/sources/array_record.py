"""ArrayRecord files of our own records, as `tools/make_shards.py` writes."""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data import records
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.utils import atomic
from mtv_jax.utils.open_files import OpenFiles
from mtv_jax.utils.path import expand_path

# Larger groups would be decompressed whole for each record read at random.
_OPTIONS = "group_size:1"
_THREADS = 16


class ArrayRecordSource:
  """Records of ArrayRecord files by number, the files in order.

  Readers are opened by the process that uses them; each is shared by its
  threads.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.

  Attributes:
    fields: the record fields it gives.
    files: in their order.
    name: short, for logs.
    shards: int64 [files], cumulative record counts; the last is the length.

  Raises:
    FileNotFoundError: if a file is missing or a glob matches none.
    ValueError: if a file is damaged, or was written in groups of records.
  """

  fields = frozenset(["key", "image", "captions"])

  def __init__(self, path: str | os.PathLike | Sequence[str | os.PathLike]):
    self.files = tuple(expand_path(path, suffix=".array_record"))
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      counts = list(pool.map(count_records, self.files))
    self.shards: Int64[np.ndarray, " files"] = np.cumsum(counts, dtype=np.int64)
    if not len(self):
      raise ValueError(f"{self.files[0]} and the rest of {path} are empty.")
    first, last = self.files[0].name, self.files[-1].name
    self.name = (
      first if len(counts) == 1 else f"{first}..{last} ({len(counts)} files)"
    )
    self._open = OpenFiles(
      functools.partial(open_reader, self.files), descriptors=1
    )

  def __len__(self) -> int:
    return int(self.shards[-1])

  def __repr__(self) -> str:
    return f"ArrayRecordSource({self.name}, {len(self)} records)"

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Record `i`.

    Raises:
      IndexError: if `i` is not in [0, len).
      BadRecord: if its bytes are damaged or it has no caption.
    """
    i = i.__index__()
    if not 0 <= i < len(self):
      raise IndexError(f"Record {i} of {self!r} does not exist.")
    shard = int(np.searchsorted(self.shards, i, side="right"))
    at = i - (int(self.shards[shard - 1]) if shard else 0)
    where = f"{self.files[shard].name}:{at}"
    try:
      (data,) = self._open.get(shard).read([at])
    except (RuntimeError, IndexError, ValueError) as error:
      raise BadRecord(where, f"can't be read ({error})") from error
    record = records.decode(data, where=where)
    record["captions"] = [c for c in record["captions"] if c.strip()]
    if not record["captions"]:
      raise BadRecord(record["key"], f"its caption in {where} is empty")
    return record


def open_reader(files: Sequence[Path], shard: int) -> Any:
  """A reader of one of the files, for reads at random by several threads."""
  return _module().ArrayRecordReader(
    str(files[shard]),
    # Reads are at random: a buffer ahead would only be thrown away.
    options="readahead_buffer_size:0",
    file_reader_buffer_size=32768,
  )


def write(
  path: str | os.PathLike, examples: Iterable[Mapping[str, Any]]
) -> int:
  """Writes records to one ArrayRecord file, which appears when complete.

  Args:
    path: the file; its folder must exist.
    examples: records with `key`, `image` (bytes) and `captions`.

  Returns:
    The number of records.
  """
  return write_bytes(path, map(records.encode, examples))


def write_bytes(path: str | os.PathLike, items: Iterable[bytes]) -> int:
  """Writes encoded records, as `write` does, and returns how many."""
  path = Path(path)
  temporary = atomic.temporary_path(path)
  writer = _module().ArrayRecordWriter(str(temporary), _OPTIONS)
  count = 0
  try:
    try:
      for item in items:
        with _as_os_error(path):
          writer.write(item)
        count += 1
    finally:
      with _as_os_error(path):
        writer.close()
    atomic.fsync(temporary)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  return count


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
  """A full disk is no defect of the program, as a RuntimeError would be."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f"{path} can't be written: {error}") from error


def count_records(file: Path) -> int:
  """Records in a file that is whole and can be read at random."""
  reader = _module().ArrayRecordReader(str(file))
  try:
    options = reader.writer_options_string()
    count = reader.num_records()
    if not reader.ok():
      raise RuntimeError("its records can't be found")
    reader.close()
  except RuntimeError as error:
    raise ValueError(
      f"{file} is no ArrayRecord file, or is cut short ({error}). Fetch or"
      " write it again, or leave it out of the path."
    ) from error
  group = re.search(r"group_size:(\d+)", options)
  if group and group[1] != "1":
    raise ValueError(
      f"{file} was written in groups of {group[1]} records, which makes reading"
      f" at random many times slower: write it again with {_OPTIONS!r}."
    )
  return count


def _module() -> Any:
  # Late, as its C++ runtime takes a while to load and most runs read tars.
  from array_record.python import array_record_module

  return array_record_module
