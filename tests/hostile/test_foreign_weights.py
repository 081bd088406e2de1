"""Hostile weights: safetensors, and archives of big_vision."""

import json
import os
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
from hostile import foreign_samples as samples
from hostile.foreign_samples import HUGE, NAN, npz_arrays
from hostile.harness import Cases, run_all
from hostile.samples import OUTSIDE

from mtv_jax.convert import big_vision

WEIGHTS = Cases(__file__, "safetensors")
ARCHIVES = Cases(__file__, "npz of big_vision")


def _read_tensor(folder, content):
  family, name, change = content
  path = samples.copy(family, folder)
  tensors = samples.load_tensors(path)
  tensors[name] = change(tensors[name])
  samples.save_tensors(path, tensors)
  return samples.read(family, path)


def _with(value, dtype=None):
  def change(array):
    array = array.astype(dtype or array.dtype)
    array.flat[-1] = value
    return array

  return change


_NAME = "vision_model.encoder.layers.0.mlp.fc1.weight"
_changes = {
  "NaN": _with(NAN),
  "infinite": _with(np.inf),
  "beyond float32": _with(1e300, np.float64),
  "NaN in bfloat16": _with(NAN, ml_dtypes.bfloat16),
  "int8": lambda a: a.astype(np.int8),
  "int64": lambda a: a.astype(np.int64),
  "another shape": lambda a: a[:3],
  "a scalar": lambda a: np.array(a[0, 0]),
}
_tensors = {k: ("siglip", _NAME, change) for k, change in _changes.items()}
WEIGHTS.add_table(_read_tensor, _tensors, prefix="a tensor ", match=_NAME)
_types = {
  f"a tensor of {kind}": ("siglip", _NAME, lambda a, kind=kind: a.astype(kind))
  for kind in ("float16", "float64", ml_dtypes.bfloat16)
}
WEIGHTS.add_table(_read_tensor, _types, expects="used")
for _family, _name in (
  ("clip", "visual_projection.weight"),
  ("dinov2", "embeddings.cls_token"),
  ("depth_anything", "head.conv1.weight"),
  ("owlv2", "owlv2.text_projection.weight"),
):
  _tensors = {k: (_family, _name, _changes[k]) for k in ("NaN", "int64")}
  WEIGHTS.add_table(_read_tensor, _tensors, prefix=f"{_family}: ", match=_name)


def _header(content, tail=bytes(4)):
  data = content if isinstance(content, bytes) else json.dumps(content).encode()
  return lambda _: struct.pack("<Q", len(data)) + data + tail


def _entry(shape, offsets, dtype="F32"):
  return _header(
    {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
  )


def _change_file(path, change):
  file = path / "model.safetensors"
  file.write_bytes(change(file.read_bytes()))


WEIGHTS.add_table(
  samples.read_edited("siglip", _change_file),
  {
    "empty": lambda d: b"",
    "cut in its header": lambda d: d[:100],
    "cut in its data": lambda d: d[: len(d) // 2],
    "with a longer tail": lambda d: d + b"\0" * 100,
    "a pickle": lambda d: b"\x80\x04" + d,
    "a Git LFS pointer": lambda d: b"version https://git-lfs.github.com",
    "a header of 2^63 bytes": lambda d: struct.pack("<Q", 1 << 63) + d,
    "a header that is no JSON": _header(b"{{", b""),
    "a header nested deep": _header(b'{"a":' * 100_000, b""),
    "a negative shape": _entry([-1], [0, 4]),
    "a vast shape": _entry([1 << 40, 1 << 40], [0, 4]),
    "offsets beyond the end": _entry([1], [0, 1 << 40]),
    "offsets backwards": _entry([1], [4, 0]),
    "no tensor": _header({}, b""),
    "one tensor of others": _entry([1], [0, 4]),
    "8-bit floats": _entry([4], [0, 4], "F8_E4M3"),
  },
  prefix="a file ",
  match="safetensors",
)


def _write_index(path, content):
  (path / "model.safetensors").rename(path / "a.safetensors")
  samples.write_json(path / "model.safetensors.index.json", content)


_read_index = samples.read_edited("siglip", _write_index)

_shards = {k: {"weight_map": {"x": name}} for k, name in OUTSIDE.items()}
WEIGHTS.add_table(_read_index, _shards, prefix="a shard: ", match="index.json")
for _label, _content, _match in (
  ("without a map", {}, "model.safetensors"),
  ("a map of text", {"weight_map": "x"}, "model.safetensors"),
  ("an empty map", {"weight_map": {}}, "model.safetensors"),
  ("a shard that is a folder", {"weight_map": {"x": "."}}, "model.safetensors"),
  ("a missing shard", {"weight_map": {"x": "b.safetensors"}}, "b.safetensors"),
):
  WEIGHTS.add_table(_read_index, {f"an index {_label}": _content}, match=_match)
_one = {"an index of one file": {"weight_map": {"x": "a.safetensors"}}}
WEIGHTS.add_table(_read_index, _one, expects="used")


def _link(path, target):
  (path / "model.safetensors").rename(path.parent / "blob")
  os.symlink(target, path / "model.safetensors")


_read_link = samples.read_edited("siglip", _link)

_out = {"a link out of the folder": "../blob"}
WEIGHTS.add_table(_read_link, _out, expects="used")
_loop = {"a link to itself": "model.safetensors"}
WEIGHTS.add_table(_read_link, _loop, match="model.safetensors")


# --- Archives ----------------------------------------------------------------


def _ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


def _read_npz(folder, changed):
  """Writes an archive with changed or, if None, removed arrays; reads it."""
  arrays = {f"params/{k}": v for k, v in changed.items()}
  arrays = {k: v for k, v in (npz_arrays() | arrays).items() if v is not None}
  np.savez(folder / "a.npz", **arrays)
  return big_vision.read(folder / "a.npz")


_POSITIONS, _PATCHES = "img/pos_embedding", "img/embedding/kernel"
_STACK = "img/Transformer/encoderblock/LayerNorm_0/bias"
_WORDS = "txt/Embed_0/embedding"
ARCHIVES.add_table(_read_npz, {"valid": {}}, expects="used")
ARCHIVES.add_table(
  _read_npz,
  {
    "NaN": {_POSITIONS: _ones(1, 4, 32) * np.float32(NAN)},
    "integers": {_POSITIONS: _ones(1, 4, 32, dtype=np.int32)},
    "text": {_POSITIONS: np.full((1, 4, 32), "x")},
    "complex numbers": {"t": _ones(1, dtype=np.complex64)},
    "raw bytes": {"t": np.zeros(1, "V3")},
    "a missing array": {_POSITIONS: None},
    "an array too many": {"img/x": _ones(3)},
    "another shape": {"txt/pos_embedding": _ones(1, 8, 31)},
    "positions of one axis": {_POSITIONS: _ones(4)},
    "positions that are no square": {_POSITIONS: _ones(1, 5, 32)},
    "a patch that is no square": {_PATCHES: _ones(16, 8, 3, 32)},
    "a scalar embedding": {_WORDS: _ones()},
    "no head": {"txt/head/kernel": _ones(32)},
    "a stack without layers": {_STACK: _ones(0, 32)},
  },
  match="a.npz",
)


def _shape_header(*shape, descr="<f4"):
  text = repr({"descr": descr, "fortran_order": False, "shape": shape})
  data = (text + "\n").encode("latin1")
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data


def _read_member(folder, content):
  """Reads an archive in which bytes replace one array."""
  name, data = f"params/{content[0]}", content[1]
  path = folder / "a.npz"
  np.savez(path, **{k: v for k, v in npz_arrays().items() if k != name})
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr(f"{name}.npy", data)
  return big_vision.read(path)


ARCHIVES.add_table(
  _read_member,
  {
    "no NumPy array": ("t", b"hello"),
    "a vast shape": ("t", _shape_header(1 << 40)),
    "a negative shape": ("t", _shape_header(-1)),
    "an array without data": ("t", _shape_header(1)),
    "an unknown type": ("t", _shape_header(1, descr="<q9")),
    "a pickled array": ("t", _shape_header(1, descr="|O")),
    "a vast stack": (_STACK, _shape_header(1 << 40, 32)),
    "a vast embedding": (_WORDS, _shape_header(HUGE, 32)),
  },
  match="a.npz",
)


class _Repeated:
  """Compresses equal blocks once; zipfile would take seconds."""

  def __init__(self, block: bytes):
    self._deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    self._block, self._packed = block, self._pack(block)

  def _pack(self, data):
    # Each part can be inflated without those before it.
    return self._deflate.compress(data) + self._deflate.flush(zlib.Z_FULL_FLUSH)

  def compress(self, data):
    return self._packed if data is self._block else self._pack(data)

  def flush(self):
    return self._deflate.flush()


@ARCHIVES.add("1.2 GB of zeros in 6 MB", match="a.npz")
def _bomb(folder):
  path = folder / "a.npz"
  np.savez(path, **npz_arrays())
  block = bytes(10 << 20)
  with (
    zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
    archive.open("params/img/x.npy", "w", force_zip64=True) as stream,
  ):
    stream._compressor = _Repeated(block)
    stream.write(_shape_header(310 << 20))
    for _ in range(124):
      stream.write(block)
  return big_vision.read(path)


def _read_bytes(folder, change):
  path = folder / "a.npz"
  np.savez(path, **npz_arrays())
  path.write_bytes(change(path.read_bytes()))
  return big_vision.read(path)


ARCHIVES.add_table(
  _read_bytes,
  {
    "an empty file": lambda d: b"",
    "cut in half": lambda d: d[: len(d) // 2],
    "without its last 10 bytes": lambda d: d[:-10],
    "zeros in the middle": lambda d: d[:5000] + b"\0" * 5000 + d[10_000:],
  },
  match="a.npz",
)

test_weights = run_all(WEIGHTS, ARCHIVES)
