"""Hostile weights: safetensors, and archives of big_vision."""

import json
import os
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
from hostile import foreign_samples as samples
from hostile.harness import Cases, run_all

from mtv_jax.convert import big_vision

HUGE = samples.HUGE
NAN = samples.NAN
WEIGHTS = Cases(__file__, "safetensors")
ARCHIVES = Cases(__file__, "npz of big_vision")


def _tensors(name, change, family="siglip"):
  def run(folder):
    path = samples.copy(family, folder)
    tensors = samples.load_tensors(path)
    tensors[name] = change(tensors[name])
    samples.save_tensors(path, tensors)
    return samples.read(family, path)

  return run


def _with(value, dtype=None):
  def change(array):
    array = array.astype(dtype or array.dtype)
    array.flat[-1] = value
    return array

  return change


_NAME = "vision_model.encoder.layers.0.mlp.fc1.weight"
for _label, _change in {
  "NaN": _with(NAN),
  "infinite": _with(np.inf),
  "beyond float32": _with(1e300, np.float64),
  "NaN in bfloat16": _with(NAN, ml_dtypes.bfloat16),
  "int8": lambda a: a.astype(np.int8),
  "int64": lambda a: a.astype(np.int64),
  "bool": lambda a: a > 0,
  "another shape": lambda a: a[:3],
  "an empty shape": lambda a: a[:0],
  "a scalar": lambda a: np.array(a[0, 0]),
}.items():
  WEIGHTS.add(f"a tensor {_label}", _tensors(_NAME, _change), match=_NAME)
for _type in (np.float16, np.float64, ml_dtypes.bfloat16):
  _run = _tensors(_NAME, lambda a, t=_type: a.astype(t))
  WEIGHTS.add(f"a tensor of {np.dtype(_type)}", _run, expects="used")
for _family, _name in (
  ("clip", "visual_projection.weight"),
  ("dinov2", "embeddings.cls_token"),
  ("depth_anything", "head.conv1.weight"),
  ("owlv2", "owlv2.text_projection.weight"),
):
  _run = _tensors(_name, _with(NAN), _family)
  WEIGHTS.add(f"{_family}: NaN", _run, match=_name)
  _run = _tensors(_name, lambda a: a.astype(np.int32), _family)
  WEIGHTS.add(f"{_family}: integers", _run, match=_name)


def _header(content, tail=b""):
  data = content if isinstance(content, bytes) else json.dumps(content).encode()
  return lambda _: struct.pack("<Q", len(data)) + data + tail


def _entry(shape, offsets, dtype="F32"):
  return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


for _label, _change in {
  "empty": lambda d: b"",
  "of 7 bytes": lambda d: d[:7],
  "cut in its header": lambda d: d[:100],
  "cut in its data": lambda d: d[: len(d) // 2],
  "without its last byte": lambda d: d[:-1],
  "with a longer tail": lambda d: d + b"\0" * 100,
  "a pickle": lambda d: b"\x80\x04" + d,
  "a Git LFS pointer": lambda d: b"version https://git-lfs.github.com/spec/v1",
  "a header of 2^63 bytes": lambda d: struct.pack("<Q", 1 << 63) + d,
  "a header of 99 GB": lambda d: struct.pack("<Q", 99 << 30) + d,
  "a header that is no JSON": _header(b"{{"),
  "a header that is a list": _header([1]),
  "a header nested deep": _header(b'{"a":' * 100_000),
  "a negative shape": _header(_entry([-1], [0, 4]), b"\0" * 4),
  "a vast shape": _header(_entry([1 << 40, 1 << 40], [0, 4]), b"\0" * 4),
  "offsets beyond the end": _header(_entry([1], [0, 1 << 40]), b"\0" * 4),
  "offsets backwards": _header(_entry([1], [4, 0]), b"\0" * 4),
  "an unknown type": _header(_entry([1], [0, 4], "Q9"), b"\0" * 4),
  "no tensor": _header({}),
  "one tensor of others": _header(_entry([1], [0, 4]), b"\0" * 4),
  "8-bit floats": _header(_entry([4], [0, 4], "F8_E4M3"), b"\0" * 4),
}.items():
  WEIGHTS.add(
    f"a file {_label}",
    samples.replacing("siglip", "model.safetensors", _change),
    match="safetensors",
  )


def _index(content):
  def run(folder):
    path = samples.copy("siglip", folder)
    (path / "model.safetensors").rename(path / "a.safetensors")
    index = path / "model.safetensors.index.json"
    samples.write_json(index, content)
    return samples.read("siglip", path)

  return run


for _label, _name in samples.OUTSIDE.items():
  _run = _index({"weight_map": {"x": _name}})
  WEIGHTS.add(f"a shard: {_label}", _run, match="index.json")
for _label, _content in {
  "without a map": {},
  "a map of text": {"weight_map": "x"},
  "an empty map": {"weight_map": {}},
  "a shard that is a folder": {"weight_map": {"x": "."}},
}.items():
  WEIGHTS.add(f"an index {_label}", _index(_content), match="model.safetensors")
WEIGHTS.add(
  "an index a missing shard",
  _index({"weight_map": {"x": "b.safetensors"}}),
  match="b.safetensors",
)
WEIGHTS.add(
  "an index of one file",
  _index({"weight_map": {"x": "a.safetensors"}}),
  expects="used",
)


@WEIGHTS.add("a shard that is linked out of the folder", expects="used")
def _linked(folder):
  path = samples.copy("siglip", folder)
  (path / "model.safetensors").rename(folder / "blob")
  os.symlink("../blob", path / "model.safetensors")
  return samples.read("siglip", path)


@WEIGHTS.add("a link to itself", match="model.safetensors")
def _loop(folder):
  path = samples.copy("siglip", folder)
  (path / "model.safetensors").unlink()
  os.symlink("model.safetensors", path / "model.safetensors")
  return samples.read("siglip", path)


test_weights = run_all(WEIGHTS)


def _npz(**changed):
  changed = {k.replace("__", "/"): v for k, v in changed.items()}
  return lambda folder: samples.read_npz(folder, **changed)


def _ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


ARCHIVES.add("valid", _npz(), expects="used")
for _label, _changed in {
  "NaN": {"img__pos_embedding": _ones(1, 4, 32) * np.float32(NAN)},
  "integers": {"img__pos_embedding": _ones(1, 4, 32, dtype=np.int32)},
  "text": {"img__pos_embedding": np.full((1, 4, 32), "x")},
  "complex numbers": {"t": _ones(1, dtype=np.complex64)},
  "raw bytes": {"t": np.zeros(1, "V3")},
  "raw bytes that are no bfloat16": {"t": np.zeros(1, "V4")},
  "a missing array": {"img__pos_embedding": None},
  "an array too many": {"img__x": _ones(3)},
  "another shape": {"txt__pos_embedding": _ones(1, 8, 31)},
  "positions of one axis": {"img__pos_embedding": _ones(4)},
  "positions that are no square": {"img__pos_embedding": _ones(1, 5, 32)},
  "positions of no patch": {"img__pos_embedding": _ones(1, 0, 32)},
  "a patch of nothing": {"img__embedding__kernel": _ones(0, 0, 3, 32)},
  "a patch that is no square": {"img__embedding__kernel": _ones(16, 8, 3, 32)},
  "a scalar embedding": {"txt__Embed_0__embedding": _ones()},
  "an empty vocabulary": {"txt__Embed_0__embedding": _ones(0, 32)},
  "no head": {"txt__head__kernel": _ones(32)},
  "a stack without layers": {
    "img__Transformer__encoderblock__LayerNorm_0__bias": _ones(0, 32)
  },
  "a stack that is a scalar": {
    "img__Transformer__encoderblock__LayerNorm_0__bias": _ones()
  },
}.items():
  ARCHIVES.add(_label, _npz(**_changed), match="a.npz")


def _shape_header(shape, descr="<f4"):
  text = repr({"descr": descr, "fortran_order": False, "shape": shape})
  data = (text + "\n").encode("latin1")
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data


def _member(name, data, kind=zipfile.ZIP_STORED):
  """An archive with one array replaced by bytes."""

  def run(folder):
    path = folder / "a.npz"
    arrays = samples.npz_arrays()
    np.savez(path, **{k: v for k, v in arrays.items() if k != name})
    with zipfile.ZipFile(path, "a", kind) as archive:
      archive.writestr(f"{name}.npy", data)
    return big_vision.read(path)

  return run


_STACK = "params/img/Transformer/encoderblock/LayerNorm_0/bias"
for _label, _name, _data in (
  ("no NumPy array", "params/t", b"hello"),
  ("an empty member", "params/t", b""),
  ("a vast shape", "params/t", _shape_header((1 << 40,))),
  ("a negative shape", "params/t", _shape_header((-1,))),
  ("a shape of text", "params/t", _shape_header(("x",))),
  ("an array without data", "params/t", _shape_header((1,))),
  ("an unknown type", "params/t", _shape_header((1,), "<q9")),
  ("a pickled array", "params/t", _shape_header((1,), "|O")),
  ("a vast stack", _STACK, _shape_header((1 << 40, 32))),
  (
    "a vast embedding",
    "params/txt/Embed_0/embedding",
    _shape_header((HUGE, 32)),
  ),
):
  ARCHIVES.add(_label, _member(_name, _data), match="a.npz")


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
  np.savez(path, **samples.npz_arrays())
  with (
    zipfile.ZipFile(
      path, "a", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive,
    archive.open("params/img/x.npy", "w", force_zip64=True) as stream,
  ):
    block = bytes(10 << 20)
    stream._compressor = _Repeated(block)
    stream.write(_shape_header((310 << 20,)))
    for _ in range(124):
      stream.write(block)
  return big_vision.read(path)


def _npz_bytes(change):
  def run(folder):
    path = folder / "a.npz"
    np.savez(path, **samples.npz_arrays())
    path.write_bytes(change(path.read_bytes()))
    return big_vision.read(path)

  return run


for _label, _change in {
  "an empty file": lambda d: b"",
  "cut in half": lambda d: d[: len(d) // 2],
  "without its last 10 bytes": lambda d: d[:-10],
  "a flipped byte": lambda d: d[:200] + bytes([d[200] ^ 255]) + d[201:],
  "zeros in the middle": lambda d: d[:5000] + b"\0" * 5000 + d[10_000:],
}.items():
  ARCHIVES.add(f"a file: {_label}", _npz_bytes(_change), match="a.npz")


test_archives = run_all(ARCHIVES)
