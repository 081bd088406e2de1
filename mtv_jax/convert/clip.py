"""Reader of Hugging Face's CLIP."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders, siglip, tables
from mtv_jax.convert.tables import TORCH, Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

VISION_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 32,
  "projection_dim": 512,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
TEXT_DEFAULTS = {
  "vocab_size": 49_408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "projection_dim": 512,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "eos_token_id": 49_407,
}
IGNORE = r"position_ids$|^classifier\."


def _section(
  config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """One tower's config: early files held it twice, and the second one wins."""
  section = folders.with_defaults(config.get(name), defaults)
  second = config.get(f"{name}_dict")
  if second is not None:
    section.update(folders.with_defaults(second, defaults))
  return section


def _vision_spec(config: Mapping[str, Any], projection: int | None) -> ViTSpec:
  return ViTSpec(
    **folders.read_sizes(config),
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    pool="cls",
    cls_token=True,
    pre_norm=True,
    patch_bias=False,
    gelu=folders.read_activation(config),
    norm_eps=float(config["layer_norm_eps"]),
    projection=projection,
  )


def _text_spec(config: Mapping[str, Any], projection: int) -> TextSpec:
  eos_id = config["eos_token_id"]
  if isinstance(eos_id, list):
    eos_id = eos_id[0]
  return TextSpec(
    vocab_size=config["vocab_size"],
    length=config["max_position_embeddings"],
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    pool="eos",
    causal=True,
    gelu=folders.read_activation(config),
    norm_eps=float(config["layer_norm_eps"]),
    projection=projection,
    projection_bias=False,
    eos_id=eos_id,
  )


def spec(config: Mapping[str, Any], names: Iterable[str]) -> ModelSpec:
  """The model that a `config.json` of type clip(_vision_model) describes."""
  names = set(names)
  projected = "visual_projection.weight" in names
  if config["model_type"] == "clip_vision_model":
    vision = folders.with_defaults(config, VISION_DEFAULTS)
    projection = vision["projection_dim"] if projected else None
    return ModelSpec(image=_vision_spec(vision, projection), text=None)
  vision = _section(config, "vision_config", VISION_DEFAULTS)
  width = config.get("projection_dim") or 512
  text = None
  if any(name.startswith("text_model.") for name in names):
    section = _section(config, "text_config", TEXT_DEFAULTS)
    text = _text_spec(section, width)
  else:
    log.info("No text tower in the file: only images can be encoded.")
  projection = width if projected or text is not None else None
  return ModelSpec(image=_vision_spec(vision, projection), text=text)


def rules(spec: ModelSpec, *, prefix: str = "vision_model") -> list[Rule]:
  """The table of a CLIP; `prefix` is the vision tower's ('' in some)."""
  image, text = spec.image, spec.text
  found = _vision_rules(image, prefix)
  if image.projection:
    found += tables.dense(
      TORCH,
      "image/projection",
      "visual_projection",
      image.width,
      image.projection,
      bias="",
    )
  if text is None:
    return found
  scale = "heads/contrastive/logit_scale"
  return [
    *found,
    *siglip.text_trunk_rules(text),
    *tables.dense(
      TORCH,
      "text/projection",
      "text_projection",
      text.width,
      text.projection,
      bias="",
    ),
    # CLIP has no bias; our similarity has one, so it is zero.
    Rule(
      (scale, "heads/contrastive/logit_bias"),
      ("logit_scale",),
      ((),),
      to_ours=lambda a: (a, np.zeros((), np.float32)),
    ),
  ]


def folded_positions(
  cls_token: str,
  positions: str,
  *,
  grid: int,
  width: int,
  stored: tuple[tuple[int, ...], tuple[int, ...]],
) -> Rule:
  """A class token whose position is added once and for all.

  Theirs add position 0 to it in every forward pass; it never changes, not
  with the resolution either.

  Args:
    cls_token: name in the file.
    positions: name in the file, the class token's first.
    grid: patches on a side.
    width: of the tower.
    stored: shapes of the two in the file.
  """

  def to_ours(token: np.ndarray, table: np.ndarray) -> tables.Arrays:
    table = table.reshape(grid**2 + 1, width)
    return token.reshape(width) + table[0], table[1:]

  return Rule(
    ("image/cls_token", "image/position_embedding"),
    (cls_token, positions),
    stored,
    to_ours,
  )


def _vision_rules(spec: ViTSpec, prefix: str) -> list[Rule]:
  def at(name):
    return TORCH.join(prefix, name)

  width, grid = spec.width, spec.image_size // spec.patch_size
  return [
    tables.convolution(
      "image/patch_embed/kernel",
      at("embeddings.patch_embedding.weight"),
      spec.patch_size,
      width,
    ),
    folded_positions(
      at("embeddings.class_embedding"),
      at("embeddings.position_embedding.weight"),
      grid=grid,
      width=width,
      stored=((width,), (grid**2 + 1, width)),
    ),
    # The name is spelt so in every checkpoint.
    *tables.norm(TORCH, "image/pre_norm", at("pre_layrnorm"), width),
    *tables.blocks(
      TORCH,
      "image/blocks",
      at("encoder.layers.{i}"),
      siglip.NAMES,
      width=width,
      heads=spec.heads,
      mlp_dim=spec.mlp_dim,
      depth=spec.depth,
    ),
    *tables.norm(TORCH, "image/norm", at("post_layernorm"), width),
  ]
