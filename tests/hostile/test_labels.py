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
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  BROKEN_JSON,
  as_bytes,
  changed,
  other_types,
  read_epoch,
)

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import BoxLabel
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import array_record

VALUES = Cases(__file__, "label values", every=4)
SETS = Cases(__file__, "label sets", every=8)

_NOISE = np.random.default_rng(0).bytes(4000)
_OPS = "decode|canvas(8)|depth(8)|regions(4)"


def _png16(side: int, *, fill=7) -> bytes:
  array = np.full((side, side), fill, np.uint16)
  return cv2.imencode(".png", array)[1].tobytes()


def _encode_image(suffix, shape, dtype) -> bytes:
  return cv2.imencode(suffix, np.zeros(shape, dtype))[1].tobytes()


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


def _decode(kind):
  """Decodes bytes, or the fields of a label."""

  def read(folder, packed):
    packed = packed() if callable(packed) else packed
    if isinstance(packed, dict):
      packed = msgpack.packb(packed)
    label_values.decode(packed, kind=kind, where="set/x:3")

  return read


def _other_types(valid):
  """Each field with values of every other type."""
  kinds = [*other_types(...), b"k", _deep(200)]
  return changed(
    valid,
    {
      name: [kind for kind in kinds if type(kind) is not type(value)]
      for name, value in valid.items()
    },
  )


_SKIP = {"expects": "skip", "match": "set/x:3"}
_DEPTH = {"key": "k", "valid": True, "png16": _png16(8), "lo": 0.0, "hi": 1.0}
_DEPTH |= {"side": 8}
_NUMBERS = [float("nan"), float("inf")]
VALUES.add_table(
  _decode("depth"),
  _other_types(_DEPTH)
  | changed(
    _DEPTH,
    {
      "lo": _NUMBERS,
      "hi": _NUMBERS,
      "side": [0, -8, 2**60, 9],
      "png16": [
        b"",
        _NOISE[:500],
        _png16(8)[:40],
        _encode_image(".jpg", (8, 8), np.uint8),
        _encode_image(".png", (8, 8), np.uint8),
        _encode_image(".png", (8, 8, 3), np.uint16),
        _encode_image(".png", (8, 9), np.uint16),
        _png_header(65_535, 65_535),
      ],
      "other": [_deep(5), {"a": {}}],
    },
  )
  | {
    f"header and side are {side}": _DEPTH
    | {"png16": _png_header(side, side), "side": side}
    for side in (4096, 32_000)
  },
  prefix="depth, ",
  **_SKIP,
)

_BOXES = {"key": "k", "valid": True, "boxes": bytes(8), "scores": bytes(4)}
_BOXES |= {"phrases": ["a dog"]}
VALUES.add_table(
  _decode("boxes"),
  _other_types(_BOXES)
  | changed(
    _BOXES,
    {
      "boxes": [bytes(7), bytes(10), bytes(16)],
      "scores": [bytes(3)],
      "phrases": [[b"a"], [3], [None], [["a"]], [""] * 200_000],
    },
  ),
  prefix="boxes, ",
  **_SKIP,
)
# `make_boxes` counts these in `dropped` when a record is used.
_scores = [np.float32(score).tobytes() for score in ("nan", "inf", "-1")]
VALUES.add_table(
  _decode("boxes"),
  changed(_BOXES, {"scores": _scores}),
  prefix="used boxes, ",
  expects="used",
)
VALUES.add_table(
  _decode("boxes"),
  {name: change(msgpack.packb(_BOXES)) for name, change in BROKEN_BYTES.items()}
  | {
    "no map": msgpack.packb([1, 2]),
    "null": b"\xc0",
    "an empty map": {},
    "no key": {"valid": False},
    "another kind": {"key": "k", "valid": True, "png16": _png16(8)},
    "bytes after its end": msgpack.packb(_BOXES) + b"\0",
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
  },
  prefix="bytes, ",
  **_SKIP,
)


# --- Sets --------------------------------------------------------------------


def _open(folder, change, *, keyed=False, read=True):
  """Opens two label sets of ten images; `change` edits the boxes."""
  label_samples.make_all(folder)
  labels = {kind: str(folder / kind) for kind in ("depth", "boxes")}
  if keyed:
    labels = label_samples.keyed(folder)
    build_source(label_samples.entry(folder, **labels))  # Writes the table.
  change(folder / "boxes")
  source = build_source(label_samples.entry(folder, **labels))
  return read_epoch(source, ops=_OPS) if read else None


def _add(changes, prefix="", expects="error", match="boxes", **options):
  read = functools.partial(_open, **options)
  SETS.add_table(read, changes, prefix=prefix, expects=expects, match=match)


def _change_manifest(change):
  def run(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))

  return run


def _manifest(changes):
  return _change_manifest(lambda content: content.update(changes))


def _shard(changes):
  return _change_manifest(lambda content: content["shards"][0].update(changes))


def _write(name, data):
  return lambda folder: (folder / name).write_bytes(as_bytes(data))


_large = {"of 40 MB": lambda: b"[" + b"[]," * 14_000_000 + b"[]]"}
_add(
  {k: _write("manifest.json", v) for k, v in (BROKEN_JSON | _large).items()},
  "a manifest, ",
)
_shards = [*other_types([]), [], ["00000.tar"]]
_changes = {
  "version": [*other_types(1), 2, "1" * 1_000_000],
  "kind": [*other_types("boxes"), "depth", "\ud800"],
  "shards": _shards,
}
_add(
  {k: _manifest(v) for k, v in changed({}, _changes).items()}, "a manifest, "
)
_bases = ["../../00000.tar", "/etc/passwd", "0\0.tar", "00001.tar", "99999.tar"]
_samples = [[[0, "k"]], [[-1, "k", "h"]], [[0, "k", "h"]], [[0, ["k"], "h"]]]
_changes = {
  "base": [*other_types("x"), *_bases],
  "records": [*other_types(1), -1, 4.0, 2**70, 3],
  "samples": [*other_types([]), *_samples],
}
_add({k: _shard(v) for k, v in changed({}, _changes).items()}, "a shard, ")


def _replace(name, make):
  def change(folder):
    (folder / name).unlink()
    make(folder / name)

  return change


_LABELS = "00000.array_record"
_add(
  {
    "the manifest is a pipe": _replace("manifest.json", os.mkfifo),
    "the manifest is a folder": _replace("manifest.json", os.mkdir),
    "labels are a pipe": _replace(_LABELS, os.mkfifo),
  }
)


def _change_labels(change):
  def run(folder):
    file = folder / _LABELS
    file.write_bytes(change(file.read_bytes()))

  return run


_labels = {
  name: _change_labels(change) for name, change in BROKEN_BYTES.items()
}
_add(_labels, "labels are ")


def _flip(folder):
  """Damages the bytes of the labels, not their index."""
  file = folder / "00000.array_record"
  data = bytearray(file.read_bytes())
  at = data.find(b"phrases")
  for i in range(at - 60, at + 60):
    data[i] ^= 0x55
  file.write_bytes(data)


_add({"labels have damaged bytes": _flip}, "", "skip error used", "")


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

  _changes = {"hashes": _hashes, "a table": _table}
  _add(_changes, f"{_name}, keys in ", keyed=True)


@SETS.add("a table of keys with positions beyond the set", match="Remove this")
def _positions(folder):
  def change(folder):
    (file,) = folder.glob("keys-*.npy")
    hashes, positions = np.load(file)
    np.save(file, np.stack([hashes, positions + 1000]))

  return _open(folder, change, keyed=True)


def _open_path(folder, name):
  (folder / "file").write_text("{}")
  LabelSet(folder / name, kind="depth")


SETS.add_table(_open_path, {"no folder": "none", "a file": "file"})


test_labels = run_all(VALUES, SETS)
