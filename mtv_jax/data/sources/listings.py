"""Listings of images and captions: COCO JSON, tables, folders."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.webdataset import parse_captions
from mtv_jax.utils.errors import InputError, MissingFileError, did_you_mean

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass
class Example:
  """One image of a listing.

  Attributes:
    name: as the listing has it; it goes into the record and into reports.
    path: the image file, which may be missing.
    captions: those that are not blank.
    extra: further JSON fields of the record.
    problem: why it can't be used, if that is known already.
  """

  name: str
  path: Path
  captions: list[str]
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  problem: str = ""

  def __post_init__(self):
    self.captions = [s for c in self.captions if (s := c.strip())]
    if not self.captions and not self.problem:
      self.problem = "no caption"


def read(
  path: str | os.PathLike,
  *,
  images: str | os.PathLike | None = None,
  image_column: str = "image",
  caption_column: str = "caption",
) -> list[Example]:
  """The examples of a listing, told apart by its name.

  Args:
    path: a COCO caption file (.json), a table (.csv, .tsv, .parquet) with a
      row for each image or for each caption, or a folder of images with a
      .txt or .json of the same name.
    images: what image names are relative to; None for the listing's folder.
    image_column, caption_column: of a table; captions may be lists.

  Returns:
    One example for each image, in the order of the listing, its captions in
    theirs; a folder's are sorted by name.

  Raises:
    MissingFileError: if there is no such file or folder.
    InputError: if it is of no known kind, lacks a column or lists nothing.
  """
  path = Path(path)
  if not path.exists():
    raise MissingFileError(f"There is no {path}.")
  root = Path(images) if images is not None else path.parent
  if not root.is_dir():
    raise MissingFileError(f"There is no folder of images {root}.")
  kind = path.suffix.lower()
  if path.is_dir():
    examples = _folder(path)
  elif kind == ".json":
    examples = _coco(path, root)
  elif kind in (".csv", ".tsv"):
    columns = image_column, caption_column
    examples = _table(_csv_rows(path, *columns), root)
  elif kind == ".parquet":
    columns = image_column, caption_column
    examples = _table(_parquet_rows(path, *columns), root)
  else:
    raise InputError(
      f"{path}: a listing is a folder or ends in .json, .csv, .tsv or .parquet."
    )
  if not examples:
    raise InputError(f"{path} lists no image.")
  return examples


def _coco(path: Path, root: Path) -> list[Example]:
  """COCO's caption annotations; images and captions in the file's order."""
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from error
  if not isinstance(content, Mapping) or not (
    {"images", "annotations"} <= set(content)
  ):
    there = sorted(content) if isinstance(content, Mapping) else type(content)
    raise InputError(
      f"{path} is no COCO file: it needs 'images' and 'annotations', it has"
      f" {there}."
    )
  hint = "give captions_*.json, not instances_*.json"
  captions: dict[Any, list[str]] = {}
  for entry in _entries(
    path, content, "annotations", ("image_id", "caption"), hint
  ):
    # A caption that is no text counts as none.
    text = entry["caption"]
    captions.setdefault(entry["image_id"], []).extend(
      [text] if isinstance(text, str) else []
    )
  images = _entries(path, content, "images", ("id", "file_name"), hint)
  return [
    Example(
      name=image["file_name"],
      path=root / image["file_name"],
      captions=captions.get(image["id"], []),
      extra={"image_id": image["id"]},
    )
    for image in images
  ]


def _entries(
  path: Path,
  content: Mapping[str, Any],
  field: str,
  keys: Sequence[str],
  hint: str,
) -> list[Mapping[str, Any]]:
  """The entries of a field of a COCO file, each with all of `keys`."""
  entries = content[field]
  if not isinstance(entries, list):
    raise InputError(
      f"{path}: {field!r} is a {type(entries).__name__}, expected a list."
    )
  for number, entry in enumerate(entries):
    there = sorted(entry) if isinstance(entry, Mapping) else repr(entry)
    for key in keys:
      if not isinstance(entry, Mapping) or key not in entry:
        raise InputError(
          f"{path}: {field}[{number}] has no {key!r}, only {there}; {hint}."
        )
  return entries


def _csv_rows(
  path: Path, image_column: str, caption_column: str
) -> Iterator[tuple[Any, Any]]:
  delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file, delimiter=delimiter)
    try:
      names = reader.fieldnames or []
      _check_columns(path, names, image_column, caption_column)
      for row in reader:
        if row.get(None):
          raise InputError(
            f"{path}, line {reader.line_num}: {len(row[None])} cells more than"
            f" the header names, from {row[None][0]!r} on. Put cells that hold"
            f" a {delimiter!r} in quotation marks."
          )
        yield row[image_column], row[caption_column]
    except UnicodeDecodeError as error:
      raise InputError(
        f"{path} is not UTF-8, near line {reader.line_num + 1} ({error}):"
        " convert it, for example with iconv -f latin1 -t utf-8."
      ) from error
    except csv.Error as error:
      raise InputError(
        f"{path}, near line {reader.line_num + 1}: {error}. Is a quotation"
        " mark not closed?"
      ) from error


def _parquet_rows(
  path: Path, image_column: str, caption_column: str
) -> Iterator[tuple[Any, Any]]:
  try:
    from pyarrow import ArrowInvalid, parquet
  except ImportError as error:
    raise ImportError(
      f"Reading {path} needs pyarrow: pip install 'mtv_jax[parquet]', or give a"
      " .csv."
    ) from error
  try:
    opened = parquet.ParquetFile(path)
  except ArrowInvalid as error:
    raise InputError(f"{path} is no Parquet file: {error}") from error
  with opened as file:
    _check_columns(path, file.schema_arrow.names, image_column, caption_column)
    for batch in file.iter_batches(columns=[image_column, caption_column]):
      yield from zip(
        batch.column(image_column).to_pylist(),
        batch.column(caption_column).to_pylist(),
        strict=True,
      )


def _check_columns(
  path: Path, names: Sequence[str], image_column: str, caption_column: str
) -> None:
  for what, column in (("image", image_column), ("caption", caption_column)):
    if column not in names:
      raise InputError(
        f"{path} has no column {column!r} for the {what}."
        f" {did_you_mean(column, names)} Name it with {what}_column."
      )


def _table(rows: Iterator[tuple[Any, Any]], root: Path) -> list[Example]:
  """Rows of the same image are one example with several captions."""
  captions: dict[str, list[str]] = {}
  for number, (image, caption) in enumerate(rows):
    if image is not None and not isinstance(image, str):
      raise InputError(
        f"Row {number}: the image column must hold paths, got"
        f" {type(image).__name__}."
      )
    # A row without an image is still counted, under its number.
    of_image = captions.setdefault(image or f"row {number}", [])
    several = caption if isinstance(caption, list) else [caption]
    of_image.extend(c for c in several if isinstance(c, str))
  return [Example(name, root / name, found) for name, found in captions.items()]


def _folder(folder: Path) -> list[Example]:
  """Images and the .txt or .json beside them, in subfolders too."""
  groups: dict[str, dict[str, Path]] = {}
  for parent, folders, names in os.walk(folder):
    folders.sort()
    for name in sorted(names):
      file = Path(parent, name)
      kind = file.suffix.lower()
      kind = "image" if kind in _IMAGES else kind
      if kind not in ("image", ".txt", ".json"):
        continue
      stem = str(file.relative_to(folder).with_suffix(""))
      of_kind = groups.setdefault(stem, {})
      if kind in of_kind:
        raise InputError(
          f"{of_kind[kind]} and {file} are two files for one example: rename or"
          " remove one of them."
        )
      of_kind[kind] = file
  examples = []
  for stem, files in groups.items():
    image = files.get("image")
    if image is None:
      first = files.get(".txt") or files[".json"]
      name = str(first.relative_to(folder))
      examples.append(Example(name, first, [], problem="no image beside it"))
      continue
    name = str(image.relative_to(folder))
    text, sidecar = (
      files[kind].read_bytes() if kind in files else None
      for kind in (".txt", ".json")
    )
    try:
      captions = [] if len(files) == 1 else parse_captions(stem, text, sidecar)
      examples.append(Example(name, image, captions))
    except BadRecord as error:
      examples.append(Example(name, image, [], problem=error.reason))
  return examples
