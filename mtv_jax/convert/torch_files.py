"""Reads checkpoints of `torch.save` without PyTorch and without a pickle.

A checkpoint is a zip archive with a pickle, whose opcodes `_interpret_pickle`
evaluates, and one uncompressed file per storage. As in `torch.load` with
`weights_only=True`, only tensors, containers and plain values are read; other
globals are refused by name. Nothing in the file is imported, called or
executed.
"""

import dataclasses
import math
import pathlib
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtv_jax.config import options
from mtv_jax.convert.tables import ConversionError
from mtv_jax.utils.errors import printable
from mtv_jax.utils.text import list_first

_MAX_PICKLE = 4 << 20  # Bytes; a ViT of 7B parameters has 0.2 MB.
_MAX_AXES = 8
_MAX_ARGUMENTS = 8
_HINT = (
  "Save its weights alone, torch.save(model.state_dict(), path), or as "
  "safetensors."
)
_DTYPES = {
  "Float": np.float32, "Double": np.float64, "Half": np.float16,
  "BFloat16": jnp.bfloat16, "Long": np.int64, "Int": np.int32,
  "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
}  # fmt: skip
_DTYPES = {f"torch.{name}Storage": kind for name, kind in _DTYPES.items()}


class _Global(str):
  """The name of a global, as `module.name`."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  dtype: np.dtype
  key: str
  size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def __post_init__(self):
    if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
      raise ValueError("a tensor's shape and strides differ")
    sizes = [*self.shape, *self.strides, self.offset]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes):
      raise ValueError("a tensor's sizes are not valid integers")
    # A tensor expanded by strides of 0 would be larger than its storage.
    count = max(self.offset + self.extent, math.prod(self.shape))
    if count > self.storage.size:
      raise ValueError(f"a tensor of shape {self.shape} exceeds its storage")

  @property
  def extent(self) -> int:
    """Elements of the storage from the tensor's first to its last."""
    if 0 in self.shape:
      return 0
    pairs = zip(self.shape, self.strides, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.storage.dtype.itemsize

  def get_shape(self) -> tuple[int, ...]:
    return self.shape


def _rebuild_tensor(
  storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> _Tensor:
  if any(rest[2:]):  # After requires_grad and hooks: a negative view, say.
    raise ConversionError(f"a tensor has metadata. {_HINT}")
  if (type(storage), type(shape), type(strides)) != (_Storage, tuple, tuple):
    raise ValueError("a tensor lacks a storage, shape or strides")
  return _Tensor(storage, offset, shape, strides)


# Inert stand-ins for the globals that a state dict may call.
_CALLS: Mapping[str, Callable[..., Any]] = {
  "collections.OrderedDict": lambda *_: {},
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch.Size": lambda *sizes: sizes,
}


def _build_storage(pid: Any) -> _Storage:
  kind, dtype, key, _, size = pid
  types = (type(kind), type(dtype), type(key), type(size))
  if types != (str, _Global, str, int) or kind != "storage" or size < 0:
    raise ValueError("it has an unknown storage")
  return _Storage(np.dtype(_DTYPES[dtype]), key, size)


def _call_global(function: Any, args: Any) -> Any:
  is_call = type(function) is _Global and type(args) is tuple
  if not is_call or len(args) > _MAX_ARGUMENTS:
    raise ValueError("it calls something that is not a known function")
  return _CALLS[function](*args)


def _name_global(name: str) -> _Global:
  if name not in _CALLS and name not in _DTYPES:
    raise ConversionError(
      f"it holds {options.shorten_repr(name)}, which is not read: only "
      f"tensors, containers and plain values are. {_HINT}"
    )
  return _Global(name)


_MARK = object()
_CONSTANTS = {
  "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (),
  "MARK": _MARK,
}  # fmt: skip
_LITERALS = {
  "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BININT",
  "BININT1", "BININT2", "LONG1", "BINFLOAT",
}  # fmt: skip
# Values that an opcode pops from the stack; None: all above the mark.
_POP_COUNTS = {
  "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2,
  "SETITEMS": None, "APPEND": 1, "APPENDS": None, "STACK_GLOBAL": 2,
  "BINPERSID": 1, "REDUCE": 2, "BUILD": 1,
}  # fmt: skip


class _PickleMachine:
  """Pickle machine: a stack and a memo."""

  def __init__(self):
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}

  def _pop(self, count: int | None) -> list[Any]:
    pops_to_mark = count is None
    if pops_to_mark:
      above = enumerate(reversed(self.stack))
      count = next((n for n, value in above if value is _MARK), None)
    if count is None or len(self.stack) < count:
      raise ValueError("its stack lacks values")
    start = len(self.stack) - count
    values = self.stack[start:]
    del self.stack[start - pops_to_mark :]
    return values

  def _set_items(self, values: list[Any]) -> None:
    target = self.stack[-1]
    if type(target) is not dict or len(values) % 2:
      raise ValueError("it sets items of something that is not a dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
      # The hash of a deeply nested tuple would exhaust the C stack.
      if not isinstance(key, str | int | float | None):
        raise ValueError(
          "it has a dictionary key that is neither a string, a number nor None"
        )
      target[key] = value

  def step(self, name: str, arg: Any) -> None:
    """Evaluates one opcode; ValueError for an unknown one."""
    push = self.stack.append
    values = self._pop(_POP_COUNTS[name]) if name in _POP_COUNTS else []
    if name in _LITERALS:
      push(arg)
    elif name in _CONSTANTS:
      push(_CONSTANTS[name])
    elif name in ("EMPTY_DICT", "EMPTY_LIST"):
      push({} if name == "EMPTY_DICT" else [])
    elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
      self.memo[len(self.memo) if arg is None else arg] = self.stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      push(self.memo[arg])
    elif name.startswith("TUPLE"):
      push(tuple(values))
    elif name.startswith("SETITEM"):
      self._set_items(values)
    elif name.startswith("APPEND"):
      if type(self.stack[-1]) is not list:
        raise ValueError("it appends to something that is not a list")
      self.stack[-1].extend(values)
    elif name == "GLOBAL":
      push(_name_global(arg.replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
      push(_name_global(".".join(values)))
    elif name == "BINPERSID":
      push(_build_storage(*values))
    elif name == "REDUCE":
      push(_call_global(*values))
    # BUILD sets attributes, such as `_metadata`.
    elif name not in ("BUILD", "PROTO", "FRAME", "STOP"):
      raise ValueError(f"it has the opcode {name}")


def _interpret_pickle(data: bytes) -> Any:
  machine = _PickleMachine()
  for opcode, arg, _ in pickletools.genops(data):
    machine.step(opcode.name, arg)
  return machine.stack[-1]


def _find_state_dict(value: Any) -> dict[str, _Tensor]:
  """Returns a state dict's tensors; the checkpoint may hold it under a key."""

  def select(value: Any) -> dict[str, _Tensor]:
    items = value.items() if type(value) is dict else ()
    return {k: v for k, v in items if type(k) is str and type(v) is _Tensor}

  if state := select(value):
    return state
  items = value.items() if type(value) is dict else ()
  # Thousands of keys may refer to one large dictionary.
  nested = {id(item): (key, item) for key, item in items}.values()
  states = {key: match for key, item in nested if (match := select(item))}
  if len(states) != 1:
    names = list_first([*map(str, states)], 6)
    raise ConversionError(
      f"it holds {len(states)} state dicts, {names}; expected one. {_HINT}"
    )
  return states.popitem()[1]


class TorchFile:
  """Context manager for a checkpoint, with the interface of `safe_open`."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    with path.open("rb") as file:
      magic = file.read(4)
    if magic != b"PK\x03\x04":
      raise ConversionError(
        f"{path} is not a zip archive of torch.save: it is damaged, or in the "
        f"format before PyTorch 1.6, a pickle that is not read. {_HINT}"
      )
    try:
      self._archive = zipfile.ZipFile(path)
      self._tensors = self._read_state()
    except ConversionError as error:
      raise ConversionError(f"{path}: {error}") from None
    except Exception as error:  # Damaged files can raise any exception.
      raise ConversionError(
        f"{path} is not a complete checkpoint of torch.save "
        f"({printable(error, 200)}): copy it again."
      ) from None

  def _read_state(self) -> dict[str, _Tensor]:
    entries = {info.filename: info for info in self._archive.infolist()}
    (name,) = (n for n in entries if re.fullmatch(r"[^/]+/data\.pkl", n))
    self._root = name.removesuffix("data.pkl")
    if entries[name].file_size > _MAX_PICKLE:
      raise ValueError(f"its pickle has {entries[name].file_size:,} bytes")
    if order := entries.get(f"{self._root}byteorder"):
      with self._archive.open(order) as file:
        if file.read(6) != b"little":
          raise ValueError("its numbers are big-endian")
    state = _find_state_dict(_interpret_pickle(self._archive.read(name)))
    storages = {}
    for tensor in state.values():
      storage = tensor.storage
      info = entries[f"{self._root}data/{storage.key}"]
      size = storage.size * storage.dtype.itemsize
      if info.file_size != size or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"storage {storage.key!r} does not have {size} bytes")
      storages[storage.key] = size
    # Tied weights share a storage; thousands of aliases would fill the memory.
    total = sum(tensor.nbytes for tensor in state.values())
    if total > 2 * sum(storages.values()):
      raise ConversionError(f"its tensors share storages too often. {_HINT}")
    for prefix in ("module.", "_orig_mod."):  # DDP and torch.compile add them.
      if all(key.startswith(prefix) for key in state):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state

  def __enter__(self) -> "TorchFile":
    return self

  def __exit__(self, *error: object) -> None:
    self._archive.close()

  def keys(self) -> list[str]:
    return list(self._tensors)

  def get_slice(self, name: str) -> _Tensor:
    return self._tensors[name]

  def get_tensor(self, name: str) -> np.ndarray:
    """Reads a tensor from its storage."""
    tensor, dtype = self._tensors[name], self._tensors[name].storage.dtype
    with self._archive.open(f"{self._root}data/{tensor.storage.key}") as file:
      file.seek(tensor.offset * dtype.itemsize)
      data = file.read(tensor.extent * dtype.itemsize)
    values = np.frombuffer(data, dtype, tensor.extent)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides)
    return np.array(view)
