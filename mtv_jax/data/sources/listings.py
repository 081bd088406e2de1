"""Image files and captions: listings (COCO JSON, tables, folders), a source."""

import collections
import contextlib
import csv
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TextIO

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data.canvas import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from mtv_jax.data.image_limits import MAX_BYTES
from mtv_jax.data.records import (
  NO_CAPTIONS_HINT,
  BadRecord,
  NoRecordsError,
  Record,
)
from mtv_jax.data.sources import coco
from mtv_jax.data.sources.base import CaptionMode, Source
from mtv_jax.data.sources.webdataset import MAX_TEXT, parse_captions
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  did_you_mean,
  printable,
)
from mtv_jax.utils.path import check_regular_file, read_regular, refuse_remote

log = logging.getLogger(__name__)

_ALL_SUFFIXES = (*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES)
_JSON_TYPES = (str, int, float, bool, list, dict, type(None))
_MAX_LINE = 1 << 22  # Characters per line of a table.
# Errors of one file, not of the storage: missing, circular link, permissions.
_FILE_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
_FILE_ERRORS += (errno.EPERM,)
NO_CAPTION = "no caption"  # `Example.problem` of an image without captions.


@dataclasses.dataclass
class Example:
  """One image of a listing."""

  name: str  # As listed, for records and reports.
  path: Path  # The image file, which may be missing.
  captions: list[str]  # Non-blank ones.
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # For JSON.
  problem: str = ""  # Why it is unusable; "": it may be usable.
  # Reads an example of a source, instead of `path` and `captions`.
  read: Callable[[], Record] | None = None

  def __post_init__(self):
    if self.read:
      return
    self.captions = [s for c in self.captions if (s := c.strip())]
    texts = "".join([self.name, *self.captions])
    if not self.problem and texts != printable(texts, len(texts)):
      self.problem = "its name or a caption is not Unicode"
    if not self.captions and not self.problem:
      self.problem = NO_CAPTION


def read(
  path: str | os.PathLike,
  *,
  images: str | os.PathLike | None = None,
  image_column: str = "image",
  caption_column: str = "caption",
) -> list[Example]:
  """Reads a listing, by its suffix: one example per image, in order.

  A COCO caption file (.json), a table (.csv, .tsv, .parquet) with a row per
  image or per caption (or list of captions), or a folder of images, each with a
  .txt or .json of its name. Relative image names are resolved in `images`, by
  default the listing's folder.
  """
  path = Path(path)
  # Not Path.exists(), which raises for names that are too long.
  if not os.path.exists(path):
    raise MissingFileError(f"There is no {printable(path)}.")
  if not path.is_dir():
    check_regular_file(path)
  root = Path(images) if images is not None else path.parent
  if not root.is_dir():
    raise MissingFileError(f"There is no folder of images {printable(root)}.")
  kind = path.suffix.lower()
  read_rows = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
  if path.is_dir():
    examples = _read_folder(path)
  elif kind == ".json":
    examples = _read_captions(path, root)
  elif kind in read_rows:
    rows = read_rows[kind](path, (image_column, caption_column))
    examples = _group_rows(rows, root)
  else:
    kinds = ".json, .csv, .tsv or .parquet"
    raise InputError(f"{path}: a listing is a folder or ends in {kinds}.")
  if not examples:
    raise NoRecordsError(f"{printable(path)} lists no image.")
  return examples


def list_images(folder: str | os.PathLike) -> list[Example]:
  """Lists the images of a folder and its subfolders, without captions."""
  if not os.path.isdir(folder):
    raise MissingFileError(f"There is no folder {printable(folder)}.")
  examples = []
  for file in _iter_images(folder):
    name = str(file.relative_to(folder))
    examples.append(Example(name, file, [], problem=_find_problem(file)))
  return examples


def find_image(folder: str | os.PathLike) -> Path | None:
  """First image by name in a folder or its subfolders, or None."""
  return next(_iter_images(folder), None)


def _iter_images(folder: str | os.PathLike) -> Iterator[Path]:
  return (f for f in _list_files(folder) if f.suffix.lower() in _ALL_SUFFIXES)


def _find_problem(file: Path) -> str:
  """Returns the problem of an image in an unsupported format, or ""."""
  if (kind := file.suffix.lower()) not in UNSUPPORTED_SUFFIXES:
    return ""
  return f"in an unsupported format ({kind}): convert to JPEG"


def _list_files(folder: str | os.PathLike) -> Iterator[Path]:
  """Yields the files of a folder by name, then those in each subfolder.

  Doesn't follow links to folders. Avoids `os.walk`, which is recursive before
  Python 3.12 and silently skips unreadable folders.
  """
  pending = [os.fspath(folder)]
  while pending:
    parent = pending.pop()
    try:
      with os.scandir(parent) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    except OSError as error:
      problem = f"{printable(parent)} can't be read: {error.strerror}."
      raise InputError(problem) from error
    folders = []
    for entry in entries:
      if not os.path.isdir(entry):
        yield Path(entry)
      elif not entry.is_symlink() and entry.name != "lost+found":
        folders.append(entry.path)
    pending += reversed(folders)


def require_images(examples: Sequence[Example]) -> None:
  """Raises MissingFileError, naming the files, if any image is missing."""
  missing = [e.path for e in examples if not os.path.isfile(e.path)]
  if missing:
    names = ", ".join(printable(path) for path in missing[:3])
    raise MissingFileError(
      f"{len(missing)} of {len(examples)} listed images are missing: {names}"
      f"{', ...' if len(missing) > 3 else ''}. Set `images` to their folder."
    )


def _read_captions(path: Path, root: Path) -> list[Example]:
  """Reads COCO captions; images and captions keep the file's order."""
  content = coco.read_content(
    path,
    {
      "images": {"id": coco.ID, "file_name": str},
      "annotations": {"image_id": coco.ID, "caption": _JSON_TYPES},
    },
    hint="pass captions_*.json, not instances_*.json",
  )
  images = coco.group_images(
    path, content, image={}, annotation={}, require_listed=False
  )
  examples = []
  for id_, image in images.items():
    name, problem = image.info["file_name"], ""
    try:
      file = foreign.resolve_name(root, name, where=path)
    except InputError:
      file, problem = root, "a file name that leaves the folder"
    captions = [row["caption"] for row in image.annotations]
    texts = [caption for caption in captions if isinstance(caption, str)]
    examples.append(Example(name, file, texts, {"image_id": id_}, problem))
  return examples


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
  delimiter = _find_delimiter(path, columns[0])
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(_read_lines(path, file), delimiter=delimiter)
    try:
      _check_columns(path, reader.fieldnames or [], columns)
      for row in reader:
        if row.get(None):
          raise InputError(
            f"{path}, line {reader.line_num}: {len(row[None])} cells too many,"
            f" from {row[None][0]!r} on. Quote cells with {delimiter!r}."
          )
        yield [row[column] for column in columns]
    except UnicodeDecodeError as error:
      place = f"near line {reader.line_num + 1} ({error})"
      fix = "convert it, for example with iconv -f latin1 -t utf-8."
      raise InputError(f"{path} is not UTF-8, {place}: {fix}") from error
    except csv.Error as error:
      place = f"{path}, near line {reader.line_num + 1}: {error}"
      raise InputError(f"{place}. Is a quotation mark not closed?") from error


def _find_delimiter(path: Path, column: str) -> str:
  """Finds the delimiter that yields `column`, else the first in the header."""
  default = "\t" if path.suffix.lower() == ".tsv" else ","
  with path.open("rb") as file:
    header = file.readline(_MAX_LINE).decode("utf-8-sig", errors="replace")
  # Spreadsheets use semicolons where the comma is the decimal separator.
  delimiters = [d for d in (default, ";", "\t", ",") if d in header]
  for delimiter in delimiters:
    with contextlib.suppress(csv.Error):
      if column in next(csv.reader([header], delimiter=delimiter)):
        return delimiter
  return delimiters[0] if delimiters else default


def _read_lines(path: Path, file: TextIO) -> Iterator[str]:
  while line := file.readline(_MAX_LINE):
    if len(line) == _MAX_LINE:
      raise InputError(f"{path} has a line of {_MAX_LINE:,} characters.")
    yield line


def _read_parquet(
  path: Path, columns: Sequence[str]
) -> Iterator[Sequence[Any]]:
  from mtv_jax.data.sources.parquet import open_parquet

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
        f" {did_you_mean(column, names)} Set {role}_column."
      )


def _group_rows(rows: Iterator[Sequence[Any]], root: Path) -> list[Example]:
  captions: dict[str, list[str]] = {}
  for number, (image, caption) in enumerate(rows):
    if image is not None and not isinstance(image, str):
      kind = type(image).__name__
      raise InputError(f"Row {number}: images must contain paths, got {kind}.")
    # A row without an image is reported under its row number.
    name = image or f"row {number}"
    row = caption if isinstance(caption, list) else [caption]
    captions.setdefault(name, []).extend(c for c in row if isinstance(c, str))
  return [Example(name, root / name, texts) for name, texts in captions.items()]


def _read_folder(folder: Path) -> list[Example]:
  """Pairs images with the .txt or .json next to them, in subfolders too."""
  groups: dict[str, list[Path]] = {}
  for file in _list_files(folder):
    if file.suffix.lower() in (*_ALL_SUFFIXES, ".txt", ".json"):
      stem = str(file.relative_to(folder))[: -len(file.suffix)]
      groups.setdefault(stem, []).append(file)
  examples = []
  for stem, files in groups.items():
    texts = {f.suffix.lower(): f for f in files}
    texts = {k: texts[k] for k in (".txt", ".json") if k in texts}
    images = [f for f in files if f.suffix.lower() in _ALL_SUFFIXES]
    images = [f for f in images if not _find_problem(f)] or images
    if texts and len(images) > 1:
      names = " and ".join(map(printable, images[:2]))
      raise InputError(f"{names} are two files for one example: rename one.")
    for main_file in images or files[:1]:
      captions, problem = [], _find_problem(main_file)
      if not images:
        problem = "no image beside it"
      if texts and not problem:
        try:
          data = [_read_sidecar(stem, texts.get(k)) for k in (".txt", ".json")]
          captions = parse_captions(stem, *data)
        except BadRecord as error:
          problem = error.reason
      name = str(main_file.relative_to(folder))
      examples.append(Example(name, main_file, captions, problem=problem))
  return examples


def _read_sidecar(stem: str, file: Path | None) -> bytes | None:
  if file is None:
    return None
  return read_content(stem, file.suffix, file, limit=MAX_TEXT)


def read_content(key: str, what: str, file: Path, *, limit: int) -> bytes:
  """Reads a file of an example; BadRecord if that file is unreadable."""
  try:
    return read_regular(file, limit=limit)
  except InputError as error:
    raise BadRecord(key, printable(error)) from error
  except OSError as error:
    if error.errno not in _FILE_ERRORS:
      raise
    reason = f"its {what} can't be read ({error.strerror})"
    raise BadRecord(key, reason) from error


class FolderSource(Source):
  """Image files, read one by one, with captions from a listing.

  For local data sets of up to some hundred thousand files; larger ones read
  faster from shards (`mtv-jax make_shards` reads the same listings). A record's
  key is its file name relative to the folder.

  Args:
    path: a folder of images (and subfolders), with captions in a .txt or .json
      named like the image; or a listing: COCO captions (.json) or a table
      (.csv, .tsv, .parquet), see `read`.
    images: folder of a listing's images; default: the listing's folder.
    image_column: a table's column of file names.
    caption_column: a table's column of captions.
    captions: "required" skips images without captions; "ignored" reads all
      images and no captions; "optional" reads all images, except those whose
      captions are unreadable.

  Raises:
    MissingFileError: the path or a listed file is missing.
    NoRecordsError: no usable image is listed.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    captions: CaptionMode = "required",
  ):
    refuse_remote(path, "A folder of images", "Write shards, or copy it.")
    path = os.path.expanduser(path)
    if images is not None and os.path.isdir(path):
      name = printable(path)
      raise InputError(f"{name} is a folder of images: leave out `images`.")
    if captions == "ignored" and os.path.isdir(path):
      all_examples = list_images(path)
    else:
      columns = {"image_column": image_column, "caption_column": caption_column}
      all_examples = read(path, images=images, **columns)
    usable = {""} if captions == "required" else {"", NO_CAPTION}
    self._examples = [e for e in all_examples if e.problem in usable]
    self.name = printable(path)
    self._report_left_out([e for e in all_examples if e.problem not in usable])
    require_images(self._examples)
    fields = ["key", "image"] + ["captions"] * (captions != "ignored")
    self.fields = frozenset(fields)
    # Files are not shards: block shuffling sees a single shard.
    self.shards = np.array([len(self._examples)], np.int64)

  def _report_left_out(self, examples: list[Example]) -> None:
    counts = collections.Counter(e.problem for e in examples)
    reasons = "; ".join(f"{n} {reason}" for reason, n in counts.most_common(3))
    if not self._examples:
      raise NoRecordsError(
        f"{self.name} has no usable image ({reasons or 'no file'}). Expected"
        " images with a .txt or .json of the same name, or a listing."
        f" {NO_CAPTIONS_HINT}"
      )
    if examples:
      log.warning(
        f"{self.name}: left out {len(examples)} images ({reasons});"
        f" {len(self._examples)} remain."
      )

  def _list_names(self) -> list[str]:
    return [example.name for example in self._examples]

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; BadRecord if its file is missing or unreadable."""
    _, i = self._locate(i)
    example = self._examples[i]
    data = read_content(example.name, "image", example.path, limit=MAX_BYTES)
    record: Record = {"key": example.name, "image": data}
    if "captions" in self.fields:
      record["captions"] = list(example.captions)
    return record

  def _metadata(self, i: int, key: str) -> dict[str, Any]:
    example = self._examples[i]
    return {**example.extra, "file_name": example.name, "key": key}
