"""Hostile ArrayRecord and Parquet files, tar indices, and listings."""

import os
import struct

import numpy as np
import pyarrow as pa
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  BROKEN_JSON,
  DAMAGED_BYTES,
  JPEG,
  OUTSIDE,
  as_bytes,
  by_repr,
  changed,
  other_types,
  read_epoch,
  record,
  write_tar,
)
from pyarrow import parquet

from mtv_jax.data import records
from mtv_jax.data.sources import array_record, listings, shard_writer
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.tar_index import ENTRY, HEADER, Header
from mtv_jax.data.sources.webdataset import WebDatasetSource

ARRAY_RECORDS = Cases(__file__, "array_record files")
PARQUET = Cases(__file__, "parquet files")
INDICES = Cases(__file__, "tar indices")
LISTINGS = Cases(__file__, "listings")
ANY = "error skip used"


# --- ArrayRecord -------------------------------------------------------------


def _write_records(folder, *items):
  file = folder / "x.array_record"
  good = {"key": "good", "image": JPEG, "captions": ["a dog"]}
  array_record.write_bytes(file, [records.encode(good), *items])
  return file


def _read_records(folder, change):
  file = _write_records(folder)
  file.write_bytes(change(file.read_bytes()))
  return read_epoch(ArrayRecordSource(file))


def _read_item(folder, item):
  return read_epoch(ArrayRecordSource(_write_records(folder, item)))


ARRAY_RECORDS.add_table(_read_records, BROKEN_BYTES, match="x.array_record")
ARRAY_RECORDS.add_table(_read_records, DAMAGED_BYTES, expects=ANY)


def _encode(key=b"k", image=JPEG, captions=(b"a dog",)):
  parts = [key, image, *captions]
  counts = [len(captions), *map(len, parts)]
  return b"MTV1" + struct.pack(f"<{len(counts)}I", *counts) + b"".join(parts)


ARRAY_RECORDS.add_table(
  _read_item,
  {
    "a key that is not UTF-8": _encode(key=b"\xff\xfe"),
    "a caption that is not UTF-8": _encode(captions=[b"\xff"]),
    "a caption of lone surrogates": _encode(captions=[b"\xed\xa0\x80"]),
    "a million empty captions": _encode(captions=[b""] * 1_000_000),
  },
  prefix="a record of ",
  expects="skip",
)


def _read_sidecar(folder, content):
  file = _write_records(folder)
  if content is None:
    os.mkfifo(folder / "x_meta.jsonl")
  else:
    (folder / "x_meta.jsonl").write_bytes(content + b"\n")
  return ArrayRecordSource(file).read_metadata(0)


_sidecars = {name: data for name, data in BROKEN_JSON.items() if data}
_sidecars |= {"without keys": b"{}", "of keys that are lists": b'{"key": []}'}
_read = {"prefix": "a sidecar, "}
ARRAY_RECORDS.add_table(_read_sidecar, _sidecars, match="x_meta.jsonl", **_read)
ARRAY_RECORDS.add_table(
  _read_sidecar, {"a pipe": None}, expects="used", **_read
)


@ARRAY_RECORDS.add("records in groups", match="groups of 5")
def _grouped(folder):
  file = folder / "x.array_record"
  writer = array_record._module().ArrayRecordWriter(str(file), "group_size:5")
  for _ in range(10):
    writer.write(b"x")
  writer.close()
  return ArrayRecordSource(file)


def _open_pipe(folder, name):
  os.mkfifo(folder / name)
  kind = name.partition(".")[2]
  return read_epoch({"type": kind, "path": str(folder / name)})


ARRAY_RECORDS.add_table(_open_pipe, {"a pipe": "x.array_record"})
PARQUET.add_table(_open_pipe, {"a pipe": "x.parquet"})


# --- Parquet -----------------------------------------------------------------


_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _images(*values):
  rows = [{"bytes": v, "path": None} for v in values]
  return pa.array(rows, _STRUCT)


def _bad_utf8(*values):
  array = pa.array(values, pa.binary())
  return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def _write_table(folder, columns, **options):
  file = folder / "x.parquet"
  parquet.write_table(pa.table(columns), file, **options)
  return file


def _read_parquet(file):
  return read_epoch({"type": "parquet", "path": str(file)})


def _read_table(folder, columns):
  return _read_parquet(_write_table(folder, columns))


def _read_damaged(folder, change):
  columns = {"image": _images(*[JPEG] * 20), "text": ["a dog"] * 20}
  file = _write_table(folder, columns)
  file.write_bytes(change(file.read_bytes()))
  return _read_parquet(file)


_footers = {
  "2 GiB": b"\xff\xff\xff\x7f",
  "2^32 - 1": b"\xff" * 4,
  "0": bytes(4),
}
PARQUET.add_table(
  _read_damaged,
  BROKEN_BYTES
  | {"its magic twice": lambda data: b"PAR1PAR1"}
  | {
    f"a footer of {name}": lambda data, size=size: data[:-8] + size + b"PAR1"
    for name, size in _footers.items()
  },
)
PARQUET.add_table(_read_damaged, DAMAGED_BYTES, expects=ANY)
PARQUET.add_table(
  _read_table,
  {
    "no rows": {"image": _images(), "text": _bad_utf8()},
    "no columns": {},
    "no captions": {"image": _images(JPEG)},
    "an image of text": {"image": ["http://x"], "text": ["a"]},
  },
)
# After a good row.
_texts = {
  "null": ["a", None],
  "null captions": [["a"], [None, ""]],
  "20 MB": ["a", "x" * 20_000_000],
  "bytes that are not UTF-8": _bad_utf8(b"a", b"\xff\xfe"),
  "a lone surrogate": _bad_utf8(b"a", b"\xed\xa0\x80"),
}
_rows = {
  f"a caption of {name}": {"image": _images(JPEG, JPEG), "text": values}
  for name, values in _texts.items()
}
for _name, _value in {"null": None, "no bytes": b""}.items():
  _image = {"image": _images(JPEG, _value), "text": ["a", "b"]}
  _rows[f"an image of {_name}"] = _image
PARQUET.add_table(_read_table, _rows, expects="skip")


@PARQUET.add("a row group of ten million nulls", match="smaller row groups")
def _many_rows(folder):
  count = 10_000_000
  columns = {"image": pa.nulls(count, _STRUCT)}
  columns["text"] = pa.nulls(count, pa.string())
  return _read_parquet(_write_table(folder, columns, row_group_size=count))


@PARQUET.add("one name in two folders", match="have the same name")
def _names(folder):
  for name in ("a", "b"):
    (folder / name).mkdir()
    _write_table(folder / name, {"image": _images(JPEG), "text": ["a"]})
  return _read_parquet(f"{folder}/*/x.parquet")


# --- Tar indices -------------------------------------------------------------


def _read_index(folder, change):
  """Reads a tar whose index was changed: it is built again, or refused."""
  file = write_tar(folder / "x.tar", record("a") | record("b") | record("c"))
  WebDatasetSource(file)
  index = folder / "x.tar.index"
  index.write_bytes(change(index.read_bytes()))
  return read_epoch(WebDatasetSource(file))


def _set_header(name, value):
  """Replaces a field of an index's header."""

  def change(data):
    header = Header._make(HEADER.unpack_from(data))._replace(**{name: value})
    return HEADER.pack(*header) + data[HEADER.size :]

  return change


def _set_entry(field, value):
  def change(data):
    data = bytearray(data)
    np.frombuffer(data, ENTRY, 3, HEADER.size)[field][1] = value
    return bytes(data)

  return change


INDICES.add_table(
  _read_index,
  {k: v for k, v in BROKEN_BYTES.items() if k != "empty"}
  | {
    "a byte more": lambda data: data + b"\0",
    "another magic": _set_header("magic", b"MTVTAR99"),
    "bounds that are not UTF-8": lambda data: data[:-2] + b"\xff\xff",
    **{
      f"{name} is {value}": _set_header(name, value)
      for name in ("tar_size", "tar_time", "count", "keys_size")
      for value in (0, 1 << 60)
    },
    "more captioned than records": _set_header("captioned", 1 << 40),
    "fewer captioned than records": _set_header("captioned", 2),
  },
  expects="used",
)
INDICES.add_table(
  _read_index,
  DAMAGED_BYTES
  | {
    f"an entry's {name} is {value}": _set_entry(name, value)
    for name in ENTRY.names
    for value in (0, np.iinfo(ENTRY[name]).max)
  },
  expects=ANY,
)


# --- Listings ----------------------------------------------------------------


def _list(name):
  """Writes shards of a listing of one image."""

  def read(folder, content):
    (folder / "0.jpg").write_bytes(JPEG)
    (folder / name).write_bytes(as_bytes(content))
    examples = listings.read(folder / name)
    return shard_writer.write(examples, folder / "out")

  return read


_IMAGE = {"id": 1, "file_name": "0.jpg"}
_CAPTION = {"image_id": 1, "caption": "a dog"}
_COCO = {"images": [_IMAGE], "annotations": [_CAPTION]}
LISTINGS.add_table(_list("x.json"), {"COCO": _COCO}, expects="used")
LISTINGS.add_table(
  _list("x.json"),
  BROKEN_JSON
  | changed(
    _COCO,
    {
      "images": [
        *[*other_types([]), [], [1], [{"id": 1}]],
        *([_IMAGE | {"file_name": name}] for name in OUTSIDE.values()),
      ],
      "annotations": [
        [_CAPTION | {"image_id": [1]}],
        [_CAPTION | {"caption": "\ud800"}],
      ],
    },
  ),
  prefix="COCO, ",
)
LISTINGS.add_table(
  _list("x.csv"),
  {
    "empty": b"",
    "not UTF-8": b"image,caption\n0.jpg,\xff\n",
    "an open quotation mark": b'image,caption\n0.jpg,"' + b"x" * 200_000,
    "NUL": b"image,caption\n0\0.jpg,a\n",
    "a folder as the image": b"image,caption\n/,a\n",
    "a device as the image": b"image,caption\n/dev/zero,a\n",
  },
  prefix="a table, ",
)


def _list_pipe(folder, name):
  """A pipe is the image, the listing, or the text beside an image."""
  output, folder = folder / "out", folder / "in"
  folder.mkdir()
  os.mkfifo(folder / name)
  (folder / "x.csv").write_text("image,caption\np.jpg,a\n")
  (folder / "a.jpg").write_bytes(JPEG)
  path = {"p.jpg": folder / "x.csv", "a.txt": folder}.get(name, folder / name)
  examples = listings.read(path)
  return shard_writer.write(examples, output)


LISTINGS.add_table(_list_pipe, by_repr(("p.jpg", "x.json", "a.txt")))

test_shards = run_all(ARRAY_RECORDS, PARQUET, INDICES, LISTINGS)
