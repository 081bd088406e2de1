"""Reader of Hugging Face's DINOv2, with or without registers."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_DEFAULTS = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "mlp_ratio": 4,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "image_size": 224,
  "patch_size": 16,
  "qkv_bias": True,
  "layerscale_value": 1.0,
  "use_swiglu_ffn": False,
}
_NAMES = {
  "patch_embed": "embeddings.patch_embeddings.projection",
  "mask_token": "embeddings.mask_token",
  "registers": "embeddings.register_tokens",
  **tables.nest(
    "blocks/",
    "encoder.layer.{i}.",
    {
      "norm1": "norm1",
      "attention/qkv": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
      ),
      "attention/out": "attention.output.dense",
      "scale1": "layer_scale1.lambda1",
      "norm2": "norm2",
      "mlp/fc1": "mlp.fc1",
      "mlp/fc2": "mlp.fc2",
      "scale2": "layer_scale2.lambda1",
    },
  ),
  "norm": "layernorm",
}
IGNORE = r"^classifier\."


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """Model spec from a `config.json` of type dinov2(_with_registers)."""
  config = folders.with_defaults(config, _DEFAULTS)
  if not config["qkv_bias"]:
    raise ConversionError(
      "qkv_bias=False is not supported: our attention always has biases."
    )
  mlp, mlp_dim = "plain", int(config["hidden_size"] * config["mlp_ratio"])
  if config["use_swiglu_ffn"]:
    # Two thirds of the hidden units, rounded up to a multiple of eight, so
    # that three kernels have the parameters of two.
    mlp, mlp_dim = "swiglu", (int(mlp_dim * 2 / 3) + 7) // 8 * 8
  registers, position_resize = 0, "bicubic"
  if config["model_type"] == "dinov2_with_registers":
    registers = config.get("num_register_tokens", 4)
    position_resize = "antialiased"
  image = ViTSpec(
    mlp=mlp,
    pool="cls",
    cls_token=True,
    registers=registers,
    layer_scale=float(config["layerscale_value"]),
    mask_token=any(n.endswith("embeddings.mask_token") for n in names),
    position_resize=position_resize,
    **folders.read_vision({**config, "intermediate_size": mlp_dim}),
  )
  return ModelSpec(image=image)


def rules(spec: ModelSpec, *, prefix: str = "") -> list[Rule]:
  """Conversion rules for DINOv2; `prefix`: a classifier's or a detector's."""
  special = [
    tables.folded_positions(
      f"{prefix}embeddings.cls_token",
      f"{prefix}embeddings.position_embeddings",
      unit_axes=(2, 1),
      spec=spec,
    )
  ]
  names = dict(tables.nest("image/", prefix, _NAMES))
  if spec.image.mlp == "swiglu":
    mlp = f"{prefix}encoder.layer.{{i}}.mlp"
    special += _swiglu_input(f"{mlp}.weights_in", spec.image)
    names["image/blocks/mlp/fc2"] = f"{mlp}.weights_out"
  return tables.tower_rules(
    spec,
    names,
    *special,
    unit_axes={"image/mask_token": 1, "image/registers": 1},
  )


def _swiglu_input(layer: str, spec: ViTSpec) -> list[Rule]:
  """Gate and value of a SwiGLU, one tensor in the file."""
  mlp = "image/blocks/mlp"
  return [
    Rule(
      (f"{mlp}/gate/{leaf}", f"{mlp}/fc1/{leaf}"),
      (f"{layer}.{name}",),
      ((2 * spec.mlp_dim, *columns),),
      read=lambda a: tuple(half.T for half in np.split(a, 2)),
      depth=spec.depth,
    )
    for leaf, name, columns in (
      ("kernel", "weight", (spec.width,)),
      ("bias", "bias", ()),
    )
  ]
