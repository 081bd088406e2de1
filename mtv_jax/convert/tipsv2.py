"""Hugging Face TIPSv2, with or without text tower: read and export."""

import numpy as np

from mtv_jax.convert import dinov2, tables
from mtv_jax.convert.family import AnyOf, Family, Key, TowerTable
from mtv_jax.convert.tables import Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_TEMPERATURE = 0.005065968260169029


class Tipsv2(Family):
  """TIPSv2."""

  name = "tipsv2"
  class_name = "Tipsv2"
  image = TowerTable(
    {
      "hidden_size": 768,
      "num_hidden_layers": 12,
      "num_attention_heads": 12,
      "layer_norm_eps": 1e-6,
      "image_size": 448,
      "patch_size": 14,
      "hidden_act": "gelu",
      "mlp_ratio": 4,
      "num_channels": 3,
      "qkv_bias": True,
      "layerscale_value": 1.0,
      "use_swiglu_ffn": False,
      "num_register_tokens": 1,
    },
    {
      "pool": "cls",
      "cls_token": True,
      "position_resize": "bilinear_antialiased",
    },
    {
      "patch_embed": "patch_embed.proj",
      "mask_token": "mask_token",
      "registers": "register_tokens",
      **tables.nest(
        "blocks/",
        "blocks.{i}.",
        {
          "norm1": "norm1",
          "attention/out": "attn.proj",
          "scale1": "ls1.gamma",
          "norm2": "norm2",
          "mlp/fc1": "mlp.c_fc",
          "mlp/fc2": "mlp.c_proj",
          "scale2": "ls2.gamma",
        },
      ),
      "norm": "norm",
    },
    gated={"blocks/mlp/fc2": "blocks.{i}.mlp.w3"},
    keys=dinov2.MLP_KEYS,
  )
  text = TowerTable(
    {
      "hidden_size": 768,
      "num_hidden_layers": 12,
      "num_attention_heads": 12,
      "intermediate_size": 3072,
      "layer_norm_eps": 1e-5,
      "vocab_size": 32_000,
      "max_position_embeddings": 64,
      "hidden_act": "relu",
      "attention_dropout": 0.0,
      "pad_token_id": 0,
      "scale_sqrt_depth": True,
    },
    {
      "pool": "mean",
      "causal": False,
      "projection": None,
      # Without a projection, its bias is irrelevant.
      "projection_bias": AnyOf((False, True)),
      "positions": "sinusoidal",
    },
    {
      "token_embedding": "text_encoder.token_embedding.weight",
      **tables.nest(
        "blocks/",
        "text_encoder.transformer.resblocks.{i}.",
        {
          "norm1": "ln_1",
          "attention/out": "attn.out_proj",
          "norm2": "ln_2",
          "mlp/fc1": "mlp.c_fc",
          "mlp/fc2": "mlp.c_proj",
        },
      ),
      "norm": "text_encoder.ln_final",
    },
    keys={
      "pad_token_id": Key(
        "pad_id",
        check=lambda spec: (
          "pad_id is None and would have to be a token"
          if spec.pad_id is None
          else None
        ),
      ),
      "scale_sqrt_depth": Key("token_scale"),
    },
  )
  image_prefix = "vision_encoder."
  text_prefix = "text_encoder."
  unit_axes = {"image/mask_token": 1, "image/registers": 1}
  neutral = ("layer_scale", "mask_token")
  preprocess = {
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
  }
  lower_case = True
  add_end = False

  def tokenizer_config(self, spec: TextSpec) -> dict[str, list[str]]:
    # Without a mask, `transformers` attends to padding.
    return {"model_input_names": ["input_ids", "attention_mask"]}

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    rules = [
      tables.folded_positions(
        f"{prefix}cls_token", f"{prefix}pos_embed", unit_axes=(2, 1), spec=spec
      ),
      *_qkv("image", spec.image, f"{prefix}blocks.{{i}}.attn.qkv."),
    ]
    if spec.image.mlp == "swiglu":
      layer = f"{prefix}blocks.{{i}}.mlp.w12"
      rules += dinov2.fused_swiglu_rule(layer, spec.image)
    if not spec.image.registers:
      empty = np.zeros((1, 0, spec.image.width))
      rules.append(tables.constant(f"{prefix}register_tokens", empty))
    if spec.text is not None:
      layer = "text_encoder.transformer.resblocks.{i}.attn.in_proj_"
      rules += _qkv("text", spec.text, layer)
    return rules

  def temperature_rules(self) -> list[Rule]:
    return [_temperature()]


def _qkv(tower: str, spec: ViTSpec | TextSpec, layer: str) -> list[Rule]:
  return tables.stacked_projections(
    {f"{tower}/blocks/attention/qkv": 3},
    layer,
    spec.width,
    spec.heads,
    depth=spec.depth,
  )


def _temperature() -> Rule:
  """The temperature rule: the inverse of our scale, without a bias."""
  head = "heads/contrastive/logit_"

  def read(temperature: np.ndarray) -> tuple[np.ndarray, ...]:
    scale = -np.log(temperature.astype(np.float64))
    return np.array(scale, np.float32), np.zeros((), np.float32)

  def write(scale: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.array(np.exp(-scale.astype(np.float64)), np.float32),)

  return Rule(
    (f"{head}scale", f"{head}bias"),
    ("temperature",),
    ((),),
    read,
    write,
    default=(np.array(_TEMPERATURE, np.float32),),
  )


TIPSV2 = Tipsv2()
