"""Hugging Face's SigLIP (SigLIP 2 of fixed resolution, MTV): read and export.

Our own models are exported as SigLIP.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from mtv_jax.convert import folders, processors, tables
from mtv_jax.convert.tables import Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
_VISION_DEFAULTS = {
  **_DEFAULTS,
  "image_size": 224,
  "patch_size": 16,
  "vision_use_head": True,
}
_TEXT_DEFAULTS = {
  **_DEFAULTS,
  "vocab_size": 32_000,
  "max_position_embeddings": 64,
}
# Every SigLIP tokenizer ends and pads with </s>, whose id is 1; the
# eos_token_id of its config is CLIP's and unused.
_EOS_ID = 1

BLOCKS = {
  "norm1": "layer_norm1",
  "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "attention/out": "self_attn.out_proj",
  "norm2": "layer_norm2",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
_VISION = {
  "patch_embed": "embeddings.patch_embedding",
  "position_embedding": "embeddings.position_embedding.weight",
  # Not in SigLIP: only training uses it.
  "mask_token": None,
  **tables.nest("blocks/", "encoder.layers.{i}.", BLOCKS),
  "norm": "post_layernorm",
  "pool/probe": "head.probe",
  "pool/attention/out": "head.attention.out_proj",
  "pool/norm": "head.layernorm",
  "pool/mlp/fc1": "head.mlp.fc1",
  "pool/mlp/fc2": "head.mlp.fc2",
}
# CLIP's text tower has the same names.
TEXT = {
  "token_embedding": "text_model.embeddings.token_embedding.weight",
  "position_embedding": "text_model.embeddings.position_embedding.weight",
  **tables.nest("blocks/", "text_model.encoder.layers.{i}.", BLOCKS),
  "norm": "text_model.final_layer_norm",
}
IGNORE = r"position_ids$|^classifier\."
NEUTRAL = ()
LOSS = "sigmoid"
PROCESSOR = "Siglip"
# What `SiglipModel` can express; an image tower alone may lack its head.
_REQUIRED = {
  "image": {"pool": "map", "cls_token": False},
  "text": {"pool": "last", "causal": False, "projection_bias": True},
}


def _read_vision(config: Any, section: str = "", **fields: Any) -> ViTSpec:
  config = folders.with_defaults(config, _VISION_DEFAULTS, section)
  pool = "map" if config["vision_use_head"] else "mean"
  if pool == "mean":
    log.info("vision_use_head=False: pooled is the mean of the patches.")
  return ViTSpec(pool=pool, **folders.read_vision(config), **fields)


def read_spec(
  config: Mapping[str, Any], names: Collection[str], **fields: Any
) -> ModelSpec:
  """The model that a `config.json` of type siglip(_vision_model) describes.

  `fields` are further ones of the image tower.
  """
  if config["model_type"] == "siglip_vision_model":
    return ModelSpec(image=_read_vision(config, **fields))
  text = None
  if folders.has_text_tower(names):
    name = "text_config"
    section = folders.with_defaults(config.get(name), _TEXT_DEFAULTS, name)
    text = TextSpec(
      pool="last",
      causal=False,
      projection=section.get("projection_size") or section["hidden_size"],
      projection_bias=True,
      eos_id=_EOS_ID,
      **folders.read_text(section),
    )
  name = "vision_config"
  image = _read_vision(config.get(name), name, **fields)
  return ModelSpec(image=image, text=text)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: squashed to a square."""
  return {
    "size": spec.image.image_size,
    "interpolation": "bicubic",
    "resize": "squash",
    "mean": processors.HALF,
    "std": processors.HALF,
  }


def rules(
  spec: ModelSpec, *special: Rule, prefix: str = "vision_model."
) -> list[Rule]:
  """Conversion rules for SigLIP.

  `prefix` is the vision tower's; `special` rules replace those of their leaves.
  """
  special = [*special]
  if spec.image.pool == "map":
    special += tables.in_projection(
      "image/pool/attention",
      f"{prefix}head.attention",
      spec.image.width,
      spec.image.heads,
    )
  if spec.text is not None:
    special += tables.scale_and_bias("logit_scale", "logit_bias")
  names = {
    **tables.nest("image/", prefix, _VISION),
    **tables.nest("text/", "", TEXT),
    "text/projection": "text_model.head",
  }
  return tables.tower_rules(
    spec, names, *special, unit_axes={"image/pool/probe": 2}
  )


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model.

  Args:
    spec: the model's spec, without `mismatches`.
    pad_id: padding id of the tokenizer; the end of text if None.
  """
  common = {"dtype": "float32", "torch_dtype": "float32"}
  vision = {
    "model_type": "siglip_vision_model",
    **folders.tower_config(spec.image),
    "num_channels": 3,
    "vision_use_head": spec.image.pool == "map",
  }
  if spec.text is None:
    return {**vision, **common, "architectures": ["SiglipVisionModel"]}
  return {
    **common,
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "initializer_factor": 1.0,
    "vision_config": vision,
    "text_config": {
      "model_type": "siglip_text_model",
      **folders.tower_config(spec.text),
      "projection_size": spec.text.projection,
      **folders.text_ids(spec.text, pad_id),
    },
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What `SiglipModel` can't express, a line for each field."""
  required = {"image": _REQUIRED["image"]}
  if spec.text is None and spec.image.pool == "mean":
    # Without its head, `SiglipVisionModel` returns the patches alone.
    required = {"image": {**required["image"], "pool": "mean"}}
  if spec.text is not None:
    # SigLIP projects the text to the image's width.
    required["text"] = {**_REQUIRED["text"], "projection": spec.image.width}
  return folders.list_mismatches(spec, required)
