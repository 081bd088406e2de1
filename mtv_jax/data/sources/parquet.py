"""Parquet files with image bytes and captions, as in Hugging Face data sets."""

import functools
import io
import itertools
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.records import (
  BadRecord,
  Record,
  content_errors,
  read_captions,
)
from mtv_jax.data.sources import base, block_table
from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  StorageError,
  did_you_mean,
  import_extra,
)
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import Range, RangeReader
from mtv_jax.utils.threads import map_threads

# Default columns, used if exactly one of them exists.
_IMAGE_COLUMNS = ("image", "img", "jpg")
_CAPTION_COLUMNS = ("caption", "text", "captions")
# Block shuffling mixes 16 groups (`data.order.WINDOW`); the extra ones hold
# prefetched rows of the next window.
_MAX_CACHED_GROUPS = 24
FOOTER = 1 << 16  # Bytes that pyarrow reads at the end of a file.
# Row group limits: a group is decoded whole, by several threads at once.
_MEMORY = 1 << 30  # Bytes of row groups of a bucket, outside of training.
_MAX_ROWS, _MAX_BYTES = 1 << 22, 1 << 31


class ParquetSource(base.FileSource):
  """Records of Parquet files, one per row.

  Reading a record decodes its whole row group; each process caches the 24 most
  recent groups. `data.shuffle="block"` reads each group about once per epoch;
  "global" decodes a whole group for nearly every record.

  A record's key is FILE/ROW, FILE without its suffix.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
    blocks: table of blocks, written by `mtv-jax index`; default: blocks.npz
      next to the files, if they are in a bucket and it exists. With it, a row
      group is one request, and the other files' footers are read on first use.
    image: column of encoded images, struct {bytes, path} or binary. None: the
      column "image" if it is of this type, else the only such struct or binary
      column named img or jpg.
    caption: column of strings or lists of strings. None: the only column named
      caption, text or captions.
    captions: "required": a record without captions is a `BadRecord`; "ignored":
      captions are not read; "optional": the list of captions may be empty and
      the column may be missing.

  Raises:
    InputError: a file is corrupt, lacks a column or has the wrong type; two
      files share a name; all files are empty.
  """

  suffix = ".parquet"

  def __init__(
    self,
    path: base.Paths,
    *,
    image: str | None = None,
    caption: str | None = None,
    captions: base.CaptionMode = "required",
    blocks: str | os.PathLike | None = None,
  ):
    _pyarrow()  # Fail first if it isn't installed.
    listing = buckets.cached_listing()
    files = expand_path(path, suffix=self.suffix, listing=listing)
    self._stems = [file.name.removesuffix(self.suffix) for file in files]
    by_stem: dict[str, PurePath] = {}
    for stem, file in zip(self._stems, files, strict=True):
      if (other := by_stem.setdefault(stem, file)) is not file:
        raise InputError(
          f"{other} and {file} have the same name, so records would share keys."
          " Give each folder an entry of data.train."
        )
    self._table = block_table.find(files, blocks, listing)
    self._reader = RangeReader(_MEMORY)
    if self._table is None:
      schemas, rows = zip(*map_threads(_read_footer, files), strict=True)
    else:
      files = list(self._table.files)
      self._stems = [file.name.removesuffix(self.suffix) for file in files]
      schemas = [open_parquet(files[0]).schema_arrow]
      of_shard = np.searchsorted(self._table.shard, np.arange(1, len(files)))
      rows = np.split(self._table.records, of_shard)
    counts = [int(np.sum(groups)) for groups in rows]
    super().__init__(files, counts, captions=captions)
    if not len(self):
      raise InputError(f"{self.name} has no row.")
    self._captions = captions
    first = files[0], schemas[0]
    self._image = image or _default_column(*first, "image")
    self._caption = caption if captions != "ignored" else None
    if captions == "required" or (
      captions == "optional" and {*_CAPTION_COLUMNS} & {*schemas[0].names}
    ):
      self._caption = caption or _default_column(*first, "caption")
    for file, schema in zip(files, schemas, strict=not self._table):
      _check_column(file, schema, "image", self._image)
      if self._caption is not None:
        _check_column(file, schema, "caption", self._caption)
    # First record of each row group, and first group of each file.
    self._starts = np.cumsum([0, *itertools.chain(*rows)], dtype=np.int64)
    self._first = np.cumsum([0, *map(len, rows)])
    self._groups = ProcessCache(self._read_group, limit=_MAX_CACHED_GROUPS)

  @property
  def blocks(self) -> Int64[np.ndarray, " groups"]:
    """Cumulative row counts of the row groups of all files."""
    return self._starts[1:]

  @functools.cached_property
  def lane_blocks(self) -> base.Blocks:
    """As in the base class: the row groups."""
    groups = np.arange(len(self._starts) - 1)
    shard = np.searchsorted(self._first, groups, side="right") - 1
    return base.Blocks(self._starts[1:], shard, self._starts[1:])

  def describe(self) -> dict[str, Any]:
    """As in the base class; depends on the table of blocks, if there is one."""
    digest = {"digest": self._table.digest} if self._table else {}
    return super().describe() | digest

  def use_reader(self, reader: RangeReader) -> None:
    """As in the base class."""
    self._reader = reader

  def prefetch(self, first: int, count: int) -> None:
    """As in the base class."""
    if self._table is not None:
      ends = np.searchsorted(self._starts, [first, first + count - 1], "right")
      self._reader.prefetch(map(self._table.range, range(ends[0] - 1, ends[1])))

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; InputError if the file changed after opening."""
    key, row = self._read_row(i)
    image, path = _split_image(row[self._image])
    if not image:
      hint = f", only the path {path!r}" if path else ""
      raise BadRecord(key, f"its {self._image!r} has no image bytes{hint}")
    record: Record = {"key": key, "image": image}
    if self._captions == "ignored":
      return record
    captions = row[self._caption] if self._caption is not None else []
    if not isinstance(captions, list):
      captions = [captions]
    record["captions"] = read_captions(
      key,
      [caption for caption in captions if caption is not None],
      required=self._captions == "required",
      where=f" in column {self._caption!r}",
    )
    return record

  def _metadata(self, i: int, key: str) -> Mapping[str, Any]:
    """The key, and the image column's `path` as `file_name`."""
    try:
      _, path = _split_image(self._read_row(i)[1][self._image])
    except BadRecord:
      path = None
    return {"key": key} | ({"file_name": path} if path else {})

  def _read_row(self, i: SupportsIndex) -> tuple[str, dict[str, Any]]:
    """Returns key and column values of record `i`."""
    shard, row = self._locate(i)
    key = f"{self._stems[shard]}/{row:09d}"
    group = int(np.searchsorted(self._starts, i, side="right")) - 1
    try:
      table = self._groups.get(group)
    except (_pyarrow().ArrowException, OSError) as error:
      # Arrow's decoders also raise OSError, but only disk errors have an errno.
      if getattr(error, "errno", None) or isinstance(error, StorageError):
        raise
      reason = f"its row group can't be decoded ({error})"
      raise BadRecord(key, reason) from error
    row = i.__index__() - int(self._starts[group])
    with content_errors(key, "its row can't be decoded"):
      names = table.column_names
      return key, {name: table[name][row].as_py() for name in names}

  def _read_group(self, group: int) -> Any:
    """Reads image and caption columns of a row group as a `pyarrow.Table`."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    shard = int(np.searchsorted(self._first, group, side="right")) - 1
    number = group - int(self._first[shard])
    columns = [self._image] + [self._caption] * (self._caption is not None)
    rows = self._starts[group + 1] - self._starts[group]
    # A ParquetFile is not thread-safe, so open a new one.
    with parquet.ParquetFile(self._open(shard, group)) as file:
      groups, row_group = file.metadata.num_row_groups, file.metadata.row_group
      if number >= groups or row_group(number).num_rows != rows:
        name = self.files[shard]
        raise InputError(f"{name} has changed since it was opened.")
      return file.read_row_group(number, columns=columns, use_threads=False)

  def _open(self, shard: int, group: int) -> Any:
    """Argument for `ParquetFile`, from which a row group is read."""
    if self._table is None:
      return _open(self.files[shard])
    last = self._table.range(int(self._first[shard + 1]) - 1)
    size = self._table.sizes[shard]
    start = min(last.offset + last.size, max(size - FOOTER, 0))
    footer = Range(self.files[shard], start, size - start)
    pieces = [self._table.range(group), footer]
    return _Pieces(size, {r.offset: self._reader.get(r) for r in pieces})


class _Pieces(io.RawIOBase):
  """A file of which only some parts are in memory."""

  def __init__(self, size: int, pieces: Mapping[int, bytes]):
    super().__init__()
    self._size, self._pieces, self._at = size, pieces, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
    self._at = base[whence] + offset
    return self._at

  def read(self, size: int = -1) -> bytes:
    end = self._size if size < 0 else min(self._at + size, self._size)
    for start, data in self._pieces.items():
      if start <= self._at and end <= start + len(data):
        part = bytes(memoryview(data)[self._at - start : end - start])
        self._at = end
        return part
    raise InputError(
      f"The bytes {self._at} to {end} are outside of a row group of the table"
      " of blocks. Run `mtv-jax index` again."
    )


def scan(path: PurePath) -> block_table.Columns:
  """Returns the columns of a file's blocks, its row groups, without `shard`.

  Reads the footer. A group's range contains all of its columns.
  """
  rows = []
  with open_parquet(path) as opened:
    for group in map(
      opened.metadata.row_group, range(opened.metadata.num_row_groups)
    ):
      columns = [group.column(i) for i in range(group.num_columns)]
      starts = [
        min(filter(None, (c.dictionary_page_offset, c.data_page_offset)))
        for c in columns
      ]
      ends = [
        start + column.total_compressed_size
        for start, column in zip(starts, columns, strict=True)
      ]
      begin = min(starts)
      rows.append((begin, max(ends) - begin, group.num_rows, group.num_rows))
  return block_table.as_columns(rows)


def _split_image(image: Any) -> tuple[bytes | None, str | None]:
  """Splits a value of the image column into bytes and path."""
  if isinstance(image, Mapping):
    return image["bytes"], image.get("path")
  return image, None


def open_parquet(file: PurePath) -> Any:
  """Opens a `pyarrow.parquet.ParquetFile`; InputError if it is corrupt."""
  arrow = _pyarrow()
  try:
    return import_extra("pyarrow.parquet", "parquet").ParquetFile(_open(file))
  except (arrow.ArrowException, OSError) as error:
    if getattr(error, "errno", None) or isinstance(error, StorageError):
      raise
    raise InputError(
      f"{file} is not a Parquet file, or truncated ({error}). Fetch it again."
    ) from error


def _open(file: PurePath) -> Any:
  """Argument for `ParquetFile`: a local path, or an opened bucket file."""
  return path_lib.open_file(file) if path_lib.is_remote(file) else file


def _read_footer(file: PurePath) -> tuple[Any, list[int]]:
  """Returns the Arrow schema and the row count of each row group."""
  with open_parquet(file) as opened:
    metadata = opened.metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    if not all(
      0 <= rows <= _MAX_ROWS and 0 <= size <= _MAX_BYTES for rows, size in sizes
    ):
      rows, size = max(sizes)
      raise InputError(
        f"{file} has a row group of {rows:,} rows and {size:,} bytes; at most"
        f" {_MAX_ROWS:,} and {_MAX_BYTES:,}. Write it with smaller row groups."
      )
    return opened.schema_arrow, [rows for rows, _ in sizes]


def _default_column(file: PurePath, schema: Any, role: str) -> str:
  if role == "caption":
    columns = [name for name in _CAPTION_COLUMNS if name in schema.names]
  else:
    columns = [
      field.name
      for field in schema
      if _is_image(field.type)
      and (_is_struct(field.type) or field.name in _IMAGE_COLUMNS)
    ]
    columns = ["image"] if "image" in columns else columns
  if len(columns) != 1:
    names = (f"{field.name} ({field.type})" for field in schema)
    hint = " or captions='ignored'" if role == "caption" else ""
    raise InputError(
      f"{file} has {' and '.join(columns) or 'no column'} of {role}s by name"
      f" and type. Set {role}={hint}; the columns are {', '.join(names)}."
    )
  return columns[0]


def _check_column(file: PurePath, schema: Any, role: str, name: str) -> None:
  accepts = _is_image if role == "image" else _is_caption
  if schema.names.count(name) != 1:
    raise InputError(
      f"{file} has no column {name!r}, or several, for the {role}."
      f" {did_you_mean(name, schema.names)}"
    )
  if not accepts(kind := schema.field(name).type):
    expected = "a string or a list of strings"
    if role == "image":
      expected = "binary or struct<bytes: binary, path: string>"
      if _is_string(kind):
        expected += "; URLs and paths are not fetched: store the bytes"
    problem = f"{file}: column {name!r} is {kind}"
    raise InputError(f"{problem}; the {role} must be {expected}.")


def _is_struct(kind: Any) -> bool:
  return _pyarrow().types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_image(kind: Any) -> bool:
  kind = kind.field("bytes").type if _is_struct(kind) else kind
  return str(kind) in ("binary", "large_binary")


def _is_string(kind: Any) -> bool:
  return str(kind) in ("string", "large_string")


def _is_caption(kind: Any) -> bool:
  types = _pyarrow().types
  is_list = types.is_list(kind) or types.is_large_list(kind)
  return _is_string(kind.value_type if is_list else kind)


def _pyarrow() -> Any:
  return import_extra("pyarrow", "parquet")
