"""Hostile ArrayRecord and Parquet files, tar indices, and listings."""

import json
import os
import struct

import numpy as np
from hostile.harness import Cases
from hostile.samples import JPEG, read_epoch, record, write_tar

from mtv_jax.data import records
from mtv_jax.data.sources import array_record, listings, shard_writer
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.tar_index import ENTRY, HEADER
from mtv_jax.data.sources.webdataset import WebDatasetSource

ARRAY_RECORDS = Cases(__file__, "array_record files", slow=True)
PARQUET = Cases(__file__, "parquet files", slow=True)
INDICES = Cases(__file__, "tar indices", slow=True)
LISTINGS = Cases(__file__, "listings", slow=True)

_NOISE = np.random.default_rng(0).bytes(4000)


# --- ArrayRecord -------------------------------------------------------------


def _records(folder):
  file = folder / "x.array_record"
  examples = [
    {"key": f"k{i}", "image": JPEG, "captions": ["a dog"]} for i in range(5)
  ]
  array_record.write(file, examples)
  return file


def _array_record(name, change, expects="error"):
  def run(folder):
    file = _records(folder)
    data = change(file.read_bytes())
    if data is not None:
      file.write_bytes(data)
    return read_epoch(ArrayRecordSource(file))

  ARRAY_RECORDS.add(name, run, expects=expects)


def _flip(start: float, stop: float):
  def change(data):
    changed = bytearray(data)
    for i in range(int(start * len(data)), int(stop * len(data))):
      changed[i] ^= 0xA5
    return bytes(changed)

  return change


for _name, _change in {
  "empty": lambda data: b"",
  "noise": lambda data: _NOISE * 30,
  "zeros": lambda data: bytes(200_000),
  "half": lambda data: data[: len(data) // 2],
  "without its last byte": lambda data: data[:-1],
  "a byte": lambda data: data[:1],
  "64 bytes": lambda data: data[:64],
  "its end repeated": lambda data: data + data[-1000:],
  "a tar": lambda data: b"\0" * 512 + data,
  "damaged everywhere": _flip(0, 1),
}.items():
  _array_record(_name, _change)
_array_record("damaged at its end", _flip(0.98, 1), "error used")
_array_record("damaged at its start", _flip(0, 0.001), "error skip used")
_array_record("damaged records", _flip(0.001, 0.02), "error skip used")


def _raw(name, items, expects="skip"):
  def run(folder):
    file = folder / "x.array_record"
    good = {"key": "good", "image": JPEG, "captions": ["a dog"]}
    array_record.write_bytes(file, [records.encode(good), *items()])
    return read_epoch(ArrayRecordSource(file))

  ARRAY_RECORDS.add(name, run, expects=expects, match="")


def _bytes_of(key=b"k", image=JPEG, captions=(b"a dog",)):
  parts = [key, image, *captions]
  counts = [len(captions), *map(len, parts)]
  return b"MTV1" + struct.pack(f"<{len(counts)}I", *counts) + b"".join(parts)


_raw("records of no bytes", lambda: [b""] * 2)
_raw("records of another format", lambda: [b"\n\x0b\n\t\n\x05image"])
_raw("keys that are not UTF-8", lambda: [_bytes_of(key=b"\xff\xfe")])
_raw("captions that are not UTF-8", lambda: [_bytes_of(captions=[b"\xff"])])
_raw(
  "captions of lone surrogates", lambda: [_bytes_of(captions=[b"\xed\xa0\x80"])]
)
_raw(
  "a million empty captions", lambda: [_bytes_of(captions=[b""] * 1_000_000)]
)
_raw("images of no bytes", lambda: [_bytes_of(image=b"")])
_raw("no captions", lambda: [_bytes_of(captions=[])])


def _sidecar(name, text):
  @ARRAY_RECORDS.add(f"a sidecar, {name}", match="x_meta.jsonl")
  def _(folder):
    file = _records(folder)
    (folder / "x_meta.jsonl").write_bytes(text)
    return ArrayRecordSource(file).read_metadata(0)


_sidecar("not JSON", b"{\n")
_sidecar("of lists", b"[]\n")
_sidecar("without keys", b"{}\n")
_sidecar("of numbers", b"3\n")
_sidecar("nested 100,000 deep", b"[" * 100_000)
_sidecar("latin-1", b'{"key": "\xff"}\n')
_sidecar("of keys that are lists", b'{"key": []}\n')


@ARRAY_RECORDS.add("a sidecar that is a pipe", expects="used")
def _sidecar_pipe(folder):
  file = _records(folder)
  os.mkfifo(folder / "x_meta.jsonl")
  return ArrayRecordSource(file).read_metadata(0)


@ARRAY_RECORDS.add("a pipe")
def _pipe(folder):
  os.mkfifo(folder / "x.array_record")
  return ArrayRecordSource(folder / "x.array_record")


@ARRAY_RECORDS.add("records in groups", match="groups of 5")
def _grouped(folder):
  module = array_record._module()
  file = folder / "x.array_record"
  writer = module.ArrayRecordWriter(str(file), "group_size:5")
  for _ in range(10):
    writer.write(b"x")
  writer.close()
  return ArrayRecordSource(file)


# --- Parquet -----------------------------------------------------------------


def _table(**columns):
  import pyarrow as pa

  return pa.table(columns)


def _images(values):
  import pyarrow as pa

  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  return pa.array([{"bytes": v, "path": None} for v in values], kind)


def _write(folder, table, **options):
  from pyarrow import parquet

  file = folder / "x.parquet"
  parquet.write_table(table, file, **options)
  return file


def _read(file):
  return read_epoch({"type": "parquet", "path": str(file)})


def _parquet(name, make, expects="error", match=""):
  PARQUET.add(
    name,
    lambda folder: _read(_write(folder, make())),
    expects=expects,
    match=match,
  )


def _damaged(name, change, expects="error"):
  def run(folder):
    rows = [JPEG] * 20
    file = _write(folder, _table(image=_images(rows), text=["a dog"] * 20))
    file.write_bytes(change(file.read_bytes()))
    return _read(file)

  PARQUET.add(name, run, expects=expects)


for _name, _change in {
  "empty": lambda data: b"",
  "noise": lambda data: _NOISE,
  "zeros": lambda data: bytes(4000),
  "half": lambda data: data[: len(data) // 2],
  "without its last byte": lambda data: data[:-1],
  "its magic alone": lambda data: b"PAR1",
  "its magic twice": lambda data: b"PAR1PAR1",
  "a footer of 2 GiB": lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
  "a footer of 2^32 - 1": lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1",
  "a footer of 0": lambda data: data[:-8] + bytes(4) + b"PAR1",
  "a footer of noise": lambda data: b"PAR1" + _NOISE + b"\xa0\x0f\0\0PAR1",
}.items():
  _damaged(_name, _change)
_damaged("damaged pages", _flip(0.05, 0.3), "skip error")
_damaged("damaged everywhere but the footer", _flip(0.01, 0.5), "skip error")
_damaged("a damaged footer", _flip(0.8, 0.95), "skip error used")


def _binary(values):
  import pyarrow as pa

  return pa.array(values, pa.binary())


def _bad_utf8(values):
  import pyarrow as pa

  array = pa.array(values, pa.binary())
  return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


for _name, (_make, _expects) in {
  "no rows": (lambda: _table(image=_images([]), text=_bad_utf8([])), "error"),
  "no columns": (lambda: _table(), "error"),
  "no image": (lambda: _table(text=["a"]), "error"),
  "two images": (
    lambda: _table(img=_binary([JPEG]), jpg=_binary([JPEG])),
    "error",
  ),
  "no captions": (lambda: _table(image=_images([JPEG])), "error"),
  "two captions": (
    lambda: _table(image=_images([JPEG]), text=["a"], caption=["b"]),
    "error",
  ),
  "an image of text": (lambda: _table(image=["http://x"], text=["a"]), "error"),
  "an image of numbers": (lambda: _table(image=[1], text=["a"]), "error"),
  "captions of numbers": (
    lambda: _table(image=_images([JPEG]), text=[1]),
    "error",
  ),
  "an image of null": (
    lambda: _table(image=_images([JPEG, None]), text=["a", "b"]),
    "skip",
  ),
  "an image of no bytes": (
    lambda: _table(image=_images([JPEG, b""]), text=["a", "b"]),
    "skip",
  ),
  "a caption of null": (
    lambda: _table(image=_images([JPEG, JPEG]), text=["a", None]),
    "skip",
  ),
  "a list of null captions": (
    lambda: _table(image=_images([JPEG, JPEG]), text=[["a"], [None, ""]]),
    "skip",
  ),
  "a caption that is not UTF-8": (
    lambda: _table(
      image=_images([JPEG, JPEG]), text=_bad_utf8([b"a", b"\xff\xfe"])
    ),
    "skip error",
  ),
  "a caption of an encoded lone surrogate": (
    lambda: _table(
      image=_images([JPEG, JPEG]), text=_bad_utf8([b"a", b"\xed\xa0\x80"])
    ),
    "skip error",
  ),
  "a caption of 50 MB": (
    lambda: _table(image=_images([JPEG, JPEG]), text=["a", "x" * 50_000_000]),
    "skip",
  ),
}.items():
  _parquet(_name, _make, _expects)


@PARQUET.add(
  "a row group of ten million rows of null", match="smaller row groups"
)
def _many_rows(folder):
  import pyarrow as pa

  count = 10_000_000
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  table = pa.table(
    {"image": pa.nulls(count, kind), "text": pa.nulls(count, pa.string())}
  )
  return _read(_write(folder, table, row_group_size=count))


@PARQUET.add("a file that is replaced by one of other row groups")
def _replaced(folder):
  from mtv_jax.data.registry import build_source

  table = _table(image=_images([JPEG] * 8), text=["a"] * 8)
  file = _write(folder, table, row_group_size=4)
  source = build_source({"type": "parquet", "path": str(file)})
  _write(folder, table, row_group_size=8)
  return read_epoch(source)


@PARQUET.add("a pipe")
def _parquet_pipe(folder):
  os.mkfifo(folder / "x.parquet")
  return _read(folder / "x.parquet")


@PARQUET.add("the same name in two folders")
def _names(folder):
  for name in ("a", "b"):
    (folder / name).mkdir()
    _write(folder / name, _table(image=_images([JPEG]), text=["a"]))
  return read_epoch({"type": "parquet", "path": f"{folder}/*/x.parquet"})


# --- Tar indices -------------------------------------------------------------


def _index(name, change, expects="used"):
  def run(folder):
    file = write_tar(folder / "x.tar", record("a") | record("b") | record("c"))
    WebDatasetSource(file)
    index = folder / "x.tar.index"
    data = bytearray(index.read_bytes())
    index.write_bytes(change(data) or data)
    return read_epoch(WebDatasetSource(file))

  INDICES.add(name, run, expects=expects)


def _set_header(**fields):
  """Replaces fields of an index's header."""
  names = ["magic", "tar_size", "tar_time", "count", "captioned", "keys_size"]

  def change(data):
    header = list(HEADER.unpack_from(data))
    for name, value in fields.items():
      header[names.index(name)] = value
    HEADER.pack_into(data, 0, *header)

  return change


def _set_entry(field, value, number=1):
  def change(data):
    entries = np.frombuffer(data, ENTRY, 3, HEADER.size)
    entries[field][number] = value

  return change


for _name, _change in {
  "empty": lambda data: b"\0",
  "noise": lambda data: _NOISE,
  "cut": lambda data: bytes(data[:-5]),
  "a byte more": lambda data: bytes(data) + b"\0",
  "another magic": _set_header(magic=b"MTVTAR99"),
  "of another size": _set_header(tar_size=99),
  "of another time": _set_header(tar_time=-1),
  "a count of 2^63": _set_header(count=1 << 63),
  "a count of 0": _set_header(count=0),
  "keys of 2^60 bytes": _set_header(keys_size=1 << 60),
  "bounds that are not UTF-8": lambda data: bytes(data[:-2]) + b"\xff\xff",
}.items():
  _index(_name, _change)
for _name, _change in {
  "an offset beyond the tar": _set_entry("image", 1 << 40),
  "an offset of 2^64 - 1": _set_entry("image", (1 << 64) - 1),
  "an offset of 0": _set_entry("image", 0),
  "a size of 2^32 - 1": _set_entry("image_size", (1 << 32) - 1),
  "a text of 2^32 - 1": _set_entry("text_size", (1 << 32) - 1),
  "a key's end of 2^32 - 1": _set_entry("key_end", (1 << 32) - 1),
  "a key's end of 0": _set_entry("key_end", 0, 2),
}.items():
  _index(_name, _change, "error skip used")
_index("more captioned than records", _set_header(captioned=1 << 40))
_index("fewer captioned than records", _set_header(captioned=2))


# --- Listings ----------------------------------------------------------------


def _listing(name, file, data, expects="error"):
  def run(folder):
    (folder / "0.jpg").write_bytes(JPEG)
    (folder / file).write_bytes(data() if callable(data) else data)
    examples = listings.read(folder / file)
    return shard_writer.write(examples, folder / "out")

  LISTINGS.add(name, run, expects=expects)


_COCO = {
  "images": [{"id": 1, "file_name": "0.jpg"}],
  "annotations": [{"image_id": 1, "caption": "a dog"}],
}
for _name, _content in {
  "nested 100,000 deep": b"[" * 100_000,
  "empty": b"",
  "a list": b"[]",
  "images is a map": _COCO | {"images": {}},
  "images of numbers": _COCO | {"images": [1]},
  "no names": _COCO | {"images": [{"id": 1}]},
  "a name that is a number": _COCO | {"images": [{"id": 1, "file_name": 3}]},
  "a name with NUL": _COCO | {"images": [{"id": 1, "file_name": "\0.jpg"}]},
  "a name that is a lone surrogate": _COCO
  | {"images": [{"id": 1, "file_name": "\ud800.jpg"}]},
  "an id that is a list": _COCO
  | {"annotations": [{"image_id": [1], "caption": "a"}]},
  "a caption that is a lone surrogate": _COCO
  | {"annotations": [{"image_id": 1, "caption": "\ud800"}]},
  "no image": _COCO | {"images": []},
}.items():
  _bytes = (
    _content if isinstance(_content, bytes) else json.dumps(_content).encode()
  )
  _listing(f"COCO, {_name}", "x.json", _bytes)

for _name, _data in {
  "empty": b"",
  "not UTF-8": b"image,caption\n0.jpg,\xff\n",
  "UTF-16": "image,caption\n0.jpg,a\n".encode("utf-16"),
  "more cells": b"image,caption\n0.jpg,a,b,c\n",
  "an open quotation mark": b'image,caption\n0.jpg,"' + b"x" * 200_000,
  "NUL": b"image,caption\n0\0.jpg,a\n",
  "no such file": b"image,caption\nnone.jpg,a\n",
  "a folder as the image": b"image,caption\n/,a\n",
  "a device as the image": b"image,caption\n/dev/zero,a\n",
}.items():
  _listing(f"a table, {_name}", "x.csv", _data)


@LISTINGS.add("a pipe as the image")
def _listing_pipe(folder):
  os.mkfifo(folder / "p.jpg")
  (folder / "x.csv").write_text("image,caption\np.jpg,a\n")
  examples = listings.read(folder / "x.csv")
  return shard_writer.write(examples, folder / "out")


@LISTINGS.add("a listing that is a pipe")
def _pipe_listing(folder):
  os.mkfifo(folder / "x.json")
  return listings.read(folder / "x.json")


@LISTINGS.add("a folder whose texts are pipes")
def _folder_of_pipes(folder):
  (folder / "a.jpg").write_bytes(JPEG)
  os.mkfifo(folder / "a.txt")
  examples = listings.read(folder)
  return shard_writer.write(examples, folder.parent / f"{folder.name}-out")


@ARRAY_RECORDS.parametrize
def test_array_records(case, hostile):
  hostile(case)


@PARQUET.parametrize
def test_parquet(case, hostile):
  hostile(case)


@INDICES.parametrize
def test_tar_indices(case, hostile):
  hostile(case)


@LISTINGS.parametrize
def test_listings(case, hostile):
  hostile(case)
