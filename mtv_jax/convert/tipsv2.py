"""Hugging Face's TIPSv2, with and without its text tower: read and export."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import dinov2, folders, tables
from mtv_jax.convert.tables import Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_VISION_DEFAULTS = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "mlp_ratio": 4,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "image_size": 448,
  "patch_size": 14,
  "qkv_bias": True,
  "layerscale_value": 1.0,
  "use_swiglu_ffn": False,
  "num_register_tokens": 1,
}
_TEXT_DEFAULTS = {
  "vocab_size": 32_000,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "max_position_embeddings": 64,
  "hidden_act": "relu",
  "layer_norm_eps": 1e-5,
  "pad_token_id": 0,
  "scale_sqrt_depth": True,
}
_TEMPERATURE = 0.005065968260169029
_VISION = {
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
}
_TEXT = {
  "token_embedding": "token_embedding.weight",
  **tables.nest(
    "blocks/",
    "transformer.resblocks.{i}.",
    {
      "norm1": "ln_1",
      "attention/out": "attn.out_proj",
      "norm2": "ln_2",
      "mlp/fc1": "mlp.c_fc",
      "mlp/fc2": "mlp.c_proj",
    },
  ),
  "norm": "ln_final",
}
IGNORE = r"(?!)"
NEUTRAL = ("layer_scale", "mask_token")
LOSS = "softmax"
PROCESSOR = "CLIP"
# What `Tipsv2Model` and `Tipsv2VisionModel` can express.
_REQUIRED = {
  "image": {
    "pool": "cls",
    "cls_token": True,
    "registers": folders.ANY,
    "layer_scale": folders.ANY,
    "mlp": folders.ANY,
  },
  "text": {
    "pool": "mean",
    "causal": False,
    "projection": None,
    "positions": "sinusoidal",
    "token_scale": folders.ANY,
    "pad_id": folders.ANY,
  },
}


def _read_vision(config: Any, names: Collection[str], section: str) -> ViTSpec:
  config = folders.with_defaults(config, _VISION_DEFAULTS, section)
  folders.require(config, {"qkv_bias": True})
  mlp, mlp_dim = dinov2.read_mlp(config)
  return ViTSpec(
    mlp=mlp,
    pool="cls",
    cls_token=True,
    registers=config["num_register_tokens"],
    layer_scale=float(config["layerscale_value"]),
    mask_token=any(n.endswith("mask_token") for n in names),
    position_resize="bilinear_antialiased",
    **folders.read_vision({**config, "intermediate_size": mlp_dim}),
  )


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type tipsv2(_vision_model) describes."""
  if config["model_type"] == "tipsv2_vision_model":
    return ModelSpec(image=_read_vision(config, names, ""))
  text = None
  if folders.has_text_tower(names, "text_encoder."):
    name = "text_config"
    section = folders.with_defaults(config.get(name), _TEXT_DEFAULTS, name)
    text = TextSpec(
      pool="mean",
      causal=False,
      projection=None,
      projection_bias=False,
      positions="sinusoidal",
      token_scale=section["scale_sqrt_depth"],
      pad_id=section["pad_token_id"],
      **folders.read_text(section),
    )
  name = "vision_config"
  image = _read_vision(config.get(name), names, name)
  return ModelSpec(image=image, text=text)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: 0..1, squashed to a square."""
  return {
    "size": spec.image.image_size,
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
  }


def rules(spec: ModelSpec, *, prefix: str | None = None) -> list[Rule]:
  """Conversion rules for TIPSv2; `prefix` is the vision tower's."""
  if prefix is None:
    prefix = "" if spec.text is None else "vision_encoder."
  special = [
    tables.folded_positions(
      f"{prefix}cls_token", f"{prefix}pos_embed", unit_axes=(2, 1), spec=spec
    ),
    *tables.fused_qkv(
      "image/blocks/attention/qkv",
      spec.image,
      f"{prefix}blocks.{{i}}.attn.qkv.weight",
      f"{prefix}blocks.{{i}}.attn.qkv.bias",
    ),
  ]
  names = dict(tables.nest("image/", prefix, _VISION))
  if spec.image.mlp == "swiglu":
    mlp = f"{prefix}blocks.{{i}}.mlp"
    special += dinov2.swiglu_input(f"{mlp}.w12", spec.image)
    names["image/blocks/mlp/fc2"] = f"{mlp}.w3"
  if not spec.image.registers:
    empty = np.zeros((1, 0, spec.image.width))
    special.append(tables.constant(f"{prefix}register_tokens", empty))
  if spec.text is not None:
    attention = "text_encoder.transformer.resblocks.{i}.attn.in_proj_"
    special += tables.fused_qkv(
      "text/blocks/attention/qkv",
      spec.text,
      f"{attention}weight",
      f"{attention}bias",
    )
    special.append(_temperature())
    names |= tables.nest("text/", "text_encoder.", _TEXT)
  return tables.tower_rules(
    spec,
    names,
    *special,
    unit_axes={"image/mask_token": 1, "image/registers": 1},
  )


def _temperature() -> Rule:
  """The temperature, the inverse of our scale; the similarity has no bias."""
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


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model; arguments as of `siglip.to_hf_config`."""
  del pad_id  # The tower has it.
  common = {"dtype": "float32", "torch_dtype": "float32"}
  image = spec.image
  vision = {
    "model_type": "tipsv2_vision_model",
    **folders.tower_config(image),
    "mlp_ratio": dinov2.mlp_ratio(image, integer=False),
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": image.layer_scale,
    "use_swiglu_ffn": image.mlp == "swiglu",
    "num_register_tokens": image.registers,
  }
  del vision["intermediate_size"], vision["attention_dropout"]
  if spec.text is None:
    return {**vision, **common, "architectures": ["Tipsv2VisionModel"]}
  return {
    **common,
    "architectures": ["Tipsv2Model"],
    "model_type": "tipsv2",
    "vision_config": vision,
    "text_config": {
      "model_type": "tipsv2_text_model",
      **folders.tower_config(spec.text),
      "pad_token_id": spec.text.pad_id,
      "scale_sqrt_depth": spec.text.token_scale,
    },
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What TIPSv2's classes can't express, a line for each field."""
  required = {"image": _REQUIRED["image"]}
  if spec.text is not None:
    required["text"] = _REQUIRED["text"]
  lines = folders.list_mismatches(spec, required)
  resize = spec.image.position_resize
  if resize != "bilinear_antialiased":
    lines.append(
      f"  image.position_resize is {resize!r} and would have to be "
      "'bilinear_antialiased'\n"
    )
  if spec.text is not None and spec.text.pad_id is None:
    lines.append("  text.pad_id is None and would have to be a token\n")
  return lines + dinov2.mlp_mismatches(spec.image, integer=False)
