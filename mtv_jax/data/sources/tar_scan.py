"""Scan of a tar's headers: members, grouped into records.

The standard library's `tarfile` creates an object per member, and a set of 100
million records has 300 million. This module parses headers (POSIX ustar and
pax, GNU long names and sizes) into plain offsets.
"""

import dataclasses
import io
import logging
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import PurePath
from typing import NamedTuple

from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

IMAGE, TEXT, JSON = range(3)
# As img2dataset writes them; indices and tables of blocks count these.
EXTENSIONS = dict.fromkeys(("jpg", "jpeg", "png", "webp"), IMAGE)
EXTENSIONS |= {"txt": TEXT, "json": JSON}
_BLOCK = 512
_BUFFER = 8192
# Longer names are garbage; don't read them.
_MAX_NAME = 1 << 20
# Maximum digits of a number in a pax header.
_MAX_DIGITS = 20
_FIX = "Fetch it again, or leave it out of the path."


class TarError(InputError):
  """An unusable tar; the message names the tar, the offset and the fix."""


class Span(NamedTuple):
  """Byte range of a member in the tar; offset 0 if the member is missing."""

  offset: int
  size: int


@dataclasses.dataclass(slots=True)
class Group:
  """The members that share a key: a record, if one is an image."""

  key: str
  start: int  # Offset of the first member's header.
  end: int  # End of the last member.
  spans: list[Span]  # Image, text and JSON.

  @property
  def has_image(self) -> bool:
    return self.spans[IMAGE].offset > 0

  @property
  def is_captioned(self) -> bool:
    return any(span.offset for span in self.spans[TEXT:])


class Scan(NamedTuple):
  """A tar's groups, in the order of their first members."""

  groups: list[Group]
  others: int  # Members that don't belong to a group.

  @property
  def records(self) -> list[Group]:
    """The groups with an image."""
    return [group for group in self.groups if group.has_image]


def scan(path: PurePath) -> Scan:
  """Reads the headers of a tar.

  A member's key is its name up to the first dot after the last slash, as in
  WebDataset; its role follows from its extension, ignoring case.
  """
  return group_members(_walk_file(path), path)


def group_members(
  walked: Iterable[tuple[str, Span, int]], path: PurePath
) -> Scan:
  """Groups members of `walk`; TarError if a key has two images or texts."""
  groups: dict[str, Group] = {}
  others = 0
  for name, span, start in walked:
    key, extension = split_name(name)
    role = EXTENSIONS.get(extension)
    if not key or role is None:
      others += 1
      continue
    if key not in groups:
      groups[key] = Group(key, start, start, [Span(0, 0)] * 3)
    group = groups[key]
    if group.spans[role].offset:
      kind = ("image", ".txt", ".json")[role]
      raise TarError(
        f"{path}: key {key!r} has a second {kind} ({name!r} at offset"
        f" {span.offset}; the first is at {group.spans[role].offset}). Keys"
        " must be unique: remove the duplicate, or leave the tar out of the"
        " path."
      )
    if span.size >= 1 << 32:
      raise TarError(f"{path}: {name!r} has {span.size} bytes, 4 GiB or more.")
    group.spans[role], group.end = span, span.offset + span.size
  return Scan(list(groups.values()), others)


def split_name(name: str) -> tuple[str, str]:
  """`a/b.jpg` -> `a/b`, `jpg`; the key may be empty."""
  folder, slash, base = name.removeprefix("./").rpartition("/")
  stem, _, extension = base.partition(".")
  return (folder + slash + stem if stem else ""), extension.lower()


def members(path: PurePath) -> Iterator[tuple[str, Span]]:
  """Yields name and span of each regular file in the tar."""
  for name, span, _ in _walk_file(path):
    yield name, span


def _walk_file(path: PurePath) -> Iterator[tuple[str, Span, int]]:
  # A buffer covers the caption files between two images and the next header.
  with path_lib.open_file(path, buffering=_BUFFER) as file:
    total = file.seek(0, os.SEEK_END)
    if total == 0:
      raise TarError(f"{path} is empty (0 bytes): fetch it again.")
    if not (yield from walk(file, total, path)):
      log.warning(
        f"{path} has no end mark at offset {total}; if its writer was stopped,"
        " records are missing."
      )


def walk(
  file: io.BufferedIOBase, total: int, path: PurePath
) -> Generator[tuple[str, Span, int], None, bool]:
  """Yields name, span and first header's offset of each regular file.

  Reads up to an end mark or `total` bytes; returns whether there is a mark.
  """
  offset = first_header = 0
  # Overrides for the next member, from extended headers.
  name, size = "", -1
  # `offset` exceeds `total` only if the last padding is missing: harmless.
  while offset < total:
    file.seek(offset)
    header = file.read(_BLOCK)
    if len(header) < _BLOCK:
      raise _truncation_error(path, offset, _BLOCK, total, "a header")
    if not header.strip(b"\0"):
      return True
    _check_header(header, path, offset)
    typeflag = header[156:157]
    length = size
    if size < 0 or typeflag in b"LKxg":
      length = _parse_number(header[124:136], path, offset)
    start = offset + _BLOCK
    if start + length > total:
      member = repr(name or _header_name(header))
      raise _truncation_error(path, start, length, total, member)
    end = start + -(-length // _BLOCK) * _BLOCK
    if typeflag in b"Lx" and length <= _MAX_NAME:
      extra = file.read(length)
      if typeflag == b"L":
        name = _decode_name(extra.rstrip(b"\0"))
      else:
        name, size = _parse_pax(extra, name, size, path, offset)
    elif typeflag not in b"Kg":
      if typeflag in b"0\x007":
        yield name or _header_name(header), Span(start, length), first_header
      name, size, first_header = "", -1, end
    offset = end
  return False


def _check_header(header: bytes, path: PurePath, offset: int) -> None:
  """Verifies a header's checksum, computed with a blank checksum field."""
  field = header[148:156]
  try:
    if int(field.strip(b" \0"), 8) == sum(header) - sum(field) + 8 * ord(" "):
      return
  except ValueError:
    pass
  if offset:
    raise TarError(f"{path} is corrupt: no header at offset {offset}. {_FIX}")
  if header[:2] == b"\x1f\x8b":
    raise TarError(f"{path} is compressed: gunzip it for random access.")
  start = f"it starts with {header[:16]!r}"
  raise TarError(f"{path} is not a tar: {start}. Fetch it again.")


def _truncation_error(
  path: PurePath, offset: int, needed: int, total: int, part: str
) -> TarError:
  return TarError(
    f"{path} is truncated: {part} at offset {offset} needs {needed} bytes, but"
    f" the file has {max(total - offset, 0)} there. {_FIX}"
  )


def _parse_number(field: bytes, path: PurePath, offset: int) -> int:
  """Parses octal digits, or GNU's binary form for sizes from 8 GiB."""
  if field[0] == 0x80:
    return int.from_bytes(field[1:], "big")
  digits = field.strip(b" \0") or b"0"
  # `int` also accepts signs and underscores; sizes must not be negative.
  if digits.isdigit() and not digits.strip(b"01234567"):
    return int(digits, 8)
  raise TarError(
    f"{path} is corrupt: size {field!r} at offset {offset}. {_FIX}"
  )


def _header_name(header: bytes) -> str:
  name = _decode_name(header[:100].split(b"\0", 1)[0])
  # GNU tars store times in the field of POSIX's name prefix.
  if header[257:263] == b"ustar\0" and (front := header[345:500].rstrip(b"\0")):
    return f"{_decode_name(front)}/{name}"
  return name


def _parse_pax(
  data: bytes, name: str, size: int, path: PurePath, offset: int
) -> tuple[str, int]:
  """Reads `path` and `size` of a pax header: lines of "length key=value"."""
  start, length = 0, len(data.rstrip(b"\0"))
  try:
    while start < length:
      space = data.find(b" ", start, start + _MAX_DIGITS)
      digits = data[start:space]
      if space < 0 or not digits.isdigit() or not int(digits):
        raise ValueError(digits)
      end = start + int(digits)
      if end > len(data):
        raise ValueError(digits)
      key, _, value = data[space + 1 : end - 1].partition(b"=")
      if key == b"path":
        name = _decode_name(value)
      elif key == b"size":
        if len(value) > _MAX_DIGITS or not value.isdigit():
          raise ValueError(value)
        size = int(value)
      start = end
  except ValueError:
    raise TarError(
      f"{path} is corrupt: unreadable pax header at offset {offset}. {_FIX}"
    ) from None
  return name, size


def _decode_name(data: bytes) -> str:
  # Names that are not UTF-8 still yield a printable key.
  return data.decode("utf-8", errors="backslashreplace")
