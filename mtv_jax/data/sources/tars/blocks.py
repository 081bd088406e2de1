"""Blocks of tars: runs of records that one request reads."""

import io
from pathlib import PurePath

import numpy as np

from mtv_jax.data.sources import block_table
from mtv_jax.data.sources.base import Blocks
from mtv_jax.data.sources.block_table import BlockTable, Columns
from mtv_jax.data.sources.tars import scan as tar_scan
from mtv_jax.data.sources.tars.scan import Group, TarError
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import RangeReader

# Larger blocks don't fit in memory next to other blocks. A block grows beyond
# its number of records if members of a record are far apart.
_MAX_SIZE = 1 << 30
# Parsed blocks; their bytes are in the `RangeReader`.
_MAX_PARSED = 4096


def scan(path: PurePath, *, records: int) -> Columns:
  """Returns the columns of a tar's blocks, without `shard`.

  Reads the tar once. A block has `records` records with an image, in the order
  of their first members, and more if members of several records alternate.
  Raises TarError like `tar_scan.scan`.
  """
  rows, count, captioned, max_end = [], 0, 0, 0
  begin = 0
  for group in tar_scan.scan(path).groups:
    if count >= records and group.start >= max_end:
      rows.append((begin, group.start - begin, count, captioned))
      begin, count, captioned = group.start, 0, 0
    if group.has_image:
      count += 1
      captioned += group.is_captioned
    max_end = max(max_end, group.end)
  rows += [(begin, max_end - begin, count, captioned)] * (count > 0)
  columns = block_table.as_columns(rows)
  if (columns["size"] > _MAX_SIZE).any():
    raise TarError(
      f"{path}: members of one record are more than {_MAX_SIZE:,} bytes apart."
      " Write images and captions next to each other, as `mtv-jax make_shards`"
      " does."
    )
  return columns


class TarBlocks:
  """Records of tars in blocks, by position.

  `captioned` leaves out records without captions.
  """

  def __init__(
    self, table: BlockTable, reader: RangeReader, *, captioned: bool
  ):
    self.table, self._captioned = table, captioned
    self.use(reader)
    counts = table.captioned if captioned else table.records
    all_ends = np.cumsum(table.records)
    self.blocks = Blocks(np.cumsum(counts), table.shard, all_ends)

  def use(self, reader: RangeReader) -> None:
    """Reads through another reader from now on."""
    self._reader = reader
    self._parsed_blocks = ProcessCache(self._parse_block, limit=_MAX_PARSED)

  def prefetch(self, first: int, count: int) -> None:
    """Starts to read the blocks of some records."""
    begin, end = (self.blocks.find(i) for i in (first, first + count - 1))
    self._reader.prefetch(map(self.table.range, range(begin, end + 1)))

  def _parse_block(self, block: int) -> list[Group]:
    span = self.table.range(block)
    data = self._reader.get(span)
    members = tar_scan.walk(io.BytesIO(data), len(data), span.path)
    try:
      records = tar_scan.group_members(members, span.path).records
    except TarError as error:
      raise self._changed_error(block) from error
    captioned = [record for record in records if record.is_captioned]
    expected = self.table.records[block], self.table.captioned[block]
    if (len(records), len(captioned)) != expected:
      raise self._changed_error(block)
    return captioned if self._captioned else records

  def _changed_error(self, block: int) -> TarError:
    span = self.table.range(block)
    return TarError(
      f"{span.path} has changed at offset {span.offset} since its table of"
      " blocks was written. Run `mtv-jax index` again."
    )

  def read(self, i: int) -> tuple[str, list[bytes | None]]:
    """Returns the key of record `i`, and its image, text and JSON."""
    block = self.blocks.find(i)
    at = i - (int(self.blocks.ends[block - 1]) if block else 0)
    record = self._parsed_blocks.get(block)[at]
    data = memoryview(self._reader.get(self.table.range(block)))
    return record.key, [
      bytes(data[at : at + size]) if at else None for at, size in record.spans
    ]
