"""Reader of timm Perception Encoders (`vit_pe_*`; absent in transformers).

timm's `config.json` names the architecture; tensor shapes give the sizes. timm
rotates pairs of neighbouring channels, columns first; we rotate the two halves
of a head, rows first. The reader permutes the channels of queries and keys,
which preserves their products.
"""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.convert import hf_files, processors, tables, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.positions import Rope
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

_NAME = re.compile(
  r"vit_pe_(core|lang|spatial)_(tiny|small|base|large|gigantic)"
  r"_patch(\d{1,3})_(\d{1,4})(?:\..*)?"
)
_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "gigantic": 16}
_POOL_HEADS = 8
_NORM_EPS = 1e-5
_NAMES = {
  "patch_embed": "patch_embed.proj",
  "pre_norm": "norm_pre",
  **tables.nest(
    "blocks/",
    "blocks.{i}.",
    {
      "norm1": "norm1",
      "attention/out": "attn.proj",
      "scale1": "gamma_1",
      "norm2": "norm2",
      "mlp/fc1": "mlp.fc1",
      "mlp/fc2": "mlp.fc2",
      "scale2": "gamma_2",
    },
  ),
  "norm": "norm",
  "pool/probe": "attn_pool.latent",
  "pool/attention/q": "attn_pool.q",
  "pool/attention/out": "attn_pool.proj",
  "pool/norm": "attn_pool.norm",
  "pool/mlp/fc1": "attn_pool.mlp.fc1",
  "pool/mlp/fc2": "attn_pool.mlp.fc2",
}
_IGNORED = r"^rope\.|^head\."


def read_model(
  folder: pathlib.Path, config: Mapping[str, Any], *, with_params: bool = True
) -> ConvertedModel:
  """Reads a timm folder, with or without its parameters."""
  path, name = folder / "config.json", config["architecture"]
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ConversionError(
      f"{path} has timm's architecture {options.shorten_repr(name)}; only "
      "Perception Encoders are supported, such as "
      "'vit_pe_core_base_patch16_224'."
    )
  with hf_files.open_weights(folder) as store:
    with foreign.errors_of(path):
      spec = read_spec(config, set(store.names), store.shape)
      preprocess = read_preprocess(config, spec)
    params = {}
    if with_params:
      params = tensors.load(param_mapping(spec), store, ignore=_IGNORED)
  return ConvertedModel(spec, params, preprocess)


def read_spec(
  config: Mapping[str, Any],
  names: Collection[str],
  shape_of: Callable[[str], tuple[int, ...]],
) -> ModelSpec:
  """Reads the spec from a timm `config.json` and tensor shapes."""
  match = _NAME.fullmatch(config["architecture"])
  kind, size, patch, side = match[1], match[2], int(match[3]), int(match[4])

  def shape(name: str, axes: int) -> tuple[int, ...]:
    if name not in names:
      raise ConversionError(f"{name!r} is missing: incomplete weights.")
    sizes = shape_of(name)
    if len(sizes) != axes:
      raise ConversionError(f"{name} is {sizes}, expected {axes} axes.")
    return sizes

  blocks = {int(m[1]) for n in names if (m := re.match(r"blocks\.(\d+)\.", n))}
  mlp_dim, width = shape("blocks.0.mlp.fc1.weight", 2)
  has_cls = "cls_token" in names
  grid = math.isqrt(shape("pos_embed", 3)[1] - has_cls)
  is_pooled = kind == "core"
  pool: dict[str, Any] = {"pool": "mean"}
  if is_pooled:
    pool = {
      "pool": "map",
      "pool_prefix": True,
      "pool_heads": _POOL_HEADS,
      "pool_mlp_dim": shape("attn_pool.mlp.fc1.weight", 2)[0],
    }
  image = ViTSpec(
    image_size=grid * patch,
    patch_size=patch,
    width=width,
    depth=max(blocks) + 1,
    heads=_HEADS[size],
    mlp_dim=mlp_dim,
    cls_token=has_cls,
    layer_scale=0.1 if "blocks.0.gamma_1" in names else None,
    pre_norm=True,
    final_norm=is_pooled,
    patch_bias=False,
    gelu="exact",
    norm_eps=_NORM_EPS,
    position_resize="antialiased",
    positions="learned_rope",
    rope=Rope(
      base=10_000.0,
      normalize="index",
      # Rescales the positions of any grid to the pretraining grid.
      reference=side // patch,
      offset=float(has_cls),
    ),
    **pool,
  )
  return ModelSpec(image=image)


def read_preprocess(
  config: Mapping[str, Any], spec: ModelSpec
) -> dict[str, Any]:
  """Fields of `Preprocess` from timm's `pretrained_cfg`."""
  fields = config.get("pretrained_cfg") or {}
  read = functools.partial(foreign.read_field, fields, where="pretrained_cfg.")
  three, half = tuple[float, float, float], processors.HALF
  return {
    "size": spec.image.image_size,
    "resize": "squash",
    "interpolation": read("interpolation", str, default="bicubic"),
    "mean": read("mean", three, default=half),
    "std": read("std", three, default=half),
  }


def _channel_order(channels: int) -> np.ndarray:
  """Maps each of our channels of a head to timm's channel."""
  quarter = channels // 4
  # In each half, our channels rotate by row angles, then by column angles.
  pairs = np.concatenate([np.arange(quarter) + quarter, np.arange(quarter)])
  return np.concatenate([2 * pairs, 2 * pairs + 1])


def param_mapping(spec: ModelSpec) -> list[Rule]:
  """Conversion rules for a Perception Encoder."""
  image = spec.image
  special = tables.stacked_projections(
    {"image/blocks/attention/qkv": 3},
    "blocks.{i}.attn.qkv.",
    image.width,
    image.heads,
    depth=image.depth,
    order=_channel_order(image.width // image.heads),
  )
  if image.cls_token:
    special.append(
      tables.folded_positions(
        "cls_token", "pos_embed", unit_axes=(2, 1), spec=spec
      )
    )
  if image.pool == "map":
    special += tables.stacked_projections(
      {"image/pool/attention/kv": 2},
      "attn_pool.kv.",
      image.width,
      image.pool_heads,
    )
  names = {
    **tables.nest("image/", "", _NAMES),
    "image/position_embedding": "pos_embed",
  }
  return tables.tower_rules(
    spec,
    names,
    *special,
    unit_axes={"image/pool/probe": 2, "image/position_embedding": 1},
  )
