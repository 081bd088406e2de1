"""Hugging Face's SigLIP (SigLIP 2 of fixed resolution, MTV): both directions.

The one family that is written too: our own models export as it.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from mtv_jax.convert import folders, tables
from mtv_jax.convert.tables import TORCH, ConversionError, Rule
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
  "patch_size": 16,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
  "vision_use_head": True,
}
TEXT_DEFAULTS = {
  "vocab_size": 32_000,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "max_position_embeddings": 64,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
# The tokenizer of every SigLIP ends and pads with </s>, whose id is 1; the
# eos_token_id of its config is CLIP's and unused.
EOS_ID = 1

NAMES = tables.BlockNames(
  norm1="layer_norm1",
  q="self_attn.q_proj",
  k="self_attn.k_proj",
  v="self_attn.v_proj",
  out="self_attn.out_proj",
  norm2="layer_norm2",
  mlp="mlp",
)
IGNORE = r"position_ids$|^classifier\."


def _vision_spec(config: Mapping[str, Any] | None) -> ViTSpec:
  config = folders.with_defaults(config, VISION_DEFAULTS)
  pool = "map" if config["vision_use_head"] else "mean"
  if pool == "mean":
    log.info("vision_use_head=False: pooled is the mean of the patches.")
  return ViTSpec(
    **folders.read_sizes(config),
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    pool=pool,
    gelu=folders.read_activation(config),
    norm_eps=float(config["layer_norm_eps"]),
  )


def _text_spec(config: Mapping[str, Any] | None) -> TextSpec:
  config = folders.with_defaults(config, TEXT_DEFAULTS)
  return TextSpec(
    vocab_size=config["vocab_size"],
    length=config["max_position_embeddings"],
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    pool="last",
    causal=False,
    gelu=folders.read_activation(config),
    norm_eps=float(config["layer_norm_eps"]),
    projection=config.get("projection_size") or config["hidden_size"],
    projection_bias=True,
    eos_id=EOS_ID,
  )


def spec(config: Mapping[str, Any], names: Iterable[str]) -> ModelSpec:
  """The model that a `config.json` of type siglip(_vision_model) describes."""
  if config["model_type"] == "siglip_vision_model":
    return ModelSpec(image=_vision_spec(config), text=None)
  text = None
  if any(name.startswith("text_model.") for name in names):
    text = _text_spec(config.get("text_config"))
  else:
    log.info("No text tower in the file: only images can be encoded.")
  image = _vision_spec(config.get("vision_config"))
  return ModelSpec(image=image, text=text)


def rules(spec: ModelSpec, *, prefix: str = "vision_model") -> list[Rule]:
  """The table of a SigLIP; `prefix` is the vision tower's ('' in some)."""
  found = _vision_rules(spec.image, prefix)
  if spec.text is None:
    return found
  head, text = "heads/contrastive", spec.text
  return [
    *found,
    *text_trunk_rules(text),
    *tables.dense(
      TORCH, "text/projection", "text_model.head", text.width, text.projection
    ),
    tables.reshaped(f"{head}/logit_scale", "logit_scale", (), (1,)),
    tables.reshaped(f"{head}/logit_bias", "logit_bias", (), (1,)),
  ]


def _vision_rules(spec: ViTSpec, prefix: str) -> list[Rule]:
  def at(name):
    return TORCH.join(prefix, name)

  width, grid = spec.width, spec.image_size // spec.patch_size
  embeddings = at("embeddings")
  found = [
    tables.convolution(
      "image/patch_embed/kernel",
      f"{embeddings}.patch_embedding.weight",
      spec.patch_size,
      width,
    ),
    tables.vector(
      "image/patch_embed/bias", f"{embeddings}.patch_embedding.bias", width
    ),
    tables.reshaped(
      "image/position_embedding",
      f"{embeddings}.position_embedding.weight",
      (grid**2, width),
      (grid**2, width),
    ),
    *tables.blocks(
      TORCH,
      "image/blocks",
      at("encoder.layers.{i}"),
      NAMES,
      width=width,
      heads=spec.heads,
      mlp_dim=spec.mlp_dim,
      depth=spec.depth,
    ),
    *tables.norm(TORCH, "image/norm", at("post_layernorm"), width),
  ]
  if spec.pool != "map":
    return found
  head, ours = at("head"), "image/pool"
  attention = f"{head}.attention"
  return [
    *found,
    tables.reshaped(f"{ours}/probe", f"{head}.probe", (width,), (1, 1, width)),
    *tables.in_projection(f"{ours}/attention", attention, width, spec.heads),
    *tables.dense(
      TORCH, f"{ours}/attention/out", f"{attention}.out_proj", width, width
    ),
    *tables.norm(TORCH, f"{ours}/norm", f"{head}.layernorm", width),
    *tables.mlp(TORCH, f"{ours}/mlp", f"{head}.mlp", width, spec.mlp_dim),
  ]


def text_trunk_rules(spec: TextSpec) -> list[Rule]:
  """A text tower up to its last norm, which SigLIP has from CLIP."""
  width = spec.width
  embeddings = "text_model.embeddings"
  tokens, positions = (spec.vocab_size, width), (spec.length, width)
  return [
    tables.reshaped(
      "text/token_embedding",
      f"{embeddings}.token_embedding.weight",
      tokens,
      tokens,
    ),
    tables.reshaped(
      "text/position_embedding",
      f"{embeddings}.position_embedding.weight",
      positions,
      positions,
    ),
    *tables.blocks(
      TORCH,
      "text/blocks",
      "text_model.encoder.layers.{i}",
      NAMES,
      width=width,
      heads=spec.heads,
      mlp_dim=spec.mlp_dim,
      depth=spec.depth,
    ),
    *tables.norm(TORCH, "text/norm", "text_model.final_layer_norm", width),
  ]


# ---------------------------------------------------------------------------
# Writing.


def _refusals(spec: ModelSpec) -> list[str]:
  """The fields that `SiglipModel` can't express, each with what to change."""
  image, text = spec.image, spec.text
  found = []

  def need(tower: str, field: str, got: Any, want: Any) -> None:
    if got != want:
      found.append(f"{tower}.{field} is {got!r} and would have to be {want!r}")

  for field, want in (
    ("pool", "map"),
    ("cls_token", False),
    ("registers", 0),
    ("layer_scale", None),
    ("mlp", "plain"),
    ("pre_norm", False),
    ("patch_bias", True),
    ("projection", None),
  ):
    need("image", field, getattr(image, field), want)
  if text is not None:
    for field, want in (
      ("pool", "last"),
      ("causal", False),
      ("projection_bias", True),
    ):
      need("text", field, getattr(text, field), want)
    # There is no projection of the image, so the text comes to its width.
    need("text", "projection", text.projection, image.width)
  return found


def config(spec: ModelSpec, *, pad_id: int | None = None) -> dict[str, Any]:
  """The `config.json` of a model.

  Args:
    spec: of the model.
    pad_id: what the tokenizer pads with, which is the end of text if None.

  Raises:
    ConversionError: `SiglipModel` has no such model; names every field.
  """
  refusals = _refusals(spec)
  if refusals:
    raise ConversionError(
      "transformers' SiglipModel can't express this model:\n"
      + "".join(f"  {line}\n" for line in refusals)
      + "Train with these settings to export it, or keep it in our own form "
      "(from_hf's folder), which mtv_jax.load opens."
    )
  image, text = spec.image, spec.text
  vision = {
    "model_type": "siglip_vision_model",
    "hidden_size": image.width,
    "intermediate_size": image.mlp_dim,
    "num_hidden_layers": image.depth,
    "num_attention_heads": image.heads,
    "num_channels": 3,
    "image_size": image.image_size,
    "patch_size": image.patch_size,
    "hidden_act": folders.HIDDEN_ACT[image.gelu],
    "layer_norm_eps": image.norm_eps,
    "attention_dropout": 0.0,
    "vision_use_head": True,
  }
  common = {"dtype": "float32", "torch_dtype": "float32"}
  if text is None:
    return {**vision, **common, "architectures": ["SiglipVisionModel"]}
  return {
    **common,
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "initializer_factor": 1.0,
    "vision_config": vision,
    "text_config": {
      "model_type": "siglip_text_model",
      "vocab_size": text.vocab_size,
      "max_position_embeddings": text.length,
      "hidden_size": text.width,
      "intermediate_size": text.mlp_dim,
      "num_hidden_layers": text.depth,
      "num_attention_heads": text.heads,
      "projection_size": text.projection,
      "hidden_act": folders.HIDDEN_ACT[text.gelu],
      "layer_norm_eps": text.norm_eps,
      "attention_dropout": 0.0,
      # Only our tokenizers' ids: their defaults are CLIP's, and out of range.
      "bos_token_id": None,
      "eos_token_id": text.eos_id,
      "pad_token_id": text.eos_id if pad_id is None else pad_id,
    },
  }
