"""Scan of a tar's headers: its members, grouped into records.

The standard library's `tarfile` builds an object a member; a set of 100
million records has 300 million members. This reads the same headers (POSIX
ustar and pax, GNU long names and sizes) into plain offsets.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

IMAGE, TEXT, JSON = range(3)
EXTENSIONS = {
  "jpg": IMAGE,
  "jpeg": IMAGE,
  "png": IMAGE,
  "webp": IMAGE,
  "txt": TEXT,
  "json": JSON,
}
_BLOCK = 512
# One read covers the caption files between two images and the next header.
_WINDOW = 8192
# Rules out a header that is garbage before a name of gigabytes is read.
_MAX_NAME = 1 << 20


class TarError(InputError):
  """A tar that can't be used as it is: names the tar, where, and the fix."""


class Span(NamedTuple):
  """Where the bytes of a member lie in the tar."""

  offset: int
  size: int


_NOWHERE = Span(0, 0)


@dataclasses.dataclass
class Scan:
  """The records of one tar, in the order of their first members.

  Attributes:
    records: key to the spans of image, text and JSON; offset 0 means absent
      (no member's bytes start at 0, where the first header is).
    no_image: keys with a caption file but no image.
    no_caption: keys with an image but neither .txt nor .json.
    others: members that are no part of a record.
  """

  records: dict[str, list[Span]]
  no_image: list[str]
  no_caption: list[str]
  others: int


def scan(path: Path) -> Scan:
  """Reads the headers of a tar.

  The key of a member is its name up to the first dot after the last slash, as
  WebDataset has it; its extension, in any case, says what it is.

  Raises:
    TarError: if the tar is cut short, compressed, no tar, or has a key twice.
  """
  groups: dict[str, list[Span]] = {}
  others = 0
  for name, span in _members(path):
    key, extension = _split(name)
    role = EXTENSIONS.get(extension)
    if not key or role is None:
      others += 1
      continue
    spans = groups.setdefault(key, [_NOWHERE] * 3)
    if spans[role].offset:
      what = ("image", ".txt", ".json")[role]
      raise TarError(
        f"{path}: key {key!r} has a second {what} ({name!r} at offset"
        f" {span.offset}; the first is at {spans[role].offset}). Keys must be"
        " unique: write the tar again without the duplicate, or leave it out"
        " of the path."
      )
    if span.size >= 1 << 32:
      raise TarError(
        f"{path}: {name!r} has {span.size} bytes; no record is that large."
      )
    spans[role] = span
  no_image = [k for k, spans in groups.items() if not spans[IMAGE].offset]
  for key in no_image:
    del groups[key]
  no_caption = [
    key
    for key, spans in groups.items()
    if not spans[TEXT].offset and not spans[JSON].offset
  ]
  return Scan(groups, no_image, no_caption, others)


def _split(name: str) -> tuple[str, str]:
  """`a/b.jpg` -> `a/b`, `jpg`; an empty key if the name has none."""
  folder, slash, base = name.removeprefix("./").rpartition("/")
  stem, _, extension = base.partition(".")
  return (folder + slash + stem if stem else ""), extension.lower()


def _members(path: Path) -> Iterator[tuple[str, Span]]:
  """Name and span of each regular file in the tar."""
  with path.open("rb", buffering=0) as file:
    total = os.fstat(file.fileno()).st_size
    window = _Window(file.fileno())
    offset = 0
    # What an extra header says of the member after it.
    name, size = "", -1
    if total == 0:
      raise TarError(f"{path} is empty (0 bytes): fetch it again.")
    while True:
      # Greater where the last padding is missing: nothing is lost by that.
      if offset >= total:
        log.warning(
          "%s has no end mark at offset %d; if its writer was stopped, records"
          " are missing.",
          path,
          total,
        )
        return
      header = window.read(offset, _BLOCK)
      if len(header) < _BLOCK:
        raise _cut_short(path, offset, _BLOCK, total, "a header")
      if not header.strip(b"\0"):
        return
      _check(header, path, offset)
      kind = header[156:157]
      if size < 0 or kind in b"LKxg":
        length = _number(header[124:136], path, offset)
      else:
        length = size
      start = offset + _BLOCK
      if start + length > total:
        what = name or _name(header)
        raise _cut_short(path, start, length, total, repr(what))
      if kind in b"Lx" and length <= _MAX_NAME:
        extra = window.read(start, length)
        if kind == b"L":
          name = _text(extra.rstrip(b"\0"))
        else:
          name, size = _pax(extra, name, size, path, offset)
      elif kind not in b"Kg":
        if kind in b"0\x007":
          yield name or _name(header), Span(start, length)
        name, size = "", -1
      offset = start + -(-length // _BLOCK) * _BLOCK


class _Window:
  """Serves neighbouring small reads from one."""

  def __init__(self, fd: int):
    self._fd = fd
    self._start, self._data = 0, b""

  def read(self, offset: int, size: int) -> bytes:
    begin = offset - self._start
    if begin < 0 or begin + size > len(self._data):
      self._start = offset
      self._data = os.pread(self._fd, max(size, _WINDOW), offset)
      begin = 0
    return self._data[begin : begin + size]


def _check(header: bytes, path: Path, offset: int) -> None:
  """Every header holds the sum of its bytes, its own field read as blanks."""
  field = header[148:156]
  expected = sum(header) - sum(field) + 8 * ord(" ")
  try:
    found = int(field.strip(b" \0") or b"-1", 8)
  except ValueError:
    found = -1
  if found == expected:
    return
  if offset == 0 and header[:2] == b"\x1f\x8b":
    raise TarError(
      f"{path} is compressed, which rules out reading at an offset: gunzip it"
      " (its images are compressed already)."
    )
  if offset == 0:
    raise TarError(
      f"{path} is no tar: it starts with {header[:16]!r}. If a download left an"
      " error page there, fetch it again."
    )
  raise TarError(
    f"{path} is damaged at offset {offset}: no header where one must be. Fetch"
    " it again, or leave it out of the path."
  )


def _cut_short(
  path: Path, offset: int, needed: int, total: int, what: str
) -> TarError:
  return TarError(
    f"{path} is cut short: {what} at offset {offset} needs {needed} bytes, the"
    f" file ends {max(total - offset, 0)} after it. Fetch it again, or leave it"
    " out of the path."
  )


def _number(field: bytes, path: Path, offset: int) -> int:
  """Octal digits, or GNU's binary form for sizes from 8 GiB."""
  try:
    if field[0] & 0x80:
      return int.from_bytes(field, "big") & ((1 << 88) - 1)
    return int(field.strip(b" \0") or b"0", 8)
  except ValueError:
    raise TarError(
      f"{path} is damaged at offset {offset}: size {field!r} is no number."
    ) from None


def _name(header: bytes) -> str:
  name = _text(header[:100].split(b"\0", 1)[0])
  # GNU tars keep times where POSIX keeps the front of a long name.
  if header[257:263] == b"ustar\0" and (front := header[345:500].rstrip(b"\0")):
    return f"{_text(front)}/{name}"
  return name


def _pax(
  data: bytes, name: str, size: int, path: Path, offset: int
) -> tuple[str, int]:
  """`path` and `size` of a pax header, lines of "length key=value"."""
  try:
    while data.strip(b"\0"):
      length, _, _ = data.partition(b" ")
      line = data[len(length) + 1 : int(length) - 1]
      key, _, value = line.partition(b"=")
      if key == b"path":
        name = _text(value)
      elif key == b"size":
        size = int(value)
      data = data[int(length) :]
      if int(length) <= 0:
        raise ValueError(length)
  except ValueError:
    raise TarError(
      f"{path} is damaged at offset {offset}: unreadable pax header."
    ) from None
  return name, size


def _text(data: bytes) -> str:
  # A name in another encoding still gives a key that can be printed.
  return data.decode("utf-8", errors="backslashreplace")
