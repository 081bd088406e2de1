"""Hugging Face SigLIP and SigLIP 2: read and export.

`siglip` is SigLIP, fixed-resolution SigLIP 2 and MTV, and the export format of
our own models. `siglip2` is SigLIP 2 NaFlex, with SigLIP's towers: images keep
their aspect ratio, position embeddings are resampled to each image's grid, and
a linear layer embeds the patches.
"""

import dataclasses
import math
from typing import Any

from mtv_jax.convert import hf_files, processors, tables
from mtv_jax.convert.family import (
  Family,
  Key,
  Section,
  TowerTable,
  block_size_defaults,
)
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec

_BLOCK_DEFAULTS = block_size_defaults(768, 12, 12, 3072, layer_norm_eps=1e-6)
_ACT_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
# CLIP shares these names of blocks and text tower.
BLOCK_NAMES = {
  "norm1": "layer_norm1",
  "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "attention/out": "self_attn.out_proj",
  "norm2": "layer_norm2",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
TEXT_NAMES = {
  "token_embedding": "text_model.embeddings.token_embedding.weight",
  "position_embedding": "text_model.embeddings.position_embedding.weight",
  **tables.nest("blocks/", "text_model.encoder.layers.{i}.", BLOCK_NAMES),
  "norm": "text_model.final_layer_norm",
}


class Siglip(Family):
  """SigLIP, fixed-resolution SigLIP 2, MTV."""

  name = "siglip"
  class_name = "Siglip"
  image = TowerTable(
    {
      **_BLOCK_DEFAULTS,
      "image_size": 224,
      "patch_size": 16,
      **_ACT_DEFAULTS,
      "num_channels": 3,
      "vision_use_head": True,
    },
    {"pool": "map", "cls_token": False},
    {
      "patch_embed": "embeddings.patch_embedding",
      "position_embedding": "embeddings.position_embedding.weight",
      # Absent in SigLIP; used only in training.
      "mask_token": None,
      **tables.nest("blocks/", "encoder.layers.{i}.", BLOCK_NAMES),
      "norm": "post_layernorm",
      "pool/probe": "head.probe",
      "pool/attention/out": "head.attention.out_proj",
      "pool/norm": "head.layernorm",
      "pool/mlp/fc1": "head.mlp.fc1",
      "pool/mlp/fc2": "head.mlp.fc2",
    },
  )
  text = TowerTable(
    {
      **_BLOCK_DEFAULTS,
      "vocab_size": 32_000,
      "max_position_embeddings": 64,
      **_ACT_DEFAULTS,
      "projection_size": None,
      "bos_token_id": None,
      "eos_token_id": 1,
      "pad_token_id": None,
    },
    {"pool": "last", "causal": False, "projection_bias": True},
    {**TEXT_NAMES, "projection": "text_model.head"},
    keys={
      "projection_size": Key(
        "projection",
        lambda c: {"projection": c["projection_size"] or c["hidden_size"]},
        check=lambda spec: (
          None if spec.projection else "projection is None, not a width"
        ),
      ),
      # All SigLIP tokenizers end and pad with </s>, id 1; the config's
      # eos_token_id is CLIP's and unused.
      "eos_token_id": Key("eos_id", lambda _: {"eos_id": 1}),
    },
  )
  image_prefix = alone_prefix = "vision_model."
  num_unit_axes = {"image/pool/probe": 2}
  ignored = r"position_ids$|^classifier\."
  loss = "sigmoid"
  config = {"initializer_factor": 1.0}
  processor = "Siglip"
  preprocess = {
    "interpolation": "bicubic",
    "resize": "squash",
    "mean": processors.HALF,
    "std": processors.HALF,
  }
  lower_case = True

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    if spec.image.pool != "map":
      return []
    pool = "image/pool/attention/"
    return tables.stacked_projections(
      {f"{pool}q": 1, f"{pool}kv": 2},
      f"{prefix}head.attention.in_proj_",
      spec.image.width,
      spec.image.heads,
    )


def _read_patches(section: Section) -> dict[str, Any]:
  """Reads the size of a square image of `num_patches` patches."""
  patches = section["num_patches"]
  side = math.isqrt(patches)
  if side**2 != patches:
    raise ConversionError(f"num_patches={patches} is not a square.")
  patch = hf_files.read_side(section["patch_size"], "patch_size")
  return {"image_size": side * patch, "patch_size": patch}


class Siglip2(Siglip):
  """SigLIP 2 NaFlex."""

  name = "siglip2"
  class_name = "Siglip2"
  image = dataclasses.replace(
    Siglip.image,
    defaults={
      **{k: v for k, v in Siglip.image.defaults.items() if k != "image_size"},
      "num_patches": 256,
    },
    fields={
      **Siglip.image.fields,
      "position_resize": "bilinear_antialiased",
    },
    keys={
      "num_patches": Key("image_size", _read_patches, lambda spec: spec.grid**2)
    },
  )
  processor = "Siglip2"

  def default_preprocess(self, spec: ModelSpec) -> dict[str, Any]:
    return {
      **super().default_preprocess(spec),
      "interpolation": "bilinear",
      "resize": "native",
      "patch_size": spec.image.patch_size,
      "max_patches": spec.image.grid**2,
    }

  def tokenizer_config(self, spec: TextSpec) -> dict[str, Any]:
    # Overrides the processor's default of 64.
    return {"max_length": spec.length}

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    shape = (3 * spec.image.patch_size**2, spec.image.width)
    embedding = tables.transpose_rule(
      "image/patch_embed/kernel",
      f"{prefix}embeddings.patch_embedding.weight",
      shape,
      shape,
      (1, 0),
    )
    return [embedding, *super().special_rules(spec, prefix)]

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    config = super().write_config(spec, pad_id=pad_id)
    if "num_patches" in config:
      # Last key, so that exports stay byte-identical to earlier versions.
      config["num_patches"] = config.pop("num_patches")
    return config


SIGLIP, SIGLIP2 = Siglip(), Siglip2()
