"""Listings of images and captions: COCO JSON, tables, folders."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.parquet import open_parquet
from mtv_jax.data.sources.webdataset import parse_captions
from mtv_jax.utils.errors import InputError, MissingFileError, did_you_mean

_IMAGE_SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
)


@dataclasses.dataclass
class Example:
  """One image of a listing."""

  name: str  # The listing's, for the record and for reports.
  path: Path  # The image file, which may be missing.
  captions: list[str]  # Without blank ones.
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # For JSON.
  problem: str = ""  # Why it can't be used, if that is known.

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
  """The examples of a listing, whose kind follows from its name.

  Args:
    path: a COCO caption file (.json), a table (.csv, .tsv, .parquet) with a
      row for each image or for each caption, or a folder of images with a
      .txt or .json of the same name.
    images: folder of relative image names; None for the listing's folder.
    image_column: a table's column of paths.
    caption_column: column of a table; captions may be lists.

  Returns:
    One example for each image with all of its captions, in the order of the
    listing; a folder's are sorted by name.

  Raises:
    MissingFileError: the file or the folder of images does not exist.
    InputError: its kind is unknown, it lacks a column or lists no image.
  """
  path = Path(path)
  if not path.exists():
    raise MissingFileError(f"There is no {path}.")
  root = Path(images) if images is not None else path.parent
  if not root.is_dir():
    raise MissingFileError(f"There is no folder of images {root}.")
  kind = path.suffix.lower()
  read_rows = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
  if path.is_dir():
    examples = _read_folder(path)
  elif kind == ".json":
    examples = _read_captions(path, root)
  elif kind in read_rows:
    rows = read_rows[kind](path, (image_column, caption_column))
    examples = _group_rows(rows, root)
  else:
    raise InputError(
      f"{path}: a listing is a folder or ends in .json, .csv, .tsv or .parquet."
    )
  if not examples:
    raise InputError(f"{path} lists no image.")
  return examples


def _read_captions(path: Path, root: Path) -> list[Example]:
  """COCO's caption annotations; images and captions in the file's order."""
  content = read_coco(
    path,
    {"images": ("id", "file_name"), "annotations": ("image_id", "caption")},
    hint="give captions_*.json, not instances_*.json",
  )
  captions: dict[Any, list[str]] = {}
  for entry in content["annotations"]:
    if isinstance(entry["caption"], str):
      captions.setdefault(entry["image_id"], []).append(entry["caption"])
  images = [(image["id"], image["file_name"]) for image in content["images"]]
  return [
    Example(name, root / name, captions.get(id_, []), {"image_id": id_})
    for id_, name in images
  ]


def read_coco(
  path: Path, fields: Mapping[str, Sequence[str]], *, hint: str
) -> dict[str, Any]:
  """The content of a COCO annotation file.

  Args:
    path: the file.
    fields: required lists, and the keys that each of their entries must have.
    hint: ends the error about a missing key.
  """
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from error
  given = sorted(content) if isinstance(content, dict) else type(content)
  if not isinstance(content, dict) or not fields.keys() <= content.keys():
    needed = " and ".join(map(repr, fields))
    raise InputError(
      f"{path} is not a COCO file: it needs {needed}, it has {given}."
    )
  for field, keys in fields.items():
    entries = content[field]
    if not isinstance(entries, list):
      raise InputError(
        f"{path}: {field!r} is a {type(entries).__name__}, expected a list."
      )
    for number, entry in enumerate(entries):
      given = sorted(entry) if isinstance(entry, dict) else []
      if lacking := [key for key in keys if key not in given]:
        raise InputError(
          f"{path}: {field}[{number}] has no {lacking[0]!r}, only"
          f" {given or repr(entry)}; {hint}."
        )
  return content


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
  delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file, delimiter=delimiter)
    try:
      _check_columns(path, reader.fieldnames or [], columns)
      for row in reader:
        if row.get(None):
          raise InputError(
            f"{path}, line {reader.line_num}: {len(row[None])} more cells than"
            f" the header, from {row[None][0]!r} on. Quote cells that contain"
            f" {delimiter!r}."
          )
        yield [row[column] for column in columns]
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
  path: Path, columns: Sequence[str]
) -> Iterator[Sequence[Any]]:
  with open_parquet(path) as file:
    _check_columns(path, file.schema_arrow.names, columns)
    for batch in file.iter_batches(columns=list(columns)):
      values = [batch.column(column).to_pylist() for column in columns]
      yield from zip(*values, strict=True)


def _check_columns(
  path: Path, names: Sequence[str], columns: Sequence[str]
) -> None:
  for role, column in zip(("image", "caption"), columns, strict=True):
    if column not in names:
      raise InputError(
        f"{path} has no column {column!r} for the {role}."
        f" {did_you_mean(column, names)} Name it with {role}_column."
      )


def _group_rows(rows: Iterator[Sequence[Any]], root: Path) -> list[Example]:
  """One example for the rows of an image."""
  captions: dict[str, list[str]] = {}
  for number, (image, caption) in enumerate(rows):
    if image is not None and not isinstance(image, str):
      raise InputError(
        f"Row {number}: the image column must contain paths, got"
        f" {type(image).__name__}."
      )
    # A row without an image is reported as an example of its number.
    name = image or f"row {number}"
    row = caption if isinstance(caption, list) else [caption]
    captions.setdefault(name, []).extend(c for c in row if isinstance(c, str))
  return [Example(name, root / name, texts) for name, texts in captions.items()]


def _read_folder(folder: Path) -> list[Example]:
  """Images and the .txt or .json beside them, in subfolders too."""
  groups: dict[str, dict[str, Path]] = {}
  for parent, folders, names in os.walk(folder):
    folders.sort()
    for name in sorted(names):
      file = Path(parent, name)
      kind = file.suffix.lower()
      kind = "image" if kind in _IMAGE_SUFFIXES else kind
      if kind not in ("image", ".txt", ".json"):
        continue
      stem = str(file.relative_to(folder).with_suffix(""))
      other = groups.setdefault(stem, {}).setdefault(kind, file)
      if other is not file:
        raise InputError(
          f"{other} and {file} are two files for one example: rename or remove"
          " one of them."
        )
  examples = []
  for stem, files in groups.items():
    main = files.get("image") or files.get(".txt") or files[".json"]
    example = Example(str(main.relative_to(folder)), main, [])
    examples.append(example)
    if "image" not in files:
      example.problem = "no image beside it"
    elif len(files) > 1:
      beside = (files.get(kind) for kind in (".txt", ".json"))
      texts = (file and file.read_bytes() for file in beside)
      try:
        example.captions = parse_captions(stem, *texts)
        example.problem = ""
      except BadRecord as error:
        example.problem = error.reason
  return examples
