"""Files of a Hugging Face folder: config fields, JSON and safetensors."""

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
from mtv_jax.config.options import NonNegativeInt, PositiveFloat, Range
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.layers import Depth, Length, Side, Vocabulary, Width
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
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
  "relu": ("relu",),
}
_GELUS = {name: gelu for gelu, names in _ACTIVATIONS.items() for name in names}
_GATE = "silu"  # Of a SwiGLU.
SIDES = Side | tuple[Side, Side]
_THREE = tuple[float, float, float]
_SCALES = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
# What is known of the keys of a config.json and its sections, of any family.
_CONFIG_FIELDS = {
  "apply_layernorm": bool,
  "backbone": str,
  "depth_decoder_activation": str,
  "depth_estimation_type": str,
  "eos_token_id": int | list[int],
  "fusion_hidden_size": Width,
  "head_hidden_size": Width,
  "head_in_index": int,
  "hidden_act": str,
  "hidden_size": Width,
  "image_size": SIDES,
  "is_native": bool,
  "intermediate_size": Width,
  "layer_norm_eps": PositiveFloat,
  "key_bias": bool,
  "layerscale_value": float,
  "max_depth": PositiveFloat,
  "max_img_size": Side,
  "max_position_embeddings": Length,
  "min_depth": PositiveFloat,
  "mlp_bias": bool,
  "mlp_ratio": Annotated[float, Range(above=0, max=64)],
  "model_type": str,
  "neck_hidden_sizes": tuple[Width, ...],
  "num_depth_bins": Width,
  "norm_mean": _THREE,
  "norm_std": _SCALES,
  "num_attention_heads": Width,
  "num_channels": int,
  "num_cls_tokens": Annotated[int, Range(min=1, max=1 << 10)],
  "num_hidden_layers": Depth,
  "num_patches": Length,
  "num_register_tokens": NonNegativeInt,
  "num_registers": NonNegativeInt,
  "out_features": list[str],
  "out_indices": list[int],
  "pad_token_id": int,
  "patch_size": SIDES,
  "pos_embed_jitter": PositiveFloat,
  "pos_embed_rescale": PositiveFloat,
  "pos_embed_shift": PositiveFloat,
  "proj_bias": bool,
  "projection_dim": Width,
  "projection_size": Width,
  "qkv_bias": bool,
  "query_bias": bool,
  "readout_activation": str,
  "reassemble_factors": tuple[float, ...],
  "reassemble_hidden_size": Width,
  "rms_norm_eps": PositiveFloat,
  "rope_theta": PositiveFloat,
  "scale_sqrt_depth": bool,
  "summary_idxs": tuple[int, ...],
  "temperature_init_value": PositiveFloat,
  "use_gated_mlp": bool,
  "use_head": bool,
  "use_swiglu_ffn": bool,
  "value_bias": bool,
  "video_temporal_patch_size": int,
  "vision_use_head": bool,
  "vocab_size": Vocabulary,
}
_PROCESSOR_FIELDS = {
  **dict.fromkeys(
    ("do_resize", "do_center_crop", "do_rescale", "do_normalize"), bool
  ),
  "image_mean": _THREE,
  "image_std": _SCALES,
  "max_num_patches": Length,
  "patch_size": Side,
  "rescale_factor": PositiveFloat,
  "resample": int,
}
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
  """The folder as a path; of a bucket, of a local copy.

  Raises:
    MissingFileError: it does not exist.
    ConversionError: it is a file.
  """
  path = path_lib.local_copy(folder)
  if atomic.is_temporary(path):
    raise ConversionError(f"{path} is what an unfinished conversion left.")
  if path.is_dir():
    return path
  if path.exists():
    raise ConversionError(f"{path} is a file; a folder is expected.")
  raise MissingFileError(
    f"There is no folder {path}. mtv_jax.load and `mtv-jax convert` also take "
    "a model of the Hugging Face hub, as hf:ORG/NAME."
  )


def read_config(
  folder: str | os.PathLike, *, model_type: str, example: str
) -> tuple[pathlib.Path, dict[str, Any]]:
  """A folder's path and its `config.json`.

  Raises:
    MissingFileError: there is no folder.
    ConversionError: it has another model type; `example` names a valid model.
  """
  path = require_folder(folder)
  config = foreign.read_object(path / "config.json")
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
  """Tensors of safetensors files, memory-mapped and read one at a time.

  A context manager.

  Args:
    path: the file, or the index of several files.
    files: all of them; only `path` by default.

  Raises:
    ConversionError: a file is missing, truncated or only a pointer, or a tensor
      can't be read.
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
    try:
      return self._files[name].get_tensor(name)
    # The library raises errors of several types for types without a NumPy one.
    except Exception as error:
      raise ConversionError(f"{self.path}: {name!r}: {error}") from None


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
  if content := foreign.read_object(index):
    with foreign.errors_of(index):
      shards = foreign.read_field(content, "weight_map", Mapping[str, str])
    names = sorted({*shards.values()})
    resolve = functools.partial(foreign.resolve_name, folder, where=index)
    return TensorFiles(index, list(map(resolve, names)))
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
  """Writes a safetensors file."""
  # transformers rejects a file without this field.
  safetensors.numpy.save_file(
    dict(tensors), str(path), metadata={"format": "pt"}
  )


def with_defaults(
  config: Any, defaults: Mapping[str, Any], section: str = ""
) -> dict[str, Any]:
  """A config's section with transformers' defaults, which files leave out.

  Args:
    config: the section, None where the file leaves it out.
    defaults: by key.
    section: its name in the file, "" for the file itself.

  Raises:
    InputError: it is no object, or a known key has another type or range.
  """
  where = section and f"{section}."
  given = {} if config is None else config
  return {**defaults, **foreign.read_fields(given, _CONFIG_FIELDS, where=where)}


def require(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
  """Raises ConversionError for a key with another than the supported value."""
  for key, value in values.items():
    if config[key] != value:
      raise ConversionError(
        f"{key}={config[key]!r} is not supported; expected {value!r}."
      )


def has_text_tower(names: Iterable[str], prefix: str = "text_model.") -> bool:
  """Whether a file with these tensors has a text tower."""
  if any(name.startswith(prefix) for name in names):
    return True
  log.info("No text tower in the file: only images can be encoded.")
  return False


def read_text(
  config: Mapping[str, Any], *, gated: bool = False
) -> dict[str, Any]:
  """Fields of `TextSpec` that a complete config section sets."""
  fields = {k: config[name] for k, name in _TEXT_FIELDS.items()}
  return {**fields, **_read_tower(config, gated=gated)}


def read_vision(
  config: Mapping[str, Any], *, gated: bool = False
) -> dict[str, Any]:
  """Fields of `ViTSpec` that a complete config section sets.

  Args:
    config: the section.
    gated: whether the MLP is a SwiGLU, and `hidden_act` that of its gate.

  Raises:
    ConversionError: images or patches are not square or not RGB, or an unknown
      activation.
  """
  if config.get("num_channels", 3) != 3:
    raise ConversionError(
      f"num_channels={config['num_channels']}: only RGB models convert."
    )
  size, patch = (read_side(config[k], k) for k in _VISION_FIELDS)
  if patch > size:
    raise ConversionError(
      f"image_size={size} is smaller than patch_size={patch}."
    )
  # transformers drops pixels that do not fill a patch.
  sizes = {"image_size": size // patch * patch, "patch_size": patch}
  return {**sizes, **_read_tower(config, gated=gated)}


def _read_tower(
  config: Mapping[str, Any], *, gated: bool = False
) -> dict[str, Any]:
  fields = {k: config[name] for k, name in _TOWER_FIELDS.items()}
  activation = config["hidden_act"]
  if gated and activation == _GATE:
    return fields
  if gated:
    raise ConversionError(
      f"hidden_act={activation!r} of a gated MLP is not supported; expected "
      f"{_GATE!r}."
    )
  if activation not in _GELUS:
    raise ConversionError(
      f"hidden_act={activation!r} is not supported; expected one of "
      f"{sorted(_GELUS)}."
    )
  return {**fields, "gelu": _GELUS[activation]}


def tower_config(
  spec: ViTSpec | TextSpec, *, gated: bool = False
) -> dict[str, Any]:
  """The config section of a tower; the inverse of reading."""
  extra = _TEXT_FIELDS if isinstance(spec, TextSpec) else _VISION_FIELDS
  fields = {**_TOWER_FIELDS, **extra}
  return {
    **{key: getattr(spec, field) for field, key in fields.items()},
    "hidden_act": _GATE if gated else _ACTIVATIONS[spec.gelu][0],
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


# Fields of towers that most classes can't express otherwise than so.
_PLAIN = {
  "image": {
    "pool_tokens": (0,),
    "pool_prefix": False,
    "pool_heads": None,
    "pool_mlp_dim": None,
    "positions": "learned",
    "registers": 0,
    "layer_scale": None,
    "mlp": "plain",
    "pre_norm": False,
    "patch_norm": False,
    "final_norm": True,
    "norm_kind": "layer",
    "patch_bias": True,
    "qkv_bias": "all",
    "bias": True,
    "projection": None,
  },
  "text": {
    "mlp": "plain",
    "qkv_bias": "all",
    "bias": True,
    "norm_kind": "layer",
    "positions": "learned",
    "token_scale": False,
    "pad_id": None,
  },
}
ANY = object()  # A value of `list_mismatches`.


def list_mismatches(
  spec: ModelSpec, required: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """A line for each field of a tower with another value than a class has.

  Args:
    spec: the model's.
    required: by tower and field; `ANY` for fields that the class has. Others
      are as in SigLIP.
  """
  return [
    f"  {tower}.{field} is {value!r} and would have to be {expected!r}\n"
    for tower, fields in required.items()
    for field, expected in {**_PLAIN[tower], **fields}.items()
    if expected is not ANY
    and (value := getattr(getattr(spec, tower), field)) != expected
  ]


def read_side(value: Any, field: str) -> int:
  """A side in pixels, an integer or a pair of equal integers."""
  value = options.check_value(value, SIDES, field)
  if isinstance(value, int):
    return value
  if value[0] != value[1]:
    raise ConversionError(
      f"{field}={list(value)}: only square images and patches convert."
    )
  return value[0]
