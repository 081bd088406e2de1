"""Image processors and tokenizers of Hugging Face folders."""

import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.config.options import Side
from mtv_jax.convert import hf_files
from mtv_jax.convert.tables import ConversionError

log = logging.getLogger(__name__)

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Interpolation by Pillow's enum value.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def read_preprocess(
  folder: pathlib.Path, defaults: Mapping[str, Any], *, patch_size: int
) -> dict[str, Any]:
  """Fields of `encoder.preprocess.Preprocess` from a folder's processor.

  `defaults` are the family's fields, for keys that the processor lacks.
  """
  defaults = dict(defaults)
  path, processor = hf_files.read_processor(folder)
  if not processor:
    log.info("%s has no image processor; assuming %s.", folder, defaults)
    return defaults
  with foreign.errors_of(path):
    fields = _read_resize(processor, defaults)
    fields |= _read_normalization(processor, defaults)
    return fit_patches(fields | _read_rounding(processor), patch_size)


def fit_patches(fields: Mapping[str, Any], patch_size: int) -> dict[str, Any]:
  """Sets `drop` to the number of pixels that don't fill a patch.

  A convolution drops them at the bottom and on the right (SigLIP So400m/14 at
  384: 378).
  """
  drop = fields["size"] % patch_size
  if drop == fields["size"]:
    raise ConversionError(
      f"images of {fields['size']} pixels are smaller than a patch of "
      f"{patch_size}."
    )
  size = {"size": fields["size"] - drop}
  return {**fields, **size, **({"drop": drop} if drop else {})}


def _read_resize(
  processor: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  fields = dict(defaults)
  resample = processor.get("resample")
  if resample is not None and resample not in _RESAMPLE:
    raise ConversionError(
      f"resample={resample!r}; expected 2 (bilinear) or 3 (bicubic)."
    )
  if resample is not None:
    fields["interpolation"] = _RESAMPLE[resample]
  if fields["resize"] == "native":
    fields["max_patches"] = processor.get(
      "max_num_patches", fields["max_patches"]
    )
    return fields
  if not processor.get("do_resize", True):
    log.info("do_resize=False: images are resized to the model's size.")
    fields |= {"resize": "squash", "crop": "none"}
    fields.pop("resize_size", None)
    return fields
  if "size" in processor:
    fields |= _read_size(processor["size"], defaults["resize"])
  if processor.get("do_center_crop", defaults.get("crop") == "center"):
    resize_size = fields.get("resize_size") or fields["size"]
    crop = _read_edge(processor.get("crop_size", fields["size"]), "crop_size")
    fields |= {"crop": "center", "size": crop, "resize_size": resize_size}
  else:
    fields["crop"] = "none"
  if fields.get("resize_size") == fields["size"]:
    del fields["resize_size"]
  if fields.get("resize_size", fields["size"]) < fields["size"]:
    raise ConversionError(
      f"crop_size={fields['size']} is larger than size={fields['resize_size']}."
    )
  if fields["resize"] == "shortest" and fields["crop"] == "none":
    raise ConversionError(
      "it resizes the shorter side without a crop, so images have different "
      "shapes; only square inputs are supported."
    )
  return fields


def _read_rounding(processor: Mapping[str, Any]) -> dict[str, str]:
  """Reads `rounding` from the processor's class; Pillow's by default."""
  kind = processor.get("image_processor_type", "")
  if kind.startswith("DINOv3ViT"):
    return {"rounding": "none"}  # Scales to 0..1 first.
  is_torchvision = kind.endswith("Fast") or kind.startswith("Tipsv2")
  return {"rounding": "torchvision"} if is_torchvision else {}


def _read_normalization(
  processor: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  mean = processor.get("image_mean") or defaults["mean"]
  std = processor.get("image_std") or defaults["std"]
  if not processor.get("do_normalize", True):
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  factor = processor.get("rescale_factor", 1 / 255)
  if not processor.get("do_rescale", True):
    factor = 1.0
  # We always divide by 255; fold any other factor into mean and std.
  ratio = factor * 255
  if abs(ratio - 1) < 1e-6:
    ratio = 1.0
  return {
    "mean": tuple(m / ratio for m in mean),
    "std": tuple(s / ratio for s in std),
  }


def _read_size(size: Any, resize: str) -> dict[str, Any]:
  """Reads `size`; a number, as in old versions, implies the family's resize."""
  if isinstance(size, Mapping) and "shortest_edge" in size:
    if size.get("longest_edge"):
      raise ConversionError(f"size={dict(size)}: longest_edge is unsupported.")
    edge = foreign.read_field(size, "shortest_edge", Side, where="size.")
    mode = "shortest"
  else:
    edge = _read_edge(size, "size")
    mode = "squash" if isinstance(size, Mapping) else resize
  return {"resize": mode, "size": edge, "resize_size": edge}


def _read_edge(value: Any, field: str) -> int:
  if isinstance(value, Mapping):
    if "height" not in value or "width" not in value:
      raise ConversionError(f"{field}={dict(value)} lacks height or width.")
    value = [value["height"], value["width"]]
  return hf_files.read_side(value, field)


def resize(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
  """Changes the input size; scales the size before a crop in proportion."""
  fields = dict(fields)
  if size != fields["size"]:
    fields.pop("drop", None)
  if fields.get("resize_size"):
    fields["resize_size"] = round(fields["resize_size"] * size / fields["size"])
  return {**fields, "size": size}


def warn_of_pixels(fields: Mapping[str, Any], library: str) -> None:
  """Warns if a library with torchvision's transforms computes other pixels."""
  crop, rounding = fields.get("crop"), fields.get("crop_rounding")
  if crop == "center" and rounding != "nearest":
    log.warning(
      "%s may place the crop one pixel lower or further right.", library
    )
  _warn_of_resizing(fields, library, ("pillow",))


def _warn_of_resizing(
  fields: Mapping[str, Any], name: str, roundings: Collection[str]
) -> None:
  is_supported = fields.get("rounding", "pillow") in roundings
  if not is_supported or not fields.get("antialias", True):
    log.warning(
      "%s antialiases or rounds differently from this model's preprocessing "
      "when it resizes an image: its pixels will differ slightly.",
      name,
    )


def write_processor(
  fields: Mapping[str, Any],
  image_size: int,
  name: str,
  class_names: Mapping[str, str],
) -> dict[str, Any]:
  """Builds an export's `preprocessor_config.json` from `Preprocess` fields.

  `name` is the processor's class without 'ImageProcessor': 'Siglip' (CLIP's
  instead if images are cropped), 'Siglip2', or a class that can crop.
  `class_names` are a family's, by `rounding`.
  """
  is_cropped = fields.get("crop") == "center"
  base = "CLIP" if is_cropped and name == "Siglip" else name
  is_native = name == "Siglip2"
  _check_processor(fields, image_size, base)
  rounding = fields.get("rounding", "pillow")
  kind = class_names.get(rounding, base) + "ImageProcessor"
  if rounding == "torchvision" and rounding not in class_names:
    kind += "Fast"
  _warn_of_resizing(fields, kind, ("pillow", "torchvision", *class_names))
  if is_cropped and fields.get("crop_rounding") == "nearest":
    log.warning("%s may place the crop one pixel higher or further left.", kind)
  image_size += fields.get("drop", 0)
  square = {"height": image_size, "width": image_size}
  resizing: dict[str, Any] = {"size": square}
  if is_cropped:
    edge = fields.get("resize_size") or image_size
    is_squashed = fields.get("resize") == "squash"
    resizing = {
      "size": {"height": edge, "width": edge}
      if is_squashed
      else {"shortest_edge": edge}
    }
  if is_native:
    names = {"patch_size": "patch_size", "max_num_patches": "max_patches"}
    resizing = {key: fields[field] for key, field in names.items()}
  elif base != "Siglip":
    resizing |= {"do_center_crop": is_cropped, "crop_size": square}
  interpolation = fields.get("interpolation", "bilinear")
  return {
    "image_processor_type": kind,
    "processor_class": f"{name}Processor",
    "do_convert_rgb": True,
    "do_resize": True,
    **resizing,
    "resample": {name: n for n, name in _RESAMPLE.items()}[interpolation],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(fields.get("mean", HALF)),
    "image_std": list(fields.get("std", HALF)),
  }


def _check_processor(
  fields: Mapping[str, Any], image_size: int, base: str
) -> None:
  """Raises ConversionError for fields that a processor's class can't have."""
  is_native = base == "Siglip2"
  is_cropped = fields.get("crop") == "center"
  squash = ("squash", "shortest") if is_cropped else ("squash",)
  expected = {"resize": squash, "size": (image_size,)}
  if is_native:
    expected = {"resize": ("native",)}
  for field, allowed in expected.items():
    value = fields.get(field, None if is_native else allowed[0])
    if value not in allowed:
      fix = "Export with the images squashed to a square."
      if field == "size":
        fix = "Resize the position embedding (--image_size)."
      elif is_native:
        fix = "Export with images of native aspect ratio."
      raise ConversionError(
        f"preprocess.{field} is {value!r}; transformers' {base}ImageProcessor "
        f"needs {allowed[0]!r}. {fix}"
      )
