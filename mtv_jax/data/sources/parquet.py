"""Parquet files with image bytes and captions, as in Hugging Face data sets."""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.records import (
  NO_CAPTIONS_HINT,
  BadRecord,
  NoRecordsError,
  Record,
  content_errors,
  read_captions,
)
from mtv_jax.data.sources import base, block_table
from mtv_jax.data.sources.block_table import BlockTable
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
from mtv_jax.utils.ranges import ByteRange, RangeReader
from mtv_jax.utils.threads import map_threads

log = logging.getLogger(__name__)

_PATHS_HINT = (
  "`mtv-jax make_shards FILE.parquet` writes shards of images that a column"
  " names by their paths."
)
# Default columns, used if exactly one of them exists.
_IMAGE_COLUMNS = ("image", "img", "jpg")
_CAPTION_COLUMNS = ("caption", "text", "captions")
# Block shuffling mixes 16 groups (`data.order.WINDOW`); the extra ones hold
# prefetched rows of the next window.
_MAX_CACHED_GROUPS = 24
FOOTER = 1 << 16  # Bytes that pyarrow reads at the end of a file.
_MEMORY = 1 << 30  # Bytes for a bucket's row groups, outside of training.
# Limits of a row group, also while decoding: sizes in the file may be wrong.
_MAX_ROWS, _MAX_BYTES = 1 << 22, 1 << 31
_MAX_CACHED = 1 << 30  # Bytes of decoded row groups.
# Beyond these bytes, one thread at a time decodes a group.
_LARGE_GROUP = 1 << 26
_large_group = threading.Lock()
# Rows decoded at once, and minimum bytes of a joined chunk of rows.
_MAX_BATCH, _CHUNK_BYTES = 1024, 1 << 23


class ParquetSource(base.FileSource):
  """Records of Parquet files, one per row.

  Reading a record decodes its whole row group; each process caches the 24 most
  recent groups, of 1 GiB at most. `data.shuffle="block"` reads each group about
  once per epoch; "global" decodes a whole group for nearly every record.

  A record's key is FILE/ROW, FILE without its suffix.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
    blocks: table of blocks, written by `mtv-jax index`; default: blocks.npz
      next to the files, if they are in a bucket and it exists. With it, footers
      are read on first use; without it, at the start. A row group in a bucket
      is one request.
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
    self._remote = path_lib.is_remote(files[0])
    self._states = block_table.read_states(files, listing)
    self._reader = RangeReader(_MEMORY)
    if table := block_table.find(files, blocks, listing):
      schemas = [open_parquet(files[0]).schema_arrow]
    else:
      schemas, table = self._read_footers(files)
    # Hosts compare digests at the start, see `describe`.
    self._digest = table.digest if blocks or self._remote else None
    self._table = table
    super().__init__(files, table.count_records(), captions=captions)
    if self._remote and (table.size > _MAX_BYTES).any():
      raise _too_large_error(files[table.shard[table.size.argmax()]])
    if not len(self):
      raise InputError(f"{self.name} has no rows.")
    self._captions = captions
    first_file = files[0], schemas[0]
    self._image = image or _find_column(*first_file, "image")
    self._caption = caption if captions != "ignored" else None
    if captions == "required" or (
      captions == "optional" and {*_CAPTION_COLUMNS} & {*schemas[0].names}
    ):
      self._caption = caption or _find_column(*first_file, "caption")
    for file, schema in zip(files, schemas, strict=False):
      self._check_columns(file, schema)
    # First record of each row group, and first group of each file.
    self._starts = np.cumsum([0, *table.records], dtype=np.int64)
    self._first_groups = np.searchsorted(table.shard, np.arange(len(files) + 1))
    self._groups = ProcessCache(
      self._read_group, limit=_MAX_CACHED_GROUPS, max_bytes=_MAX_CACHED
    )

  def _read_footers(
    self, files: Sequence[PurePath]
  ) -> tuple[Sequence[Any], BlockTable]:
    if self._remote:
      log.info(
        f"Reading the footers of {len(files):,} files like {files[0]}, one"
        " request each, on every host. `mtv-jax index` joins them in a table."
      )
    schemas, columns = zip(*map_threads(_read_footer, files), strict=True)
    parts = zip(files, self._states, columns, strict=True)
    tables = [block_table.of_file(*part, per_block=0) for part in parts]
    return schemas, block_table.join(tables)

  def _check_columns(self, file: PurePath, schema: Any) -> None:
    _check_column(file, schema, "image", self._image)
    if self._caption is not None:
      _check_column(file, schema, "caption", self._caption)

  @property
  def blocks(self) -> Int64[np.ndarray, " groups"]:
    """Cumulative row counts of the row groups of all files."""
    return self._starts[1:]

  @functools.cached_property
  def lane_blocks(self) -> base.Blocks:
    """As in the base class: the row groups."""
    return base.Blocks(self._starts[1:], self._table.shard, self._starts[1:])

  def describe(self) -> dict[str, Any]:
    """As in the base class; digests the table, if stored or in a bucket."""
    digest = {"digest": self._digest} if self._digest else {}
    return super().describe() | digest

  def use_reader(self, reader: RangeReader) -> None:
    self._reader = reader

  def prefetch(self, first: int, count: int) -> None:
    if self._remote:
      begin, end = map(self.lane_blocks.find, (first, first + count - 1))
      self._reader.prefetch(map(self._table.range, range(begin, end + 1)))

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
    shard = int(self._table.shard[group])
    try:
      return self._decode_group(shard, group)
    finally:
      # The content, or an error, may come from a replaced file.
      path = self.files[shard]
      if not self._remote and self._states[shard] != _read_state(path):
        raise _changed_error(path)

  def _decode_group(self, shard: int, group: int) -> Any:
    parquet, path = (
      import_extra("pyarrow.parquet", "parquet"),
      self.files[shard],
    )
    number = group - int(self._first_groups[shard])
    columns = [self._image] + [self._caption] * (self._caption is not None)
    # A ParquetFile is not thread-safe, so open a new one.
    with (
      contextlib.ExitStack() as stack,
      parquet.ParquetFile(self._open_group(shard, group)) as file,
    ):
      groups, row_group = file.metadata.num_row_groups, file.metadata.row_group
      rows = self._table.records[group]
      if number >= groups or row_group(number).num_rows != rows:
        raise _changed_error(path)
      self._check_columns(path, file.schema_arrow)
      _check_group(path, row_group(number))
      # A value may be as large as its column's whole dictionary.
      size = row_group(number).total_byte_size
      batches = file.iter_batches(
        min(max(_LARGE_GROUP // max(size, 1), 1), _MAX_BATCH),
        row_groups=[number],
        columns=columns,
        use_threads=False,
      )
      parts, part, size, joined = [], [], 0, 0
      for batch in batches:
        before, size = size, size + batch.nbytes
        if size > _MAX_BYTES:
          raise _too_large_error(path)
        if before <= _LARGE_GROUP < size:
          stack.enter_context(_large_group)
        part.append(batch)
        if size - joined > _CHUNK_BYTES:
          parts, part, joined = [*parts, _join(part)], [], size
      return _pyarrow().concat_tables([*parts, _join(part)] if part else parts)

  def _open_group(self, shard: int, group: int) -> Any:
    if not self._remote:
      return self.files[shard]
    last = self._table.range(int(self._first_groups[shard + 1]) - 1)
    size = self._table.sizes[shard]
    start = min(last.offset + last.size, max(size - FOOTER, 0))
    footer = ByteRange(self.files[shard], start, size - start)
    pieces = [self._table.range(group), footer]
    data = {r.offset: self._reader.get(r) for r in pieces}
    return buckets.RangedFile(size, functools.partial(_cut_piece, data))


def _cut_piece(pieces: Mapping[int, bytes], offset: int, size: int) -> bytes:
  """Cuts a byte range from the pieces of a file, listed by offset."""
  end = offset + size
  for start, data in pieces.items():
    if start <= offset and end <= start + len(data):
      return bytes(memoryview(data)[offset - start : end - start])
  raise InputError(
    f"The bytes {offset} to {end} are outside the row group in the table of"
    " blocks. Run `mtv-jax index` again."
  )


def scan(path: PurePath) -> block_table.Columns:
  """Returns the columns of a file's blocks, its row groups, without `shard`.

  Reads the footer. A group's range contains all of its columns. Raises
  InputError if a group is too large.
  """
  return _read_footer(path)[1]


def _read_footer(path: PurePath) -> tuple[Any, block_table.Columns]:
  rows = []
  with open_parquet(path) as file:
    for group in map(
      file.metadata.row_group, range(file.metadata.num_row_groups)
    ):
      _check_group(path, group)
      columns = [group.column(i) for i in range(group.num_columns)]
      starts = [
        min(
          filter(None, (c.dictionary_page_offset, c.data_page_offset)),
          default=0,
        )
        for c in columns
      ]
      ends = [
        start + column.total_compressed_size
        for start, column in zip(starts, columns, strict=True)
      ]
      begin = min(starts, default=0)
      size = max(ends, default=0) - begin
      rows.append((begin, size, group.num_rows, group.num_rows))
    return file.schema_arrow, block_table.as_columns(rows)


def _join(batches: Sequence[Any]) -> Any:
  return _pyarrow().Table.from_batches(batches).combine_chunks()


def _check_group(path: PurePath, group: Any) -> None:
  """Raises InputError if the footer states too large a row group."""
  sizes = (group.num_rows, _MAX_ROWS), (group.total_byte_size, _MAX_BYTES)
  if not all(0 <= size <= limit for size, limit in sizes):
    raise _too_large_error(path)


def _too_large_error(path: PurePath) -> InputError:
  return InputError(
    f"{path} has a row group of more than {_MAX_ROWS:,} rows or {_MAX_BYTES:,}"
    " bytes. Write it with smaller row groups."
  )


def _changed_error(path: PurePath) -> InputError:
  return InputError(
    f"{path} has changed since it was opened. Start again, or restore it."
  )


def _read_state(path: PurePath) -> tuple[int, str] | None:
  """Size and version of a file; None if it is missing."""
  with contextlib.suppress(FileNotFoundError):
    return block_table.read_states([path])[0]
  return None


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


def has_images(path: str) -> bool:
  """Whether a local file has a column of images, not only of their paths."""
  with open_parquet(PurePath(path)) as file:
    return any(_is_image(field.type) for field in file.schema_arrow)


def _open(file: PurePath) -> Any:
  """Argument for `ParquetFile`: a local path, or an opened bucket file."""
  return path_lib.open_file(file) if path_lib.is_remote(file) else file


def _find_column(file: PurePath, schema: Any, role: str) -> str:
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
    lacks_captions = role == "caption" and not columns
    hint = NO_CAPTIONS_HINT if lacks_captions else ""
    if role == "image" and not any(_is_image(f.type) for f in schema):
      hint = _PATHS_HINT
    raise (NoRecordsError if lacks_captions else InputError)(
      f"{file} has {' and '.join(columns) or 'no column'} of {role}s by name"
      f" and type; the columns are {', '.join(names)}. Set {role}=COLUMN in"
      f" data.train. {hint}".rstrip()
    )
  return columns[0]


def _check_column(file: PurePath, schema: Any, role: str, name: str) -> None:
  is_valid = _is_image if role == "image" else _is_caption
  if schema.names.count(name) != 1:
    raise InputError(
      f"{file} has no column {name!r}, or several, for the {role}."
      f" {did_you_mean(name, schema.names)}"
    )
  if not is_valid(kind := schema.field(name).type):
    expected, hint = "a string or a list of strings", ""
    if role == "image":
      expected = "binary or struct<bytes: binary, path: string>"
      if _is_string(kind):
        hint = f" {_PATHS_HINT}"
    problem = f"{file}: column {name!r} is {kind}"
    raise InputError(f"{problem}; the {role} must be {expected}.{hint}")


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
