"""Files of labels in the blocks of their base shard.

One request reads a block's labels, as for the base's records. A block is,
little-endian: the number of labels and the CRC-32 of the following entries
(u32), for each label the hash of its record's key (u64), the end and the CRC-32
of its bytes (u32), then these bytes.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.block_table import BlockTable
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import RangeReader

SUFFIX = ".blocks"
_HEADER = np.dtype([("count", "<u4"), ("crc", "<u4")])
_ENTRY = np.dtype([("key", "<u8"), ("end", "<u4"), ("crc", "<u4")])


def pack(pairs: Sequence[tuple[int, bytes]]) -> bytes:
  """Returns a block of (key hash, label) pairs."""
  entries = np.zeros(len(pairs), _ENTRY)
  entries["key"] = [key for key, _ in pairs]
  labels = [label for _, label in pairs]
  entries["end"] = np.cumsum([len(label) for label in labels], dtype=np.int64)
  entries["crc"] = [zlib.crc32(label) for label in labels]
  directory = entries.tobytes()
  header = np.array((len(pairs), zlib.crc32(directory)), _HEADER)
  return b"".join([header.tobytes(), directory, *labels])


class LabelBlocks:
  """A set's labels by block; bucket files are read by ranges."""

  def __init__(self, table: BlockTable, reader: RangeReader):
    self.table = table
    self._reader = reader
    self._ends = np.cumsum(table.records)
    # First label of each shard.
    self._starts = np.cumsum([0, *table.count_records()])
    self._maps = ProcessCache(self._map_file)

  def use(self, reader: RangeReader) -> None:
    """Reads through another reader from now on."""
    self._reader = reader

  def _map_file(self, shard: int) -> np.ndarray:
    return np.memmap(self.table.files[shard], np.uint8, "r")

  def prefetch(self, shard: int, positions: range) -> None:
    """Starts to read the blocks at these positions of a shard."""
    self._reader.prefetch(map(self.table.range, self._find(shard, positions)))

  def _find(self, shard: int, positions: range) -> range:
    start, end = self._starts[shard : shard + 2]
    bounds = np.add(start, [positions.start, positions.stop - 1])
    first_block, last_block = np.searchsorted(
      self._ends, np.minimum(bounds, end - 1), side="right"
    )
    return range(int(first_block), int(last_block) + 1)

  def _open_block(self, block: int) -> tuple[np.ndarray, memoryview]:
    """Returns the entries of a block, and the labels' bytes."""
    span = self.table.range(block)
    if path_lib.is_remote(span.path):
      data = memoryview(self._reader.get(span))
    else:
      # Reading one label from a map reads only a few pages.
      data = self._maps.get(int(self.table.shard[block])).data
      data = data[span.offset : span.offset + span.size]
    count = int(self.table.records[block])
    start = _HEADER.itemsize + count * _ENTRY.itemsize
    header = np.frombuffer(bytes(data[: _HEADER.itemsize]).ljust(8), _HEADER)[0]
    directory = data[_HEADER.itemsize : start]
    if header["count"] != count or header["crc"] != zlib.crc32(directory):
      raise BadRecord(
        f"{span.path.name}:{span.offset}", f"is not a block of {count} labels"
      )
    return np.frombuffer(directory, _ENTRY), data[start:]

  def read(self, shard: int, index: int) -> bytes:
    """Returns a shard's label by index."""
    (block,) = self._find(shard, range(index, index + 1))
    before = self._ends[block] - self.table.records[block]
    entries, data = self._open_block(block)
    return _cut_label(entries, data, int(self._starts[shard] + index - before))

  def find(self, shard: int, positions: range, key: int) -> Iterator[bytes]:
    """Yields the labels with a key's hash in the blocks at these positions."""
    for block in self._find(shard, positions):
      entries, data = self._open_block(block)
      for i in np.flatnonzero(entries["key"] == np.uint64(key)):
        yield _cut_label(entries, data, int(i))


def _cut_label(entries: np.ndarray, data: memoryview, i: int) -> bytes:
  start, end = int(entries["end"][i - 1]) if i else 0, int(entries["end"][i])
  label = bytes(data[start:end])
  if zlib.crc32(label) != entries["crc"][i]:
    raise BadRecord(f"label {i} of a block", "has a wrong checksum")
  return label
