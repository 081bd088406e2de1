"""Records of sources, and the error for an unusable one.

A record is a plain dict:

  key         str, unique within its source
  image       bytes (an encoded image file) or uint8 [H, W, 3]
  captions    list of str, at least one if the source has captions

and, where a source has labels, `depth` (float32 [H, W], inverse depth, or
uint16, see `label_values.DepthLabel`), `boxes` (float32 [n, 4], y0, x0, y1, x1
in the unit square), `phrases` (list of n str), `box_scores` (float32 [n]) and
`label` (int, the class). A field that a record lacks is a missing label.
`dropped` (dict of str: int) counts by reason what was left out of its labels;
`cut` (dict of str: list of bool) tells of `captions` and `phrases` whether the
op that tokenized them cut off their ends.

The format of ArrayRecord files (`encode`, `decode`) is a fixed header and
length-prefixed byte strings: a reader needs only `struct`, and unlike a pickle
a file can't contain code.
"""

import contextlib
import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.utils.errors import InputError, UserError, printable

Record = dict[str, Any]

_MAGIC = b"MTV1"


class BadRecord(InputError):
  """A record that can't be used: its message names the key and the reason.

  For what a long run survives (a corrupt image, an empty caption): the pipeline
  counts it, logs it and reads the next record.
  """

  def __init__(self, key: str, reason: str):
    # A reason quotes the content, which may be long or not printable.
    self.key, self.reason = key, printable(reason)
    super().__init__(f"record {printable(repr(key))}: {self.reason}")

  def __reduce__(self) -> tuple:
    # Pickled by its constructor's arguments, for worker processes.
    return type(self), (self.key, self.reason)


@contextlib.contextmanager
def content_errors(key: str, problem: str) -> Iterator[None]:
  """Raises a BadRecord for whatever a library raises on a record's content.

  For code that parses bytes in memory, not for code that reads them: errors of
  storage (an OSError with a number), of memory, of the user's input and the end
  of the process pass unchanged. Panics of Rust libraries are no `Exception`.
  The message is `problem`, such as "the image can't be decoded", and the error.
  """
  try:
    yield
  except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise
    reason = f"{problem} ({type(error).__name__}: {error})"
    raise BadRecord(key, reason) from error


def caption_list(captions: Any) -> list[str]:
  """One caption or several (str or UTF-8 bytes) without the blank ones."""
  if isinstance(captions, bytes | str):
    captions = [captions]
  texts = [t.decode() if isinstance(t, bytes) else str(t) for t in captions]
  return [text for text in texts if text.strip()]


def read_captions(
  key: str, captions: Any, *, required: bool = True, where: str = ""
) -> list[str]:
  """`caption_list`; a BadRecord for what it can't read, and for none."""
  with content_errors(key, "its captions can't be read"):
    texts = caption_list(captions)
  if required and not texts:
    raise BadRecord(key, f"its caption{where} is empty")
  return texts


def count_dropped(record: Record, counts: Mapping[str, int]) -> None:
  """Adds counts by reason to the record's `dropped`."""
  dropped = record.setdefault("dropped", {})
  for reason, number in counts.items():
    dropped[reason] = dropped.get(reason, 0) + number


def encode(record: Mapping[str, Any]) -> bytes:
  """Bytes of a record: its key, its encoded image and its captions.

  A TypeError if the image is not bytes: the caller knows whether JPEG's loss is
  acceptable.
  """
  image = record["image"]
  if not isinstance(image, bytes | bytearray | memoryview):
    raise TypeError(
      f"record {record['key']!r}: 'image' must be the bytes of an encoded"
      f" image, got {type(image).__name__}; encode it first (PNG is lossless)."
    )
  captions = [text.encode() for text in record["captions"]]
  parts = [record["key"].encode(), bytes(image), *captions]
  counts = [len(captions), *map(len, parts)]
  return b"".join([_MAGIC, struct.pack(f"<{len(counts)}I", *counts), *parts])


def decode(data: bytes, *, where: str = "record") -> Record:
  """The record that `encode` wrote; a BadRecord at `where` if corrupt."""
  if data[:4] != _MAGIC:
    raise BadRecord(
      where,
      f"starts with {data[:4]!r}, expected {_MAGIC!r}; was the file written by"
      " mtv-jax make_shards --format=array_record? TFDS data is read with"
      " type='tfds'.",
    )
  try:
    (n_captions,) = struct.unpack_from("<I", data, 4)
    start = 16 + 4 * n_captions
    if start > len(data):
      raise ValueError(f"{n_captions} captions don't fit {len(data)} bytes")
    sizes = struct.unpack_from(f"<{n_captions + 2}I", data, 8)
    ends = list(itertools.accumulate(sizes, initial=start))
    if ends[-1] != len(data):
      raise ValueError(f"{ends[-1]} bytes expected, got {len(data)}")
    key, image, *captions = (data[a:b] for a, b in itertools.pairwise(ends))
    return {
      "key": key.decode(),
      "image": image,
      "captions": [text.decode() for text in captions],
    }
  except (struct.error, ValueError) as error:
    raise BadRecord(where, f"is damaged ({error})") from error
