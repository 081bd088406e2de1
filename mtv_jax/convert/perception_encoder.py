"""timm Perception Encoders (`vit_pe_*`; absent in transformers): read, export.

timm's `config.json` names the architecture; tensor shapes give the sizes. timm
rotates pairs of neighbouring channels, columns first; we rotate the two halves
of a head, rows first. The reader permutes the channels of queries and keys,
which preserves their products. timm opens an export as `local-dir:FOLDER`,
transformers without its projection.
"""

import dataclasses
import functools
import logging
import math
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.config.options import Range
from mtv_jax.convert import dinov2, hf_files, processors, tables, tensors
from mtv_jax.convert.family import Family
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.layers import Side
from mtv_jax.models.positions import Rope
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

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
  "projection": "head",
  # Absent in timm; used only in training.
  "mask_token": None,
  "pool/probe": "attn_pool.latent",
  "pool/attention/q": "attn_pool.q",
  "pool/attention/out": "attn_pool.proj",
  "pool/norm": "attn_pool.norm",
  "pool/mlp/fc1": "attn_pool.mlp.fc1",
  "pool/mlp/fc2": "attn_pool.mlp.fc2",
}
_IGNORED = r"^rope\.|^head\."
# timm's names after `vit_pe_`, by kind.
_ARCHITECTURES = {
  "core": ("tiny_patch16_384", "small_patch16_384", "base_patch16_224",
           "large_patch14_336", "gigantic_patch14_448"),
  "lang": ("large_patch14_448", "gigantic_patch14_448"),
  "spatial": ("tiny_patch16_512", "small_patch16_512", "base_patch16_512",
              "large_patch14_448"),
}  # fmt: skip
# Fields that the name does not determine.
_FREE = ("image_size", "width", "depth", "mlp_dim", "cls_token", "layer_scale")
_FREE += ("pool_mlp_dim", "projection", "mask_token")
_CROP_PCT = 0.875  # timm's default.


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
      names = set(store.names)
      # PE-Core's projection has no bias; a classifier does.
      has_head = "head.bias" in names and not store.read("head.bias").any()
      spec = read_spec(config, names, store.shape, has_head=has_head)
      preprocess = read_preprocess(config, spec)
    params = {}
    if with_params:
      params = tensors.load(param_mapping(spec), store, ignore=_IGNORED)
  return ConvertedModel(spec, params, preprocess)


def read_spec(
  config: Mapping[str, Any],
  names: Collection[str],
  shape_of: Callable[[str], tuple[int, ...]],
  *,
  has_head: bool = False,
) -> ModelSpec:
  """Reads the spec from a timm `config.json` and tensor shapes.

  `has_head`: whether the file's head is a projection.
  """

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
  pool = "attn_pool.mlp.fc1.weight"
  match = _NAME.fullmatch(config["architecture"])
  image = _make_spec(
    config["architecture"],
    image_size=grid * int(match[3]),
    width=width,
    depth=max(blocks) + 1,
    mlp_dim=mlp_dim,
    cls_token=has_cls,
    layer_scale=0.1 if "blocks.0.gamma_1" in names else None,
    pool_mlp_dim=shape(pool, 2)[0] if match[1] == "core" else None,
    projection=shape("head.weight", 2)[0] if has_head else None,
  )
  return ModelSpec(image=image)


def _make_spec(architecture: str, **fields: Any) -> ViTSpec:
  """The spec of a timm architecture; `fields` are those of `_FREE`."""
  match = _NAME.fullmatch(architecture)
  kind, size, patch, side = match[1], match[2], int(match[3]), int(match[4])
  is_pooled = kind == "core"
  pool = dict(pool="map", pool_prefix=True, pool_heads=_POOL_HEADS)
  return ViTSpec(
    patch_size=patch,
    heads=_HEADS[size],
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
      offset=float(fields["cls_token"]),
    ),
    **(pool if is_pooled else {"pool": "mean"}),
    **fields,
  )


def read_preprocess(
  config: Mapping[str, Any], spec: ModelSpec
) -> dict[str, Any]:
  """Fields of `Preprocess` from timm's `pretrained_cfg`.

  timm resizes to `1 / crop_pct` of the size and crops. Without the section, the
  publisher's: squashed, bilinear.
  """
  size, half = spec.image.image_size, processors.HALF
  if not (fields := config.get("pretrained_cfg")):
    return {"size": size, "resize": "squash", "mean": half, "std": half}
  read = functools.partial(foreign.read_field, fields, where="pretrained_cfg.")
  three, sides = tuple[float, float, float], tuple[Side, Side, Side]
  size = read("input_size", sides, default=(3, size, size))[-1]
  mode = read("crop_mode", Literal["center", "squash"], default="center")
  crop_pct = Annotated[float, Range(min=0.1, max=1)]
  resized = math.floor(size / read("crop_pct", crop_pct, default=_CROP_PCT))
  is_cropped = mode == "center" or resized != size
  cropped = {"crop": "center", "crop_rounding": "nearest"}
  return processors.fit_patches(
    {
      "size": size,
      "resize": "squash" if mode == "squash" else "shortest",
      **(cropped if is_cropped else {}),
      **({"resize_size": resized} if resized != size else {}),
      "interpolation": read("interpolation", str, default="bicubic"),
      "mean": read("mean", three, default=processors.IMAGENET_MEAN),
      "std": read("std", three, default=processors.IMAGENET_STD),
    },
    spec.image.patch_size,
  )


class PerceptionEncoder(Family):
  """Exporter of timm folders."""

  name = "perception_encoder"
  processor = ""  # In the config.

  def full_class_name(self, spec: ModelSpec) -> str:
    return self._closest(spec.image)[1]

  def can_export(self, spec: ModelSpec) -> bool:
    return spec.text is None and spec.image.positions == "learned_rope"

  def _closest(self, spec: ViTSpec) -> tuple[list[str], str]:
    """The lines of `unsupported_fields` and the closest architecture."""
    closest = []
    sizes = {"heads": spec.heads, "patch_size": spec.patch_size}
    free = {field: getattr(spec, field) for field in _FREE}
    for kind, names in _ARCHITECTURES.items():
      for name in (f"vit_pe_{kind}_{n}" for n in names):
        match = _NAME.fullmatch(name)
        if [_HEADS[match[2]], int(match[3])] != [*sizes.values()]:
          continue
        want = dataclasses.asdict(_make_spec(name, **free))
        lines = [
          f"  image.{field} is {value!r} and would have to be {want[field]!r}\n"
          for field, value in dataclasses.asdict(spec).items()
          if value != want[field]
        ]
        closest.append((lines, name))
    unknown = ([f"  timm has no Perception Encoder of {sizes}\n"], "")
    return min(closest or [unknown], key=lambda pair: len(pair[0]))

  def unsupported_fields(self, spec: ModelSpec) -> list[str]:
    return self._closest(spec.image)[0]

  def param_mapping(
    self, spec: ModelSpec, prefix: str | None = None
  ) -> list[Rule]:
    del prefix
    return param_mapping(spec)

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    del pad_id
    image = spec.image
    args = {
      "img_size": image.image_size,
      "embed_dim": image.width,
      "depth": image.depth,
      "mlp_ratio": dinov2.mlp_ratio(image),
      "class_token": image.cls_token,
      "init_values": image.layer_scale,
    }
    if image.pool_mlp_dim:
      pool = dataclasses.replace(image, mlp_dim=image.pool_mlp_dim)
      args["attn_pool_mlp_ratio"] = dinov2.mlp_ratio(pool)
    return {
      "architecture": self.full_class_name(spec),
      "num_classes": image.projection or 0,
      "num_features": image.width,
      "model_args": args,
    }

  def preprocess_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
    """timm's `pretrained_cfg`, the inverse of `read_preprocess`."""
    size, resize = fields["size"], fields.get("resize", "squash")
    is_cropped = fields.get("crop", "none") == "center"
    if resize == "native" or fields.get("drop"):
      raise ConversionError(
        "timm encodes squares of whole patches: export with images squashed to "
        "the model's size (preprocess.resize='squash')."
      )
    if is_cropped and fields.get("crop_rounding") != "nearest":
      log.warning("timm may place the crop one pixel lower or further right.")
    resized = fields.get("resize_size") or size
    crop_pct = size / resized
    if math.floor(size / crop_pct) != resized:
      crop_pct = float(np.nextafter(crop_pct, 0))
    return {
      "pretrained_cfg": {
        "input_size": [3, size, size],
        "interpolation": fields.get("interpolation", "bilinear"),
        "crop_pct": crop_pct,
        "crop_mode": "squash" if resize == "squash" else "center",
        "mean": list(fields.get("mean", processors.HALF)),
        "std": list(fields.get("std", processors.HALF)),
      }
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
  if image.projection:
    special.append(tables.constant("head.bias", np.zeros(image.projection)))
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


PERCEPTION_ENCODER = PerceptionEncoder()
