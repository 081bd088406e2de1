"""Image processors and tokenizer files of Hugging Face folders."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from mtv_jax.convert import folders
from mtv_jax.convert.tables import ConversionError

log = logging.getLogger(__name__)

_DEFAULT_MEAN_STD = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Pillow's numbers.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def _default_preprocess(family: str, image_size: int) -> dict[str, Any]:
  """Fields of `Preprocess` for a family ('siglip', 'clip', 'dinov2')."""
  fields = {"size": image_size, "interpolation": "bicubic"}
  if family == "siglip":
    return {
      **fields,
      "resize": "squash",
      "mean": _DEFAULT_MEAN_STD,
      "std": _DEFAULT_MEAN_STD,
    }
  fields |= {"resize": "shortest", "crop": "center"}
  if family == "clip":
    return {**fields, "mean": CLIP_MEAN, "std": CLIP_STD}
  # DINOv2 crops 224 from 256, whatever its position embedding's size.
  resize = round(image_size * 256 / 224)
  normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
  return {**fields, "resize_size": resize, **normal}


def read_preprocess(
  folder: pathlib.Path, family: str, *, image_size: int, patch_size: int
) -> dict[str, Any]:
  """Fields of `encoder.preprocess.Preprocess` from a folder's processor.

  Args:
    folder: the checkpoint's folder.
    family: whose defaults apply if the folder has no processor.
    image_size: the model's image size.
    patch_size: the model's patch size.

  Raises:
    ConversionError: the processor does something that `Preprocess` does not.
  """
  defaults = _default_preprocess(family, image_size)
  path, processor = folders.read_processor(folder)
  if not processor:
    log.info("%s has no image processor; assuming %s.", folder, defaults)
    return defaults
  try:
    fields = _read_resize(processor, defaults, family)
  except ConversionError as error:
    raise ConversionError(f"{path}: {error}") from None
  fields |= _read_normalization(processor, defaults)
  # transformers ignores pixels that fill no patch, at the right and the bottom
  # (SigLIP So400m/14 at 384: 378 are read). We shrink the whole image instead.
  size = fields["size"] // patch_size * patch_size
  if not size:
    raise ConversionError(
      f"images of {fields['size']} pixels are smaller than a patch of "
      f"{patch_size}."
    )
  if size != fields["size"]:
    log.info(
      "Images of %d pixels don't divide into patches of %d; they are resized "
      "to %d.",
      fields["size"],
      patch_size,
      size,
    )
  return resize(fields, size)


def _read_resize(
  processor: Mapping[str, Any], defaults: Mapping[str, Any], family: str
) -> dict[str, Any]:
  fields = dict(defaults)
  resample = processor.get("resample", 3)
  if resample not in _RESAMPLE:
    raise ConversionError(
      f"resample={resample!r}; bilinear (2) and bicubic (3) are supported."
    )
  fields["interpolation"] = _RESAMPLE[resample]
  if not processor.get("do_resize", True):
    log.info("do_resize=False: images are resized to the model's size.")
    fields |= {"resize": "squash", "crop": "none"}
    fields.pop("resize_size", None)
    return fields
  if "size" in processor:
    fields |= _read_size(processor["size"], family)
  if processor.get("do_center_crop", family != "siglip"):
    resized = fields.get("resize_size") or fields["size"]
    crop = _read_edge(processor.get("crop_size", fields["size"]), "crop_size")
    fields |= {"crop": "center", "size": crop, "resize_size": resized}
  else:
    fields["crop"] = "none"
  if fields.get("resize_size") == fields["size"]:
    del fields["resize_size"]
  if fields["resize"] == "shortest" and fields["crop"] == "none":
    raise ConversionError(
      "it resizes the shorter side without a crop, so images have different "
      "shapes; only square inputs are supported."
    )
  return fields


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
  # Ours always divides by 255; another factor goes into mean and std.
  ratio = factor * 255
  if abs(ratio - 1) < 1e-6:
    ratio = 1.0
  return {
    "mean": tuple(m / ratio for m in mean),
    "std": tuple(s / ratio for s in std),
  }


def _read_size(size: Any, family: str) -> dict[str, Any]:
  """`size`, a number in earlier versions."""
  if isinstance(size, Mapping) and "shortest_edge" in size:
    if size.get("longest_edge"):
      raise ConversionError(
        f"size={dict(size)}: a limit on the longer side is not supported."
      )
    edge, mode = int(size["shortest_edge"]), "shortest"
  else:
    edge = _read_edge(size, "size")
    is_square = isinstance(size, Mapping) or family == "siglip"
    mode = "squash" if is_square else "shortest"
  return {"resize": mode, "size": edge, "resize_size": edge}


def _read_edge(value: Any, field: str) -> int:
  if isinstance(value, Mapping):
    if "height" not in value or "width" not in value:
      raise ConversionError(
        f"{field}={dict(value)}; height and width are expected."
      )
    value = [value["height"], value["width"]]
  return folders.read_side(value, field)


def resize(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
  """The preprocessing at another input size, the crop in proportion."""
  fields = dict(fields)
  if fields.get("resize_size"):
    fields["resize_size"] = round(fields["resize_size"] * size / fields["size"])
  return {**fields, "size": size}


def write_processor(
  fields: Mapping[str, Any], image_size: int, *, family: str = "siglip"
) -> dict[str, Any]:
  """`preprocessor_config.json` of a SigLIP or a CLIP.

  Args:
    fields: values of `Preprocess`'s fields.
    image_size: the model's image size.
    family: `siglip`, or `clip`, which can crop.

  Raises:
    ConversionError: the family's processor can't express it.
  """
  is_cropped = family == "clip" and fields.get("crop") == "center"
  squash = "Export with the images squashed to a square."
  name = {"siglip": "SigLIP", "clip": "CLIP"}[family]
  for field, expected, fix in (
    ("resize", "shortest" if is_cropped else "squash", squash),
    ("crop", "center" if is_cropped else "none", squash),
    ("size", image_size, "Resize the position embedding (--image_size)."),
  ):
    value = fields.get(field, expected)
    if value != expected:
      raise ConversionError(
        f"preprocess.{field} is {value!r}; transformers' {name} needs "
        f"{expected!r}. {fix}"
      )
  if not fields.get("antialias", True):
    log.warning(
      "transformers antialiases when it shrinks an image, and this model's "
      "preprocessing does not: its pixels will differ a little."
    )
  interpolation = fields.get("interpolation", "bilinear")
  square = {"height": image_size, "width": image_size}
  size, crop = square, {}
  if family == "clip":
    crop = {"do_center_crop": is_cropped, "crop_size": square}
  if is_cropped:
    size = {"shortest_edge": fields.get("resize_size") or image_size}
  name = {"siglip": "Siglip", "clip": "CLIP"}[family]
  return {
    "image_processor_type": f"{name}ImageProcessor",
    "processor_class": f"{name}Processor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": size,
    **crop,
    "resample": {name: n for n, name in _RESAMPLE.items()}[interpolation],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(fields.get("mean", _DEFAULT_MEAN_STD)),
    "image_std": list(fields.get("std", _DEFAULT_MEAN_STD)),
  }


# Tokenizers that need no file: keys of `data.tokenizers.BUILT_IN`.
BUILT_IN_TOKENIZERS = ("bytes", "words")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer's file and the cleaning of its texts.

  Attributes:
    path: the SentencePiece or `tokenizer.json` file; None for a built-in one.
    clean: 'none', 'lower' or 'canonicalize', see `data.tokenizers`.
    built_in: the tokenizer without a file, where `path` is None.
  """

  path: pathlib.Path | None
  clean: str = "none"
  built_in: str = "bytes"

  def build(self) -> Any:
    """The tokenizer."""
    # Imported late: reading a model needs no tokenizer library.
    from mtv_jax.data import tokenizers

    spec = self.built_in if self.path is None else str(self.path)
    return tokenizers.build_tokenizer(spec, clean=self.clean)


def read_tokenizer(folder: pathlib.Path, family: str) -> TokenizerFiles | None:
  """The tokenizer of a Hugging Face folder, None if it has none."""
  config = folders.read_json(folder / "tokenizer_config.json")
  spiece_path, json_path = folder / "spiece.model", folder / "tokenizer.json"
  if clean := config.get("clean"):
    # An export of ours without its mtv_jax.json.
    is_spiece = spiece_path.is_file()
    return TokenizerFiles(spiece_path if is_spiece else json_path, clean)
  if family == "siglip" and spiece_path.is_file():
    # SiglipTokenizer removes punctuation first, then lower-cases.
    if not config.get("do_lower_case", True):
      log.warning("do_lower_case=False is ignored; text is lower-cased.")
    return TokenizerFiles(spiece_path, "canonicalize")
  if json_path.is_file():
    # SigLIP 2 was trained on lower-cased text; not every version of its
    # tokenizer.json lower-cases.
    return TokenizerFiles(json_path, "lower" if family == "siglip" else "none")
  if family == "clip" and (folder / "merges.txt").is_file():
    log.warning(
      "%s lacks a tokenizer.json, so text can't be encoded: save its tokenizer "
      "once with transformers.",
      folder,
    )
  return None
