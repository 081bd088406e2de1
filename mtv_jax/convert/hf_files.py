"""Hugging Face folder I/O: config fields, JSON and weights."""

import contextlib
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
import safetensors
import safetensors.numpy

from mtv_jax.config import foreign, options
from mtv_jax.config.options import NonNegativeInt, PositiveFloat, Range, Side
from mtv_jax.convert import torch_files
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.layers import Length, NumLayers, VocabularySize, Width
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import MissingFileError
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_TORCH_WEIGHTS = "pytorch_model.bin"
_LFS_HEADER = b"version https://git-lfs"
# Unsupported weight formats, with reasons.
_UNSUPPORTED = {
  **dict.fromkeys(
    ("*.bin", "*.pt", "*.pth", "*.ckpt"),
    f"keep one .pth, or name it {_TORCH_WEIGHTS}",
  ),
  "*.msgpack": "Flax weights",
  "*.h5": "TensorFlow weights",
  "*.npz": "NumPy archives; from_big_vision converts big_vision's",
}
SIDES = Side | tuple[Side, Side]
_TRIPLE = tuple[float, float, float]
_SCALES = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
# Types of the keys in a config.json and its sections, for all families.
_TYPED_KEYS = (
  (bool, (
    "apply_layernorm", "is_native", "key_bias", "mlp_bias", "proj_bias",
    "qkv_bias", "query_bias", "scale_sqrt_depth", "use_gated_mlp", "use_head",
    "use_swiglu_ffn", "value_bias", "vision_use_head",
  )),
  (str, (
    "backbone", "depth_decoder_activation", "depth_estimation_type",
    "hidden_act", "model_type", "readout_activation",
  )),
  (int, (
    "head_in_index", "num_channels", "pad_token_id",
    "video_temporal_patch_size",
  )),
  (PositiveFloat, (
    "layer_norm_eps", "max_depth", "min_depth",
    "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift", "rms_norm_eps",
    "rope_theta", "temperature_init_value",
  )),
  (Width, (
    "fusion_hidden_size", "head_hidden_size", "hidden_size",
    "intermediate_size", "num_attention_heads", "num_depth_bins",
    "projection_dim", "projection_size", "reassemble_hidden_size",
  )),
  (Length, ("max_position_embeddings", "num_patches")),
  (NonNegativeInt, ("num_register_tokens", "num_registers")),
  (SIDES, ("image_size", "patch_size")),
)  # fmt: skip
_CONFIG_FIELDS = {
  **{key: kind for kind, keys in _TYPED_KEYS for key in keys},
  "eos_token_id": int | list[int],
  "layerscale_value": float,
  "max_img_size": Side,
  "mlp_ratio": Annotated[float, Range(above=0, max=64)],
  "neck_hidden_sizes": tuple[Width, ...],
  "norm_mean": _TRIPLE,
  "norm_std": _SCALES,
  "num_cls_tokens": Annotated[int, Range(min=1, max=1 << 10)],
  "num_hidden_layers": NumLayers,
  "out_features": list[str],
  "out_indices": list[int],
  "reassemble_factors": tuple[float, ...],
  "summary_idxs": tuple[int, ...],
  "vocab_size": VocabularySize,
}
_PROCESSOR_FIELDS = {
  **dict.fromkeys(
    ("do_resize", "do_center_crop", "do_rescale", "do_normalize"), bool
  ),
  "image_mean": _TRIPLE,
  "image_processor_type": str,
  "image_std": _SCALES,
  "max_num_patches": Length,
  "patch_size": Side,
  "rescale_factor": PositiveFloat,
  "resample": int,
}


def require_folder(folder: str | os.PathLike) -> pathlib.Path:
  """Returns a folder's local path; copies a bucket's folder."""
  path = path_lib.local_copy(folder)
  if atomic.is_temporary(path):
    raise ConversionError(f"{path} is left from an unfinished conversion.")
  if path.is_dir():
    return path
  if path.exists():
    raise ConversionError(f"{path} is a file; expected a folder.")
  raise MissingFileError(
    f"There is no folder {path}. mtv_jax.load and `mtv-jax convert` also read "
    "a model of the Hugging Face hub, as hf:ORG/NAME."
  )


def read_config(
  folder: str | os.PathLike, *, model_type: str, example: str
) -> tuple[pathlib.Path, dict[str, Any]]:
  """A folder's path and parsed `config.json`; `example` names a valid model."""
  path = require_folder(folder)
  config = foreign.read_object(path / "config.json")
  if config.get("model_type") != model_type:
    raise ConversionError(
      f"{path / 'config.json'} has model_type {config.get('model_type')!r}; "
      f"expected {model_type!r}, as in {example}."
    )
  return path, config


def read_processor(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
  """Reads the image processor's path and fields, {} if absent."""
  # Since transformers 5, one file contains the processors of all modalities.
  path = folder / "processor_config.json"
  fields = foreign.read_object(path).get("image_processor")
  if not fields:
    path = folder / "preprocessor_config.json"
    fields = foreign.read_object(path)
  with foreign.errors_of(path):
    return path, foreign.read_fields(fields, _PROCESSOR_FIELDS)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(dict(value), indent=2, ensure_ascii=False)
  path.write_text(text + "\n", "utf-8")


class TensorFiles:
  """Context manager for safetensors or PyTorch files, read tensor by tensor.

  `path` is the file, or the index of several `files`.
  """

  def __init__(
    self, path: pathlib.Path, files: Iterable[pathlib.Path] | None = None
  ):
    self.path = path
    self._files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
      for file in [path] if files is None else files:
        handle = stack.enter_context(_open_tensors(file))
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
    try:
      return self._files[name].get_tensor(name)
    # For dtypes that NumPy lacks, safetensors raises several error types.
    except Exception as error:
      raise ConversionError(f"{self.path}: {name!r}: {error}") from None


def _open_tensors(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ConversionError(
      f"{path}, named by the index, is missing: download it too."
    )
  with path.open("rb") as file:
    if file.read(len(_LFS_HEADER)) == _LFS_HEADER:
      raise ConversionError(
        f"{path} is a Git LFS pointer: run `git lfs pull` in its folder."
      )
  if path.suffix != ".safetensors":
    return torch_files.TorchFile(path)
  try:
    return safetensors.safe_open(str(path), framework="np")
  except safetensors.SafetensorError as error:
    raise ConversionError(
      f"{path} is not a complete safetensors file ({error}): copy it again."
    ) from None


def open_weights(folder: pathlib.Path, *names: str) -> TensorFiles:
  """Opens a folder's weights: the first of `names`, possibly in shards.

  The default names are transformers'. Without a match, opens a single PyTorch
  checkpoint of any name.
  """
  names = names or (WEIGHTS, _TORCH_WEIGHTS)
  for name in names:
    if (path := folder / name).is_file():
      return TensorFiles(path)
    index = folder / f"{name}.index.json"
    if content := foreign.read_object(index):
      with foreign.errors_of(index):
        shards = foreign.read_field(content, "weight_map", Mapping[str, str])
      resolve = functools.partial(foreign.resolve_name, folder, where=index)
      return TensorFiles(index, list(map(resolve, sorted({*shards.values()}))))
  checkpoints = [*folder.glob("*.pth"), *folder.glob("*.pt")]
  if len(checkpoints) == 1:
    return TensorFiles(checkpoints[0])
  lines = [f"{folder} lacks {names[0]} and {names[0]}.index.json."]
  if (folder / "adapter_config.json").is_file():
    lines.append("It contains an adapter: merge it into its model first.")
  for pattern, reason in _UNSUPPORTED.items():
    files = sorted(p.name for p in folder.glob(pattern))
    if files:
      lines.append(f"It has {list_first(files, 4)}: {reason}.")
  if WEIGHTS in names:
    lines.append(
      "Load the model once with transformers and call "
      "save_pretrained(folder, safe_serialization=True)."
    )
  raise ConversionError(" ".join(lines))


def write_tensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes a safetensors file."""
  # transformers rejects a file without this field.
  safetensors.numpy.save_file(
    dict(tensors), str(path), metadata={"format": "pt"}
  )


def with_defaults(
  config: Any,
  defaults: Mapping[str, Any],
  section: str = "",
  own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Checks a config section and fills in transformers' defaults.

  `section` is its name in the file, "" for the top level; `config` is None if
  the file omits the section. `own` maps further keys to their types.
  """
  where = section and f"{section}."
  values = {} if config is None else config
  fields = {**_CONFIG_FIELDS, **(own or {})}
  return {**defaults, **foreign.read_fields(values, fields, where=where)}


def require(*fields: tuple[str, Any, Any]) -> None:
  """Raises ConversionError unless each (key, value, expected) is supported."""
  for key, value, expected in fields:
    if value != expected:
      raise ConversionError(
        f"{key}={value!r} is not supported; only {expected!r} is."
      )


def read_side(value: Any, field: str) -> int:
  """Reads a side in pixels, an integer or a pair of equal integers."""
  value = options.check_value(value, SIDES, field)
  if isinstance(value, int):
    return value
  if value[0] != value[1]:
    raise ConversionError(
      f"{field}={list(value)}: only square images and patches are supported."
    )
  return value[0]
