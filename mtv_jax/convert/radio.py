"""Hugging Face's RADIO (C-RADIO): read and export.

A ViT with several CLS tokens, of which some are the summary, and position
embeddings of a large square of which each image takes a part. Pixels are
normalised in the model. Video inputs are not supported.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import dinov2, folders, processors, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_DEFAULTS = {
  "hidden_size": 1280,
  "num_hidden_layers": 32,
  "num_attention_heads": 16,
  "mlp_ratio": 4.0,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "use_swiglu_ffn": False,
  "qkv_bias": True,
  "layerscale_value": 1.0,
  "patch_size": 16,
  "image_size": 224,
  "max_img_size": 2048,
  "num_cls_tokens": 3,
  "num_registers": 7,
  "summary_idxs": (0, 1),
  "norm_mean": processors.CLIP_MEAN,
  "norm_std": processors.CLIP_STD,
}
_PREFIX = "radio_model."
_MODEL = f"{_PREFIX}model."
_BLOCK = f"{_MODEL}blocks.{{i}}."
_NAMES = {
  "mask_token": None,
  **tables.nest(
    "blocks/",
    _BLOCK,
    {
      "norm1": "norm1",
      "attention/out": "attn.proj",
      "scale1": "layer_scale1.lambda1",
      "norm2": "norm2",
      "mlp/gate": "mlp.gate_proj",
      "mlp/fc1": "mlp.fc1",
      "mlp/fc2": "mlp.fc2",
      "scale2": "layer_scale2.lambda1",
    },
  ),
}
# Gated MLPs have names of their own.
_GATED = {
  "image/blocks/mlp/fc1": f"{_BLOCK}mlp.up_proj",
  "image/blocks/mlp/fc2": f"{_BLOCK}mlp.down_proj",
}
IGNORE = rf"^{_PREFIX}(summary_idxs|input_conditioner\..*)$"
NEUTRAL = ()
PROCESSOR = "CLIP"
_REQUIRED = {
  "pool": "cls",
  "pool_tokens": folders.ANY,
  "cls_token": True,
  "registers": folders.ANY,
  "layer_scale": folders.ANY,
  "mlp": folders.ANY,
  "patch_bias": False,
  "final_norm": False,
}


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type radio describes."""
  config = folders.with_defaults(config, _DEFAULTS)
  if config.get("video_temporal_patch_size"):
    raise ConversionError(
      "video_temporal_patch_size is set: RADIO of videos is not supported."
    )
  folders.require(config, {"qkv_bias": True})
  mlp, mlp_dim = dinov2.read_mlp(config)
  has_scale = any(name.endswith("layer_scale1.lambda1") for name in names)
  image = ViTSpec(
    mlp=mlp,
    pool="cls",
    pool_tokens=tuple(config["summary_idxs"]),
    cls_token=True,
    registers=config["num_cls_tokens"] - 1 + config["num_registers"],
    layer_scale=float(config["layerscale_value"]) if has_scale else None,
    patch_bias=False,
    final_norm=False,
    position_resize="crop",
    **folders.read_vision(
      {
        **config,
        "image_size": config["max_img_size"],
        "intermediate_size": mlp_dim,
      }
    ),
  )
  return ModelSpec(image=image)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: 0..1, squashed to a square."""
  del spec
  return {
    "size": _DEFAULTS["image_size"],
    "interpolation": "bicubic",
    "resize": "squash",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
  }


def adapt_preprocess(
  config: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """The preprocessing with the normalisation that is part of the model."""
  config = folders.with_defaults(config, _DEFAULTS)
  mean, std = (np.array(fields[name]) for name in ("mean", "std"))
  inner_mean, inner_std = config["norm_mean"], config["norm_std"]
  return {
    **fields,
    "mean": tuple((mean + std * inner_mean).tolist()),
    "std": tuple((std * inner_std).tolist()),
  }


def rules(spec: ModelSpec, *, prefix: str = "") -> list[Rule]:
  """Conversion rules for RADIO."""
  del prefix  # It has one of its own.
  image = spec.image
  patch, width = image.patch_size, image.width
  special = [
    *tables.fused_qkv(
      "image/blocks/attention/qkv",
      image,
      f"{_BLOCK}attn.qkv.weight",
      f"{_BLOCK}attn.qkv.bias",
    ),
    # Features are ordered (channel, y, x).
    tables.transpose_rule(
      "image/patch_embed/kernel",
      f"{_MODEL}patch_generator.embedder.weight",
      (3 * patch**2, width),
      (patch * patch, 3, width),
      (2, 1, 0),
      file_shape=(width, 3 * patch**2),
    ),
    _prefix_tokens(image),
    tables.transpose_rule(
      "image/position_embedding",
      f"{_MODEL}patch_generator.pos_embed",
      (image.grid**2, width),
      (1, image.grid**2, width),
    ),
  ]
  names = tables.nest("image/", "", _NAMES)
  if image.mlp == "swiglu":
    names = {**names, **_GATED}
  return tables.tower_rules(spec, names, *special)


def _prefix_tokens(spec: ViTSpec) -> Rule:
  """CLS tokens and registers, one tensor in the file."""
  leaves = ("image/cls_token", "image/registers")
  if not spec.registers:
    leaves = leaves[:1]
  return Rule(
    leaves,
    (f"{_MODEL}patch_generator.cls_token.token",),
    ((spec.prefix, spec.width),),
    read=lambda a: (a[0], a[1:])[: len(leaves)],
    write=lambda cls, *others: (np.concatenate([cls[None], *others]),),
  )


def file_rules(spec: ModelSpec) -> list[Rule]:
  """Tensors that a file has besides those of the parameters."""
  conditioner = f"{_PREFIX}input_conditioner.norm_"
  return [
    tables.constant(f"{conditioner}mean", np.zeros((3, 1, 1))),
    tables.constant(f"{conditioner}std", np.ones((3, 1, 1))),
    tables.constant(
      f"{_PREFIX}summary_idxs", np.array(spec.image.pool_tokens), dtype="int64"
    ),
  ]


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model without `mismatches`.

  All prefix tokens but the registers after the last one of the summary are CLS
  tokens. The normalisation is that of the image processor.
  """
  del pad_id  # There is no text.
  image = spec.image
  config = folders.tower_config(image)
  del config["intermediate_size"], config["attention_dropout"]
  cls_tokens = max(image.pool_tokens) + 1
  return {
    "dtype": "float32",
    "torch_dtype": "float32",
    "architectures": ["RadioModel"],
    "model_type": "radio",
    **config,
    "max_img_size": config["image_size"],
    "image_size": _DEFAULTS["image_size"],
    "mlp_ratio": float(dinov2.mlp_ratio(image, integer=False)),
    "num_channels": 3,
    "layerscale_value": image.layer_scale or 1.0,
    "use_swiglu_ffn": image.mlp == "swiglu",
    "qkv_bias": True,
    "num_cls_tokens": cls_tokens,
    "num_registers": image.prefix - cls_tokens,
    "summary_idxs": list(image.pool_tokens),
    "norm_mean": [0.0, 0.0, 0.0],
    "norm_std": [1.0, 1.0, 1.0],
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What `RadioModel` can't express, a line for each field."""
  lines = folders.list_mismatches(spec, {"image": _REQUIRED})
  if spec.image.position_resize != "crop":
    lines.append(
      f"  image.position_resize is {spec.image.position_resize!r} and would "
      "have to be 'crop'\n"
    )
  return lines + dinov2.mlp_mismatches(spec.image, integer=False)
