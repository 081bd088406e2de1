"""ArrayRecord files as written by `mtv-jax make_shards`."""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data import records
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.data.sources import block_table
from mtv_jax.data.sources.base import FileSource, Paths
from mtv_jax.data.sources.shard_cache import CachedShardsSource, ShardCache
from mtv_jax.utils import atomic, buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.threads import map_threads

# With larger groups, each random read would decompress a whole group.
_OPTIONS = "group_size:1"


class ArrayRecordSource(CachedShardsSource, FileSource):
  """Records of ArrayRecord files.

  The ArrayRecord reader needs local files, so each bucket file is copied whole
  when it is read. Bucket files need a table of blocks.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
    blocks: table of blocks, written by `mtv-jax index`; default: blocks.npz
      next to the files, if they are in a bucket and it exists.
  """

  suffix = ".array_record"

  def __init__(
    self,
    path: Paths,
    *,
    blocks: str | os.PathLike | None = None,
  ):
    listing = buckets.cached_listing()
    files = expand_path(path, suffix=self.suffix, listing=listing)
    copies: Sequence[Path] = [Path(file) for file in files]
    if table := block_table.find(files, blocks, listing, required=True):
      super().__init__(files, table.count_records())
      if path_lib.is_remote(files[0]):
        states = block_table.read_states(files, listing)
        self._cache = ShardCache(files, *zip(*states, strict=True))
    else:
      super().__init__(files, map_threads(count_records, copies))
    if not len(self):
      raise InputError(f"{self.name} has no records.")
    counts = np.diff(self.shards, prepend=0)
    self._open_shards(functools.partial(open_shard, files, counts), copies)
    # Megabytes per shard; only labelling reads them.
    self._sidecars = ProcessCache(
      functools.partial(_read_sidecar, self.files), limit=8
    )

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; BadRecord if it is corrupt or lacks a caption."""
    shard, index = self._locate(i)
    where = f"{self.files[shard].name}:{index}"
    data = read_bytes(self._readers.get(shard), index, where=where)
    record = records.decode(data, where=where)
    record["captions"] = records.read_captions(
      record["key"], record["captions"], where=f" in {where}"
    )
    return record

  def _metadata(self, i: int, key: str) -> Mapping[str, Any]:
    """The record's line in NAME_meta.jsonl next to its shard."""
    shard, _ = self._locate(i)
    return self._sidecars.get(shard).get(key, {"key": key})


def _read_sidecar(
  files: Sequence[PurePath], shard: int
) -> dict[str, Mapping[str, Any]]:
  """Parses NAME_meta.jsonl next to a shard; returns its lines by key."""
  name = files[shard].name.removesuffix(ArrayRecordSource.suffix)
  file = files[shard].with_name(name + "_meta.jsonl")
  # Not splitlines, which also splits at U+2028 in captions.
  try:
    text = path_lib.read_bytes(file).decode() if path_lib.is_file(file) else ""
  except UnicodeDecodeError as error:
    fix = "Copy the file again, or remove it."
    raise InputError(f"{file} is not UTF-8 ({error}). {fix}") from error
  metadata_by_key = {}
  for number, line in enumerate(text.split("\n"), 1):
    if not line:
      continue
    try:
      metadata = json.loads(line)
      metadata_by_key[metadata["key"]] = metadata
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      raise InputError(
        f"{file}: line {number} is not a JSON object with a 'key' ({error!r})."
        " Copy the file again, or remove it."
      ) from error
  return metadata_by_key


def open_readers(files: Sequence[Path], **options: Any) -> ProcessCache:
  """Returns a cache of readers, for random reads by several threads."""
  return ProcessCache(functools.partial(_open_reader, files), **options)


def open_shard(
  files: Sequence[PurePath],
  counts: Int64[np.ndarray, " shards"],
  shard: int,
  path: Path,
  *,
  fix: str = "Run `mtv-jax index` again.",
) -> Any:
  """Opens the local file of a shard; InputError if its count differs."""
  if (count := count_records(path)) != counts[shard]:
    raise InputError(
      f"{files[shard]} has {count:,} records, expected {counts[shard]:,}. {fix}"
    )
  return _open_reader([path], 0)


def scan(path: PurePath) -> block_table.Columns:
  """Returns the columns of a file's only block, without `shard`.

  Copies a bucket file whole, and removes the copy.
  """
  size = path_lib.stat(path).st_size
  with tempfile.TemporaryDirectory() as folder:
    count = count_records(path_lib.local_copy(path, cache=folder))
  return block_table.as_columns([(0, size, count, count)])


def _open_reader(files: Sequence[Path], shard: int) -> Any:
  return _module().ArrayRecordReader(
    str(files[shard]),
    # Readahead is wasted on random reads.
    options="readahead_buffer_size:0",
    file_reader_buffer_size=32768,
  )


def read_bytes(reader: Any, at: int, *, where: str) -> bytes:
  """Returns a record's bytes; BadRecord at `where` if they are corrupt."""
  try:
    return reader.read([at])[0]
  except (RuntimeError, IndexError, ValueError) as error:
    raise BadRecord(where, f"can't be read ({error})") from error


def write(
  path: str | os.PathLike, examples: Iterable[Mapping[str, Any]]
) -> None:
  """Writes records to one file, which appears once it is complete."""
  write_bytes(path, map(records.encode, examples))


def write_bytes(path: str | os.PathLike, items: Iterable[bytes]) -> None:
  """Writes encoded records; see `write`."""
  path = Path(path)
  with atomic.replace_file(path) as temporary:
    writer = _module().ArrayRecordWriter(str(temporary), _OPTIONS)
    try:
      for item in items:
        _call_writer(path, writer.write, item)
    finally:
      _call_writer(path, writer.close)


def _call_writer(path: Path, method: Callable[..., Any], *args: Any) -> None:
  """Turns the writer's RuntimeErrors, such as a full disk, into OSErrors."""
  try:
    method(*args)
  except RuntimeError as error:
    raise OSError(f"{path} can't be written: {error}") from error


def count_records(file: Path) -> int:
  """Counts records; InputError if the file is corrupt or in larger groups."""
  reader = _module().ArrayRecordReader(str(file))
  try:
    options = reader.writer_options_string()
    count = reader.num_records()
    if not reader.ok():
      raise RuntimeError("its index of records can't be read")
    reader.close()
  except RuntimeError as error:
    raise InputError(
      f"{file} is not an ArrayRecord file, or is truncated ({error}). Fetch it"
      " again."
    ) from error
  group = re.search(r"group_size:(\d+)", options)
  if group and group[1] != "1":
    raise InputError(
      f"{file} was written in groups of {group[1]} records, which makes random"
      f" reads slow: write it again with {_OPTIONS!r}."
    )
  return count


def _module() -> Any:
  # Imported lazily: its C++ runtime loads slowly, and most runs read tars.
  from array_record.python import array_record_module

  return array_record_module
