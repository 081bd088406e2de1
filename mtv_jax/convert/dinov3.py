"""Hugging Face's DINOv3 ViT: read and export.

Our own models with rotary positions are exported as DINOv3.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders, processors, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.positions import Rope
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_DEFAULTS = {
  "hidden_size": 384,
  "intermediate_size": 1536,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-5,
  "image_size": 224,
  "patch_size": 16,
  "num_register_tokens": 0,
  "layerscale_value": 1.0,
  "use_gated_mlp": False,
  "query_bias": True,
  "key_bias": False,
  "value_bias": True,
  "proj_bias": True,
  "mlp_bias": True,
  "rope_theta": 100.0,
  "pos_embed_shift": None,
  "pos_embed_jitter": None,
  "pos_embed_rescale": 2.0,
}
# Whether queries, keys and values have a bias.
_QKV_BIASES = {
  "all": (True, True, True),
  "query_value": (True, False, True),
  "none": (False, False, False),
}
_QKV = tuple(f"attention.{part}_proj" for part in "qkv")
_NAMES = {
  "patch_embed": "embeddings.patch_embeddings",
  "cls_token": "embeddings.cls_token",
  "mask_token": "embeddings.mask_token",
  "registers": "embeddings.register_tokens",
  **tables.nest(
    "blocks/",
    "layer.{i}.",
    {
      "norm1": "norm1",
      "attention/qkv": _QKV,
      "attention/out": "attention.o_proj",
      "scale1": "layer_scale1.lambda1",
      "norm2": "norm2",
      "mlp/gate": "mlp.gate_proj",
      "mlp/fc1": "mlp.up_proj",
      "mlp/fc2": "mlp.down_proj",
      "scale2": "layer_scale2.lambda1",
    },
  ),
  "norm": "norm",
}
IGNORE = r"^classifier\."
NEUTRAL = ("layer_scale", "mask_token")
# Of exports; its pixels are Pillow's, while DINOv3's own one resizes after
# scaling to 0..1.
PROCESSOR = "Bit"
# What `DINOv3ViTModel` can express.
_REQUIRED = {
  "pool": "cls",
  "cls_token": True,
  "positions": "rope",
  "registers": folders.ANY,
  "layer_scale": folders.ANY,
  "mlp": folders.ANY,
  "qkv_bias": folders.ANY,
}


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type dinov3_vit describes."""
  # Null turns the augmentation off; an absent key means the default.
  nulls = dict.fromkeys(k for k, value in config.items() if value is None)
  config = folders.with_defaults(config, _DEFAULTS)
  rescale = "pos_embed_rescale" not in nulls and config["pos_embed_rescale"]
  folders.require(config, {"proj_bias": True, "mlp_bias": True})
  biases = tuple(config[f"{part}_bias"] for part in ("query", "key", "value"))
  qkv_bias = {v: k for k, v in _QKV_BIASES.items()}.get(biases)
  if qkv_bias is None:
    raise ConversionError(
      "query_bias, key_bias and value_bias are "
      f"{biases}; expected one of {list(_QKV_BIASES.values())}."
    )
  mlp = "swiglu" if config["use_gated_mlp"] else "plain"
  image = ViTSpec(
    mlp=mlp,
    pool="cls",
    cls_token=True,
    registers=config["num_register_tokens"],
    layer_scale=config["layerscale_value"],
    mask_token="embeddings.mask_token" in names,
    positions="rope",
    rope=Rope(
      base=config["rope_theta"],
      shift=config["pos_embed_shift"],
      jitter=config["pos_embed_jitter"],
      rescale=rescale or None,
    ),
    qkv_bias=qkv_bias,
    **folders.read_vision(config, gated=mlp == "swiglu"),
  )
  return ModelSpec(image=image)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: squashed to a square."""
  return {
    "size": spec.image.image_size,
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": processors.IMAGENET_MEAN,
    "std": processors.IMAGENET_STD,
  }


def rules(spec: ModelSpec, *, prefix: str = "") -> list[Rule]:
  """Conversion rules for DINOv3; `prefix`: a classifier's."""
  special = []
  if spec.image.qkv_bias == "query_value":
    query, _, value = (f"{prefix}layer.{{i}}.{name}.bias" for name in _QKV)
    special.append(tables.query_value_bias(spec.image, query, value))
  if not spec.image.registers:
    name = f"{prefix}embeddings.register_tokens"
    special.append(tables.constant(name, np.zeros((1, 0, spec.image.width))))
  return tables.tower_rules(
    spec,
    tables.nest("image/", prefix, _NAMES),
    *special,
    unit_axes={
      "image/cls_token": 2,
      "image/mask_token": 2,
      "image/registers": 1,
    },
  )


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model without `mismatches`."""
  del pad_id  # There is no text.
  image, rope = spec.image, spec.image.rope
  query, key, value = _QKV_BIASES[image.qkv_bias]
  return {
    "dtype": "float32",
    "torch_dtype": "float32",
    "architectures": ["DINOv3ViTModel"],
    "model_type": "dinov3_vit",
    **folders.tower_config(image, gated=image.mlp == "swiglu"),
    "num_channels": 3,
    "num_register_tokens": image.registers,
    "layerscale_value": image.layer_scale,
    "use_gated_mlp": image.mlp == "swiglu",
    "query_bias": query,
    "key_bias": key,
    "value_bias": value,
    "proj_bias": True,
    "mlp_bias": True,
    "rope_theta": rope.base,
    "pos_embed_shift": rope.shift,
    "pos_embed_jitter": rope.jitter,
    "pos_embed_rescale": rope.rescale,
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What `DINOv3ViTModel` can't express, a line for each field."""
  lines = folders.list_mismatches(spec, {"image": _REQUIRED})
  rope = spec.image.rope
  if rope is not None and rope.normalize != "separate":
    lines.append(
      f"  image.rope.normalize is {rope.normalize!r} and would have to be "
      "'separate'\n"
    )
  return lines
