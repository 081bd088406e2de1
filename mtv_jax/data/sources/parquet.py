"""Parquet files with image bytes and captions, as Hugging Face data sets."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.records import BadRecord, Record, caption_list
from mtv_jax.data.sources.base import Source, name_of_files
from mtv_jax.utils.errors import InputError, did_you_mean
from mtv_jax.utils.path import expand_path
from mtv_jax.utils.process_cache import ProcessCache

# Default columns, where exactly one of these exists.
_IMAGES = ("image", "img", "jpg")
_CAPTIONS = ("caption", "text", "captions")
_THREADS = 16
# A shuffle in blocks mixes 16 of them (`data.order.WINDOW`); the others are
# for rows in flight on both sides of the border of two windows.
_GROUPS = 24


class ParquetSource(Source):
  """Records of Parquet files by number: the files in order, rows in theirs.

  A read decodes the row group of the record, and a process caches the 24 most
  recent groups. `data.shuffle="block"` reads each group about once an epoch;
  "global" decodes a whole group for nearly every record.

  The key of a record is FILE/ROW, FILE without its suffix.

  Args:
    path: brace ranges, globs, commas or a list; see `expand_path`.
    image: column of encoded images, struct {bytes, path} or binary; None for
      the only struct of this form or binary column named image, img or jpg,
      of several the one named "image".
    caption: column of strings or lists of strings; None for the only column
      named caption, text or captions.
    captions: "required": a record without a caption is a `BadRecord`;
      "ignored": records have no captions; "optional": every record has a list
      of captions, which may be empty, and the column may be missing.

  Raises:
    ImportError: pyarrow is not installed.
    FileNotFoundError: a file is missing or a glob matches none.
    InputError: a file is damaged, lacks a column or has one of another type;
      two files have the same name; the files hold no row.
  """

  suffix = ".parquet"

  def __init__(
    self,
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    image: str | None = None,
    caption: str | None = None,
    captions: Literal["required", "ignored", "optional"] = "required",
  ):
    _pyarrow()
    self.files = tuple(expand_path(path, suffix=self.suffix))
    self.name = name_of_files(self.files)
    self._stems = [file.name.removesuffix(self.suffix) for file in self.files]
    self._check_stems()
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      footers = list(pool.map(_read_footer, self.files))
    self._captions = captions
    first, schema = self.files[0], footers[0][0]
    self._image = image or _default_image(first, schema)
    self._caption = None
    if captions != "ignored":
      self._caption = caption or _default_caption(
        first, schema, optional=captions == "optional"
      )
    for file, (schema, _) in zip(self.files, footers, strict=True):
      _check_column(file, schema, "image", self._image, _is_image)
      if self._caption is not None:
        _check_column(file, schema, "caption", self._caption, _is_caption)
    rows = [counts for _, counts in footers]
    self.shards: Int64[np.ndarray, " files"] = np.cumsum(
      [sum(counts) for counts in rows], dtype=np.int64
    )
    if not len(self):
      raise InputError(f"{self.name} has no row.")
    self._blocks: Int64[np.ndarray, " groups"] = np.cumsum(
      np.concatenate(rows), dtype=np.int64
    )
    # Number of the first group of each file.
    self._first = np.cumsum([0, *map(len, rows)])
    fields = ["key", "image"] + ["captions"] * (captions != "ignored")
    self.fields = frozenset(fields)
    self._groups = ProcessCache(self._read_group, limit=_GROUPS)

  def _check_stems(self) -> None:
    files: dict[str, Path] = {}
    for stem, file in zip(self._stems, self.files, strict=True):
      if stem in files:
        raise InputError(
          f"{files[stem]} and {file} have the same name, so their records would"
          " have the same keys. Give each folder an entry of data.train."
        )
      files[stem] = file

  @property
  def blocks(self) -> Int64[np.ndarray, " groups"]:
    """Cumulative row counts of the row groups of all files."""
    return self._blocks

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Record `i`.

    Raises:
      IndexError: `i` is not in [0, len).
      BadRecord: its row group can't be decoded, the image has no bytes, or
        a required caption is missing or blank.
      InputError: the file has changed since it was opened.
    """
    key, row = self._read_row(i)
    image = row[self._image]
    path = None
    if isinstance(image, Mapping):
      image, path = image["bytes"], image.get("path")
    if not image:
      raise BadRecord(
        key,
        f"its column {self._image!r} has no image bytes"
        + (f", only the path {path!r}" if path else ""),
      )
    record: Record = {"key": key, "image": image}
    if self._captions == "ignored":
      return record
    captions = row[self._caption] if self._caption is not None else []
    if not isinstance(captions, list):
      captions = [captions]
    record["captions"] = caption_list([c for c in captions if c is not None])
    if self._captions == "required" and not record["captions"]:
      raise BadRecord(key, f"its caption in column {self._caption!r} is empty")
    return record

  def _metadata(self, i: int, key: str) -> Mapping[str, Any]:
    """The key, and `path` of the image column as `file_name`."""
    try:
      image = self._read_row(i)[1][self._image]
    except BadRecord:
      return {"key": key}
    path = image.get("path") if isinstance(image, Mapping) else None
    return {"key": key} | ({"file_name": path} if path else {})

  def _read_row(self, i: SupportsIndex) -> tuple[str, dict[str, Any]]:
    """The key of record `i` and the values of its columns."""
    shard, row = self._locate(i)
    i = i.__index__()
    key = f"{self._stems[shard]}/{row:09d}"
    group = int(np.searchsorted(self._blocks, i, side="right"))
    try:
      table = self._groups.get(group)
    except (_pyarrow().ArrowException, OSError) as error:
      # Arrow's decoders raise OSError too; an error of the disk has a number.
      if getattr(error, "errno", None):
        raise
      raise BadRecord(
        key, f"its row group can't be decoded ({error})"
      ) from error
    row = i - self._start(group)
    return key, {name: table[name][row].as_py() for name in table.column_names}

  def _start(self, group: int) -> int:
    """Number of the first record of a row group."""
    return int(self._blocks[group - 1]) if group else 0

  def _read_group(self, group: int) -> Any:
    """The image and caption columns of a row group, a `pyarrow.Table`."""
    from pyarrow import parquet

    shard = int(np.searchsorted(self._first, group, side="right")) - 1
    columns = [self._image] + [self._caption] * (self._caption is not None)
    rows = int(self._blocks[group]) - self._start(group)
    # Reads of one ParquetFile by several threads are not safe.
    with parquet.ParquetFile(self.files[shard]) as file:
      number = group - int(self._first[shard])
      metadata = file.metadata
      if (
        number >= metadata.num_row_groups
        or metadata.row_group(number).num_rows != rows
      ):
        raise InputError(
          f"{self.files[shard]} has changed since it was opened: start again."
        )
      return file.read_row_group(number, columns=columns, use_threads=False)


def _read_footer(file: Path) -> tuple[Any, list[int]]:
  """The Arrow schema of a file and the row counts of its groups."""
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(file) as opened:
      metadata = opened.metadata
      groups = range(metadata.num_row_groups)
      counts = [metadata.row_group(group).num_rows for group in groups]
      return opened.schema_arrow, counts
  except (_pyarrow().ArrowException, OSError) as error:
    if getattr(error, "errno", None):
      raise
    raise InputError(
      f"{file} is no Parquet file, or is cut short ({error}). Fetch or write it"
      " again, or leave it out of the path."
    ) from error


def _default_image(file: Path, schema: Any) -> str:
  columns = [
    field.name
    for field in schema
    if _is_image(field.type)
    and (_is_struct(field.type) or field.name in _IMAGES)
  ]
  if "image" in columns or len(columns) == 1:
    return "image" if "image" in columns else columns[0]
  raise InputError(
    f"{file} has {' and '.join(columns) or 'no column'} of images by type and"
    f" name. Name the column of image bytes with image=; {_describe(schema)}"
  )


def _default_caption(file: Path, schema: Any, *, optional: bool) -> str | None:
  columns = [name for name in _CAPTIONS if name in schema.names]
  if len(columns) == 1:
    return columns[0]
  if optional and not columns:
    return None
  raise InputError(
    f"{file} has {' and '.join(columns) or 'no column'} of captions by name."
    " Name the column with caption=, or set captions='ignored';"
    f" {_describe(schema)}"
  )


def _describe(schema: Any) -> str:
  columns = (f"{field.name} ({field.type})" for field in schema)
  return f"the columns are {', '.join(columns)}."


def _check_column(
  file: Path, schema: Any, what: str, name: str, accepts: Callable[[Any], bool]
) -> None:
  if schema.names.count(name) != 1:
    raise InputError(
      f"{file} has no column {name!r}, or several, for the {what}."
      f" {did_you_mean(name, schema.names)}"
    )
  kind = schema.field(name).type
  if accepts(kind):
    return
  expected = "a string or a list of strings"
  if what == "image":
    expected = "binary or struct<bytes: binary, path: string>"
    if _is_string(kind):
      expected += "; URLs and paths are not fetched: store the bytes"
  raise InputError(
    f"{file}: column {name!r} is {kind}; the {what} must be {expected}."
  )


def _is_image(kind: Any) -> bool:
  if _is_struct(kind):
    return _is_binary(kind.field("bytes").type)
  return _is_binary(kind)


def _is_struct(kind: Any) -> bool:
  types = _pyarrow().types
  return types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_binary(kind: Any) -> bool:
  types = _pyarrow().types
  return types.is_binary(kind) or types.is_large_binary(kind)


def _is_string(kind: Any) -> bool:
  types = _pyarrow().types
  return types.is_string(kind) or types.is_large_string(kind)


def _is_caption(kind: Any) -> bool:
  types = _pyarrow().types
  if types.is_list(kind) or types.is_large_list(kind):
    kind = kind.value_type
  return _is_string(kind)


def _pyarrow() -> Any:
  try:
    import pyarrow
  except ImportError as error:
    raise ImportError(
      "type='parquet' needs pyarrow: pip install 'mtv_jax[parquet]'."
    ) from error
  return pyarrow
