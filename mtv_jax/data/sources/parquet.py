"""Parquet files with image bytes and captions, as in Hugging Face data sets."""

import itertools
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
from mtv_jax.data.sources import base
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  StorageError,
  did_you_mean,
  import_extra,
)
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.threads import map_threads

# Default columns, used if exactly one of them exists.
_IMAGE_COLUMNS = ("image", "img", "jpg")
_CAPTION_COLUMNS = ("caption", "text", "captions")
# Block shuffling mixes 16 groups (`data.order.WINDOW`); the extra ones hold
# prefetched rows of the next window.
_MAX_CACHED_GROUPS = 24
# Row group limits: a group is decoded whole, by several threads at once.
_MAX_ROWS, _MAX_BYTES = 1 << 22, 1 << 31


class ParquetSource(base.FileSource):
  """Records of Parquet files, one per row.

  Reading a record decodes its whole row group; each process caches the 24 most
  recent groups. `data.shuffle="block"` reads each group about once per epoch;
  "global" decodes a whole group for nearly every record.

  A record's key is FILE/ROW, FILE without its suffix.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
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
  ):
    _pyarrow()  # Fail first if it isn't installed.
    files = expand_path(path, suffix=self.suffix)
    self._stems = [file.name.removesuffix(self.suffix) for file in files]
    by_stem: dict[str, PurePath] = {}
    for stem, file in zip(self._stems, files, strict=True):
      if (other := by_stem.setdefault(stem, file)) is not file:
        raise InputError(
          f"{other} and {file} have the same name, so records would share keys."
          " Give each folder an entry of data.train."
        )
    schemas, rows = zip(*map_threads(_read_footer, files), strict=True)
    super().__init__(files, list(map(sum, rows)), captions=captions)
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
    for file, schema in zip(files, schemas, strict=True):
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
    with parquet.ParquetFile(_open(self.files[shard])) as file:
      groups, row_group = file.metadata.num_row_groups, file.metadata.row_group
      if number >= groups or row_group(number).num_rows != rows:
        name = self.files[shard]
        raise InputError(f"{name} has changed since it was opened.")
      return file.read_row_group(number, columns=columns, use_threads=False)


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
