"""Hostile tars: headers, extended headers, contents, non-tar files."""

import bz2
import gzip
import io
import lzma
import os
import socket
import threading
import zipfile

from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  END,
  JPEG,
  PLACES,
  by_repr,
  header,
  member,
  pad,
  read_epoch,
  record,
  write_tar,
)

from mtv_jax.data.sources.webdataset import WebDatasetSource

SIZES = Cases(__file__, "tar sizes and headers")
PAX = Cases(__file__, "tar pax and long names")
CONTENTS = Cases(__file__, "tar contents")
FILES = Cases(__file__, "files in place of tars")

GOOD = member(b"k.jpg", JPEG)


def _read(folder, data):
  file = folder / "x.tar"
  file.write_bytes(data() if callable(data) else data)
  config = {"type": "webdataset", "path": str(file), "captions": "ignored"}
  return read_epoch(config, ops="decode|canvas(8)")


# A record with a good header, then one of this size.
_SIZES = [
  *[b"-1", b"-0000001000\0", b"   -777    \0", b"+5", b"0o17", b"1_0", b"0x10"],
  *[b"99999999999\0", b"77777777777\0", b"size", b"0001 000\0", b"12.5"],
  "\u0663\u0663".encode(),
  # Base 256: -1, -1024, 2^80, 2^63, 2^88 - 1, 1 TiB, other bits.
  *[b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00", b"\x80\x01" + bytes(10)],
  *[b"\x80\0\0\0\x80" + bytes(7), b"\x80" + b"\xff" * 11],
  *[b"\x80" + (1 << 40).to_bytes(11, "big"), b"\xc0" + bytes(10) + b"\x01"],
]
SIZES.add_table(
  lambda folder, size: _read(folder, GOOD + header(size=size) + END),
  by_repr(_SIZES),
  prefix="size ",
  match="x.tar",
)
_SUMS = [b"000001\0 ", bytes(8), b"-00001\0 ", b"checksum", b"77777777"]
SIZES.add_table(
  lambda folder, sums: _read(folder, GOOD + header(checksum=sums) + END),
  by_repr(_SUMS),
  prefix="checksum ",
)
SIZES.add_table(
  _read,
  {
    "half a header": GOOD + header()[:256],
    "a header and a byte": GOOD + header()[:1],
    "a header without data": header(size=100),
    "data cut short": GOOD[:700],
    "garbage between members": GOOD + b"x" * 512 + GOOD,
    "empty": b"",
    "zeros alone": bytes(10240),
    "one zero byte": b"\0",
  },
)
SIZES.add_table(
  _read,
  {
    "no end mark": GOOD,
    "half an end mark": GOOD + bytes(512),
    "padding cut": header(size=len(JPEG)) + JPEG,
    "garbage after the end mark": GOOD + END + b"x" * 5000,
    "no magic": member(b"k.jpg", JPEG, magic=b""),
    "binary names": member(bytes(range(128, 200)) + b".jpg", JPEG),
    "a name without end": member(b"k" * 96 + b".jpg", JPEG),
  },
  expects="used",
)


def _pax(data: bytes, kind=b"x") -> bytes:
  return header(b"pax", size=len(data), kind=kind) + pad(data)


_LINES = [
  *[b"0 path=a.jpg\n", b"-5 path=a.jpg\n", b"+12 path=a.jpg\n"],
  *[b"path=a.jpg\n", b"ab path=a.jpg\n", b"1" * 5000 + b" path=a\n"],
  *[b"123456789012345678901234567890", b"11 size=-1\n", b"12 size=abc\n"],
  *[b"12 size=1e9\n", b"31 size=1180591620717411303424\n", b"8 size=\n"],
  *[b"16 size=9999999\n", b"5013 size=" + b"9" * 5000 + b"\n"],
]
PAX.add_table(
  lambda folder, line: _read(folder, _pax(line) + GOOD + END),
  by_repr(_LINES),
  match="x.tar",
)
_MANY = b"5 a=\n" * ((1 << 20) // 5)
PAX.add_table(
  _read,
  {
    "length beyond the header": _pax(b"999 path=b\n") + GOOD,
    "cut": header(b"pax", size=1 << 30, kind=b"x") + b"12",
    "global header alone": _pax(b"14 path=a.jpg\n", b"g") + END,
    "long name cut": header(b"L", size=5000, kind=b"L") + b"k" * 600,
  },
)
PAX.add_table(
  _read,
  {
    "no equals sign": _pax(b"8 abcde\n") + GOOD,
    "empty path": _pax(b"8 path=\n") + GOOD,
    "path that is not UTF-8": _pax(b"15 path=\xff\xfe.jpg\n") + GOOD,
    "path of the folder above": _pax(b"20 path=../../a.jpg\n") + GOOD,
    "200,000 lines": _pax(_MANY) + GOOD,
    "200,000 lines, four times": _pax(_MANY) * 4 + GOOD,
    "zeros": _pax(bytes(1000)) + GOOD,
    "no member after it": GOOD + _pax(b"14 path=a.jpg\n"),
    "more than a name's size": _pax(b"x" * (3 << 20)) + GOOD,
    "long name without NUL": _pax(b"k" * 400 + b".jpg", b"L") + GOOD,
    "long name of slashes": _pax(b"/" * 9000 + b"k.jpg", b"L") + GOOD,
    "10,000 long names in a row": _pax(b"k.jpg", b"L") * 10_000 + GOOD,
    "long name after long name": _pax(b"", b"L") * 3 + GOOD,
  },
  expects="used",
)
PAX.add_table(
  _read,
  {
    "path with NUL": _pax(b"14 path=a\0.jpg\n") + GOOD,
    "long name of 1 MB": _pax(b"k" * 1_000_000 + b".jpg", b"L") + GOOD,
  },
  expects="used error skip",
)

CONTENTS.add_table(
  _read,
  {
    "a duplicate key": GOOD + GOOD + END,
    "two images of a key": GOOD + member(b"k.png", JPEG) + END,
  },
  match="'k' has a second image",
)
CONTENTS.add_table(
  _read,
  {
    "folders alone": header(b"d/", kind=b"5") * 4 + END,
    "names of dots": member(b"....jpg", JPEG) + END,
    "an empty name": member(b"", JPEG) + END,
    "texts alone": member(b"k.txt", b"a") + END,
    **{
      f"a member of kind {kind}": member(b"k.jpg", JPEG, kind=kind) + END
      for kind in (b"1", b"2", b"3", b"6", b"S", b"Z")
    },
  },
)
CONTENTS.add_table(
  _read,
  {"20,000 empty members": lambda: header(b"k.cls") * 20_000 + GOOD + END},
  expects="used",
)
CONTENTS.add_table(
  _read,
  {"an image without bytes": GOOD + member(b"m.jpg", b"") + END},
  expects="skip",
)


@CONTENTS.add("an image of 300 MB", expects="skip", match="314,572,800 bytes")
def _large(folder):
  with (folder / "x.tar").open("wb") as file:
    file.write(GOOD + header(b"m.jpg", size=300 << 20))
    file.truncate(len(GOOD) + 512 + (300 << 20))
  return read_epoch(
    {"type": "webdataset", "path": f"{folder}/x.tar", "captions": "ignored"},
    ops="decode|canvas(8)",
  )


@CONTENTS.add("a .json of 40 MB", expects="skip", match="at most 16,777,216")
def _large_json(folder):
  text = b'{"captions": [' + b"[]," * 14_000_000 + b"[]]}"
  members = record("a") | {"k.jpg": JPEG, "k.json": text}
  file = write_tar(folder / "x.tar", members)
  return read_epoch({"type": "webdataset", "path": str(file)})


@CONTENTS.add("cut while it is read", match="ends at offset")
def _cut(folder):
  file = write_tar(folder / "x.tar", record("a"))
  source = WebDatasetSource(file)
  _ = source[0]
  os.truncate(file, 600)
  return read_epoch(source)


@CONTENTS.add("replaced before it is read", match="start again")
def _replaced(folder):
  file = write_tar(folder / "x.tar", record("a"))
  source = WebDatasetSource(file)
  write_tar(file, record("a") | record("b"))
  return read_epoch(source)


def _zip() -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as file:
    file.writestr("k.jpg", JPEG)
  return stream.getvalue()


_POINTER = b"version https://git-lfs.github.com/spec/v1\nsize 9\n"
FILES.add_table(_read, {"a Git LFS pointer": _POINTER}, match="x.tar")
FILES.add_table(_read, {"gzip": gzip.compress(GOOD + END)}, match="compressed")
FILES.add_table(
  _read,
  {
    "bzip2": bz2.compress(GOOD + END),
    "xz": lzma.compress(GOOD + END),
    "zip": _zip(),
    "an image": JPEG * 3,
    "text": b"a dog\n" * 200,
    "ones": b"\xff" * 4096,
    "a web page": BROKEN_BYTES["a web page"](b""),
    "noise": BROKEN_BYTES["noise"](b""),
  },
  match="is not a tar: it starts with",
)


def _open(folder, make):
  os.chdir(folder)
  path = make(folder / "x.tar")
  return WebDatasetSource(path if isinstance(path, str) else "x.tar")


FILES.add_table(
  _open,
  {name: lambda file, path=name: path for name in ("/dev/zero", "/dev/null")},
  match="a device",
)
FILES.add_table(_open, {"a pipe": os.mkfifo}, match="a pipe")
FILES.add_table(_open, {"a folder": os.mkdir}, match="a folder")
FILES.add_table(_open, {"a dangling link": PLACES["a link to nothing"]})


@FILES.add("a socket", match="a socket")
def _socket(folder):
  os.chdir(folder)
  with socket.socket(socket.AF_UNIX) as server:
    server.bind("x.tar")
    return WebDatasetSource("x.tar")


@FILES.add("an index that is a pipe", expects="used error")
def _index_pipe(folder):
  write_tar(folder / "x.tar", record("a"))
  os.mkfifo(folder / "x.tar.index")
  return read_epoch(WebDatasetSource(folder / "x.tar"))


@FILES.add("an index that is a folder")
def _index_folder(folder):
  write_tar(folder / "x.tar", record("a"))
  (folder / "x.tar.index").mkdir()
  return read_epoch(WebDatasetSource(folder / "x.tar"))


@FILES.add("a hundred broken tars among them", match="100 of 110 tars")
def _many(folder):
  for i in range(100):
    (folder / f"a{i:03d}.tar").write_bytes(GOOD + header(size=b"-1"))
  for i in range(10):
    write_tar(folder / f"b{i:03d}.tar", record(f"k{i}"))
  threads = threading.active_count()
  try:
    return WebDatasetSource(f"{folder}/*.tar")
  finally:
    assert threading.active_count() == threads


test_tars = run_all(SIZES, PAX, CONTENTS, FILES)
