"""Hostile tars: headers, contents, non-tar files; paths of tars."""

import bz2
import gzip
import io
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
from mtv_jax.utils.path_patterns import expand_path

SIZES = Cases(__file__, "tar sizes and headers")
PAX = Cases(__file__, "tar pax and long names")
CONTENTS = Cases(__file__, "tar contents")
FILES = Cases(__file__, "files in place of tars")
PATHS = Cases(__file__, "paths")

GOOD = member(b"k.jpg", JPEG)


def _read(folder, data):
  file = folder / "x.tar"
  file.write_bytes(data() if callable(data) else data)
  config = {"type": "webdataset", "path": str(file), "captions": "ignored"}
  return read_epoch(config, ops="decode|canvas(8)")


_TEXTS = "-1 +5 0o17 1_0 99999999999 77777777777 size 12.5"
_SIZES = [text.encode() for text in _TEXTS.split()]
_SIZES += [b"   -777    \0", b"0001 000\0", "\u0663\u0663".encode()]
# Base 256: -1, -1024, 2^80, 2^63, 2^88 - 1, 1 TiB, other bits.
_SIZES += [b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00", b"\x80\x01" + bytes(10)]
_SIZES += [b"\x80\0\0\0\x80" + bytes(7), b"\x80" + b"\xff" * 11]
_SIZES += [b"\x80" + (1 << 40).to_bytes(11, "big"), b"\xc0" + bytes(10) + b"\1"]
_SUMS = [b"000001\0 ", bytes(8), b"-00001\0 ", b"checksum", b"77777777"]
for _name, _values in {"size": _SIZES, "checksum": _SUMS}.items():
  _headers = {k: header(**{_name: v}) for k, v in by_repr(_values).items()}
  SIZES.add_table(
    lambda folder, head: _read(folder, GOOD + head + END),
    _headers,
    prefix=f"{_name} ",
    match="x.tar",
  )
SIZES.add_table(
  _read,
  {
    "half a header": GOOD + header()[:256],
    "a header without data": header(size=100),
    "data cut short": GOOD[:700],
    "empty": b"",
  },
)
SIZES.add_table(
  _read,
  {"garbage between members": GOOD + b"x" * 512 + GOOD},
  match=f"corrupt: no header at offset {len(GOOD)}",
)
SIZES.add_table(
  _read,
  {
    "no end mark": GOOD,
    "padding cut": header(size=len(JPEG)) + JPEG,
    "garbage after the end mark": GOOD + END + b"x" * 5000,
    "no magic": member(b"k.jpg", JPEG, magic=b""),
    "binary names": member(bytes(range(128, 200)) + b".jpg", JPEG),
  },
  expects="used",
)


def _pax(data: bytes, kind=b"x") -> bytes:
  return header(b"pax", size=len(data), kind=kind) + pad(data)


_TEXT = """0 path=a.jpg|-5 path=a.jpg|+12 path=a.jpg|path=a.jpg|ab path=a.jpg
11 size=-1|12 size=abc|12 size=1e9|31 size=1180591620717411303424|8 size=
16 size=9999999"""
_LINES = [line.encode() + b"\n" for line in _TEXT.replace("\n", "|").split("|")]
_LINES += [b"1" * 5000 + b" path=a\n", b"5013 size=" + b"9" * 5000 + b"\n"]
_LINES += [b"123456789012345678901234567890"]
_headers = {k: _pax(line) + GOOD + END for k, line in by_repr(_LINES).items()}
PAX.add_table(_read, _headers, match="x.tar")
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
    "200,000 lines": _pax(_MANY) + GOOD,
    "200,000 lines, four times": _pax(_MANY) * 4 + GOOD,
    "no member after it": GOOD + _pax(b"14 path=a.jpg\n"),
    "long name without NUL": _pax(b"k" * 400 + b".jpg", b"L") + GOOD,
    "10,000 long names in a row": _pax(b"k.jpg", b"L") * 10_000 + GOOD,
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
    "texts alone": member(b"k.txt", b"a") + END,
    **{
      f"a member of kind {kind}": member(b"k.jpg", JPEG, kind=kind) + END
      for kind in (b"1", b"2", b"3", b"6", b"S", b"Z")
    },
  },
)
_many = {"20,000 empty members": header(b"k.cls") * 20_000 + GOOD + END}
CONTENTS.add_table(_read, _many, expects="used")
_blank = {"an image without bytes": GOOD + member(b"m.jpg", b"") + END}
CONTENTS.add_table(_read, _blank, expects="skip")


@CONTENTS.add("an image of 300 MB", expects="skip", match="314,572,800 bytes")
def _large(folder):
  data = GOOD + header(b"m.jpg", size=300 << 20)
  return _read(folder, lambda: data.ljust(len(data) + (300 << 20), b"\0"))


@CONTENTS.add("a .json of 40 MB", expects="skip", match="at most 16,777,216")
def _large_json(folder):
  text = b'{"captions": [' + b"[]," * 14_000_000 + b"[]]}"
  members = record("a") | {"k.jpg": JPEG, "k.json": text}
  return read_epoch(WebDatasetSource(write_tar(folder / "x.tar", members)))


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


_ZIP = io.BytesIO()
with zipfile.ZipFile(_ZIP, "w") as _file:
  _file.writestr("k.jpg", JPEG)
_POINTER = b"version https://git-lfs.github.com/spec/v1\nsize 9\n"
FILES.add_table(_read, {"a Git LFS pointer": _POINTER}, match="x.tar")
FILES.add_table(_read, {"gzip": gzip.compress(GOOD + END)}, match="compressed")
FILES.add_table(
  _read,
  {
    "bzip2": bz2.compress(GOOD + END),
    "zip": _ZIP.getvalue(),
    "an image": JPEG * 3,
    "a web page": BROKEN_BYTES["a web page"](b""),
    "noise": BROKEN_BYTES["noise"](b""),
  },
  match="is not a tar: it starts with",
)


def _open(folder, make):
  os.chdir(folder)
  path = make(folder / "x.tar")
  return WebDatasetSource(path if isinstance(path, str) else "x.tar")


for _name, _make, _match in (
  ("/dev/zero", lambda file: "/dev/zero", "a device"),
  ("/dev/null", lambda file: "/dev/null", "a device"),
  ("a pipe", os.mkfifo, "a pipe"),
  ("a folder", os.mkdir, "a folder"),
  ("a dangling link", PLACES["a link to nothing"], ""),
):
  FILES.add_table(_open, {_name: _make}, match=_match)


@FILES.add("a socket", match="a socket")
def _socket(folder):
  os.chdir(folder)
  with socket.socket(socket.AF_UNIX) as server:
    server.bind("x.tar")
    return WebDatasetSource("x.tar")


def _read_indexed(folder, make):
  write_tar(folder / "x.tar", record("a"))
  make(folder / "x.tar.index")
  return read_epoch(WebDatasetSource(folder / "x.tar"))


FILES.add_table(_read_indexed, {"an index that is a folder": os.mkdir})
_pipe = {"an index that is a pipe": os.mkfifo}
FILES.add_table(_read_indexed, _pipe, expects="used error")


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


# --- Paths -------------------------------------------------------------------


def _expand(folder, path):
  (folder / "b.tar").touch()
  os.mkfifo(folder / "pipe.tar")
  if path == "loop.tar":
    os.symlink("loop.tar", folder / "loop.tar")
  os.chdir(folder)
  return expand_path(path)


_TEXT = """a{00..02.tar a}.tar {a,{b,c}}.tar a{}.tar a{5..1}.tar a{-5..5}.tar
{0..999}{0..999}{0..999}.tar {00000..49999}.tar ~no_such_user/x.tar a.tar
no/such/folder/*.tar pipe:cat /dev/zero /dev/tty /tmp loop.tar"""
_PATHS = [*_TEXT.split(), "", ", ,", "pipe:cat /dev/zero"]
_PATHS += [3, None, [None], [], {"a": 1}, b"a.tar"]
_PATHS += ["a\0.tar", "a\0*.tar", "\ud800.tar", "\ud800*.tar"]
_PATHS += ["a{0.." + "9" * 30 + "}.tar", "a{0.." + "9" * 10_000 + "}.tar"]
PATHS.add_table(_expand, by_repr(_PATHS))
PATHS.add_table(
  _expand,
  {
    "a million lists": "{a,b}" * 1_000_000,
    "100,000 opening braces": "{" * 100_000,
    "100,000 commas": "a," * 100_000,
    "100,000 commas in a brace": "{" + "a," * 100_000 + "b}.tar",
    "100,000 stars": "*a" * 100_000,
    "100,000 brackets": "[" * 100_000,
    "a name of 100,000 letters": "a" * 100_000,
    "100,000 folders": "a/" * 100_000 + "x.tar",
  },
)
_pipes = {"a pipe": "pipe.tar", "a pipe in a glob": "*.tar"}
PATHS.add_table(_expand, _pipes, match="a pipe")
PATHS.add_table(_expand, {"one file twice": "b.tar,./b.tar"}, match="twice")

test_tars = run_all(SIZES, PAX, CONTENTS, FILES, PATHS)
