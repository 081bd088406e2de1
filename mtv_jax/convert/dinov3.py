"""Hugging Face DINOv3 ViT: read and export.

Also exports our own models with rotary positions.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from mtv_jax.convert import dinov2, processors, tables
from mtv_jax.convert.family import (
  AnyOf,
  Family,
  Key,
  Section,
  TowerTable,
  block_size_defaults,
  ignore,
  read_activation,
  write_activation,
)
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.positions import Rope
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

# (query, key, value): whether each has a bias.
_QKV_BIASES = {
  "all": (True, True, True),
  "query_value": (True, False, True),
  "none": (False, False, False),
}
_QKV = tuple(f"attention.{part}_proj" for part in "qkv")


def _read_biases(section: Section) -> dict[str, Any]:
  biases = tuple(section[f"{part}_bias"] for part in ("query", "key", "value"))
  for name, value in _QKV_BIASES.items():
    if value == biases:
      return {"qkv_bias": name}
  raise ConversionError(
    "query_bias, key_bias and value_bias are "
    f"{biases}; expected one of {list(_QKV_BIASES.values())}."
  )


def _read_rope(section: Section) -> dict[str, Any]:
  rope = Rope(
    base=section["rope_theta"],
    shift=section["pos_embed_shift"],
    jitter=section["pos_embed_jitter"],
    rescale=section["pos_embed_rescale"],
  )
  return {"rope": rope}


def _check_rope(spec: ViTSpec) -> str | None:
  if spec.rope is None or spec.rope.normalize == "separate":
    return None
  return f"rope.normalize is {spec.rope.normalize!r} but must be 'separate'"


class Dinov3(Family):
  """DINOv3 ViT."""

  name = "dinov3_vit"
  class_name = "DINOv3ViT"
  image = TowerTable(
    {
      **block_size_defaults(384, 12, 6, 1536, layer_norm_eps=1e-5),
      "image_size": 224,
      "patch_size": 16,
      "hidden_act": "gelu",
      "attention_dropout": 0.0,
      "num_channels": 3,
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
    },
    # timm's DINOv3 has the mean: the class returns the CLS token, and patches.
    {
      "pool": AnyOf(("cls", "mean")),
      "cls_token": True,
      "positions": "rope",
    },
    {
      "patch_embed": "embeddings.patch_embeddings",
      "cls_token": "embeddings.cls_token",
      "mask_token": "embeddings.mask_token",
      "registers": "embeddings.register_tokens",
      **tables.nest(
        "blocks/",
        "layer.{i}.",
        {
          **dinov2.BLOCK_NAMES,
          "attention/qkv": _QKV,
          "attention/out": "attention.o_proj",
          "mlp/gate": "mlp.gate_proj",
          "mlp/fc1": "mlp.up_proj",
          "mlp/fc2": "mlp.down_proj",
        },
      ),
      "norm": "norm",
    },
    keys={
      "hidden_act": Key(
        "gelu",
        lambda c: read_activation(c, gated=c["use_gated_mlp"]),
        lambda spec: write_activation(spec, gated=spec.mlp == "swiglu"),
      ),
      "use_gated_mlp": Key(
        "mlp",
        lambda c: {"mlp": "swiglu" if c["use_gated_mlp"] else "plain"},
        lambda spec: spec.mlp == "swiglu",
      ),
      "query_bias": Key(
        "qkv_bias", _read_biases, lambda spec: _QKV_BIASES[spec.qkv_bias][0]
      ),
      "key_bias": Key(None, ignore, lambda s: _QKV_BIASES[s.qkv_bias][1]),
      "value_bias": Key(None, ignore, lambda s: _QKV_BIASES[s.qkv_bias][2]),
      "rope_theta": Key(
        "rope", _read_rope, lambda spec: spec.rope.base, _check_rope
      ),
      "pos_embed_shift": Key(None, ignore, lambda spec: spec.rope.shift),
      "pos_embed_jitter": Key(None, ignore, lambda spec: spec.rope.jitter),
      "pos_embed_rescale": Key(None, ignore, lambda spec: spec.rope.rescale),
    },
  )
  num_unit_axes = {
    "image/cls_token": 2,
    "image/mask_token": 2,
    "image/registers": 1,
  }
  ignored = r"^classifier\."
  neutral = ("layer_scale", "mask_token")
  # Resizes with Pillow; DINOv3's own processor scales to 0..1 first.
  processor = "Bit"
  own_processors = {"none": "DINOv3ViT"}
  preprocess = {
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": processors.IMAGENET_MEAN,
    "std": processors.IMAGENET_STD,
  }

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    spec = super().read_spec(config, names)
    if config.get("pos_embed_rescale", 0) is not None:
      return spec
    # Null disables the augmentation; an absent key means the default.
    rope = dataclasses.replace(spec.image.rope, rescale=None)
    return ModelSpec(image=dataclasses.replace(spec.image, rope=rope))

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    rules = []
    if spec.image.qkv_bias == "query_value":
      query, _, value = (f"{prefix}layer.{{i}}.{name}.bias" for name in _QKV)
      _, bias = tables.stacked_qkv("image", spec.image, "")
      rules.append(tables.split_rows(bias, query, None, value))
    if not spec.image.registers:
      name = f"{prefix}embeddings.register_tokens"
      rules.append(tables.constant(name, np.zeros((1, 0, spec.image.width))))
    return rules


DINOV3 = Dinov3()
