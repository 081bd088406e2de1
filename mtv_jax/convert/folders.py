"""Files of a Hugging Face folder: config fields, JSON and safetensors."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mtv_jax.convert.tables import ConversionError
from mtv_jax.utils.errors import MissingFileError

WEIGHTS = "model.safetensors"
_LFS = b"version https://git-lfs"
# Weight formats that are not read, and the reason.
_OTHERS = {
  "*.bin": "pickles, which are never loaded here",
  "*.pt": "pickles, which are never loaded here",
  "*.pth": "pickles, which are never loaded here",
  "*.ckpt": "pickles, which are never loaded here",
  "*.msgpack": "Flax weights",
  "*.h5": "TensorFlow weights",
  "*.npz": "NumPy archives: big_vision's convert with from_big_vision",
}
# Activations of transformers by the names of our specs, and back.
GELUS = {
  "gelu_pytorch_tanh": "tanh",
  "gelu_new": "tanh",
  "gelu_fast": "tanh",
  "gelu": "exact",
  "gelu_python": "exact",
  "quick_gelu": "quick",
}
HIDDEN_ACT = {
  "tanh": "gelu_pytorch_tanh",
  "exact": "gelu",
  "quick": "quick_gelu",
}


def require_folder(folder: str | os.PathLike) -> pathlib.Path:
  """The folder as a path.

  Raises:
    MissingFileError: it does not exist.
    ConversionError: it is a file.
  """
  path = pathlib.Path(folder)
  if path.is_dir():
    return path
  if path.exists():
    raise ConversionError(f"{path} is a file; a folder is expected.")
  raise MissingFileError(
    f"There is no folder {path}. If it is the name of a model on the Hub, "
    "download its files first: nothing is downloaded here."
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; {} if there is no such file."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ConversionError(f"{path} is not JSON: {error}") from None
  if not isinstance(value, dict):
    raise ConversionError(f"{path} holds a {type(value).__name__}, no object.")
  return value


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(dict(value), indent=2, ensure_ascii=False)
  path.write_text(text + "\n", "utf-8")


class TensorFiles:
  """Tensors of safetensors files, memory-mapped and read one at a time.

  A context manager.
  """

  def __init__(self, files: Iterable[pathlib.Path]):
    """Opens the files.

    Raises:
      ConversionError: a file is missing, cut short or only a pointer.
    """
    self._stack = contextlib.ExitStack()
    self._where: dict[str, Any] = {}
    try:
      for path in files:
        handle = self._stack.enter_context(_open(path))
        self._where.update(dict.fromkeys(handle.keys(), handle))
    except BaseException:
      self._stack.close()
      raise

  def __enter__(self) -> "TensorFiles":
    return self

  def __exit__(self, *error: object) -> None:
    self._stack.close()

  @property
  def names(self) -> list[str]:
    return list(self._where)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._where[name].get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    return self._where[name].get_tensor(name)


def _open(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ConversionError(
      f"{path} is missing: the index beside it names it. Is the download whole?"
    )
  with path.open("rb") as file:
    if file.read(len(_LFS)) == _LFS:
      raise ConversionError(
        f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in "
        "its folder."
      )
  try:
    return safetensors.safe_open(str(path), framework="np")
  except safetensors.SafetensorError as error:
    raise ConversionError(
      f"{path} is not a whole safetensors file ({error}): copy it again."
    ) from None


def open_weights(folder: pathlib.Path) -> TensorFiles:
  """The weights of a Hugging Face folder, in one file or in shards.

  Raises:
    ConversionError: there are none that can be read.
  """
  single = folder / WEIGHTS
  if single.is_file():
    return TensorFiles([single])
  index = read_json(folder / f"{WEIGHTS}.index.json")
  if index:
    shards = sorted(set(index.get("weight_map", {}).values()))
    return TensorFiles(folder / name for name in shards)
  raise ConversionError(_missing_weights_message(folder))


def _missing_weights_message(folder: pathlib.Path) -> str:
  lines = [f"{folder} has no {WEIGHTS} (or {WEIGHTS}.index.json)."]
  if (folder / "adapter_config.json").is_file():
    lines.append("It holds an adapter: merge it into its model first.")
  for pattern, kind in _OTHERS.items():
    names = sorted(p.name for p in folder.glob(pattern))
    if names:
      lines.append(f"It has {', '.join(names[:4])}: {kind}.")
  lines.append(
    "Load the model once with transformers and call "
    "save_pretrained(folder, safe_serialization=True)."
  )
  return " ".join(lines)


def write_tensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes a safetensors file atomically."""
  partial = path.with_name(path.name + ".partial")
  # transformers refuses a file without this field.
  safetensors.numpy.save_file(
    dict(tensors), str(partial), metadata={"format": "pt"}
  )
  os.replace(partial, path)


def with_defaults(
  config: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """A config completed with the library's defaults.

  Published configs often store only the differences from them.
  """
  given = {k: v for k, v in (config or {}).items() if v is not None}
  return {**defaults, **given}


def read_activation(config: Mapping[str, Any]) -> str:
  """The spec's name of the activation `hidden_act`."""
  name = config["hidden_act"]
  if name not in GELUS:
    raise ConversionError(
      f"hidden_act={name!r} is not an activation of our towers, which have "
      f"{sorted(GELUS)}."
    )
  return GELUS[name]


def read_side(value: Any, field: str) -> int:
  """A side in pixels, given as an integer or as a pair of equal ones."""
  if isinstance(value, (list, tuple)):
    if len(set(value)) != 1:
      raise ConversionError(
        f"{field}={list(value)}: only square images and patches convert."
      )
    value = value[0]
  return int(value)


def read_sizes(config: Mapping[str, Any]) -> dict[str, int]:
  """`image_size` and `patch_size`, of square RGB images."""
  if config.get("num_channels", 3) != 3:
    raise ConversionError(
      f"num_channels={config['num_channels']}: only RGB models convert."
    )
  sizes = {k: read_side(config[k], k) for k in ("image_size", "patch_size")}
  # transformers drops pixels that do not fill a patch.
  patch = sizes["patch_size"]
  sizes["image_size"] = sizes["image_size"] // patch * patch
  return sizes
