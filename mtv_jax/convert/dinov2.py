"""Reader of Hugging Face's DINOv2, with or without registers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import clip, folders, tables
from mtv_jax.convert.tables import TORCH, ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

DEFAULTS = {
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
NAMES = tables.BlockNames(
  norm1="norm1",
  q="attention.attention.query",
  k="attention.attention.key",
  v="attention.attention.value",
  out="attention.output.dense",
  norm2="norm2",
  mlp="mlp",
  scale1="layer_scale1.lambda1",
  scale2="layer_scale2.lambda1",
)
IGNORE = r"^classifier\."


def spec(config: Mapping[str, Any], names: Iterable[str]) -> ModelSpec:
  """The model that a `config.json` of type dinov2(_with_registers) says."""
  config = folders.with_defaults(config, DEFAULTS)
  if not config["qkv_bias"]:
    raise ConversionError(
      "qkv_bias=False is not supported: our attention always has biases."
    )
  mlp, mlp_dim = "plain", int(config["hidden_size"] * config["mlp_ratio"])
  if config["use_swiglu_ffn"]:
    # Two thirds of the hidden units, rounded up to a multiple of eight, so
    # that three kernels weigh what two did.
    mlp, mlp_dim = "swiglu", (int(mlp_dim * 2 / 3) + 7) // 8 * 8
  registers, position_resize = 0, "bicubic"
  if config["model_type"] == "dinov2_with_registers":
    registers = config.get("num_register_tokens", 4)
    position_resize = "antialiased"
  image = ViTSpec(
    **folders.read_sizes(config),
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    mlp_dim=mlp_dim,
    mlp=mlp,
    pool="cls",
    cls_token=True,
    registers=registers,
    layer_scale=float(config["layerscale_value"]),
    gelu=folders.read_activation(config),
    norm_eps=float(config["layer_norm_eps"]),
    mask_token=any(n.endswith("embeddings.mask_token") for n in names),
    position_resize=position_resize,
  )
  return ModelSpec(image=image, text=None)


def swiglu(
  layout: tables.Layout, ours: str, theirs: str, width: int, mlp_dim: int
) -> list[Rule]:
  """A SwiGLU, whose gate and value lie in one tensor of the file, in order."""
  rules = []
  for leaf, name, tail in (
    ("kernel", "weight", (width,)),
    ("bias", "bias", ()),
  ):
    rules.append(
      Rule(
        (f"{ours}/gate/{leaf}", f"{ours}/fc1/{leaf}"),
        (f"{theirs}.weights_in.{name}",),
        ((2 * mlp_dim, *tail),),
        to_ours=lambda a: tuple(half.T for half in np.split(a, 2)),
      )
    )
  out = f"{theirs}.weights_out"
  return [*rules, *tables.dense(layout, f"{ours}/fc2", out, mlp_dim, width)]


def rules(spec: ModelSpec, *, prefix: str = "") -> list[Rule]:
  """The table of a DINOv2; a classifier's file has a `prefix`."""
  image = spec.image

  def at(name):
    return TORCH.join(prefix, name)

  width, grid = image.width, image.image_size // image.patch_size
  found = [
    tables.convolution(
      "image/patch_embed/kernel",
      at("embeddings.patch_embeddings.projection.weight"),
      image.patch_size,
      width,
    ),
    tables.vector(
      "image/patch_embed/bias",
      at("embeddings.patch_embeddings.projection.bias"),
      width,
    ),
    clip.folded_positions(
      at("embeddings.cls_token"),
      at("embeddings.position_embeddings"),
      grid=grid,
      width=width,
      stored=((1, 1, width), (1, grid**2 + 1, width)),
    ),
    *tables.blocks(
      TORCH,
      "image/blocks",
      at("encoder.layer.{i}"),
      NAMES,
      width=width,
      heads=image.heads,
      mlp_dim=image.mlp_dim,
      depth=image.depth,
      mlp_rules=swiglu if image.mlp == "swiglu" else tables.mlp,
    ),
    *tables.norm(TORCH, "image/norm", at("layernorm"), width),
  ]
  if image.mask_token:
    found.append(
      tables.reshaped(
        "image/mask_token", at("embeddings.mask_token"), (width,), (1, width)
      )
    )
  if image.registers:
    shape = (image.registers, width)
    found.append(
      tables.reshaped(
        "image/registers", at("embeddings.register_tokens"), shape, (1, *shape)
      )
    )
  return found
