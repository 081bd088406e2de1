"""Image processors and tokenizer files of Hugging Face folders."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from mtv_jax.convert import folders
from mtv_jax.convert.tables import ConversionError

log = logging.getLogger(__name__)

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Pillow's numbers. SigLIP is distributed with bicubic, SigLIP 2 with bilinear.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def defaults(family: str, image_size: int) -> dict[str, Any]:
  """Fields of `Preprocess` for a family ('siglip', 'clip', 'dinov2')."""
  fields = {"size": image_size, "interpolation": "bicubic"}
  if family == "siglip":
    return {**fields, "resize": "squash", "mean": _HALF, "std": _HALF}
  fields |= {"resize": "shortest", "crop": "center"}
  if family == "clip":
    return {**fields, "mean": _CLIP_MEAN, "std": _CLIP_STD}
  # DINOv2 crops 224 from 256, whatever its position embedding's size.
  resize = round(image_size * 256 / 224)
  normal = {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}
  return {**fields, "resize_size": resize, **normal}


def read_preprocess(
  folder: pathlib.Path, family: str, *, image_size: int, patch_size: int
) -> dict[str, Any]:
  """Fields of `encoder.preprocess.Preprocess` from a folder's processor.

  Args:
    folder: of the checkpoint.
    family: whose defaults stand in where the folder has no processor.
    image_size: of the model.
    patch_size: of the model.

  Raises:
    ConversionError: the processor does something that `Preprocess` does not.
  """
  # From transformers 5 on, one file holds the processors of all modalities.
  path = folder / "processor_config.json"
  found = folders.read_json(path).get("image_processor")
  if not found:
    path = folder / "preprocessor_config.json"
    found = folders.read_json(path)
  if not found:
    fields = defaults(family, image_size)
    log.info("%s has no image processor; assuming %s.", folder, fields)
    return fields
  try:
    fields = _fields(found, defaults(family, image_size), family)
  except ConversionError as error:
    raise ConversionError(f"{path}: {error}") from None
  return _whole_patches(fields, patch_size)


def _fields(
  found: Mapping[str, Any], base: Mapping[str, Any], family: str
) -> dict[str, Any]:
  fields = dict(base)
  resample = found.get("resample", 3)
  if resample not in _RESAMPLE:
    raise ConversionError(
      f"resample={resample!r}; bilinear (2) and bicubic (3) are supported."
    )
  fields["interpolation"] = _RESAMPLE[resample]
  if found.get("do_resize", True):
    if "size" in found:
      fields |= _resize(found["size"], family)
    if found.get("do_center_crop", family != "siglip"):
      fields["crop"] = "center"
      resized = fields.get("resize_size") or fields["size"]
      crop = _edge(found.get("crop_size", fields["size"]), "crop_size")
      fields |= {"size": crop, "resize_size": resized}
    else:
      fields["crop"] = "none"
  else:
    log.info("do_resize=False: images are resized to the model's size.")
    fields |= {"size": base["size"], "resize": "squash", "crop": "none"}
    fields.pop("resize_size", None)
  if fields.get("resize_size") == fields["size"]:
    del fields["resize_size"]
  if fields["resize"] == "shortest" and fields["crop"] == "none":
    raise ConversionError(
      "it resizes the shorter side and crops nothing, so images have "
      "different shapes; only square inputs are supported."
    )
  return fields | _normalisation(found, base)


def _normalisation(
  found: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
  mean = found.get("image_mean") or base["mean"]
  std = found.get("image_std") or base["std"]
  if not found.get("do_normalize", True):
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  factor = found.get("rescale_factor", 1 / 255)
  if not found.get("do_rescale", True):
    factor = 1.0
  # Ours divides by 255 always; another factor goes into mean and std.
  ratio = factor * 255
  if abs(ratio - 1) < 1e-6:
    ratio = 1.0
  return {
    "mean": tuple(m / ratio for m in mean),
    "std": tuple(s / ratio for s in std),
  }


def _edge(value: Any, field: str) -> int:
  if isinstance(value, Mapping):
    if "height" not in value or "width" not in value:
      raise ConversionError(
        f"{field}={dict(value)}; height and width are expected."
      )
    value = [value["height"], value["width"]]
  return folders.read_side(value, field)


def _resize(size: Any, family: str) -> dict[str, Any]:
  """`size`, which earlier versions wrote as a number."""
  if isinstance(size, Mapping) and "shortest_edge" in size:
    if size.get("longest_edge"):
      raise ConversionError(
        f"size={dict(size)}: a limit on the longer side is not supported."
      )
    edge = int(size["shortest_edge"])
    return {"resize": "shortest", "size": edge, "resize_size": edge}
  edge = _edge(size, "size")
  squash = isinstance(size, Mapping) or family == "siglip"
  how = "squash" if squash else "shortest"
  return {"resize": how, "size": edge, "resize_size": edge}


def _whole_patches(fields: dict[str, Any], patch: int) -> dict[str, Any]:
  """Makes the size a multiple of the patch.

  Theirs pass any size and leave the rest at the right and the bottom unseen
  (SigLIP So400m/14 at 384: 378 are read). Shrinking to 378 instead keeps the
  whole picture on the grid.
  """
  size = fields["size"] // patch * patch
  if size == fields["size"]:
    return fields
  if not size:
    raise ConversionError(
      f"images of {fields['size']} pixels are smaller than a patch of {patch}."
    )
  log.info(
    "Images of %d pixels don't divide into patches of %d; they are resized "
    "to %d.",
    fields["size"],
    patch,
    size,
  )
  return resized(fields, size)


def resized(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
  """The same processing for another input size, the crop in proportion."""
  fields = dict(fields)
  if fields.get("resize_size"):
    fields["resize_size"] = round(fields["resize_size"] * size / fields["size"])
  return {**fields, "size": size}


def written(fields: Mapping[str, Any], image_size: int) -> dict[str, Any]:
  """`preprocessor_config.json` of a SigLIP.

  Args:
    fields: of `Preprocess`.
    image_size: of the model.

  Raises:
    ConversionError: SigLIP's processor does nothing of the kind.
  """
  for field, want in (
    ("resize", "squash"),
    ("crop", "none"),
    ("size", image_size),
  ):
    got = fields.get(field, want)
    if got != want:
      raise ConversionError(
        f"preprocess.{field} is {got!r}; transformers' SigLIP processor and "
        f"model need {want!r}. "
        + (
          "Resize the position embedding to the size of the images "
          "(--image_size)."
          if field == "size"
          else "Export with the images squashed to a square."
        )
      )
  if not fields.get("antialias", True):
    log.warning(
      "transformers always antialiases when it shrinks an image; this model's "
      "own processing does not, so its pixels will differ a little."
    )
  interpolation = fields.get("interpolation", "bilinear")
  number = {name: n for n, name in _RESAMPLE.items()}[interpolation]
  return {
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": image_size, "width": image_size},
    "resample": number,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(fields.get("mean", _HALF)),
    "image_std": list(fields.get("std", _HALF)),
  }


# ---------------------------------------------------------------------------
# Tokenizers.


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """Where a tokenizer is, and how text is cleaned before it.

  Attributes:
    path: of the SentencePiece or `tokenizer.json` file; None for bytes.
    clean: 'none', 'lower' or 'canonicalize', see `data.tokenizers`.
  """

  path: pathlib.Path | None
  clean: str = "none"

  @classmethod
  def of(cls, tokenizer: Any) -> "TokenizerFiles | None":
    """Those of a `data.tokenizers` tokenizer (or of None)."""
    if tokenizer is None or isinstance(tokenizer, cls):
      return tokenizer
    path = None if tokenizer.path is None else pathlib.Path(tokenizer.path)
    return cls(path=path, clean=tokenizer.clean)

  def build(self) -> Any:
    """The tokenizer."""
    from mtv_jax.data import tokenizers

    spec = "bytes" if self.path is None else str(self.path)
    return tokenizers.build_tokenizer(spec, clean=self.clean)


def read_tokenizer(folder: pathlib.Path, family: str) -> TokenizerFiles | None:
  """The tokenizer of a Hugging Face folder, None if it has none."""
  config = folders.read_json(folder / "tokenizer_config.json")
  piece, fast = folder / "spiece.model", folder / "tokenizer.json"
  if family == "siglip" and piece.is_file():
    # SiglipTokenizer drops punctuation before anything else, and lowers.
    if not config.get("do_lower_case", True):
      log.warning("do_lower_case=False is not supported; text is lowered.")
    return TokenizerFiles(piece, "canonicalize")
  if fast.is_file():
    # SigLIP 2 was trained on lower-cased text, and its Gemma tokenizer doesn't
    # see to that in every version of the file; lowering twice is harmless.
    return TokenizerFiles(fast, "lower" if family == "siglip" else "none")
  if family == "clip" and (folder / "merges.txt").is_file():
    log.warning(
      "%s has vocab.json and merges.txt only: save its tokenizer once with "
      "transformers to get a tokenizer.json; text can't be encoded without.",
      folder,
    )
  return None
