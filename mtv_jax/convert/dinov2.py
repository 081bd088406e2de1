"""Hugging Face's DINOv2, with or without registers: read and export.

Our own models that pool the CLS token (DINO, DINOv2, MAE) are exported as
DINOv2.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders, processors, tables
from mtv_jax.convert.tables import Rule
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
NEUTRAL = ("layer_scale", "mask_token")
# Of exports; its pixels are Pillow's.
PROCESSOR = "Bit"
# What `Dinov2Model` and `Dinov2WithRegistersModel` can express.
_REQUIRED = {
  "pool": "cls",
  "cls_token": True,
  "registers": folders.ANY,
  "layer_scale": folders.ANY,
  "mlp": folders.ANY,
}


def read_spec(
  config: Mapping[str, Any], names: Collection[str], *, section: str = ""
) -> ModelSpec:
  """Model spec from a `config.json` of type dinov2(_with_registers)."""
  config = folders.with_defaults(config, _DEFAULTS, section)
  folders.require(config, {"qkv_bias": True})
  mlp, mlp_dim = read_mlp(config)
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


def read_mlp(config: Mapping[str, Any]) -> tuple[str, int]:
  """`ViTSpec.mlp` and `mlp_dim` of a complete config."""
  mlp_dim = int(config["hidden_size"] * config["mlp_ratio"])
  if config["use_swiglu_ffn"]:
    return "swiglu", _swiglu_dim(mlp_dim)
  return "plain", mlp_dim


def _swiglu_dim(mlp_dim: int) -> int:
  """Hidden units of a SwiGLU with the parameters of an MLP of `mlp_dim`.

  Two thirds, rounded up to a multiple of eight: it has three kernels, not two.
  """
  return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: 224 of 256 pixels."""
  size = spec.image.image_size
  return {
    "size": size,
    "interpolation": "bicubic",
    "resize": "shortest",
    "crop": "center",
    # Whatever the position embedding's size.
    "resize_size": round(size * 256 / 224),
    "mean": processors.IMAGENET_MEAN,
    "std": processors.IMAGENET_STD,
  }


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
    special += swiglu_input(f"{mlp}.weights_in", spec.image)
    names["image/blocks/mlp/fc2"] = f"{mlp}.weights_out"
  return tables.tower_rules(
    spec,
    names,
    *special,
    unit_axes={"image/mask_token": 1, "image/registers": 1},
  )


def swiglu_input(layer: str, spec: ViTSpec) -> list[Rule]:
  """Gate and value of a SwiGLU, one tensor in the file."""
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


def mlp_ratio(spec: ViTSpec, *, integer: bool = True) -> int | float | None:
  """The config's `mlp_ratio`, maybe an integer; None if there is none."""
  is_gated = spec.mlp == "swiglu"
  ratios = [*range(1, 65)]
  if not integer:
    ratio = spec.mlp_dim / spec.width * (1.5 if is_gated else 1.0)
    ratios += [ratio, np.nextafter(ratio, np.inf)]
  for ratio in ratios:
    dim = int(spec.width * ratio)
    if (_swiglu_dim(dim) if is_gated else dim) == spec.mlp_dim:
      return ratio
  return None


def mlp_mismatches(spec: ViTSpec, *, integer: bool = True) -> list[str]:
  """A line if no `mlp_ratio` gives the width of the MLP."""
  if mlp_ratio(spec, integer=integer) is not None:
    return []
  return [
    f"  image.mlp_dim is {spec.mlp_dim} and would have to be a multiple of the "
    f"width {spec.width}\n"
  ]


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model without `mismatches`."""
  del pad_id  # There is no text.
  image = spec.image
  config = folders.tower_config(image)
  del config["intermediate_size"], config["attention_dropout"]
  with_registers = {
    "architectures": ["Dinov2WithRegistersModel"],
    "model_type": "dinov2_with_registers",
    "num_register_tokens": image.registers,
  }
  return {
    "dtype": "float32",
    "torch_dtype": "float32",
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    **(with_registers if image.registers else {}),
    **config,
    "mlp_ratio": mlp_ratio(image),
    "num_channels": 3,
    "layerscale_value": image.layer_scale,
    "use_swiglu_ffn": image.mlp == "swiglu",
    "qkv_bias": True,
  }


def mismatches(spec: ModelSpec) -> list[str]:
  """What `Dinov2Model` can't express, a line for each field."""
  lines = folders.list_mismatches(spec, {"image": _REQUIRED})
  resize = spec.image.position_resize
  if resize not in ("bicubic", "antialiased"):
    lines.append(
      f"  image.position_resize is {resize!r} and would have to be 'bicubic' or"
      " 'antialiased'\n"
    )
  return lines + mlp_mismatches(spec.image)
