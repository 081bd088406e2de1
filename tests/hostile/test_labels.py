"""Hostile label sets: values, manifests, key tables."""

import dataclasses
import functools
import json
import os
import struct

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
  ihdr,
  other_types,
  png,
  read_epoch,
)

from mtv_jax.data.labels import label_sets, label_values
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import BoxLabel
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import block_table

VALUES = Cases(__file__, "label values")
SETS = Cases(__file__, "label sets")

_NOISE = np.random.default_rng(0).bytes(4000)
_OPS = "decode|canvas(8)|depth(8)|regions(4)"


def _encode_image(suffix, shape, dtype) -> bytes:
  return cv2.imencode(suffix, np.full(shape, 7, dtype))[1].tobytes()


_PNG = _encode_image(".png", (8, 8), np.uint16)


def _png_of(side: int) -> bytes:
  """A PNG whose header promises pixels that it lacks."""
  return png(ihdr(side, side, bits=16, colour=0), _PNG[33:])


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
  deep = functools.reduce(lambda value, _: [value], range(200))
  kinds = [*other_types(...), b"k", deep]
  return changed(
    valid,
    {
      name: [kind for kind in kinds if type(kind) is not type(value)]
      for name, value in valid.items()
    },
  )


_SKIP = {"expects": "skip", "match": "set/x:3"}
_DEPTH = {"key": "k", "valid": True, "png16": _PNG, "lo": 0.0, "hi": 1.0}
_DEPTH |= {"side": 8}
_NUMBERS = [float("nan"), float("inf")]
_IMAGES = [b"", _NOISE[:500], _PNG[:40], _png_of(65_535)]
_IMAGES += [
  _encode_image(suffix, shape, dtype)
  for suffix, shape, dtype in (
    (".jpg", (8, 8), np.uint8),
    (".png", (8, 8), np.uint8),
    (".png", (8, 8, 3), np.uint16),
    (".png", (8, 9), np.uint16),
  )
]
_values = {"lo": _NUMBERS, "hi": _NUMBERS, "side": [0, -8, 2**60, 9]}
_values |= {"png16": _IMAGES, "other": [[[[[[0]]]]], {"a": {}}]}
_large = {
  f"header and side are {side}": _DEPTH | {"png16": _png_of(side), "side": side}
  for side in (4096, 32_000)
}
_labels = _other_types(_DEPTH) | changed(_DEPTH, _values) | _large
VALUES.add_table(_decode("depth"), _labels, prefix="depth, ", **_SKIP)

_BOXES = {"key": "k", "valid": True, "boxes": bytes(8), "scores": bytes(4)}
_BOXES |= {"phrases": ["a dog"]}
_values = {"boxes": [bytes(7), bytes(10), bytes(16)], "scores": [bytes(3)]}
_values["phrases"] = [[b"a"], [3], [None], [["a"]], [""] * 200_000]
_labels = _other_types(_BOXES) | changed(_BOXES, _values)
VALUES.add_table(_decode("boxes"), _labels, prefix="boxes, ", **_SKIP)
# `make_boxes` counts these in `dropped` when a record is used.
_scores = [np.float32(score).tobytes() for score in ("nan", "inf", "-1")]
_labels = changed(_BOXES, {"scores": _scores})
VALUES.add_table(_decode("boxes"), _labels, prefix="used ", expects="used")
VALUES.add_table(
  _decode("boxes"),
  {name: change(msgpack.packb(_BOXES)) for name, change in BROKEN_BYTES.items()}
  | {
    "no map": msgpack.packb([1, 2]),
    "an empty map": {},
    "no key": {"valid": False},
    "another kind": {"key": "k", "valid": True, "png16": _PNG},
    "bytes after its end": msgpack.packb(_BOXES) + b"\0",
    "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
    "a list of 2^32 - 1": b"\x81\xa7phrases\xdd\xff\xff\xff\xff",
    "a million nested lists": b"\x81\xa3key" + b"\x91" * 1_000_000,
    "ten million maps": lambda: (
      b"\x81\xa3key\xdd\0\x98\x96\x80" + b"\x80" * 10_000_000
    ),
    "a text that is not UTF-8": b"\x81\xa3key\xa2\xff\xfe",
    "100 MB": lambda: msgpack.packb({"key": "k", "boxes": bytes(100 << 20)}),
  },
  prefix="bytes, ",
  **_SKIP,
)


# --- Sets --------------------------------------------------------------------


def _open_keyed(folder, change):
  return _open(folder, change, keyed=True)


def _open(folder, change, *, keyed=False):
  """Opens two label sets of ten images; `change` edits the boxes."""
  label_samples.make_all(folder)
  labels = {kind: str(folder / kind) for kind in ("depth", "boxes")}
  if keyed:
    labels = label_samples.keyed(folder)
    build_source(label_samples.entry(folder, **labels))  # Writes the table.
  change(folder / "boxes")
  source = build_source(label_samples.entry(folder, **labels))
  return read_epoch(source, ops=_OPS)


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


def _replace(name, make):
  def change(folder):
    (folder / name).unlink()
    make(folder / name)

  return change


def _change_labels(change):
  def run(folder):
    file = folder / _LABELS
    file.write_bytes(change(file.read_bytes()))

  return run


def _flip(data):
  """Damages the bytes of the labels, not their index."""
  at = data.find(b"phrases")
  flipped = bytes(byte ^ 0x55 for byte in data[at - 60 : at + 60])
  return data[: at - 60] + flipped + data[at + 60 :]


_LABELS, _MANIFEST = "00000.blocks", "manifest.json"
# These change the file's size: an error before a label is read.
_resized = {k: v for k, v in BROKEN_BYTES.items() if k != "reversed"}
_texts = BROKEN_JSON | {"of 40 MB": lambda: b"[" + b"[]," * 14_000_000 + b"[]]"}
_contents = {
  "version": [*other_types(2), 3, "1" * 1_000_000],
  "kind": [*other_types("boxes"), "depth", "\ud800"],
  "shards": [*other_types([]), [], ["00000.tar"]],
}
_bases = ["../../00000.tar", "/etc/passwd", "0\0.tar", "00001.tar", "99999.tar"]
_samples = [[[0, "k"]], [[-1, "k", "h"]], [[0, "k", "h"]], [[0, ["k"], "h"]]]
_fields = {
  "base": [*other_types("x"), *_bases],
  "records": [*other_types(1), -1, 4.0, 2**70, 3],
  "samples": [*other_types([]), *_samples],
}
for _prefix, _changes in {
  "a manifest, ": {k: _write(_MANIFEST, v) for k, v in _texts.items()}
  | {k: _manifest(v) for k, v in changed({}, _contents).items()},
  "a shard, ": {k: _shard(v) for k, v in changed({}, _fields).items()},
  "the manifest is ": {
    "a pipe": _replace(_MANIFEST, os.mkfifo),
    "a folder": _replace(_MANIFEST, os.mkdir),
  },
  "labels are ": {k: _change_labels(v) for k, v in _resized.items()}
  | {"a pipe": _replace(_LABELS, os.mkfifo)},
}.items():
  SETS.add_table(_open, _changes, prefix=_prefix, match="boxes")
_flips = {
  "labels have damaged bytes": _change_labels(_flip),
  "labels are reversed": _change_labels(BROKEN_BYTES["reversed"]),
}
SETS.add_table(_open, _flips, expects="skip error used")


def _write_labels(data):
  def write(folder):
    size = (folder / _LABELS).write_bytes(label_sets.pack([(0, data)] * 4))
    file = folder / block_table.NAME
    table = block_table.read(file)
    sizes = np.where(np.arange(len(table)) == 0, size, table.size)
    dataclasses.replace(table, size=sizes, sizes=tuple(sizes.tolist())).write(
      file
    )

  return write


_foreign = {"labels that are no labels": _write_labels(b"\x93\1\2\3")}
SETS.add_table(_open, _foreign, expects="skip", match="boxes/00000:")
_BLANK = BoxLabel(np.zeros((0, 4), np.float32), (), np.zeros(0, np.float32))
_other = _write_labels(label_values.encode("another", _BLANK))
SETS.add_table(_open, {"labels of other keys": _other}, match="key")


def _npy(header: str, data=b"") -> bytes:
  text = header.encode().ljust(117) + b"\n"
  return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


_HEADER = "{{'descr': {!r}, 'fortran_order': False, 'shape': {}, }}"
_TABLES = {
  "empty": b"",
  "of 10^12 rows": _npy(_HEADER.format("<u8", "(1000000000000,)")),
  "of -4 rows": _npy(_HEADER.format("<u8", "(-4,)"), bytes(32)),
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
  _prefix = f"{_name}, keys in "
  SETS.add_table(_open_keyed, _changes, prefix=_prefix, match="boxes")


def _move(folder):
  (file,) = folder.glob("keys-*.npy")
  hashes, positions = np.load(file)
  np.save(file, np.stack([hashes, positions + 1000]))


_positions = {"keys with positions beyond the set": _move}
SETS.add_table(_open_keyed, _positions, match="Remove this")


def _open_path(folder, name):
  (folder / "file").write_text("{}")
  LabelSet(folder / name, kind="depth")


SETS.add_table(_open_path, {"no folder": "none", "a file": "file"})


test_labels = run_all(VALUES, SETS)
