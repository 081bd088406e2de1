"""Hugging Face RADIO (C-RADIO): read and export.

A ViT with several CLS tokens; a subset of them is the summary. Position
embeddings cover a large square and are cropped to each image's grid. The model
normalises pixels itself. Video inputs are not supported.
"""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from mtv_jax.convert import dinov2, hf_files, processors, tables
from mtv_jax.convert.family import (
  Family,
  Key,
  Section,
  TowerTable,
  block_size_defaults,
  ignore,
  read_sizes,
)
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_SIZE = 224  # Image size without an image processor.
_PREFIX = "radio_model."
_MODEL = f"{_PREFIX}model."
_BLOCK = f"{_MODEL}blocks.{{i}}."
_NORMALIZATION = {
  "norm_mean": processors.CLIP_MEAN,
  "norm_std": processors.CLIP_STD,
}


def _count_cls_tokens(spec: ViTSpec) -> int:
  """Counts prefix tokens up to the summary's last; others are registers."""
  return max(spec.pool_tokens) + 1


class Radio(Family):
  """RADIO for images."""

  name = "radio"
  class_name = "Radio"
  image = TowerTable(
    {
      **block_size_defaults(1280, 32, 16, layer_norm_eps=1e-6),
      "image_size": _SIZE,
      "patch_size": 16,
      "hidden_act": "gelu",
      "max_img_size": 2048,
      "mlp_ratio": 4.0,
      "num_channels": 3,
      "layerscale_value": 1.0,
      "use_swiglu_ffn": False,
      "qkv_bias": True,
      "num_cls_tokens": 3,
      "num_registers": 7,
      "summary_idxs": (0, 1),
      **_NORMALIZATION,
    },
    {
      "pool": "cls",
      "cls_token": True,
      "patch_bias": False,
      "final_norm": False,
      "position_resize": "crop",
    },
    {
      "mask_token": None,
      **tables.nest(
        "blocks/",
        _BLOCK,
        {
          **dinov2.BLOCK_NAMES,
          "attention/out": "attn.proj",
          "mlp/gate": "mlp.gate_proj",
        },
      ),
    },
    gated={
      "blocks/mlp/fc1": f"{_BLOCK}mlp.up_proj",
      "blocks/mlp/fc2": f"{_BLOCK}mlp.down_proj",
    },
    keys={
      **dinov2.MLP_KEYS,
      "mlp_ratio": dataclasses.replace(
        dinov2.MLP_KEYS["mlp_ratio"],
        write=lambda spec: float(dinov2.mlp_ratio(spec)),
      ),
      "image_size": Key(read=ignore),
      "max_img_size": Key(
        "image_size", lambda section: read_sizes(section, "max_img_size")
      ),
      "layerscale_value": Key(
        "layer_scale",
        lambda c: {"layer_scale": float(c["layerscale_value"])},
        lambda spec: spec.layer_scale or 1.0,
      ),
      "num_cls_tokens": Key(
        "registers",
        lambda c: {"registers": c["num_cls_tokens"] - 1 + c["num_registers"]},
        _count_cls_tokens,
      ),
      "num_registers": Key(
        None, ignore, lambda spec: spec.prefix - _count_cls_tokens(spec)
      ),
      "summary_idxs": Key(
        "pool_tokens",
        lambda section: {"pool_tokens": tuple(section["summary_idxs"])},
        lambda spec: list(spec.pool_tokens),
      ),
      # An export's image processor normalises, so the model must not.
      "norm_mean": Key(None, ignore, lambda _: [0.0, 0.0, 0.0]),
      "norm_std": Key(None, ignore, lambda _: [1.0, 1.0, 1.0]),
    },
  )
  resampling = "crop"
  ignored = rf"^{_PREFIX}(summary_idxs|input_conditioner\..*)$"

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    if config.get("video_temporal_patch_size"):
      raise ConversionError(
        "video_temporal_patch_size is set: video models are not supported."
      )
    spec = super().read_spec(config, names)
    if any(name.endswith("layer_scale1.lambda1") for name in names):
      return spec
    return ModelSpec(image=dataclasses.replace(spec.image, layer_scale=None))

  def default_preprocess(self, spec: ModelSpec) -> dict[str, Any]:
    del spec
    return {
      "size": _SIZE,
      "interpolation": "bicubic",
      "resize": "squash",
      "mean": (0.0, 0.0, 0.0),
      "std": (1.0, 1.0, 1.0),
    }

  def read_preprocess(
    self, folder: pathlib.Path, config: Section, spec: ModelSpec
  ) -> dict[str, Any]:
    """Folds the model's own normalisation into the preprocessing."""
    fields = super().read_preprocess(folder, config, spec)
    config = hf_files.with_defaults(config, _NORMALIZATION)
    mean, std = (np.array(fields[name]) for name in ("mean", "std"))
    return {
      **fields,
      "mean": tuple((mean + std * config["norm_mean"]).tolist()),
      "std": tuple((std * config["norm_std"]).tolist()),
    }

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    del prefix  # RADIO's prefix is fixed.
    image = spec.image
    patch, width = image.patch_size, image.width
    return [
      *tables.stacked_qkv("image", image, f"{_BLOCK}attn.qkv."),
      # The file orders patch features (channel, y, x).
      tables.transpose_rule(
        "image/patch_embed/kernel",
        f"{_MODEL}patch_generator.embedder.weight",
        (3 * patch**2, width),
        (patch * patch, 3, width),
        (2, 1, 0),
        file_shape=(width, 3 * patch**2),
      ),
      _prefix_token_rule(image),
      tables.transpose_rule(
        "image/position_embedding",
        f"{_MODEL}patch_generator.pos_embed",
        (image.grid**2, width),
        (1, image.grid**2, width),
      ),
    ]

  def constants(self, spec: ModelSpec) -> list[Rule]:
    conditioner = f"{_PREFIX}input_conditioner.norm_"
    indices = np.array(spec.image.pool_tokens)
    return [
      tables.constant(f"{conditioner}mean", np.zeros((3, 1, 1))),
      tables.constant(f"{conditioner}std", np.ones((3, 1, 1))),
      tables.constant(f"{_PREFIX}summary_idxs", indices, dtype="int64"),
    ]


def _prefix_token_rule(spec: ViTSpec) -> Rule:
  """Rule for CLS tokens and registers, one tensor in the file."""
  leaves = ("image/cls_token", "image/registers")
  if not spec.registers:
    leaves = leaves[:1]
  return Rule(
    leaves,
    (f"{_MODEL}patch_generator.cls_token.token",),
    ((spec.prefix, spec.width),),
    read=lambda a: (a[0], a[1:])[: len(leaves)],
    write=lambda cls, *others: (np.concatenate([cls[None], *others]),),
  )


RADIO = Radio()
