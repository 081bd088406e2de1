"""Records of sources, and the error for an unusable one.

A record is a plain dict:

  key         str, unique within its source
  image       bytes (an encoded image file) or uint8 [H, W, 3]
  captions    list of str, at least one where the source has captions

and, where a source has labels, `depth` (float32 [H, W], inverse depth, or
uint16 as `label_values.DepthLabel` has it), `boxes` (float32 [n, 4], y0, x0,
y1, x1 in the unit square), `phrases` (list of n str), `box_scores` (float32
[n]) and `label` (int, the class). A field that one record lacks is a label
that it does not have. `dropped` (dict of str: int) counts what was left out of
its labels and why; the loader adds them up.

`encode` and `decode` are how a record lies in an ArrayRecord file. The format
is a fixed header and length-prefixed byte strings, so that a reader needs
nothing but `struct` and no file can smuggle in code the way a pickle can.
"""

import struct
from collections.abc import Mapping
from typing import Any

from mtv_jax.utils.errors import InputError

Record = dict[str, Any]

_MAGIC = b"MTV1"
_COUNT = struct.Struct("<I")


class BadRecord(InputError):
  """A record that can't be used: its message names the key and the reason.

  Raise it for what a long run should survive (truncated bytes, bytes that are
  no image, an absurd size, an empty caption): the pipeline counts it, logs it
  and takes the next good record. Anything that is wrong with a whole file or
  a config is another error, and stops the run.
  """

  def __init__(self, key: str, reason: str):
    super().__init__(f"record {key!r}: {reason}")
    self.key = key
    self.reason = reason

  def __reduce__(self) -> tuple:
    # Exceptions travel from worker processes by their constructor's arguments.
    return type(self), (self.key, self.reason)


def caption_list(captions: Any) -> list[str]:
  """One caption or several (str or UTF-8 bytes) without the blank ones."""
  if isinstance(captions, bytes | str):
    captions = [captions]
  texts = [t.decode() if isinstance(t, bytes) else str(t) for t in captions]
  return [text for text in texts if text.strip()]


def count_dropped(record: Record, counts: Mapping[str, int]) -> None:
  """Adds counts by reason to the record's `dropped`."""
  dropped = record.setdefault("dropped", {})
  for reason, number in counts.items():
    dropped[reason] = dropped.get(reason, 0) + number


def encode(record: Mapping[str, Any]) -> bytes:
  """Bytes of a record: its key, its encoded image and its captions.

  Raises:
    TypeError: if the image is not bytes: pixels are encoded by their owner,
      who knows whether the loss of a JPEG is acceptable.
    KeyError: if a field is missing.
  """
  image = record["image"]
  if not isinstance(image, bytes | bytearray | memoryview):
    raise TypeError(
      f"record {record['key']!r}: 'image' must be the bytes of an encoded"
      f" image, got {type(image).__name__}; encode it first (PNG is lossless)."
    )
  captions = [text.encode() for text in record["captions"]]
  parts = [record["key"].encode(), bytes(image), *captions]
  sizes = [_COUNT.pack(len(part)) for part in parts]
  return b"".join([_MAGIC, _COUNT.pack(len(captions)), *sizes, *parts])


def decode(data: bytes, *, where: str = "record") -> Record:
  """The record that `encode` wrote.

  Args:
    data: the bytes of one record.
    where: names the record in errors, such as "train.array_record:17".

  Raises:
    BadRecord: if the bytes are not such a record or are cut short.
  """
  if data[:4] != _MAGIC:
    raise BadRecord(
      where,
      f"starts with {data[:4]!r}, expected {_MAGIC!r}; was the file written by"
      " tools/make_shards.py --format=array_record? TFDS data is read with"
      " type='tfds'.",
    )
  try:
    (n_captions,) = _COUNT.unpack_from(data, 4)
    n_parts = n_captions + 2
    if 8 + 4 * n_parts > len(data):
      raise InputError(f"{n_captions} captions don't fit {len(data)} bytes")
    sizes = struct.unpack_from(f"<{n_parts}I", data, 8)
    start = 8 + 4 * n_parts
    if start + sum(sizes) != len(data):
      raise InputError(f"{start + sum(sizes)} bytes expected, got {len(data)}")
    parts = []
    for size in sizes:
      parts.append(data[start : start + size])
      start += size
    key, image, *captions = parts
    return {
      "key": key.decode(),
      "image": image,
      "captions": [text.decode() for text in captions],
    }
  except (struct.error, ValueError) as error:
    raise BadRecord(where, f"is damaged ({error})") from error
