"""Files for the hostile corpus, and runs of the input pipeline over them."""

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import build_source
from mtv_jax.data.tokenizers import build_tokenizer

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


def write_tar(file: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
  """A well-formed tar."""
  with tarfile.open(file, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file


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

  Each bad record must be counted, with its key, and the others used.
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
