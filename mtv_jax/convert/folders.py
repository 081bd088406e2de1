"""Files of a Hugging Face folder: JSON and safetensors, never a pickle."""

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
# Kinds of weights that are not read, and why not.
_OTHERS = {
  "*.bin": "pickles, which are never loaded here",
  "*.pt": "pickles, which are never loaded here",
  "*.pth": "pickles, which are never loaded here",
  "*.ckpt": "pickles, which are never loaded here",
  "*.msgpack": "Flax weights",
  "*.h5": "TensorFlow weights",
  "*.npz": "NumPy archives: big_vision's convert with from_big_vision",
}


def existing(folder: str | os.PathLike) -> pathlib.Path:
  """The folder, checked to be one."""
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
  """The tensors of one or several safetensors files, read one at a time.

  Use as a context; files are memory-mapped, and a tensor costs memory only
  while it is in use.
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
  raise ConversionError(_no_weights(folder))


def _no_weights(folder: pathlib.Path) -> str:
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
  """Writes a safetensors file; whoever looks sees it whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  # transformers refuses a file that doesn't say whose format it is.
  safetensors.numpy.save_file(
    dict(tensors), str(partial), metadata={"format": "pt"}
  )
  os.replace(partial, path)
