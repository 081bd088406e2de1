"""Hugging Face ViT, DeiT, ViT-MAE and I-JEPA: read.

DINO's first version is a ViT. The pooler, classifiers and MAE's decoder are
ignored: `pooled` is the CLS token, or I-JEPA's mean of the patches. A model
read from these is exported to the equivalent class whose `pooler_output` is
`pooled`: Dinov2's, with DeiT's distillation token as a register, or SigLIP's
without a head.
"""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from mtv_jax.convert import processors, tables
from mtv_jax.convert.family import (
  Family,
  Key,
  Section,
  TowerTable,
  block_size_defaults,
)
from mtv_jax.convert.tables import Rule
from mtv_jax.models.two_tower import ModelSpec

log = logging.getLogger(__name__)
_FIELDS = {"pool": "cls", "cls_token": True}
_IMAGE = TowerTable(
  {
    **block_size_defaults(768, 12, 12, 3072, layer_norm_eps=1e-12),
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "num_channels": 3,
    "qkv_bias": True,
  },
  _FIELDS,
  {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "mask_token": "embeddings.mask_token",
    **tables.nest(
      "blocks/",
      "encoder.layer.{i}.",
      {
        "norm1": "layernorm_before",
        "attention/qkv": tuple(
          f"attention.attention.{part}" for part in ("query", "key", "value")
        ),
        "attention/out": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
      },
    ),
    "norm": "layernorm",
  },
  keys={
    "qkv_bias": Key(
      "qkv_bias", lambda c: {"qkv_bias": "all" if c["qkv_bias"] else "none"}
    )
  },
)


class Vit(Family):
  """ViT and its relatives, whose towers differ in `fields`."""

  num_unit_axes = {"image/mask_token": 2}
  ignored = r"^decoder\.|(^|\.)pooler\.|classifier\."
  exports_image = False

  def __init__(
    self,
    name: str,
    class_name: str,
    preprocess: Section | None = None,
    **fields: Any,
  ):
    self.name, self.class_name = name, class_name
    self.image = dataclasses.replace(_IMAGE, fields={**_FIELDS, **fields})
    self.preprocess = {
      "interpolation": "bilinear",
      "resize": "squash",
      "mean": processors.IMAGENET_MEAN,
      "std": processors.IMAGENET_STD,
      **(preprocess or {}),
    }

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    if any(name.startswith("decoder.") for name in names):
      log.info("The decoder in the file is not read.")
    return super().read_spec(config, names)

  def find_prefix(self, config: Section, names: Collection[str]) -> str:
    # ViT-MAE and I-JEPA pretrained models nest the encoder as `vit.`, `ijepa.`.
    parents = (f"{kind}." for kind in ("vit", "deit", "ijepa"))
    return next((p for p in parents if any(n.startswith(p) for n in names)), "")

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    image, tokens = spec.image, {}
    if image.cls_token:
      tokens["image/cls_token"] = f"{prefix}embeddings.cls_token"
    if image.registers:
      tokens["image/registers"] = f"{prefix}embeddings.distillation_token"
    positions = f"{prefix}embeddings.position_embeddings"
    return [tables.folded_positions(tokens, positions, image)]


_HALF = {"mean": processors.HALF, "std": processors.HALF}
VIT = Vit("vit", "ViT", _HALF)  # Also DINO's.
VIT_MAE = Vit("vit_mae", "ViTMAE")
DEIT = Vit("deit", "DeiT", {"interpolation": "bicubic"}, registers=1)
IJEPA = Vit("ijepa", "IJepa", pool="mean", cls_token=False)
