"""Hostile label sets: values, manifests, key tables."""

import functools
import json
import os
import struct
import zlib

import cv2
import label_samples
import msgpack
import numpy as np
from hostile.harness import Cases
from hostile.samples import read_epoch

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import array_record

VALUES = Cases(__file__, "label values")
SETS = Cases(__file__, "label sets", slow=True)

_NOISE = np.random.default_rng(0).bytes(4000)
_OPS = "decode|canvas(8)|depth(8)|regions(4)"


def _png16(side: int, *, fill=7) -> bytes:
  array = np.full((side, side), fill, np.uint16)
  return cv2.imencode(".png", array)[1].tobytes()


def _png_header(width, height, bits=16, colour=0) -> bytes:
  """A PNG whose header promises pixels that it lacks."""
  fields = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
  header = b"IHDR" + fields
  checksum = struct.pack(">I", zlib.crc32(header))
  rest = _png16(8)[33:]
  return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + checksum + rest


def _deep(depth: int):
  value = 0
  for _ in range(depth):
    value = [value]
  return value


def _value(name, kind, data, expects="skip"):
  def run(folder):
    packed = data() if callable(data) else data
    if isinstance(packed, dict):
      packed = msgpack.packb(packed)
    label_values.decode(packed, kind=kind, where="set/x:3")

  match = "set/x:3" if expects == "skip" else ""
  VALUES.add(name, run, expects=expects, match=match)


_DEPTH = {"key": "k", "valid": True, "png16": _png16(8), "lo": 0.0, "hi": 1.0}
_DEPTH |= {"side": 8}
for _name, _change in {
  "key is bytes": {"key": b"k"},
  "key is null": {"key": None},
  "valid is a text": {"valid": "yes"},
  "valid is a number": {"valid": 1},
  "low is a text": {"lo": "near"},
  "low is null": {"lo": None},
  "low is NaN": {"lo": float("nan")},
  "high is infinite": {"hi": float("inf")},
  "high is true": {"hi": True},
  "high is an integer of 64 bits": {"hi": 2**64 - 1, "lo": "x"},
  "side is 0": {"side": 0},
  "side is -8": {"side": -8},
  "side is 8.0": {"side": 8.0},
  "side is 2^60": {"side": 2**60},
  "side is a text": {"side": "8"},
  "side is another": {"side": 9},
  "the image is a text": {"png16": "png"},
  "the image is null": {"png16": None},
  "the image is empty": {"png16": b""},
  "the image is noise": {"png16": np.random.default_rng(0).bytes(500)},
  "the image is cut": {"png16": _png16(8)[:40]},
  "the image is a JPEG": {
    "png16": cv2.imencode(".jpg", np.zeros((8, 8), np.uint8))[1].tobytes()
  },
  "the image has 8 bits": {
    "png16": cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
  },
  "the image has three channels": {
    "png16": cv2.imencode(".png", np.zeros((8, 8, 3), np.uint16))[1].tobytes()
  },
  "the image is not square": {
    "png16": cv2.imencode(".png", np.zeros((8, 9), np.uint16))[1].tobytes()
  },
  "the image's header is of 65,535": {"png16": _png_header(65_535, 65_535)},
  "the header and side are of 32,000": {
    "png16": _png_header(32_000, 32_000),
    "side": 32_000,
  },
  "the header and side are of 4,096": {
    "png16": _png_header(4096, 4096),
    "side": 4096,
  },
  "a nested value": {"other": _deep(5)},
  "a map in it": {"other": {"a": {}}},
}.items():
  _value(f"depth, {_name}", "depth", _DEPTH | _change)

_BOXES = {"key": "k", "valid": True, "boxes": bytes(8), "scores": bytes(4)}
_BOXES |= {"phrases": ["a dog"]}
for _name, _change in {
  "boxes is a list": {"boxes": [[0, 0, 1, 1]]},
  "boxes of 7 bytes": {"boxes": bytes(7)},
  "boxes of 10 bytes": {"boxes": bytes(10)},
  "boxes is a text": {"boxes": "01234567"},
  "more boxes than phrases": {"boxes": bytes(16)},
  "scores is a list": {"scores": [1.0]},
  "scores of 3 bytes": {"scores": bytes(3)},
  "phrases is a text": {"phrases": "a dog"},
  "phrases is a map": {"phrases": {"a": "dog"}},
  "phrases is null": {"phrases": None},
  "a phrase is bytes": {"phrases": [b"a dog"]},
  "a phrase is a number": {"phrases": [3]},
  "a phrase is null": {"phrases": [None]},
  "a phrase is a list": {"phrases": [["a dog"]]},
  "nested phrases": {"phrases": _deep(200)},
  "200,000 phrases": {"phrases": [""] * 200_000},
}.items():
  _value(f"boxes, {_name}", "boxes", _BOXES | _change)

for _name, _score in {"NaN": np.nan, "infinite": np.inf, "-1": -1.0}.items():
  _data = _BOXES | {"scores": np.float32(_score).tobytes()}
  # `make_boxes` counts these in `dropped` when a record is used.
  _value(f"boxes, a score is {_name}", "boxes", _data, "used")

for _name, _data in {
  "empty": b"",
  "no map": msgpack.packb([1, 2]),
  "a number": b"\x03",
  "null": b"\xc0",
  "an empty map": {},
  "no key": {"valid": False},
  "another kind": {"key": "k", "valid": True, "png16": _png16(8)},
  "bytes after its end": lambda: msgpack.packb(_BOXES) + b"\0",
  "cut": lambda: msgpack.packb(_BOXES)[:-3],
  "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
  "a list of 2^32 - 1": b"\x81\xa7phrases\xdd\xff\xff\xff\xff",
  "a text of 2^32 - 1": b"\x81\xa3key\xdb\xff\xff\xff\xff",
  "a million nested lists": b"\x81\xa3key" + b"\x91" * 1_000_000,
  "ten million maps": lambda: (
    b"\x81\xa3key\xdd\0\x98\x96\x80" + b"\x80" * 10_000_000
  ),
  "an extension": b"\x81\xa3key\xc7\xff\x05" + bytes(255),
  "a text that is not UTF-8": b"\x81\xa3key\xa2\xff\xfe",
  "a key that is a map": b"\x81\x80\x01",
  "100 MB": lambda: msgpack.packb({"key": "k", "boxes": bytes(100 << 20)}),
  "a pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x05posix\x94.",
}.items():
  _value(f"bytes, {_name}", "boxes", _data)


# --- Sets --------------------------------------------------------------------


def _open(folder, change, *, keyed=False, read=True):
  """Opens two label sets of ten images, of which `change` edits the boxes'."""
  label_samples.make_all(folder)
  labels = {kind: str(folder / kind) for kind in ("depth", "boxes")}
  if keyed:
    labels = label_samples.keyed(folder)
    build_source(label_samples.entry(folder, **labels))  # Writes the table.
  change(folder / "boxes")
  source = build_source(label_samples.entry(folder, **labels))
  return read_epoch(source, ops=_OPS) if read else None


def _set(name, change, expects="error", match="boxes", **options):
  run = functools.partial(_open, change=change, **options)
  SETS.add(name, run, expects=expects, match=match)


def _manifest(**changes):
  def change(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))

  return change


def _shard(**changes):
  def change(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0] |= changes
    file.write_text(json.dumps(content))

  return change


def _write(name, data):
  return lambda folder: (folder / name).write_bytes(
    data() if callable(data) else data
  )


for _name, _data in {
  "empty": b"",
  "not JSON": b"{",
  "a list": b"[]",
  "null": b"null",
  "nested 100,000 deep": b"[" * 100_000,
  "latin-1": b'{"version": "\xff"}',
  "of 40 MB": lambda: b"[" + b"[]," * 14_000_000 + b"[]]",
}.items():
  _set(f"a manifest, {_name}", _write("manifest.json", _data))

for _name, _changes in {
  "version is 2": {"version": 2},
  "version is a list": {"version": [1]},
  "version is a text of 1 MB": {"version": "1" * 1_000_000},
  "kind is null": {"kind": None},
  "kind is depth": {"kind": "depth"},
  "kind is a lone surrogate": {"kind": "\ud800"},
  "shards is null": {"shards": None},
  "shards is a map": {"shards": {"base": "00000.tar"}},
  "shards is a text": {"shards": "00000.tar"},
  "shards are texts": {"shards": ["00000.tar"]},
  "shards are empty": {"shards": []},
}.items():
  _set(f"a manifest, {_name}", _manifest(**_changes))

for _name, _changes in {
  "base is a number": {"base": 3},
  "base leaves the folder": {"base": "../../00000.tar"},
  "base is absolute": {"base": "/etc/passwd"},
  "base has NUL": {"base": "0\0.tar"},
  "base is another shard": {"base": "00001.tar"},
  "base is unknown": {"base": "99999.tar"},
  "records is -1": {"records": -1},
  "records is 4.0": {"records": 4.0},
  "records is true": {"records": True},
  "records is a text": {"records": "4"},
  "records is 2^70": {"records": 2**70},
  "records is another number": {"records": 3},
  "samples is null": {"samples": None},
  "samples are numbers": {"samples": [1, 2, 3]},
  "a sample is short": {"samples": [[0, "k"]]},
  "a sample is negative": {"samples": [[-1, "k", "h"]]},
  "a sample of another key": {"samples": [[0, "k", "h"]]},
  "a sample's key is a list": {"samples": [[0, ["k"], "h"]]},
}.items():
  _set(f"a shard, {_name}", _shard(**_changes))


def _replace(name, make):
  def change(folder):
    (folder / name).unlink()
    make(folder / name)

  return change


_set("the manifest is a pipe", _replace("manifest.json", os.mkfifo))
_set("the manifest is a folder", _replace("manifest.json", os.mkdir))
_set("labels are a pipe", _replace("00000.array_record", os.mkfifo))
_set("labels are empty", _write("00000.array_record", b""))
_set("labels are noise", _write("00000.array_record", _NOISE * 18))
_set("labels are zeros", _write("00000.array_record", bytes(200_000)))


def _cut(folder):
  file = folder / "00000.array_record"
  os.truncate(file, file.stat().st_size // 2)


def _flip(folder):
  """Damages the bytes of the labels, not those of their index."""
  file = folder / "00000.array_record"
  data = bytearray(file.read_bytes())
  at = data.find(b"phrases")
  for i in range(at - 60, at + 60):
    data[i] ^= 0x55
  file.write_bytes(data)


_set("labels are cut", _cut)
_set("labels have damaged bytes", _flip, "skip error used", "")


@SETS.add("labels that are no labels", expects="skip", match="0.array_record")
def _foreign(folder):
  def change(folder):
    array_record.write_bytes(folder / "00000.array_record", [b"\x93\1\2\3"] * 4)

  return _open(folder, change)


@SETS.add("labels of other keys", match="key")
def _other_keys(folder):
  def change(folder):
    label = BoxLabel(np.zeros((0, 4), np.float32), (), np.zeros(0, np.float32))
    data = label_values.encode("another", label)
    array_record.write_bytes(folder / "00000.array_record", [data] * 4)

  return _open(folder, change)


def _npy(header: str, data=b"") -> bytes:
  text = header.encode().ljust(117) + b"\n"
  return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


_HEADER = "{{'descr': {!r}, 'fortran_order': False, 'shape': {}, }}"
_TABLES = {
  "empty": b"",
  "noise": _NOISE[:1000],
  "of 10^12 rows": _npy(_HEADER.format("<u8", "(1000000000000,)")),
  "of 10^30 rows": _npy(_HEADER.format("<u8", f"({10**30},)")),
  "of -4 rows": _npy(_HEADER.format("<u8", "(-4,)"), bytes(32)),
  "of floats": _npy(_HEADER.format("<f8", "(4,)"), bytes(32)),
  "of objects": _npy(_HEADER.format("|O", "(4,)"), bytes(32)),
  "of a header that is code": _npy("__import__('os').abort()"),
  "of a header 10,000 deep": _npy("(" * 10_000),
  "of a pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x05abort\x93.",
}
for _name, _data in _TABLES.items():

  def _hashes(folder, data=_data):
    for name in ("keys-x.npy", "00000.keys.npy"):
      (folder / name).write_bytes(data)
    for table in folder.glob("keys-*.npy"):
      table.unlink()

  def _table(folder, data=_data):
    (table,) = folder.glob("keys-*.npy")
    table.write_bytes(data)

  _set(f"hashes of keys, {_name}", _hashes, keyed=True)
  _set(f"a table of keys, {_name}", _table, keyed=True)


@SETS.add("a table of keys with positions beyond the set", match="Remove this")
def _positions(folder):
  def change(folder):
    (file,) = folder.glob("keys-*.npy")
    hashes, positions = np.load(file)
    np.save(file, np.stack([hashes, positions + 1000]))

  return _open(folder, change, keyed=True)


@SETS.add("a folder that does not exist")
def _absent(folder):
  LabelSet(folder / "none", kind="depth")


@SETS.add("a file in place of the folder")
def _file(folder):
  (folder / "x").write_text("{}")
  LabelSet(folder / "x", kind="depth")


def test_encoded_labels_are_read(tmp_path):
  """The strict reader takes what the writer writes."""
  values = np.arange(64, dtype=np.uint16).reshape(8, 8)
  label = DepthLabel(values, 0.25, 3.0)
  data = label_values.encode("k", label)
  stored = label_values.decode(data, kind="depth", where="x")
  np.testing.assert_array_equal(stored.label.values, values)
  assert (stored.key, stored.label.low, stored.label.high) == ("k", 0.25, 3.0)


@VALUES.parametrize
def test_label_values(case, hostile):
  hostile(case)


@SETS.parametrize
def test_label_sets(case, hostile):
  hostile(case)
