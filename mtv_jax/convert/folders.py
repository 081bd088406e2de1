"""Files of a Hugging Face folder: config fields, JSON and safetensors."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import MissingFileError

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_LFS = b"version https://git-lfs"
# Weight formats that are not read, and the reason.
_OTHERS = {
  **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt"), "unsafe pickles"),
  "*.msgpack": "Flax weights",
  "*.h5": "TensorFlow weights",
  "*.npz": "NumPy archives; from_big_vision converts big_vision's",
}
# Activations of transformers by those of our specs; the first one is written.
_ACTIVATIONS = {
  "tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
  "exact": ("gelu", "gelu_python"),
  "quick": ("quick_gelu",),
}
_GELUS = {name: gelu for gelu, names in _ACTIVATIONS.items() for name in names}
# Fields of SigLIP's and CLIP's config sections by those of our specs.
_TOWER_FIELDS = {
  "width": "hidden_size",
  "depth": "num_hidden_layers",
  "heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "norm_eps": "layer_norm_eps",
}
_TEXT_FIELDS = {"vocab_size": "vocab_size", "length": "max_position_embeddings"}
_VISION_FIELDS = {"image_size": "image_size", "patch_size": "patch_size"}


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
    f"There is no folder {path}. Download a model of the Hub first: nothing is "
    "downloaded here."
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
    raise ConversionError(f"{path} is not a JSON object.")
  return value


def read_config(
  folder: str | os.PathLike, *, model_type: str, example: str
) -> tuple[pathlib.Path, dict[str, Any]]:
  """A folder's path and its `config.json`.

  Raises:
    MissingFileError: there is no folder.
    ConversionError: it has another model type; `example` names a valid model.
  """
  path = require_folder(folder)
  config = read_json(path / "config.json")
  if config.get("model_type") != model_type:
    raise ConversionError(
      f"{path / 'config.json'} has model_type {config.get('model_type')!r}; "
      f"expected {model_type!r}, as in {example}."
    )
  return path, config


def read_processor(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
  """The image processor's file and its fields, {} if there is none."""
  # From transformers 5 on, one file contains the processors of all modalities.
  path = folder / "processor_config.json"
  if fields := read_json(path).get("image_processor"):
    return path, fields
  path = folder / "preprocessor_config.json"
  return path, read_json(path)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(dict(value), indent=2, ensure_ascii=False)
  path.write_text(text + "\n", "utf-8")


class TensorFiles:
  """Tensors of safetensors files, memory-mapped and read one at a time.

  A context manager.

  Args:
    path: the file, or the index of several files.
    files: all of them; only `path` by default.

  Raises:
    ConversionError: a file is missing, truncated or only a pointer.
  """

  def __init__(
    self, path: pathlib.Path, files: Iterable[pathlib.Path] | None = None
  ):
    self.path = path
    self._files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
      for file in [path] if files is None else files:
        handle = stack.enter_context(_open(file))
        self._files.update(dict.fromkeys(handle.keys(), handle))
      self._stack = stack.pop_all()

  def __enter__(self) -> "TensorFiles":
    return self

  def __exit__(self, *error: object) -> None:
    self._stack.close()

  @property
  def names(self) -> list[str]:
    return list(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)


def _open(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ConversionError(
      f"{path}, named by the index beside it, is missing: download it too."
    )
  with path.open("rb") as file:
    if file.read(len(_LFS)) == _LFS:
      raise ConversionError(
        f"{path} is a Git LFS pointer: run `git lfs pull` in its folder."
      )
  try:
    return safetensors.safe_open(str(path), framework="np")
  except safetensors.SafetensorError as error:
    raise ConversionError(
      f"{path} is not a whole safetensors file ({error}): copy it again."
    ) from None


def open_weights(folder: pathlib.Path) -> TensorFiles:
  """The weights of a Hugging Face folder, one file or shards.

  Raises:
    ConversionError: there are none that can be read.
  """
  path = folder / WEIGHTS
  if path.is_file():
    return TensorFiles(path)
  index = folder / f"{WEIGHTS}.index.json"
  if shards := read_json(index).get("weight_map"):
    return TensorFiles(index, [folder / n for n in sorted({*shards.values()})])
  lines = [f"{folder} lacks {WEIGHTS} and {WEIGHTS}.index.json."]
  if (folder / "adapter_config.json").is_file():
    lines.append("It contains an adapter: merge it into its model first.")
  for pattern, kind in _OTHERS.items():
    names = sorted(p.name for p in folder.glob(pattern))
    if names:
      lines.append(f"It has {', '.join(names[:4])}: {kind}.")
  lines.append(
    "Load the model once with transformers and call "
    "save_pretrained(folder, safe_serialization=True)."
  )
  raise ConversionError(" ".join(lines))


def write_tensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes a safetensors file atomically."""
  with atomic.replace_file(path) as temporary:
    # transformers rejects a file without this field.
    safetensors.numpy.save_file(
      dict(tensors), str(temporary), metadata={"format": "pt"}
    )


def with_defaults(config: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """A config's section with transformers' defaults, which files leave out.

  Raises:
    ConversionError: the section is no object, or a value no number or list
      where the default is one.
  """
  if not isinstance(config, Mapping | None):
    raise ConversionError(
      f"config.json has {config!r} for a section; expected an object."
    )
  given = {k: v for k, v in (config or {}).items() if v is not None}
  for name in defaults.keys() & given:
    default, value = defaults[name], given[name]
    number = isinstance(default, int | float)
    if (number and isinstance(value, str | Mapping)) or (
      isinstance(default, tuple) and not isinstance(value, list | tuple)
    ):
      raise ConversionError(
        f"config.json: {name}={value!r}; expected a value such as {default}."
      )
  return {**defaults, **given}


def has_text_tower(names: Iterable[str]) -> bool:
  """Whether a file of SigLIP or CLIP with these tensors has a text tower."""
  if any(name.startswith("text_model.") for name in names):
    return True
  log.info("No text tower in the file: only images can be encoded.")
  return False


def read_text(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `TextSpec` that a complete config section sets."""
  fields = {k: config[name] for k, name in _TEXT_FIELDS.items()}
  return {**fields, **_read_tower(config)}


def read_vision(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `ViTSpec` that a complete config section sets.

  Raises:
    ConversionError: images or patches are not square or not RGB, or an unknown
      activation.
  """
  if config.get("num_channels", 3) != 3:
    raise ConversionError(
      f"num_channels={config['num_channels']}: only RGB models convert."
    )
  size, patch = (read_side(config[k], k) for k in _VISION_FIELDS)
  # transformers drops pixels that do not fill a patch.
  sizes = {"image_size": size // patch * patch, "patch_size": patch}
  return {**sizes, **_read_tower(config)}


def _read_tower(config: Mapping[str, Any]) -> dict[str, Any]:
  fields = {k: config[name] for k, name in _TOWER_FIELDS.items()}
  activation = config["hidden_act"]
  if activation not in _GELUS:
    raise ConversionError(
      f"hidden_act={activation!r} is not supported; expected one of "
      f"{sorted(_GELUS)}."
    )
  fields["norm_eps"] = float(fields["norm_eps"])
  return {**fields, "gelu": _GELUS[activation]}


def tower_config(spec: ViTSpec | TextSpec) -> dict[str, Any]:
  """The config section of a tower; the inverse of reading."""
  extra = _TEXT_FIELDS if isinstance(spec, TextSpec) else _VISION_FIELDS
  fields = {**_TOWER_FIELDS, **extra}
  return {
    **{key: getattr(spec, field) for field, key in fields.items()},
    "hidden_act": _ACTIVATIONS[spec.gelu][0],
    "attention_dropout": 0.0,
  }


def text_ids(spec: TextSpec, pad_id: int | None) -> dict[str, int | None]:
  """Special tokens of a text section; the defaults would be CLIP's ids."""
  pad_id = spec.eos_id if pad_id is None else pad_id
  return {
    "bos_token_id": None,
    "eos_token_id": spec.eos_id,
    "pad_token_id": pad_id,
  }


def list_mismatches(
  spec: ModelSpec, required: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """A line for each field of a tower, by its name, with another value."""
  return [
    f"  {tower}.{field} is {value!r} and would have to be {expected!r}\n"
    for tower, fields in required.items()
    for field, expected in fields.items()
    if (value := getattr(getattr(spec, tower), field)) != expected
  ]


def read_side(value: Any, field: str) -> int:
  """A side in pixels, an integer or a pair of equal integers."""
  if isinstance(value, (list, tuple)):
    if len(set(value)) != 1:
      raise ConversionError(
        f"{field}={list(value)}: only square images and patches convert."
      )
    value = value[0]
  return int(value)
