"""Small valid folders of models, one of each family, for hostile changes."""

import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from hostile.samples import as_bytes

from mtv_jax.convert import big_vision, depth_anything, huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.encoder import loading
from mtv_jax.experts import owlv2_model as owlv2
from mtv_jax.models import two_tower
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

HUGE, NAN = 10**30, float("nan")
WRONG = {
  "text": "x",
  "zero": 0,
  "negative": -1,
  "huge": HUGE,
  "nan": NAN,
  "list": [1, 2, 3],
  "object": {"a": 1},
}
_TOWER = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_attention_heads": 2,
  "num_hidden_layers": 1,
  "layer_norm_eps": 1e-6,
}
_VISION = {**_TOWER, "image_size": 32, "patch_size": 16}
_TEXT = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 8}
_BACKBONE = {
  **_VISION,
  "model_type": "dinov2",
  "image_size": 28,
  "patch_size": 14,
  "num_hidden_layers": 4,
  "mlp_ratio": 2,
  "out_indices": [1, 2, 3, 4],
}
_VITS = "vit", "deit", "vit_mae", "ijepa"
CONFIGS = {
  "siglip": {
    "model_type": "siglip",
    "vision_config": _VISION,
    "text_config": {**_TEXT, "projection_size": 32},
  },
  "clip": {
    "model_type": "clip",
    "projection_dim": 32,
    "vision_config": _VISION,
    "text_config": {**_TEXT, "eos_token_id": 1},
  },
  "dinov2": {**_BACKBONE, "out_indices": None},
  "dinov3": {**_VISION, "model_type": "dinov3_vit", "num_register_tokens": 2},
  "siglip2": {**_TOWER, "model_type": "siglip2_vision_model", "num_patches": 4},
  "aimv2": {**_VISION, "model_type": "aimv2_vision_model"},
  "radio": {
    **_VISION,
    "model_type": "radio",
    "mlp_ratio": 2.0,
    "max_img_size": 64,
  },
  "tipsv2": {**_VISION, "model_type": "tipsv2_vision_model", "mlp_ratio": 2},
  **{kind: {**_VISION, "model_type": kind} for kind in _VITS},
  "metaclip_2": {
    "model_type": "metaclip_2",
    "projection_dim": 32,
    "vision_config": _VISION,
    "text_config": {**_TEXT, "eos_token_id": 1},
  },
  "depth_anything": {
    "model_type": "depth_anything",
    "backbone_config": _BACKBONE,
    "reassemble_hidden_size": 32,
    "neck_hidden_sizes": [8, 16, 24, 32],
    "fusion_hidden_size": 8,
    "head_hidden_size": 4,
  },
  "owlv2": {
    "model_type": "owlv2",
    "projection_dim": 32,
    "vision_config": _VISION,
    "text_config": _TEXT,
  },
}
_TEXT_NAMES = ["text_model.x"]
_OTHERS = {
  "depth_anything": lambda c: depth_anything.param_mapping(
    depth_anything.read_spec(c, ())
  ),
  "owlv2": lambda c: owlv2.param_mapping(owlv2.read_spec(c)),
}


def _param_mapping(config):
  if config["model_type"] in _OTHERS:
    return _OTHERS[config["model_type"]](config)
  (family,) = (
    f for f in huggingface.FAMILIES if config["model_type"] in f.model_types()
  )
  return family.param_mapping(family.read_spec(config, _TEXT_NAMES))


READERS = {"depth_anything": depth_anything.read, "owlv2": owlv2.read}
TOKENS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "<pad>": 3}
PROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 3}


@functools.cache
def _bases() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="foreign"))


@functools.cache
def base(family: str) -> pathlib.Path:
  """A valid folder of a family; don't change it."""
  folder = _bases() / family
  if family in ("native", "export"):
    write = native.write if family == "native" else huggingface.write
    return write(folder, _model())
  folder.mkdir()
  config = CONFIGS[family]
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=shape).astype(np.float32)
    for rule in _param_mapping(config)
    for name, shape in rule.expected_shapes()
  }
  save_tensors(folder, tensors)
  write_json(folder / "config.json", config)
  write_json(folder / "preprocessor_config.json", PROCESSOR)
  model = tokenizers.models.WordLevel(TOKENS, "a")
  tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
  return folder


def _model() -> ConvertedModel:
  shape = {"width": 32, "heads": 2, "mlp_dim": 64, "depth": 1}
  text = {**shape, "length": 8, "vocab_size": 258}
  image = {**shape, "patch_size": 16, "image_size": 32}
  spec = ModelSpec.from_config({**image, "text": text})
  leaves = {
    name: np.ones(leaf.shape, np.float32)
    for name, leaf in flatten_with_names(two_tower.abstract_params(spec))
  }
  for leaf in ("logit_scale", "logit_bias"):
    leaves[f"heads/contrastive/{leaf}"] = np.float32(1)
  params = unflatten_names(leaves)
  return ConvertedModel(spec, params, {"size": 32}, TokenizerFiles(None))


def copy(family: str, folder: pathlib.Path) -> pathlib.Path:
  """A copy of a valid folder."""
  return pathlib.Path(shutil.copytree(base(family), folder / family))


def read(family: str, folder: pathlib.Path) -> object:
  """Reads a folder, as `mtv_jax.load` or the expert does."""
  if family in READERS:
    return READERS[family](folder)
  return loading.load(folder)


def read_edited(
  family: str, edit: Callable[[pathlib.Path, Any], object]
) -> Callable[[pathlib.Path, Any], object]:
  """A reader of a copy of a folder that `edit(copy, input)` has changed."""

  def read_copy(folder: pathlib.Path, value: Any) -> object:
    path = copy(family, folder)
    edit(path, value)
    return read(family, path)

  return read_copy


def write_json(path: pathlib.Path, content: object) -> None:
  path.write_text(json.dumps(content))


def change_json(path: pathlib.Path, keys: str, value: object) -> None:
  """Sets, or with `...` removes, the value at dotted keys."""
  content = json.loads(path.read_text())
  *parents, last = keys.split(".")
  inner = content
  for key in parents:
    inner = inner[key]
  if value is ...:
    del inner[last]
  else:
    inner[last] = value
  write_json(path, content)


def save_tensors(folder: pathlib.Path, tensors: dict) -> None:
  """Writes `model.safetensors`."""
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def load_tensors(folder: pathlib.Path) -> dict:
  """Reads `model.safetensors`."""
  return safetensors.numpy.load_file(folder / "model.safetensors")


@functools.cache
def npz_arrays() -> dict:
  """A SigLIP of big_vision."""
  rules = big_vision._param_mapping(_model().spec, {"b"})
  return {
    f"params/{name}": np.ones(shape, np.float32)
    for rule in rules
    for name, shape in rule.expected_shapes()
  }


def write(folder: pathlib.Path, name: str, content: object) -> pathlib.Path:
  """Writes bytes, or anything else as JSON."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(as_bytes(content))
  return path


def pipe(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Makes a pipe without a writer, whose reader would block."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  os.mkfifo(path)
  return path
