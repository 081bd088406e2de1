"""Hugging Face AIMv2, with or without text tower: read and export."""

from typing import Any

from mtv_jax.convert import clip, tables
from mtv_jax.convert.family import (
  AnyOf,
  Family,
  Key,
  TowerTable,
  block_size_defaults,
  read_activation,
  write_activation,
)
from mtv_jax.models.text import TextSpec

# Last keys of both config sections.
_COMMON = {
  "hidden_act": "silu",
  "attention_dropout": 0.0,
  "rms_norm_eps": 1e-5,
  "qkv_bias": False,
  "mlp_bias": False,
}
_KEYS = {
  "hidden_act": Key(
    None,
    lambda section: read_activation(section, gated=True),
    lambda spec: write_activation(spec, gated=True),
  ),
}
_FIELDS = {
  "mlp": "swiglu",
  "norm_kind": "rms",
  "qkv_bias": "none",
  "bias": False,
}
_BLOCK_NAMES = {
  "norm1": "rms_norm1",
  "attention/qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "attention/out": "attention.out_proj",
  "norm2": "rms_norm2",
  "mlp/gate": "ffn.gate_proj",
  "mlp/fc1": "ffn.up_proj",
  "mlp/fc2": "ffn.down_proj",
}


class Aimv2(Family):
  """AIMv2, including native resolution."""

  name = "aimv2"
  class_name = "Aimv2"
  image = TowerTable(
    {
      **block_size_defaults(1024, 24, 8, 2816),
      "image_size": 224,
      "patch_size": 14,
      **_COMMON,
      "num_channels": 3,
      "use_head": True,
      "is_native": False,
    },
    {
      **_FIELDS,
      "pool": "query",
      "cls_token": False,
      "patch_norm": True,
      "positions": AnyOf(("learned", "sincos_xy")),
    },
    {
      "patch_embed": "embeddings.patch_embed",
      "patch_norm": "embeddings.rms_norm",
      "position_embedding": "embeddings.position_embedding.weight",
      # Absent in AIMv2; used only in training.
      "mask_token": None,
      **tables.nest("blocks/", "encoder.layers.{i}.", _BLOCK_NAMES),
      "norm": "rms_norm",
      "pool/probe": "head.cls_token",
      "pool/attention/kv": ("head.k_proj", "head.v_proj"),
      "pool/attention/out": "head.output_proj",
    },
    keys={
      **_KEYS,
      "is_native": Key(
        None,
        lambda c: {"positions": "sincos_xy" if c["is_native"] else "learned"},
        lambda spec: spec.positions == "sincos_xy",
      ),
    },
  )
  text = TowerTable(
    {
      **block_size_defaults(768, 12, 6, 2048),
      "vocab_size": 49_408,
      "max_position_embeddings": 77,
      **_COMMON,
      "bos_token_id": None,
      "eos_token_id": 49_407,
      "pad_token_id": None,
    },
    # `transformers` applies the causal mask only if it gets a padding mask, as
    # from its processor.
    {**_FIELDS, "pool": "eos", "causal": True, "projection_bias": False},
    {
      "token_embedding": "text_model.embeddings.token_embedding.weight",
      "position_embedding": "text_model.embeddings.position_embedding.weight",
      **tables.nest("blocks/", "text_model.encoder.layers.{i}.", _BLOCK_NAMES),
      "norm": "text_model.rms_norm",
      "projection": "text_projection",
    },
    keys={**_KEYS, "eos_token_id": Key("eos_id", clip.read_eos_id)},
  )
  projection_dim = 512
  image_prefix = "vision_model."
  num_unit_axes = {"image/pool/probe": 2}
  ignored = r"position_ids$"
  preprocess = clip.Clip.preprocess

  def tokenizer_config(self, spec: TextSpec) -> dict[str, Any]:
    # Without a mask, `transformers` attends to padding and is not causal.
    return {"model_input_names": ["input_ids", "attention_mask"]}


AIMV2 = Aimv2()
