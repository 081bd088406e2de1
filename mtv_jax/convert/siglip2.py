"""Hugging Face's SigLIP 2 NaFlex (native aspect ratio): read and export.

Its towers are SigLIP's. Images keep their aspect ratio, and position embeddings
are resampled to the grid of each; patches are embedded by a linear layer.
SigLIP 2 of fixed resolution is `siglip`.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from mtv_jax.convert import folders, siglip, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.two_tower import ModelSpec

_RESIZE = "bilinear_antialiased"
_NUM_PATCHES = 256
_PATCH_SIZE = 16
IGNORE = siglip.IGNORE
NEUTRAL = ()
LOSS = siglip.LOSS
PROCESSOR = "Siglip2"


def _with_image_size(section: Any, where: str) -> dict[str, Any]:
  """A vision section with the `image_size` of its square of patches."""
  defaults = {"num_patches": _NUM_PATCHES, "patch_size": _PATCH_SIZE}
  section = folders.with_defaults(section, defaults, where)
  side = math.isqrt(section["num_patches"])
  if side**2 != section["num_patches"]:
    raise ConversionError(
      f"num_patches={section['num_patches']} is not a square of patches."
    )
  patch = folders.read_side(section["patch_size"], "patch_size")
  return {**section, "image_size": side * patch}


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> ModelSpec:
  """The model that a `config.json` of type siglip2(_vision_model) describes."""
  if config["model_type"] == "siglip2_vision_model":
    config = _with_image_size(config, "")
    config["model_type"] = "siglip_vision_model"
  else:
    section = _with_image_size(config.get("vision_config"), "vision_config")
    config = {**config, "model_type": "siglip", "vision_config": section}
  return siglip.read_spec(config, names, position_resize=_RESIZE)


def default_preprocess(spec: ModelSpec) -> dict[str, Any]:
  """Fields of `Preprocess` without a processor: of native aspect ratio."""
  return {
    **siglip.default_preprocess(spec),
    "interpolation": "bilinear",
    "resize": "native",
    "patch_size": spec.image.patch_size,
    "max_patches": spec.image.grid**2,
  }


def rules(spec: ModelSpec, *, prefix: str = "vision_model.") -> list[Rule]:
  """Conversion rules for SigLIP 2 NaFlex; `prefix` is the vision tower's."""
  shape = (3 * spec.image.patch_size**2, spec.image.width)
  embedding = tables.transpose_rule(
    "image/patch_embed/kernel",
    f"{prefix}embeddings.patch_embedding.weight",
    shape,
    shape,
    (1, 0),
  )
  return siglip.rules(spec, embedding, prefix=prefix)


def to_hf_config(
  spec: ModelSpec, *, pad_id: int | None = None
) -> dict[str, Any]:
  """The `config.json` of a model; arguments as of `siglip.to_hf_config`."""
  config = siglip.to_hf_config(spec, pad_id=pad_id)

  def rename(section: dict[str, Any]) -> dict[str, Any]:
    kind = section["model_type"].replace("siglip", "siglip2")
    section = {**section, "model_type": kind}
    if section.pop("image_size", None):
      section["num_patches"] = spec.image.grid**2
    return section

  config = rename(config)
  for name in ("vision_config", "text_config"):
    if name in config:
      config[name] = rename(config[name])
  classes = [c.replace("Siglip", "Siglip2") for c in config["architectures"]]
  return {**config, "architectures": classes}


def mismatches(spec: ModelSpec) -> list[str]:
  """What `Siglip2Model` can't express, a line for each field."""
  resize = spec.image.position_resize
  if resize == _RESIZE:
    return siglip.mismatches(spec)
  return [
    f"  image.position_resize is {resize!r} and would have to be {_RESIZE!r}\n",
    *siglip.mismatches(spec),
  ]
