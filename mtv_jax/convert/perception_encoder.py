"""Exports Perception Encoders, which transformers lacks, to timm.

timm opens an export as `local-dir:FOLDER`; transformers omits its projection.
`timm.py` reads them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import dinov2, processors, timm
from mtv_jax.convert.family import Family
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

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


class _WrittenFile:
  """The tensors that tell `timm.param_mapping` a file's layout."""

  path = "a new file"

  def __init__(self, image: ViTSpec):
    rows = image.grid**2 + image.prefix
    self._shapes = {"pos_embed": (1, rows, image.width)}
    for name in ("blocks.0.gamma_1", "blocks.0.gamma_2"):
      self._shapes[name] = (image.width,)
    if image.cls_token:
      self._shapes["cls_token"] = (1, 1, image.width)

  @property
  def names(self) -> list[str]:
    return [*self._shapes]

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    return np.zeros(self._shapes[name], np.float32)


def _make_spec(kind: str, name: str, spec: ViTSpec) -> ViTSpec:
  """Builds a timm architecture's spec, with the fields `_FREE` of `spec`."""
  is_pooled = kind == "core"
  pool = dict(pool="map", pool_prefix=True, pool_heads=timm.PE_POOL_HEADS)
  return ViTSpec(
    patch_size=spec.patch_size,
    heads=spec.heads,
    pre_norm=True,
    final_norm=is_pooled,
    patch_bias=False,
    gelu="exact",
    norm_eps=1e-5,
    position_resize="antialiased",
    positions="learned_rope",
    rope=timm.pe_rope(name, spec.patch_size, spec.cls_token),
    **(pool if is_pooled else {"pool": "mean"}),
    **{field: getattr(spec, field) for field in _FREE},
  )


class PerceptionEncoder(Family):
  """Exporter of timm folders."""

  name = "perception_encoder"

  def full_class_name(self, spec: ModelSpec) -> str:
    return self._find_closest(spec.image)[1]

  def can_export(self, spec: ModelSpec) -> bool:
    is_rotary = spec.image.positions == "learned_rope"
    return spec.text is None and is_rotary and spec.image.pre_norm

  def _find_closest(self, spec: ViTSpec) -> tuple[list[str], str]:
    """Returns the unsupported fields and name of the closest architecture."""
    candidates = []
    sizes = {"heads": spec.heads, "patch_size": spec.patch_size}
    for kind, names in _ARCHITECTURES.items():
      for name in (f"vit_pe_{kind}_{n}" for n in names):
        _, heads = timm.read_name({"architecture": name})
        if heads != spec.heads or f"_patch{spec.patch_size}_" not in name:
          continue
        expected = dataclasses.asdict(_make_spec(kind, name, spec))
        lines = [
          f"  image.{field} is {value!r} but must be {expected[field]!r}\n"
          for field, value in dataclasses.asdict(spec).items()
          if value != expected[field]
        ]
        candidates.append((lines, name))
    fallback = ([f"  timm has no Perception Encoder of {sizes}\n"], "timm")
    return min(candidates or [fallback], key=lambda pair: len(pair[0]))

  def unsupported_fields(self, spec: ModelSpec) -> list[str]:
    return self._find_closest(spec.image)[0]

  def param_mapping(
    self, spec: ModelSpec, prefix: str | None = None
  ) -> list[Rule]:
    del prefix
    image = dataclasses.replace(spec.image, mask_token=False)  # None in timm.
    return timm.param_mapping(ModelSpec(image=image), _WrittenFile(image))

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
    if image.pool == "map":  # timm's default is the architecture's ratio.
      mlp_dim = image.pool_mlp_dim or image.mlp_dim
      pool = dataclasses.replace(image, mlp_dim=mlp_dim)
      args["attn_pool_mlp_ratio"] = dinov2.mlp_ratio(pool)
    return {
      "architecture": self.full_class_name(spec),
      "num_classes": image.projection or 0,
      "num_features": image.width,
      "model_args": args,
    }

  def write_files(
    self, spec: ModelSpec, config: Any, fields: Mapping[str, Any], size: int
  ) -> dict[str, Any]:
    """The config, with the inverse of `timm.read_preprocess`."""
    size, resize = fields["size"], fields.get("resize", "squash")
    if resize == "native" or fields.get("drop"):
      raise ConversionError(
        "timm encodes squares of whole patches: export with images squashed to "
        "the model's size (preprocess.resize='squash')."
      )
    processors.warn_of_pixels(fields, "timm")
    resized = fields.get("resize_size") or size
    crop_pct = size / resized
    if math.floor(size / crop_pct) != resized:
      crop_pct = float(np.nextafter(crop_pct, 0))
    pretrained = {
      "input_size": [3, size, size],
      "interpolation": fields.get("interpolation", "bilinear"),
      "crop_pct": crop_pct,
      "crop_mode": "squash" if resize == "squash" else "center",
      "mean": list(fields.get("mean", processors.HALF)),
      "std": list(fields.get("std", processors.HALF)),
    }
    return {"config.json": {**config, "pretrained_cfg": pretrained}}


PERCEPTION_ENCODER = PerceptionEncoder()
