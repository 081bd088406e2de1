"""Files for the hostile corpus, and runs of the input pipeline over them."""

import io
import json
import os
import pathlib
import pickle
import struct
import zlib
from collections.abc import Iterable, Mapping

import dataset_samples
import numpy as np
from PIL import Image

from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import build_source
from mtv_jax.data.tokenizers import build_tokenizer

write_tar = dataset_samples.write_members
OPS = "decode|canvas(8)|caption(16)"
END = bytes(1024)  # The end mark of a tar.


def image_file(format="JPEG", size=(16, 12), mode="RGB", **options) -> bytes:
  """An image file of random pixels."""
  width, height = size
  pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3))
  stream = io.BytesIO()
  image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
  image.save(stream, format, **options)
  return stream.getvalue()


JPEG = image_file()


def chunk(kind: bytes, data: bytes = b"", checksum: int | None = None) -> bytes:
  """A chunk of a PNG."""
  end = zlib.crc32(kind + data) if checksum is None else checksum
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", end)


def png(*chunks: bytes) -> bytes:
  """A PNG of chunks."""
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def ihdr(width=10, height=10, bits=8, colour=2, interlace=0) -> bytes:
  """The header chunk of a PNG."""
  fields = width, height, bits, colour, 0, 0, interlace
  return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def header(
  name=b"a.jpg", *, size=0, kind=b"0", magic=b"ustar\x0000", checksum=None
) -> bytes:
  """A tar header; `size` is a number or the bytes of its field."""
  if isinstance(size, int):
    size = f"{size:011o}\0".encode()
  fields = [
    name.ljust(100, b"\0"),
    b"0000644\0" + b"0000000\0" * 2,
    size.ljust(12, b"\0"),
    b"00000000000\0",
    b" " * 8,
    kind,
    bytes(100),
    magic.ljust(8, b"\0"),
  ]
  block = b"".join(fields).ljust(512, b"\0")
  if checksum is None:
    checksum = f"{sum(block):06o}\0 ".encode()
  return block[:148] + checksum.ljust(8, b"\0") + block[156:]


def pad(data: bytes) -> bytes:
  """Data of a member, padded to blocks."""
  return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes, **fields) -> bytes:
  """A member of a tar: its header and its data."""
  return header(name, size=len(data), **fields) + pad(data)


def record(key: str, image=JPEG, text="a dog", **fields) -> dict[str, bytes]:
  """The members of a record; `text` and `json` of None are left out."""
  members = {f"{key}.jpg": image}
  if text is not None:
    members[f"{key}.txt"] = text if isinstance(text, bytes) else text.encode()
  if "json" in fields:
    content = fields["json"]
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    members[f"{key}.json"] = content
  return members


def read_epoch(source, *, tokenizer="bytes", ops=OPS):
  """Reads every record of a source; "skip" with the reasons of bad ones.

  Each bad record must be counted, with its key, and the rest used.
  """
  if not hasattr(source, "shards"):
    source = build_source(source)
  if isinstance(tokenizer, str):
    tokenizer = build_tokenizer(tokenizer)
  config = {"ops": ops, "shuffle": "none", "max_corrupt": 1.0}
  loader = make_loader(
    config, batch_size=1, seed=0, tokenizer=tokenizer, sources=[source]
  )
  with loader:
    for _ in range(len(source)):
      next(loader)
    stats = loader.stats
  if not stats.corrupt:
    return stats.read
  # A record is counted each time that it is tried.
  assert 1 <= len(stats.reasons) <= stats.corrupt, stats
  return "skip", "; ".join(f"{k}: {r}" for k, r in stats.reasons.items())


def read_tar(folder: pathlib.Path, members: dict[str, bytes], **options):
  """Reads a tar of hostile members between two good records."""
  good = {"text": "good"}
  members = record("a", **good) | members | record("z", **good)
  file = write_tar(folder / "x.tar", members)
  return read_epoch({"type": "webdataset", "path": str(file)}, **options)


def read_record(folder: pathlib.Path, **fields):
  """Reads a hostile record, of the key "h", between two good ones."""
  options = {k: fields.pop(k) for k in ("tokenizer", "ops") if k in fields}
  return read_tar(folder, record("h", **fields), **options)


class _Canary:
  """Its pickle writes outside the case's folder if it is executed."""

  def __reduce__(self):
    return os.mkdir, ("../executed",)


# Changes of a valid file's bytes: of these no reader can use the result.
NOISE = np.random.default_rng(0).bytes(20_000)
BROKEN_BYTES = {
  "empty": lambda data: b"",
  "a byte": lambda data: data[:1],
  "its first four bytes": lambda data: data[:4],
  "noise": lambda data: NOISE,
  "zeros": lambda data: bytes(10_000),
  "half": lambda data: data[: len(data) // 2],
  "reversed": lambda data: data[::-1],
  "a web page": lambda data: b"<!DOCTYPE html><html>404 Not Found</html>" * 50,
  "a pickle": lambda data: pickle.dumps(_Canary()) + data[16:],
}
# Damage that some readers accept.
DAMAGED_BYTES = {
  "without its last byte": lambda data: data[:-1],
  "twice": lambda data: data * 2,
  "noise in the middle": lambda data: (
    data[: len(data) // 2] + NOISE[:2000] + data[-100:]
  ),
  "damaged at its start": lambda data: flip(data, 0, 0.02),
  "damaged in its middle": lambda data: flip(data, 0.4, 0.6),
  "damaged at its end": lambda data: flip(data, 0.95, 1),
}


def flip(data: bytes, start: float, stop: float) -> bytes:
  """Inverts some bits of the bytes from one share of a file to another."""
  changed = bytearray(data)
  for i in range(int(start * len(data)), int(stop * len(data))):
    changed[i] ^= 0xA5
  return bytes(changed)


# JSON of the wrong kind, for a file that must be an object.
BROKEN_JSON = {
  "empty": b"",
  "not JSON": b"{]",
  "binary": bytes(range(256)),
  "NUL bytes": bytes(1000),
  "a list": b"[1]",
  "a string": b'"x"',
  "a number": b"3",
  "null": b"null",
  "cut": b'{"model_type": "sig',
  "nested 100,000 deep": b'{"a":' * 100_000,
  "lists a million deep": b"[" * 1_000_000,
  "a number of 10,000 digits": b'{"model_type": ' + b"9" * 10_000 + b"}",
  "latin-1": b'{"version": "\xff"}',
  "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le")[:-1],
}
# File names that no list of files may have.
OUTSIDE = {
  "a parent": "../x.json",
  "an absolute path": "/etc/passwd",
  "a number": 3,
  "empty": "",
  "a null byte": "a\0b.json",
  "a lone surrogate": "\ud800.json",
  "a name of 5,000 bytes": "a" * 5000,
  "a path of 9,000 bytes": "a/" * 4500 + "a",
}
HUGE_FILE = 1 << 40  # Bytes of a sparse file.


def sparse(file: pathlib.Path) -> None:
  """Writes a file of a terabyte of zeros."""
  with file.open("wb") as stream:
    stream.truncate(HUGE_FILE)


# What may exist instead of a file: functions of its path.
PLACES = {
  "a folder": os.mkdir,
  "a pipe": os.mkfifo,
  "a link to itself": lambda file: file.symlink_to(file.name),
  "a link to nothing": lambda file: file.symlink_to("nothing"),
  "a link to /dev/zero": lambda file: file.symlink_to("/dev/zero"),
  "a terabyte": sparse,
}


def other_types(value: object) -> list[object]:
  """JSON values whose type differs from a valid one's."""
  kinds = None, True, "x", 0.5, [[1]], {"a": 1}
  return [kind for kind in kinds if type(kind) is not type(value)]


def as_bytes(content: object) -> bytes:
  """Bytes themselves, a callable's, or the JSON of anything else."""
  content = content() if callable(content) else content
  return content if isinstance(content, bytes) else json.dumps(content).encode()


def by_repr(values: Iterable[object]) -> dict[str, object]:
  """Values by (shortened) representation."""
  named: dict[str, object] = {}
  for value in values:
    name = ascii(value)[:40]
    named[f"{name} ({len(named)})" if name in named else name] = value
  return named


def changed(
  valid: Mapping[str, object], values: Mapping[str, Iterable[object]]
) -> dict[str, dict]:
  """Copies of a valid object, each with another value of one key."""
  return {
    f"{key} is {name}": {**valid, key: value}
    for key, listed in values.items()
    for name, value in by_repr(listed).items()
  }
