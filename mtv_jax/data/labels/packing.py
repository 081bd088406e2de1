"""Serialized labels: flat msgpack maps, validated when read."""

from collections.abc import Mapping
from typing import Any

import msgpack

# Limits of a stored label, far above the sizes of experts and data sets.
MAX_ENTRIES = 10_000
_MAX_BYTES = 1 << 26


def unpack(data: bytes) -> dict[str, Any]:
  """Parses a flat msgpack map of scalars and lists of scalars."""
  if len(data) > _MAX_BYTES:
    raise ValueError(f"{len(data):,} bytes, at most {_MAX_BYTES:,}")
  unpacker = msgpack.Unpacker(max_buffer_size=len(data) + 1)
  unpacker.feed(data)
  packed = {}
  for _ in range(unpacker.read_map_header()):
    name = _unpack_scalar(unpacker, data)
    if _is_list(data, unpacker.tell()):
      count = unpacker.read_array_header()
      if count > MAX_ENTRIES:
        raise ValueError(
          f"{name} has {count:,} entries, at most {MAX_ENTRIES:,}"
        )
      value = [_unpack_scalar(unpacker, data) for _ in range(count)]
    else:
      value = _unpack_scalar(unpacker, data)
    packed[name] = value
  if (end := unpacker.tell()) != len(data):
    raise ValueError(f"{len(data) - end} bytes after its end")
  return packed


def _is_list(data: bytes, at: int) -> bool:
  return data[at] & 0xF0 == 0x90 or data[at] in (0xDC, 0xDD)


def _unpack_scalar(unpacker: msgpack.Unpacker, data: bytes) -> Any:
  """Reads a value; rejects nested ones, which cost memory per byte."""
  at = unpacker.tell()
  if _is_list(data, at) or data[at] & 0xF0 == 0x80 or data[at] in (0xDE, 0xDF):
    raise ValueError(f"a nested value at byte {at}")
  return unpacker.unpack()


def read_typed_field(packed: Mapping[str, Any], name: str, *kinds: type) -> Any:
  """Returns a field; ValueError if it is missing or of another type."""
  if name not in packed:
    raise ValueError(f"it has no {name!r}")
  # Not isinstance: a bool is an int.
  if type(packed[name]) not in kinds:
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(
      f"{name!r} is a {type(packed[name]).__name__}, not {names}"
    )
  return packed[name]
