"""Hugging Face's CLIP: read and export.

Our own models of this architecture are exported as CLIP.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mtv_jax.convert import folders, processors, siglip, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_EOS_ID = 49_407
_DEFAULTS = {
  "num_hidden_layers": 12,
  "projection_dim": 512,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS = {
  **_DEFAULTS,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 32,
}
TEXT_DEFAULTS = {
  **_DEFAULTS,
  "vocab_size": 49_408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "eos_token_id": _EOS_ID,
}
_VISION = {
  "patch_embed": "embeddings.patch_embedding",
  # Misspelt in every checkpoint.
  "pre_norm": "pre_layrnorm",
  # Not in CLIP: only training uses it.
  "mask_token": None,
  **tables.nest("blocks/", "encoder.layers.{i}.", siglip.BLOCKS),
  "norm": "post_layernorm",
}
# What `CLIPModel` can express.
_REQUIRED = {
  "image": {
    "pool": "cls",
    "cls_token": True,
    "pre_norm": True,
    "patch_bias": False,
  },
  "text": {"pool": "eos", "causal": True, "projection_bias": False},
}
IGNORE = r"position_ids$|^classifier\."
NEUTRAL = ()
LOSS = "softmax"
PROCESSOR = "CLIP"


def _section(
  config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """One tower's config. Early files have two, of which the second one wins."""
  section = folders.with_defaults(config.get(name), defaults, name)
  second = config.get(f"{name}_dict")
  if second is not None:
    section |= folders.with_defaults(second, defaults, f"{name}_dict")
  return section


def _read_vision(config: Mapping[str, Any], projection: int | None) -> ViTSpec:
  return ViTSpec(
    pool="cls",
    cls_token=True,
    pre_norm=True,
    patch_bias=False,
    projection=projection,
    **folders.read_vision(config),
  )


def read_eos_id(value: int | list[int]) -> int:
  """The first one of `eos_token_id`."""
  if value == []:
    raise ConversionError("text_config.eos_token_id is empty.")
  return value[0] if isinstance(value, list) else value


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type clip(_vision_model) describes."""
  is_projected = "visual_projection.weight" in names
  if config["model_type"] == "clip_vision_model":
    vision = folders.with_defaults(config, _VISION_DEFAULTS)
    projection = vision["projection_dim"] if is_projected else None
    return ModelSpec(image=_read_vision(vision, projection))
  width, text = folders.with_defaults(config, _DEFAULTS)["projection_dim"], None
  if folders.has_text_tower(names):
    section = _section(config, "text_config", TEXT_DEFAULTS)
    text = TextSpec(
      pool="eos",
      causal=True,
      projection=width,
      projection_bias=False,
      eos_id=read_eos_id(section["eos_token_id"]),
      **folders.read_text(section),
    )
  vision = _section(config, "vision_config", _VISION_DEFAULTS)
  projection = width if is_projected or text is not None else None
  return ModelSpec(image=_read_vision(vision, projection), text=text)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: the central square."""
  return {
    "size": spec.image.image_size,
    "interpolation": "bicubic",
    "resize": "shortest",
    "crop": "center",
    "mean": processors.CLIP_MEAN,
    "std": processors.CLIP_STD,
  }


def rules(spec: ModelSpec, *, prefix: str = "vision_model.") -> list[Rule]:
  """Conversion rules for CLIP; `prefix` is the vision tower's."""
  special = [
    tables.folded_positions(
      f"{prefix}embeddings.class_embedding",
      f"{prefix}embeddings.position_embedding.weight",
      unit_axes=(0, 0),
      spec=spec,
    )
  ]
  if spec.text is not None:
    special.append(tables.scale_without_bias("logit_scale", ()))
  names = {
    **tables.nest("image/", prefix, _VISION),
    "image/projection": "visual_projection",
    **tables.nest("text/", "", siglip.TEXT),
    "text/projection": "text_projection",
  }
  return tables.tower_rules(spec, names, *special)


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model.

  Args:
    spec: the model's spec, without `mismatches`.
    pad_id: padding id of the tokenizer; the end of text if None.
  """
  width = {"projection_dim": spec.embed_dim}
  return {
    "dtype": "float32",
    "torch_dtype": "float32",
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "initializer_factor": 1.0,
    **width,
    "vision_config": {
      "model_type": "clip_vision_model",
      **folders.tower_config(spec.image),
      **width,
      "num_channels": 3,
    },
    "text_config": {
      "model_type": "clip_text_model",
      **folders.tower_config(spec.text),
      **width,
      **folders.text_ids(spec.text, pad_id),
    },
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What `CLIPModel` can't express of two towers, a line for each field."""
  # CLIP has both projections.
  image = {**_REQUIRED["image"], "projection": spec.embed_dim}
  return folders.list_mismatches(spec, {**_REQUIRED, "image": image})
