"""Reader of Hugging Face's OWLv2 folders."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from mtv_jax.convert import checks, clip, folders, tables
from mtv_jax.convert.tables import TORCH, ConversionError, Rule
from mtv_jax.data import tokenizers
from mtv_jax.experts.owlv2 import clip_tokenizer
from mtv_jax.models.two_tower import ModelSpec

# Where OWLv2's defaults are not those of CLIP.
_VISION = {"image_size": 768, "patch_size": 16}
_TEXT = {"max_position_embeddings": 16}
IGNORE = r"position_ids$|^box_bias$"
# CLIP's, which preprocessor_config.json may replace.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENIZER_FILES = (
  "tokenizer.json",
  clip_tokenizer.VOCABULARY,
  clip_tokenizer.MERGES,
)


@runtime_checkable
class Encodes(Protocol):
  """Texts to rows of ids."""

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]: ...


@dataclasses.dataclass(frozen=True)
class Owlv2Files:
  """What a folder holds.

  Attributes:
    spec: of the towers; its image tower has the folder's image size.
    params: of `Owlv2`, NumPy float32.
    mean, std: of pixels from 0 to 1, by channel.
    tokenizer: of its texts.
    tokenizer_hash: of the files that it is made from.
  """

  spec: ModelSpec
  params: dict[str, Any]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  tokenizer: Encodes
  tokenizer_hash: str


def read(folder: str | os.PathLike) -> Owlv2Files:
  """Reads a folder that `Owlv2ForObjectDetection.save_pretrained` wrote.

  With the files of its processor: `processor_config.json` or
  `preprocessor_config.json` (optional) and
  the tokenizer's, `tokenizer.json` or `vocab.json` and `merges.txt`.

  Raises:
    FileNotFoundError: no such folder, or no tokenizer in it.
    ConversionError: another kind of model, or tensors that are missing,
      unexpected or of another shape, each named.
  """
  path = folders.require_folder(folder)
  config = folders.read_json(path / "config.json")
  if config.get("model_type") != "owlv2":
    raise ConversionError(
      f"{path}: model_type is {config.get('model_type')!r} in config.json, "
      "and 'owlv2' is expected: a folder such as that of "
      "google/owlv2-base-patch16-ensemble."
    )
  spec = read_spec(config)
  with folders.open_weights(path) as store:
    table = rules(spec)
    what = str(path / folders.WEIGHTS)
    checks.check(table, store, what=what, ignore=IGNORE)
    params = tables.load(table, store)
  # CLIP's temperature is of whole images.
  del params["heads"]
  # From transformers 5 on, one file holds the processors of all modalities.
  pixels = folders.read_json(path / "processor_config.json").get(
    "image_processor"
  ) or folders.read_json(path / "preprocessor_config.json")
  tokenizer = read_tokenizer(path)
  digest = hashlib.blake2b(digest_size=8)
  for name in _TOKENIZER_FILES:
    if (path / name).is_file():
      digest.update((path / name).read_bytes())
  return Owlv2Files(
    spec=spec,
    params=params,
    mean=tuple(pixels.get("image_mean") or _MEAN),
    std=tuple(pixels.get("image_std") or _STD),
    tokenizer=tokenizer,
    tokenizer_hash=digest.hexdigest(),
  )


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
  """The towers that a `config.json` describes.

  Raises:
    ConversionError: embeddings of phrases and patches can't be compared.
  """
  text = folders.with_defaults(config.get("text_config"), _TEXT)
  text.setdefault("hidden_size", clip.TEXT_DEFAULTS["hidden_size"])
  width = config.get("projection_dim") or 512
  if width != text["hidden_size"]:
    raise ConversionError(
      f"projection_dim={width}, and the text tower's hidden_size is "
      f"{text['hidden_size']}: OWLv2 compares its patches with phrases in as "
      "many channels as the text tower has."
    )
  # The end of a text is its highest id, whatever eos_token_id says: that is
  # what 2 stands for.
  text["eos_token_id"] = 2
  towers = {
    "model_type": "clip",
    "vision_config": folders.with_defaults(
      config.get("vision_config"), _VISION
    ),
    "text_config": text,
    "projection_dim": width,
  }
  return clip.spec(towers, ("text_model.", "visual_projection.weight"))


def rules(spec: ModelSpec) -> list[Rule]:
  """The table of names."""
  image, text = spec.image, spec.text

  def norm(ours, theirs):
    return tables.norm(TORCH, ours, theirs, image.width)

  def dense(ours, theirs, n_out):
    return tables.dense(TORCH, ours, theirs, image.width, n_out)

  found = [
    *_inside("owlv2", clip.rules(spec)),
    *norm("merge_norm", "layer_norm"),
    *dense("classes/projection", "class_head.dense0", text.projection),
    *dense("classes/shift", "class_head.logit_shift", 1),
    *dense("classes/scale", "class_head.logit_scale", 1),
  ]
  for ours, theirs, n_out in (
    ("boxes", "box_head", 4),
    ("objectness", "objectness_head", 1),
  ):
    found += dense(f"{ours}/mlp/fc1", f"{theirs}.dense0", image.width)
    found += dense(f"{ours}/mlp/fc2", f"{theirs}.dense1", image.width)
    found += dense(f"{ours}/last", f"{theirs}.dense2", n_out)
  return found


def _inside(name: str, found: Sequence[Rule]) -> list[Rule]:
  """A CLIP's rules where it is a part of another model, under this name."""

  def renamed(part: str) -> str:
    # CLIP's own files have it misspelt.
    return TORCH.join(name, part.replace("pre_layrnorm", "pre_layernorm"))

  return [
    dataclasses.replace(rule, theirs=tuple(map(renamed, rule.theirs)))
    for rule in found
  ]


def read_tokenizer(folder: pathlib.Path) -> Encodes:
  """The tokenizer of a folder, in either kind of files.

  Raises:
    FileNotFoundError: there is none.
  """
  if (folder / "tokenizer.json").is_file():
    return tokenizers.build_tokenizer(folder / "tokenizer.json", clean="none")
  return clip_tokenizer.ClipTokenizer(folder)
