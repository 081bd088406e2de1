"""Hugging Face DINOv2, with or without registers: read and export.

Also exports our own models that pool the CLS token (DINO, DINOv2, MAE).
"""

import dataclasses
from typing import Any

import numpy as np

from mtv_jax.convert import processors, tables
from mtv_jax.convert.family import (
  AnyOf,
  Family,
  Key,
  Section,
  Spec,
  TowerTable,
  block_size_defaults,
  ignore,
)
from mtv_jax.convert.tables import Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec


def read_mlp(section: Section) -> dict[str, Any]:
  """Reads the spec's `mlp` and `mlp_dim`."""
  dim = int(section["hidden_size"] * section["mlp_ratio"])
  if section["use_swiglu_ffn"]:
    return {"mlp": "swiglu", "mlp_dim": _compute_swiglu_dim(dim)}
  return {"mlp": "plain", "mlp_dim": dim}


def _compute_swiglu_dim(mlp_dim: int) -> int:
  """Hidden width of a SwiGLU that matches the parameters of a plain MLP.

  A SwiGLU has three kernels, an MLP two: 2/3 of `mlp_dim`, rounded up to a
  multiple of 8.
  """
  return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def mlp_ratio(spec: Spec, *, integer: bool = False) -> int | float | None:
  """The config's `mlp_ratio`, an integer if possible; None if none fits."""
  is_gated = spec.mlp == "swiglu"
  ratios = [*range(1, 65)]
  if not integer:
    ratio = spec.mlp_dim / spec.width * (1.5 if is_gated else 1.0)
    ratios += [ratio, np.nextafter(ratio, np.inf)]
  for ratio in ratios:
    dim = int(spec.width * ratio)
    if (_compute_swiglu_dim(dim) if is_gated else dim) == spec.mlp_dim:
      return ratio
  return None


def _check_ratio(spec: ViTSpec, *, integer: bool = False) -> str | None:
  if mlp_ratio(spec, integer=integer) is not None:
    return None
  return (
    f"mlp_dim is {spec.mlp_dim} but must be a multiple of the width "
    f"{spec.width}"
  )


# Keys of MLPs whose width is a ratio; `MLP_KEYS` accept fractional ratios.
MLP_KEYS = {
  "mlp_ratio": Key("mlp_dim", ignore, mlp_ratio, _check_ratio),
  "use_swiglu_ffn": Key("mlp", read_mlp, lambda spec: spec.mlp == "swiglu"),
}
_INTEGER_RATIO = Key(
  "mlp_dim",
  ignore,
  lambda spec: mlp_ratio(spec, integer=True),
  lambda spec: _check_ratio(spec, integer=True),
)


def fused_swiglu_rule(layer: str, spec: ViTSpec) -> list[Rule]:
  """Rules of a SwiGLU whose gate and value are one tensor in the file."""
  mlp = "image/blocks/mlp"
  return [
    Rule(
      (f"{mlp}/gate/{leaf}", f"{mlp}/fc1/{leaf}"),
      (f"{layer}.{name}",),
      ((2 * spec.mlp_dim, *columns),),
      read=lambda a: tuple(half.T for half in np.split(a, 2)),
      write=lambda gate, value: (np.concatenate([gate.T, value.T]),),
      depth=spec.depth,
    )
    for leaf, name, columns in (
      ("kernel", "weight", (spec.width,)),
      ("bias", "bias", ()),
    )
  ]


# DINOv3 and RADIO share these names.
BLOCK_NAMES = {
  "norm1": "norm1",
  "scale1": "layer_scale1.lambda1",
  "norm2": "norm2",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
  "scale2": "layer_scale2.lambda1",
}


class Dinov2(Family):
  """DINOv2 without registers; the base class of the family with registers."""

  name = "dinov2"
  class_name = "Dinov2"
  image = TowerTable(
    {
      **block_size_defaults(768, 12, 12, layer_norm_eps=1e-6),
      "image_size": 224,
      "patch_size": 14,
      "hidden_act": "gelu",
      "mlp_ratio": 4,
      "num_channels": 3,
      "layerscale_value": 1.0,
      "use_swiglu_ffn": False,
      "qkv_bias": True,
    },
    {
      "pool": "cls",
      "cls_token": True,
      "position_resize": AnyOf(("bicubic", "antialiased")),
    },
    {
      "patch_embed": "embeddings.patch_embeddings.projection",
      "mask_token": "embeddings.mask_token",
      "registers": "embeddings.register_tokens",
      **tables.nest(
        "blocks/",
        "encoder.layer.{i}.",
        {
          **BLOCK_NAMES,
          "attention/qkv": tuple(
            f"attention.attention.{part}" for part in ("query", "key", "value")
          ),
          "attention/out": "attention.output.dense",
        },
      ),
      "norm": "layernorm",
    },
    gated={"blocks/mlp/fc2": "encoder.layer.{i}.mlp.weights_out"},
    keys={**MLP_KEYS, "mlp_ratio": _INTEGER_RATIO},
  )
  num_unit_axes = {"image/mask_token": 1, "image/registers": 1}
  ignored = r"^classifier\."
  neutral = ("layer_scale", "mask_token")
  processor = "Bit"  # Resizes with Pillow.
  resampling = "bicubic"

  def default_preprocess(self, spec: ModelSpec) -> dict[str, Any]:
    """DINOv2's crop of 224 from 256 pixels, scaled to the image size."""
    size = spec.image.image_size
    return {
      "size": size,
      "interpolation": "bicubic",
      "resize": "shortest",
      "crop": "center",
      "resize_size": round(size * 256 / 224),
      "mean": processors.IMAGENET_MEAN,
      "std": processors.IMAGENET_STD,
    }

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    positions = tables.folded_positions(
      {"image/cls_token": f"{prefix}embeddings.cls_token"},
      f"{prefix}embeddings.position_embeddings",
      spec.image,
    )
    if spec.image.mlp != "swiglu":
      return [positions]
    layer = f"{prefix}encoder.layer.{{i}}.mlp.weights_in"
    return [positions, *fused_swiglu_rule(layer, spec.image)]


class Dinov2WithRegisters(Dinov2):
  """DINOv2 with registers and antialiased position resampling."""

  name = "dinov2_with_registers"
  class_name = "Dinov2WithRegisters"
  image = dataclasses.replace(
    Dinov2.image,
    defaults={
      "num_register_tokens": 4,
      **Dinov2.image.defaults,
      "patch_size": 16,
    },
    fields={
      **Dinov2.image.fields,
      "position_resize": AnyOf(("antialiased", "bicubic")),
    },
  )
  resampling = "antialiased"


DINOV2, DINOV2_WITH_REGISTERS = Dinov2(), Dinov2WithRegisters()
