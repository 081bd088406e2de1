"""WebDataset tars in img2dataset's layout, with random access."""

import functools
import io
import itertools
import json
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, SupportsIndex

import numpy as np

from mtv_jax.data.image_limits import MAX_BYTES
from mtv_jax.data.records import (
  NO_CAPTIONS_HINT,
  BadRecord,
  NoRecordsError,
  Record,
)
from mtv_jax.data.sources import block_table, tar_index, tar_scan
from mtv_jax.data.sources.base import Blocks, CaptionMode, FileSource, Paths
from mtv_jax.data.sources.block_table import BlockTable, Columns
from mtv_jax.data.sources.tar_index import TarIndex
from mtv_jax.data.sources.tar_scan import Group, TarError
from mtv_jax.utils import buckets
from mtv_jax.utils.errors import InputError, printable
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import RangeReader

log = logging.getLogger(__name__)

# Members of a record are read in one request if at most this many unrelated
# bytes lie between them.
_MAX_GAP = 1 << 16
# Maximum bytes of a .txt or .json; parsed JSON takes up to 20 times as many.
MAX_TEXT = 1 << 24
_MEMORY = 1 << 30  # Bytes for a bucket's blocks, outside of lanes.
# Maximum number of records whose keys are compared for duplicates.
_MAX_COMPARED = 2_000_000


class WebDatasetSource(FileSource):
  """Records of tars, read by offset from a memory-mapped index.

  Tars in a bucket need a table of blocks; a block is one request.

  A record has the members that share a key: an image (.jpg, .jpeg, .png or
  .webp) and its captions. Captions come from the list `captions` in KEY.json,
  else from KEY.txt, else from `caption` in KEY.json. Blank captions are
  dropped; a record with only blank ones is a `BadRecord`.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
    index_dir: folder of the indices; default: next to the tars.
    blocks: table of blocks, written by `mtv-jax index`; default: blocks.npz
      next to the tars, if they are in a bucket and it exists. With it, a record
      is read with its whole block, and no index is needed.
    captions: "required" skips records with neither .txt nor .json; "ignored"
      reads all images and no captions; "optional" reads all images, and
      captions that are present, not blank and readable.

  Raises:
    TarError: a tar is truncated, corrupt, compressed or repeats a key.
    OSError: an index is missing or stale and can't be written, or a bucket
      can't be read.
    InputError: the tars contain no records, or lack a table in a bucket.
  """

  suffix = ".tar"

  def __init__(
    self,
    path: Paths,
    *,
    index_dir: str | os.PathLike | None = None,
    captions: CaptionMode = "required",
    blocks: str | os.PathLike | None = None,
  ):
    listing = buckets.cached_listing()
    files = expand_path(path, suffix=self.suffix, listing=listing)
    self._captions = captions
    self._blocks = None
    if table := block_table.find(files, blocks, listing, required=True):
      self._open_blocks(table)
      return
    if index_dir is not None:
      refuse_remote(index_dir, "index_dir", "Pass a folder of this machine.")
      index_dir = Path(index_dir).expanduser()
    tars = tar_index.build_indices(files, index_dir=index_dir)
    count_field = "captioned" if captions == "required" else "count"
    counts = [getattr(t.header, count_field) for t in tars]
    super().__init__([t.tar for t in tars], counts, captions=captions)
    self._report_skipped(tars)
    _check_duplicates(tars)
    # Two descriptors: the tar, and the memory map of its index.
    load = functools.partial(_OpenTar, tars)
    self._open_tars = ProcessCache(load, descriptors=2)

  def _open_blocks(self, table: BlockTable) -> None:
    captioned = self._captions == "required"
    reader = RangeReader(_MEMORY)
    self._blocks = TarBlocks(table, reader, captioned=captioned)
    counts = table.count_records(captioned=captioned)
    super().__init__(table.files, counts, captions=self._captions)
    if not len(self):
      raise InputError(f"{self.name} has no records in its table of blocks.")

  @property
  def lane_blocks(self) -> Blocks:
    return self._blocks.blocks if self._blocks else super().lane_blocks

  def describe(self) -> dict[str, Any]:
    """As in the base class; depends on the table of blocks, if there is one."""
    digest = {"digest": self._blocks.table.digest} if self._blocks else {}
    return super().describe() | digest

  def use_reader(self, reader: RangeReader) -> None:
    if self._blocks:
      self._blocks.use(reader)

  def prefetch(self, first: int, count: int) -> None:
    if self._blocks:
      self._blocks.prefetch(first, count)

  def _report_skipped(self, tars: Sequence[TarIndex]) -> None:
    no_image = sum(t.header.no_image for t in tars)
    no_caption = sum(t.header.count for t in tars) - len(self)
    if not len(self):
      others = sum(t.header.others for t in tars)
      raise (NoRecordsError if no_caption else InputError)(
        f"{self.name} has no records: {no_image} groups of members without an"
        f" image, {no_caption} without a caption, {others} other members."
        " Expected KEY.jpg (.jpeg, .png, .webp) with KEY.txt or KEY.json; KEY"
        f" ends at the first dot. {NO_CAPTIONS_HINT}"
      )
    if no_caption or no_image:
      log.warning(
        f"{self.name}: left out {no_image} records without an image and"
        f" {no_caption} without a caption; {len(self)} remain."
      )

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; TarError if the tar changed after indexing."""
    return self._read_record(i)[0]

  def _read_record(self, i: SupportsIndex) -> tuple[Record, bytes | None]:
    """Returns record `i`, and the bytes of its .json."""
    shard, index = self._locate(i)
    key, image, text, sidecar = self._read_members(shard, index, i)
    if not image:
      raise BadRecord(
        key, f"its image in {self.files[shard].name} has no bytes"
      )
    record: Record = {"key": key, "image": image}
    if self._captions != "ignored":
      try:
        record["captions"] = parse_captions(key, text, sidecar)
      except BadRecord:
        if self._captions == "required":
          raise
        record["captions"] = []
    return record, sidecar

  def _read_members(
    self, shard: int, index: int, i: SupportsIndex
  ) -> tuple[str, bytes, bytes | None, bytes | None]:
    if not self._blocks:
      return self._open_tars.get(shard).read(index)
    key, (image, text, sidecar) = self._blocks.read(i.__index__())
    sizes = (len(part or b"") for part in (image, text, sidecar))
    check_sizes(key, self.files[shard].name, *sizes)
    return key, image or b"", text, sidecar

  def read_metadata(self, i: SupportsIndex) -> dict[str, Any]:
    """Returns the object in KEY.json of record `i` (or {}), with its `key`."""
    shard, index = self._locate(i)
    try:
      key, _, _, sidecar = self._read_members(shard, index, i)
    except BadRecord as error:
      return {"key": error.key}
    return _parse_metadata(key, sidecar)

  def read_with_metadata(self, i: SupportsIndex) -> Record:
    record, sidecar = self._read_record(i)
    return record | {"meta": _parse_metadata(record["key"], sidecar)}


def _parse_metadata(key: str, sidecar: bytes | None) -> dict[str, Any]:
  try:
    fields = json.loads(sidecar or b"{}")
  except (ValueError, RecursionError):
    fields = {}
  return (fields if isinstance(fields, dict) else {}) | {"key": key}


def parse_captions(
  key: str, text: bytes | None, sidecar: bytes | None
) -> list[str]:
  """Returns the non-blank captions; BadRecord if there are none."""
  captions: list[Any] = []
  # Parsing a .json costs more than reading it, and is rarely needed.
  if sidecar is not None and (text is None or b'"captions"' in sidecar):
    try:
      fields = json.loads(sidecar)
    except (ValueError, RecursionError) as error:
      raise BadRecord(key, f"its .json can't be parsed ({error})") from error
    if not isinstance(fields, dict):
      raise BadRecord(key, "its .json is not an object")
    values, single = fields.get("captions"), fields.get("caption")
    if values is not None:
      captions = values if isinstance(values, list) else [values]
    elif text is None and single is not None:
      captions = [single]
    elif text is None:
      names = printable(", ".join(sorted(fields))) or "nothing"
      raise BadRecord(key, f"it has no .txt, and its .json has only {names}")
  if not captions and text is not None:
    try:
      captions = [text.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
      raise BadRecord(key, f"its .txt is not UTF-8 ({error})") from error
  if non_strings := [c for c in captions if not isinstance(c, str)]:
    value = printable(repr(non_strings[0]), 80)
    raise BadRecord(key, f"a caption of its .json is {value}, not a string")
  captions = [stripped for c in captions if (stripped := c.strip())]
  if not captions:
    raise BadRecord(key, "its caption is empty")
  return captions


def check_sizes(key: str, file: str, *sizes: int) -> None:
  """BadRecord if a record's image, text or JSON has too many bytes."""
  for role, size in zip(("image", ".txt", ".json"), sizes, strict=True):
    limit = MAX_BYTES if role == "image" else MAX_TEXT
    if size > limit:
      where = f"its {role} in {file} has {size:,} bytes"
      raise BadRecord(key, f"{where}; at most {limit:,} are read")


class _OpenTar:
  def __init__(self, tars: Sequence[TarIndex], shard: int):
    index = tars[shard]
    self.path, self._index = index.tar, index.file
    self._size = index.header.tar_size
    self._entries, self._keys = index.open()
    self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
    # Not __del__, which may run too late during interpreter shutdown.
    weakref.finalize(self, os.close, self._fd)
    stat, header = os.fstat(self._fd), index.header
    state = header.tar_size, header.tar_time
    if (stat.st_size, stat.st_mtime_ns) != state:
      raise TarError(
        f"{index.tar} has changed since this run started (from"
        f" {header.tar_size} to {stat.st_size} bytes): start again."
      )

  def read(self, i: int) -> tuple[str, bytes, bytes | None, bytes | None]:
    """Returns key, image bytes, text and JSON of record `i`."""
    *spans, key_end = self._entries[i].item()
    key_start = int(self._entries["key_end"][i - 1]) if i else 0
    spans = list(zip(spans[:3], spans[3:], strict=True))
    present = [(at, size) for at, size in spans if at]
    ends = [at + size for at, size in present]
    if (
      not key_start < key_end <= len(self._keys)
      or max(ends, default=self._size + 1) > self._size
    ):
      raise TarError(
        f"The index {self._index} is damaged at record {i}: remove it to"
        " rebuild it."
      )
    key = self._keys[key_start:key_end].tobytes().decode(errors="replace")
    check_sizes(key, self.path.name, *(size for _, size in spans))
    start = min(at for at, _ in present)
    end = max(ends)
    if end - start <= sum(size for _, size in present) + _MAX_GAP:
      data = self._pread(start, end - start)
      parts = [data[a - start : a - start + n] if a else None for a, n in spans]
    else:
      parts = [self._pread(at, size) if at else None for at, size in spans]
    image, text, sidecar = parts
    return key, image or b"", text, sidecar

  def _pread(self, offset: int, size: int) -> bytes:
    try:
      data = os.pread(self._fd, size, offset)
      while len(data) < size:
        # A read may stop short of 2 GiB or at a signal; empty means the end.
        chunk = os.pread(self._fd, size - len(data), offset + len(data))
        if not chunk:
          end = os.fstat(self._fd).st_size
          raise TarError(
            f"{self.path} ends at offset {end}, but a record ends at"
            f" {offset + size}: it was truncated during this run. Restore it."
          )
        data += chunk
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self.path)) from error
    return data


def _check_duplicates(tars: Sequence[TarIndex]) -> None:
  """Raises TarError if tars with overlapping key ranges share a key."""
  ranges = sorted(
    (t for t in tars if t.header.count), key=lambda t: (t.smallest, t.largest)
  )
  # img2dataset's keys start with the shard number, so ranges rarely overlap.
  maxima = list(itertools.accumulate((t.largest for t in ranges), max))
  suspects = [
    tar
    for i, tar in enumerate(ranges)
    if (i and tar.smallest <= maxima[i - 1])
    or any(other.smallest <= tar.largest for other in ranges[i + 1 : i + 2])
  ]
  total = sum(t.header.count for t in suspects)
  if total > _MAX_COMPARED:
    log.warning(
      f"The keys of {len(suspects)} tars overlap ({suspects[0].tar}, ...) and"
      f" are not compared, as there are {total}."
    )
    return
  tar_by_key: dict[str, Path] = {}
  for tar in suspects:
    for key in tar.read_keys():
      if (other := tar_by_key.setdefault(key, tar.tar)) is not tar.tar:
        raise TarError(
          f"Key {key!r} is in {other} and in {tar.tar}. Give each data set its"
          " own entry in data.train, or leave a duplicate tar out of the path."
        )


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
