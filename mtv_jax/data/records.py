"""Record format of sources, and the error for an unusable record.

A record is a plain dict:

  key         str, unique within its source
  image       bytes (an encoded image file) or uint8 [H, W, 3]
  captions    list of str, at least one if the source has captions
  conversation  list of str, questions and answers in turn, if the source has
              conversations; a question with `<image>` is about the image

A labelled record also has `depth` (float32 [H, W], inverse depth, or uint16,
see `label_values.DepthLabel`), `boxes` (float32 [n, 4], y0, x0, y1, x1 in the
unit square), `phrases` (list of n str), `box_scores` (float32 [n]) and `label`
(int, the class). A missing field is a missing label. `dropped` (dict of str:
int) counts the label parts that were left out, by reason. `texts` (Counter)
counts encoded texts by kind, and those cut or with unknown words.

ArrayRecord files (`encode`, `decode`) store a fixed header and length-prefixed
byte strings. Reading them needs only `struct`, and unlike a pickle they can't
contain code.
"""

import collections
import contextlib
import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.utils.errors import InputError, UserError, printable

Record = dict[str, Any]

# Fields that a label set adds, by the kind of its labels.
LABEL_FIELDS = {
  "depth": frozenset(["depth"]),
  "boxes": frozenset(["boxes", "phrases", "box_scores"]),
  "features": frozenset(["features"]),
}
_MAGIC = b"MTV1"
# Ends errors about missing captions.
NO_CAPTIONS_HINT = (
  "To train on images alone, use a recipe without text, such as mae_b16_224, or"
  " set captions='ignored' in data.train."
)


class BadRecord(InputError):
  """An unusable record; the message names its key and the reason.

  For errors that a long run survives (a corrupt image, an empty caption): the
  pipeline counts and logs them and reads the next record.
  """

  def __init__(self, key: str, reason: str):
    # A reason quotes the content, which may be long or not printable.
    self.key, self.reason = key, printable(reason)
    super().__init__(f"record {printable(repr(key))}: {self.reason}")

  def __reduce__(self) -> tuple:
    # Worker processes pickle it: rebuild it from the constructor's arguments.
    return type(self), (self.key, self.reason)


class NoRecordsError(InputError):
  """Raised for a path without images, shards or required captions."""


@contextlib.contextmanager
def content_errors(key: str, problem: str) -> Iterator[None]:
  """Turns any error of a library that parses a record's content into BadRecord.

  For code that parses bytes in memory. Storage errors (OSError with an errno),
  MemoryError, UserError and process exits pass unchanged. Catches BaseException
  because panics of Rust libraries derive from it.
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


def read_captions(
  key: str, captions: Any, *, required: bool = True, where: str = ""
) -> list[str]:
  """Decodes one or more captions (str or UTF-8 bytes) and drops blank ones."""
  if isinstance(captions, bytes | str):
    captions = [captions]
  with content_errors(key, "its captions can't be read"):
    texts = [t.decode() if isinstance(t, bytes) else str(t) for t in captions]
    texts = [text for text in texts if text.strip()]
  if required and not texts:
    raise BadRecord(key, f"its caption{where} is empty")
  return texts


def count_dropped(record: Record, counts: Mapping[str, int]) -> None:
  """Adds numbers of dropped labels, by reason, to the record's `dropped`."""
  dropped = record.setdefault("dropped", {})
  for reason, number in counts.items():
    dropped[reason] = dropped.get(reason, 0) + number


def count_text(
  record: Record, kind: str, is_cut: bool, has_unknown: bool
) -> None:
  """Counts an encoded text in the record's `texts`."""
  texts = record.setdefault("texts", collections.Counter())
  texts[kind] += 1
  texts[f"{kind}_cut"] += is_cut
  texts[f"{kind}_unknown"] += has_unknown


def encode(record: Mapping[str, Any]) -> bytes:
  """Encodes a record's key, encoded image and captions as bytes."""
  image = record["image"]
  if not isinstance(image, bytes | bytearray | memoryview):
    raise TypeError(
      f"record {record['key']!r}: 'image' must be the bytes of an encoded"
      f" image, got {type(image).__name__}."
    )
  captions = [text.encode() for text in record["captions"]]
  parts = [record["key"].encode(), bytes(image), *captions]
  counts = [len(captions), *map(len, parts)]
  return b"".join([_MAGIC, struct.pack(f"<{len(counts)}I", *counts), *parts])


def decode(data: bytes, *, where: str = "record") -> Record:
  """Decodes what `encode` wrote; `where` names corrupt records in errors."""
  if data[:4] != _MAGIC:
    start = f"starts with {data[:4]!r}, not {_MAGIC!r}"
    hint = "expected a file of make_shards; TFDS data need type='tfds'"
    raise BadRecord(where, f"{start}: {hint}")
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
