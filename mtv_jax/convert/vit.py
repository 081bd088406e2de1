"""Hugging Face ViT, DeiT, ViT-MAE and I-JEPA: read.

DINO's first version is a ViT. The pooler, classifiers and MAE's decoder are
ignored: `pooled` is the CLS token, or I-JEPA's mean of the patches. A model
read from these exports to the class of the same function whose `pooler_output`
is `pooled`: Dinov2's, with DeiT's distillation token as a register, or
SigLIP's without a head.
"""

import dataclasses
import logging
from collections.abc import Collection

from mtv_jax.convert import processors, tables
from mtv_jax.convert.family import Family, Key, Section, TowerTable, blocks
from mtv_jax.convert.tables import Rule
from mtv_jax.models.two_tower import ModelSpec

log = logging.getLogger(__name__)


class Vit(Family):
  """ViT, also DINO's."""

  name = "vit"
  class_name = "ViT"
  image = TowerTable(
    {
      **blocks(768, 12, 12, 3072, layer_norm_eps=1e-12),
      "image_size": 224,
      "patch_size": 16,
      "hidden_act": "gelu",
      "num_channels": 3,
      "qkv_bias": True,
    },
    {"pool": "cls", "cls_token": True},
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
  unit_axes = {"image/mask_token": 2}
  ignored = r"^decoder\.|(^|\.)pooler\.|classifier\."
  exports_image = False
  preprocess = {
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": processors.HALF,
    "std": processors.HALF,
  }

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    if any(name.startswith("decoder.") for name in names):
      log.info("The decoder in the file is not read.")
    return super().read_spec(config, names)

  def find_prefix(self, config: Section, names: Collection[str]) -> str:
    # ViT-MAE and I-JEPA pretrained models nest the encoder as `vit.`, `ijepa.`.
    nested = (f"{kind}." for kind in ("vit", "deit", "ijepa"))
    return next((p for p in nested if any(n.startswith(p) for n in names)), "")

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    image, tokens = spec.image, {}
    if image.cls_token:
      tokens["image/cls_token"] = f"{prefix}embeddings.cls_token"
    if image.registers:
      tokens["image/registers"] = f"{prefix}embeddings.distillation_token"
    positions = f"{prefix}embeddings.position_embeddings"
    return [tables.folded_positions(tokens, positions, image)]


class VitMae(Vit):
  """ViT-MAE's encoder."""

  name = "vit_mae"
  class_name = "ViTMAE"
  preprocess = {
    **Vit.preprocess,
    "mean": processors.IMAGENET_MEAN,
    "std": processors.IMAGENET_STD,
  }


class Deit(Vit):
  """DeiT, with the distillation token as a register."""

  name = "deit"
  class_name = "DeiT"
  image = dataclasses.replace(
    Vit.image, fields={**Vit.image.fields, "registers": 1}
  )
  preprocess = {**VitMae.preprocess, "interpolation": "bicubic"}


class Ijepa(Vit):
  """I-JEPA's encoder."""

  name = "ijepa"
  class_name = "IJepa"
  image = dataclasses.replace(
    Vit.image, fields={"pool": "mean", "cls_token": False}
  )
  preprocess = VitMae.preprocess


VIT, VIT_MAE, DEIT, IJEPA = Vit(), VitMae(), Deit(), Ijepa()
