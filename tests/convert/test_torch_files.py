"""PyTorch checkpoints: values, refusals, shards and names."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import tower_parity as parity
from family_specs import TEXT_SPECS

from mtv_jax.convert import huggingface, torch_files
from mtv_jax.convert.tables import ConversionError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.reference
def test_torch_checkpoints_equal_torch(tmp_path):
  import torch

  base = torch.arange(24.0).reshape(4, 6)
  state = {
    "whole": torch.nn.Parameter(base),
    "view": base.T[1:3],
    "half": base.to(torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 2),
  }
  for value in (state, {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}}):
    for protocol in (2, 4):
      torch.save(value, tmp_path / "a.pth", pickle_protocol=protocol)
      with torch_files.TorchFile(tmp_path / "a.pth") as file:
        assert set(file.keys()) == {*state}
        for name, want in state.items():
          got = np.float32(file.get_tensor(name))
          assert file.get_slice(name).get_shape() == tuple(want.shape)
          np.testing.assert_array_equal(got, want.detach().float().numpy())
  torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "a.pth")
  with torch_files.TorchFile(tmp_path / "a.pth") as file:
    assert set(file.keys()) == {*state}


class Global:
  """Pickles as a call of a global, or as a storage."""

  def __init__(self, module, name, *args):
    self.parts = module, name, args


def pickled(value):
  """A protocol-2 pickle of dicts, tuples, ints, strings and `Global`s."""

  def dump(value):
    match value:
      case Global(parts=(module, name, args)):
        head = f"c{module}\n{name}\n".encode()
        return head + dump(args[0]) + b"R" if args else head
      case dict():
        items = b"".join(dump(k) + dump(v) for k, v in value.items())
        return b"}(" + items + b"u"
      case tuple():
        return b"(" + b"".join(map(dump, value)) + b"t"
      case list():  # A persistent id.
        return dump(tuple(value)) + b"Q"
      case int():
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + data
      case bytes():
        return value
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data

  return b"\x80\x02" + dump(value) + b"."


def tensor(size=4, offset=0, shape=(2, 2), strides=(2, 1), storage="Float"):
  pid = ["storage", Global("torch", f"{storage}Storage"), "0", "cpu", size]
  args = (pid, offset, shape, strides)
  return Global("torch._utils", "_rebuild_tensor_v2", args)


def save_zip(path, data, *, storage=b"\0" * 16, **options):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", data)
    archive.writestr("a/data/0", storage, **options)


HUGE = 1 << 40
DEEP = b"N" + b"\x85" * 9_000  # A tuple in a tuple in ...
LARGE = pickled({f"{i}": b"N" for i in range(6_000)})[2:-1] + b"q\1"
REFUSED = {
  "code": (pickled({"a": Global("os", "system", ("touch x",))}), "'os.system'"),
  "numpy": (pickled({"a": Global("numpy", "dtype", ("f4",))}), "numpy.dtype"),
  "getattr": (pickled({"a": Global("builtins", "getattr")}), "getattr"),
  "no_tensor": (pickled({"a": 1}), "0 state dicts"),
  "two": (pickled({k: {"x": tensor()} for k in "ab"}), "2 state dicts, a, b"),
  "large": (pickled({"a": tensor(HUGE, shape=(HUGE,), strides=(1,))}), "bytes"),
  "expanded": (pickled({"a": tensor(shape=(9, 9), strides=(0, 0))}), "exceeds"),
  "outside": (pickled({"a": tensor(offset=1)}), "exceeds its storage"),
  "negative": (pickled({"a": tensor(shape=(-1, 2))}), "not valid integers"),
  "rank": (pickled({"a": tensor(shape=(1,) * 9)}), "shape and strides"),
  "aliases": (pickled({str(i): tensor() for i in range(9)}), "too often"),
  "dtype": (pickled({"a": tensor(storage="Quantised")}), "QuantisedStorage"),
  # Looking into each of the dictionaries takes seconds.
  "alias_dicts": (
    pickled({"a": LARGE} | {f"{i}": b"h\1" for i in range(6_000)}),
    "0 state dicts",
  ),
  "deep_key": (b"\x80\x02}" + DEEP + b"Ns.", "neither a string, a number"),
  "deep_value": (b"\x80\x02}X\1\0\0\0a" + DEEP + b"s.", "0 state dicts"),
  "memo_bomb": (b"\x80\x02}r\xff\xff\xff\x7f" + b"0.", "opcode POP"),
  "call_of_value": (b"\x80\x02}(tR.", "calls something"),
  "no_mark": (b"\x80\x02}u.", "stack lacks values"),
  "underflow": (b"\x80\x02\x85.", "stack lacks values"),
  "memo": (b"\x80\x02h\x07.", "not a complete checkpoint"),
  "instance": (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
  "cut": (pickled({"a": tensor()})[:-9], "not a complete checkpoint"),
  "bytes": (b"\x80\x02B\xff\xff\xff\x7f.", "not a complete checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_checkpoints_are_refused(case, tmp_path, monkeypatch):
  data, match = REFUSED[case]
  monkeypatch.setattr(pickle, "loads", None)
  save_zip(tmp_path / "a.pth", data)
  with pytest.raises(ConversionError, match=match):
    torch_files.TorchFile(tmp_path / "a.pth")


def test_archives_are_checked(tmp_path):
  path, good = tmp_path / "a.pth", pickled({"a": tensor()})
  save_zip(path, good)
  with torch_files.TorchFile(path) as file:
    np.testing.assert_array_equal(file.get_tensor("a"), np.zeros((2, 2)))
  save_zip(path, good, compress_type=zipfile.ZIP_DEFLATED)
  with pytest.raises(ConversionError, match="not have 16 bytes"):
    torch_files.TorchFile(path)
  save_zip(path, good + b"\0" * (5 << 20))
  with pytest.raises(ConversionError, match="its pickle has"):
    torch_files.TorchFile(path)
  whole = io.BytesIO()
  pickle.dump({"a": 1}, whole, protocol=2)
  path.write_bytes(whole.getvalue())
  with pytest.raises(ConversionError, match="before PyTorch 1.6.*state_dict"):
    torch_files.TorchFile(path)


@pytest.mark.reference
def test_names_of_dinov2_equal_those_of_timm(tmp_path):
  """dinov2_vits14_reg4_pretrain.pth: a position of the CLS token, too."""
  timm = pytest.importorskip("timm")
  name = "vit_small_patch14_reg4_dinov2"
  model = timm.create_model(name, 0, img_size=56, depth=1, embed_dim=96)
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  config = json.dumps({"architecture": name})
  (tmp_path / "config.json").write_text(config)
  save_state(tmp_path / "a.pth", state)
  want = huggingface.read(tmp_path).params["image"]
  state["register_tokens"] = state.pop("reg_token")
  state["mask_token"] = np.ones((1, 96), np.float32)
  first = np.full((1, 1, 96), 0.25, np.float32)
  state["pos_embed"] = np.concatenate([first, state["pos_embed"]], 1)
  save_state(tmp_path / "a.pth", state)
  got = dict(huggingface.read(tmp_path).params["image"])
  np.testing.assert_array_equal(got.pop("mask_token"), np.ones(96))
  got["cls_token"] = got["cls_token"] - np.float32(0.25)
  np.testing.assert_allclose(got.pop("cls_token"), want["cls_token"], atol=1e-6)
  parity.assert_same_params({**got, "cls_token": want["cls_token"]}, want)
  del state["blocks.0.norm1.bias"], state["blocks.0.norm1.weight"]
  save_state(tmp_path / "a.pth", state)
  with pytest.raises(ConversionError, match=r"(?s)missing \(2\).*norm1.bias"):
    huggingface.read(tmp_path)


def test_shards_and_names_of_torch_files(tmp_path):
  """transformers' shards, and a single checkpoint of any name."""
  model = parity.spec_model({**TEXT_SPECS["clip"], "image_size": 64})
  folder = huggingface.write(tmp_path / "a", model)
  from safetensors.numpy import load_file

  state = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  for name in ("any.pth", "pytorch_model.bin"):
    save_state(folder / name, state)
    parity.assert_same_params(huggingface.read(folder).params, model.params)
    (folder / name).unlink()
  names, files = sorted(state), ("a-1.bin", "a-2.bin")
  for file, part in zip(files, (names[::2], names[1::2]), strict=True):
    save_state(folder / file, {name: state[name] for name in part})
  weights = {name: files[i % 2] for i, name in enumerate(names)}
  index = folder / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weights}))
  parity.assert_same_params(huggingface.read(folder).params, model.params)


def save_state(path, state):
  """`torch.save` of float32 arrays, without PyTorch."""
  values = {}
  for i, (name, array) in enumerate(state.items()):
    strides = tuple(s // 4 for s in np.ascontiguousarray(array).strides)
    pid = [
      "storage",
      Global("torch", "FloatStorage"),
      f"{i}",
      "cpu",
      array.size,
    ]
    args = (pid, 0, array.shape, strides[: array.ndim])
    values[name] = Global("torch._utils", "_rebuild_tensor_v2", args)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", pickled(values))
    for i, array in enumerate(state.values()):
      archive.writestr(f"a/data/{i}", array.tobytes())
