"""Hostile tars: headers, extended headers, contents, files that are none."""

import bz2
import gzip
import io
import lzma
import os
import socket
import threading
import zipfile

import numpy as np
from hostile.harness import Cases
from hostile.samples import (
  END,
  JPEG,
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
  file.write_bytes(data)
  config = {"type": "webdataset", "path": str(file), "captions": "ignored"}
  return read_epoch(config, ops="decode|canvas(8)")


def _add(cases, name, data, expects="error", match=""):
  def run(folder):
    return _read(folder, data() if callable(data) else data)

  cases.add(name, run, expects=expects, match=match)


# A record with a good header, then one of this size.
for _name, _size in {
  "-1": b"-1",
  "-1000": b"-0000001000\0",
  "-777 with blanks": b"   -777    \0",
  "+5": b"+5",
  "0o17": b"0o17",
  "1_0": b"1_0",
  "0x10": b"0x10",
  "decimal 99999999999": b"99999999999\0",
  "octal 77777777777": b"77777777777\0",
  "letters": b"size",
  "inner blank": b"0001 000\0",
  "unicode digits": "\u0663\u0663".encode(),
  "a point": b"12.5",
  "base 256, -1": b"\xff" * 12,
  "base 256, -1024": b"\xff" * 10 + b"\xfc\x00",
  "base 256, 2^80": b"\x80\x01" + bytes(10),
  "base 256, 2^63": b"\x80" + bytes(3) + b"\x80" + bytes(7),
  "base 256, 2^88 - 1": b"\x80" + b"\xff" * 11,
  "base 256, 1 TiB": b"\x80" + (1 << 40).to_bytes(11, "big"),
  "base 256, other bits": b"\xc0" + bytes(10) + b"\x01",
}.items():
  _add(SIZES, f"size {_name}", GOOD + header(size=_size) + END, match="x.tar")

for _name, _sum in {
  "wrong": b"000001\0 ",
  "empty": bytes(8),
  "negative": b"-00001\0 ",
  "letters": b"checksum",
  "huge": b"77777777",
}.items():
  _add(SIZES, f"checksum {_name}", GOOD + header(checksum=_sum) + END)

for _name, (_data, _expects) in {
  "half a header": (GOOD + header()[:256], "error"),
  "a header and a byte": (GOOD + header()[:1], "error"),
  "a header without data": (header(size=100), "error"),
  "data cut short": (GOOD[:700], "error"),
  "no end mark": (GOOD, "used"),
  "half an end mark": (GOOD + bytes(512), "used"),
  "padding cut": (header(size=len(JPEG)) + JPEG, "used"),
  "garbage after the end mark": (GOOD + END + b"x" * 5000, "used"),
  "garbage between members": (GOOD + b"x" * 512 + GOOD, "error"),
  "empty": (b"", "error"),
  "zeros alone": (bytes(10240), "error"),
  "one zero byte": (b"\0", "error"),
  "no magic": (member(b"k.jpg", JPEG, magic=b""), "used"),
  "binary names": (member(bytes(range(128, 200)) + b".jpg", JPEG), "used"),
  "a name without end": (member(b"k" * 96 + b".jpg", JPEG), "used"),
}.items():
  _add(SIZES, _name, _data, _expects)


def _pax(data: bytes, kind=b"x") -> bytes:
  return header(b"pax", size=len(data), kind=kind) + pad(data)


for _name, _line in {
  "length 0": b"0 path=a.jpg\n",
  "length -5": b"-5 path=a.jpg\n",
  "length +12": b"+12 path=a.jpg\n",
  "no length": b"path=a.jpg\n",
  "length of letters": b"ab path=a.jpg\n",
  "length of 5,000 digits": b"1" * 5000 + b" path=a\n",
  "no blank": b"123456789012345678901234567890",
  "size -1": b"11 size=-1\n",
  "size of letters": b"12 size=abc\n",
  "size 1e9": b"12 size=1e9\n",
  "size 2^70": b"31 size=1180591620717411303424\n",
  "size beyond the file": b"16 size=9999999\n",
  "size of 5,000 digits": b"5013 size=" + b"9" * 5000 + b"\n",
  "size empty": b"8 size=\n",
}.items():
  _add(PAX, f"pax, {_name}", _pax(_line) + GOOD + END, match="x.tar")

_LINES = b"5 a=\n" * ((1 << 20) // 5)
for _name, (_data, _expects) in {
  "length beyond the header": (_pax(b"999 path=b\n") + GOOD, "error"),
  "no equals sign": (_pax(b"8 abcde\n") + GOOD, "used"),
  "empty path": (_pax(b"8 path=\n") + GOOD, "used"),
  "path with NUL": (_pax(b"14 path=a\0.jpg\n") + GOOD, "used error"),
  "path that is not UTF-8": (_pax(b"15 path=\xff\xfe.jpg\n") + GOOD, "used"),
  "path of the folder above": (_pax(b"20 path=../../a.jpg\n") + GOOD, "used"),
  "200,000 lines": (_pax(_LINES) + GOOD, "used"),
  "200,000 lines, four times": (_pax(_LINES) * 4 + GOOD, "used"),
  "zeros": (_pax(bytes(1000)) + GOOD, "used"),
  "no member after it": (GOOD + _pax(b"14 path=a.jpg\n"), "used"),
  "more than a name's size": (_pax(b"x" * (3 << 20)) + GOOD, "used"),
  "cut": (header(b"pax", size=1 << 30, kind=b"x") + b"12", "error"),
  "global header alone": (_pax(b"14 path=a.jpg\n", b"g") + END, "error"),
  "long name cut": (header(b"L", size=5000, kind=b"L") + b"k" * 600, "error"),
  "long name without NUL": (_pax(b"k" * 400 + b".jpg", b"L") + GOOD, "used"),
  "long name of 1 MB": (
    _pax(b"k" * 1_000_000 + b".jpg", b"L") + GOOD,
    "used error skip",
  ),
  "long name of slashes": (_pax(b"/" * 9000 + b"k.jpg", b"L") + GOOD, "used"),
  "10,000 long names in a row": (_pax(b"k.jpg", b"L") * 10_000 + GOOD, "used"),
  "long name after long name": (_pax(b"", b"L") * 3 + GOOD, "used"),
}.items():
  _add(PAX, _name, _data, _expects)


for _name, (_data, _expects) in {
  "a duplicate key": (GOOD + GOOD + END, "error"),
  "two images of a key": (GOOD + member(b"k.png", JPEG) + END, "error"),
  "folders alone": (header(b"d/", kind=b"5") * 4 + END, "error"),
  "symbolic links alone": (header(b"k.jpg", kind=b"2") + END, "error"),
  "hard links alone": (header(b"k.jpg", kind=b"1") + END, "error"),
  "a device": (header(b"k.jpg", kind=b"3") + END, "error"),
  "a pipe": (header(b"k.jpg", kind=b"6") + END, "error"),
  "a sparse file": (member(b"k.jpg", JPEG, kind=b"S") + END, "error"),
  "an unknown kind": (member(b"k.jpg", JPEG, kind=b"Z") + END, "error"),
  "names of dots": (member(b"....jpg", JPEG) + END, "error"),
  "an empty name": (member(b"", JPEG) + END, "error"),
  "texts alone": (member(b"k.txt", b"a") + END, "error"),
  "20,000 empty members": (
    lambda: header(b"k.cls") * 20_000 + GOOD + END,
    "used",
  ),
  "an image without bytes": (
    GOOD + member(b"m.jpg", b"") + END,
    "skip",
  ),
}.items():
  _add(CONTENTS, _name, _data, _expects)


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


for _name, _data in {
  "gzip": gzip.compress(GOOD + END),
  "bzip2": bz2.compress(GOOD + END),
  "xz": lzma.compress(GOOD + END),
  "zip": _zip(),
  "a web page": b"<!DOCTYPE html><html>404 Not Found</html>" * 50,
  "an image": JPEG * 3,
  "text": b"a dog\n" * 200,
  "random bytes": np.random.default_rng(0).bytes(20_000),
  "ones": b"\xff" * 4096,
  "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
}.items():
  _add(FILES, _name, _data)


def _open(path):
  return lambda folder: WebDatasetSource(path)


FILES.add("/dev/zero", _open("/dev/zero"), match="a device")
FILES.add("/dev/null", _open("/dev/null"), match="a device")


@FILES.add("a pipe", match="a pipe")
def _fifo(folder):
  os.mkfifo(folder / "x.tar")
  return WebDatasetSource(f"{folder}/*.tar")


@FILES.add("a socket", match="a socket")
def _socket(folder):
  os.chdir(folder)
  with socket.socket(socket.AF_UNIX) as server:
    server.bind("x.tar")
    return WebDatasetSource("x.tar")


@FILES.add("a folder", match="a folder")
def _folder(folder):
  (folder / "x.tar").mkdir()
  return WebDatasetSource(folder / "x.tar")


@FILES.add("a dangling link")
def _dangling(folder):
  os.symlink("nothing.tar", folder / "x.tar")
  return WebDatasetSource(folder / "x.tar")


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


@SIZES.parametrize
def test_sizes_and_headers(case, hostile):
  hostile(case)


@PAX.parametrize
def test_pax_and_long_names(case, hostile):
  hostile(case)


@CONTENTS.parametrize
def test_contents(case, hostile):
  hostile(case)


@FILES.parametrize
def test_files_in_place_of_tars(case, hostile):
  hostile(case)
