"""Hugging Face's AIMv2, with and without its text tower: read and export."""

from collections.abc import Collection, Mapping
from typing import Any

from mtv_jax.convert import clip, folders, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_DEFAULTS = {
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
  "qkv_bias": False,
  "mlp_bias": False,
}
_VISION_DEFAULTS = {
  **_DEFAULTS,
  "hidden_size": 1024,
  "intermediate_size": 2816,
  "num_hidden_layers": 24,
  "num_attention_heads": 8,
  "image_size": 224,
  "patch_size": 14,
  "use_head": True,
  "is_native": False,
}
_TEXT_DEFAULTS = {
  **_DEFAULTS,
  "vocab_size": 49_408,
  "hidden_size": 768,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "max_position_embeddings": 77,
  "eos_token_id": 49_407,
}
_BLOCKS = {
  "norm1": "rms_norm1",
  "attention/qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "attention/out": "attention.out_proj",
  "norm2": "rms_norm2",
  "mlp/gate": "ffn.gate_proj",
  "mlp/fc1": "ffn.up_proj",
  "mlp/fc2": "ffn.down_proj",
}
_VISION = {
  "patch_embed": "embeddings.patch_embed",
  "patch_norm": "embeddings.rms_norm",
  "position_embedding": "embeddings.position_embedding.weight",
  # Not in AIMv2: only training uses it.
  "mask_token": None,
  **tables.nest("blocks/", "encoder.layers.{i}.", _BLOCKS),
  "norm": "rms_norm",
  "pool/probe": "head.cls_token",
  "pool/attention/kv": ("head.k_proj", "head.v_proj"),
  "pool/attention/out": "head.output_proj",
}
_TEXT = {
  "token_embedding": "text_model.embeddings.token_embedding.weight",
  "position_embedding": "text_model.embeddings.position_embedding.weight",
  **tables.nest("blocks/", "text_model.encoder.layers.{i}.", _BLOCKS),
  "norm": "text_model.rms_norm",
  "projection": "text_projection",
}
IGNORE = r"position_ids$"
NEUTRAL = ()
LOSS = "softmax"
PROCESSOR = "CLIP"
# What `Aimv2Model` and `Aimv2VisionModel` can express.
_BLOCK = {
  "mlp": "swiglu",
  "norm_kind": "rms",
  "qkv_bias": "none",
  "bias": False,
}
_REQUIRED = {
  "image": {
    **_BLOCK,
    "pool": "query",
    "cls_token": False,
    "patch_norm": True,
    "positions": folders.ANY,
    "projection": folders.ANY,
  },
  "text": {**_BLOCK, "pool": "eos", "causal": True, "projection_bias": False},
}


def _block_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of both specs."""
  if config["qkv_bias"] or config["mlp_bias"]:
    raise ConversionError(
      f"qkv_bias={config['qkv_bias']} and mlp_bias={config['mlp_bias']}: only "
      "AIMv2 without biases is supported."
    )
  return _BLOCK


def _read_vision(config: Any, section: str, projection: int | None) -> ViTSpec:
  config = folders.with_defaults(config, _VISION_DEFAULTS, section)
  config["layer_norm_eps"] = config["rms_norm_eps"]
  return ViTSpec(
    pool="query" if config["use_head"] else "mean",
    positions="sincos_xy" if config["is_native"] else "learned",
    patch_norm=True,
    projection=projection,
    **_block_fields(config),
    **folders.read_vision(config, gated=True),
  )


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type aimv2(_vision_model) describes."""
  if config["model_type"] == "aimv2_vision_model":
    return ModelSpec(image=_read_vision(config, "", None))
  width = folders.with_defaults(config, {"projection_dim": 512})
  width, text = width["projection_dim"], None
  if folders.has_text_tower(names):
    name = "text_config"
    section = folders.with_defaults(config.get(name), _TEXT_DEFAULTS, name)
    section["layer_norm_eps"] = section["rms_norm_eps"]
    text = TextSpec(
      pool="eos",
      # `transformers` masks so where it is given the padding, as its processor
      # does.
      causal=True,
      projection=width,
      projection_bias=False,
      eos_id=clip.read_eos_id(section["eos_token_id"]),
      **_block_fields(section),
      **folders.read_text(section, gated=True),
    )
  is_projected = "visual_projection.weight" in names
  projection = width if is_projected or text is not None else None
  name = "vision_config"
  image = _read_vision(config.get(name), name, projection)
  return ModelSpec(image=image, text=text)


default_preprocess = clip.default_preprocess


def rules(spec: ModelSpec, *, prefix: str | None = None) -> list[Rule]:
  """Conversion rules for AIMv2; `prefix` is the vision tower's."""
  if prefix is None:
    prefix = "" if spec.text is None else "vision_model."
  special = []
  if spec.text is not None:
    special.append(tables.scale_without_bias("logit_scale", ()))
  names = {
    **tables.nest("image/", prefix, _VISION),
    "image/projection": "visual_projection",
    **tables.nest("text/", "", _TEXT),
  }
  return tables.tower_rules(
    spec, names, *special, unit_axes={"image/pool/probe": 2}
  )


def _section(spec: ViTSpec | TextSpec) -> dict[str, Any]:
  config = folders.tower_config(spec, gated=True)
  config["rms_norm_eps"] = config.pop("layer_norm_eps")
  return {**config, "qkv_bias": False, "mlp_bias": False}


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model; arguments as of `siglip.to_hf_config`."""
  common = {"dtype": "float32", "torch_dtype": "float32"}
  vision = {
    "model_type": "aimv2_vision_model",
    **_section(spec.image),
    "num_channels": 3,
    "use_head": spec.image.pool == "query",
    "is_native": spec.image.positions == "sincos_xy",
  }
  if spec.text is None:
    return {**vision, **common, "architectures": ["Aimv2VisionModel"]}
  return {
    **common,
    "architectures": ["Aimv2Model"],
    "model_type": "aimv2",
    "projection_dim": spec.embed_dim,
    "vision_config": vision,
    "text_config": {
      "model_type": "aimv2_text_model",
      **_section(spec.text),
      **folders.text_ids(spec.text, pad_id),
    },
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What AIMv2's classes can't express, a line for each field."""
  # The two towers are projected, and an image tower alone is not.
  projection = None if spec.text is None else spec.embed_dim
  required = {"image": {**_REQUIRED["image"], "projection": projection}}
  if spec.text is None and spec.image.pool == "mean":
    # Without its head, `Aimv2VisionModel` returns the patches alone.
    required["image"]["pool"] = "mean"
  if spec.text is not None:
    required["text"] = _REQUIRED["text"]
  lines = folders.list_mismatches(spec, required)
  if spec.image.positions not in ("learned", "sincos_xy"):
    lines.append(
      f"  image.positions is {spec.image.positions!r} and would have to be "
      "'learned' or 'sincos_xy'\n"
    )
  return lines
