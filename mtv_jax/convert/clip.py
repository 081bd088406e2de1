"""Hugging Face CLIP and MetaCLIP 2: read and export.

Also exports our own models of this architecture.
"""

import dataclasses
from typing import Any

from mtv_jax.convert import processors, siglip, tables
from mtv_jax.convert.family import (
  Family,
  Key,
  Section,
  TowerTable,
  block_size_defaults,
)
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec

_WIDTH = 512  # Default embedding width.
_ACT_DEFAULTS = {"hidden_act": "quick_gelu", "attention_dropout": 0.0}


def read_eos_id(section: Section) -> dict[str, Any]:
  """Reads `eos_token_id`, the first one of a list."""
  value = section["eos_token_id"]
  if value == []:
    raise ConversionError("text_config.eos_token_id is empty.")
  return {"eos_id": value[0] if isinstance(value, list) else value}


class Clip(Family):
  """CLIP, by OpenAI and others."""

  name = "clip"
  class_name = "CLIP"
  image = TowerTable(
    {
      **block_size_defaults(768, 12, 12, 3072, layer_norm_eps=1e-5),
      "image_size": 224,
      "patch_size": 32,
      **_ACT_DEFAULTS,
      "projection_dim": _WIDTH,
      "num_channels": 3,
    },
    {"pool": "cls", "cls_token": True, "pre_norm": True, "patch_bias": False},
    {
      "patch_embed": "embeddings.patch_embedding",
      # Misspelt in every checkpoint.
      "pre_norm": "pre_layrnorm",
      # Absent in CLIP; used only in training.
      "mask_token": None,
      **tables.nest("blocks/", "encoder.layers.{i}.", siglip.BLOCK_NAMES),
      "norm": "post_layernorm",
    },
  )
  text = TowerTable(
    {
      **block_size_defaults(512, 12, 8, 2048, layer_norm_eps=1e-5),
      "vocab_size": 49_408,
      "max_position_embeddings": 77,
      **_ACT_DEFAULTS,
      "projection_dim": _WIDTH,
      "bos_token_id": None,
      "eos_token_id": 49_407,
      "pad_token_id": None,
    },
    {"pool": "eos", "causal": True, "projection_bias": False},
    {**siglip.TEXT_NAMES, "projection": "text_projection"},
    keys={"eos_token_id": Key("eos_id", read_eos_id)},
  )
  projection_dim = _WIDTH
  image_prefix = alone_prefix = "vision_model."
  ignored = r"position_ids$|^classifier\."
  config = {"initializer_factor": 1.0}
  preprocess = {
    "interpolation": "bicubic",
    "resize": "shortest",
    "crop": "center",
    "mean": processors.CLIP_MEAN,
    "std": processors.CLIP_STD,
  }

  def full_class_name(self, spec: ModelSpec) -> str:
    is_projected = spec.text is None and spec.image.projection
    suffix = "WithProjection" if is_projected else ""
    return super().full_class_name(spec) + suffix

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    return [
      tables.folded_positions(
        {"image/cls_token": f"{prefix}embeddings.class_embedding"},
        f"{prefix}embeddings.position_embedding.weight",
        spec.image,
        is_flat=True,
      )
    ]


class MetaClip2(Clip):
  """MetaCLIP 2: texts end at the first `eos_token_id`, even if it is 2."""

  name = "metaclip_2"
  class_name = "MetaClip2"
  text = dataclasses.replace(
    Clip.text, fields={**Clip.text.fields, "pool": "first_eos"}
  )


CLIP, METACLIP2 = Clip(), MetaClip2()
