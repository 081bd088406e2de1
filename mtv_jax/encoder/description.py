"""A folder's model without its parameters, and as sections of a config.

Recipes read it, before JAX may use its devices: nothing here makes an array.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.convert import huggingface
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import VARIANTS, ModelSpec

_MAX_SCALE = 100.0  # CLIP's.


@dataclasses.dataclass(frozen=True)
class Description:
  """What a folder says of its model.

  Attributes:
    spec: architecture of the towers.
    preprocess: of the encoder's images.
    tokenizer: None if there is none.
    contrast: options of the objective `contrastive`, {} for a model without:
      its loss and, of a softmax loss, the highest scale. That is a run's own,
      and of other folders 100, or their scale where that is greater.
    weights: which weights of a run `mtv_jax.load` takes; "student" of other
      folders, which have one set.
  """

  spec: ModelSpec
  preprocess: Preprocess
  tokenizer: TokenizerFiles | None
  contrast: Mapping[str, Any]
  weights: str

  def model_config(self) -> dict[str, Any]:
    """The section `model` of a config whose run has this model.

    Also its pixel statistics, its preprocessing and its tokenizer.
    """
    image = dataclasses.asdict(self.spec.image)
    for name, shape in VARIANTS.items():
      if all(image[key] == value for key, value in shape.items()):
        image["variant"] = f"{name}/{self.spec.image.patch_size}"
    if image["rope"] is None:
      del image["rope"]
    preprocess = self.preprocess.to_dict()
    image |= {f"image_{key}": preprocess.pop(key) for key in ("mean", "std")}
    text = None
    if self.spec.text is not None:
      text = dataclasses.asdict(self.spec.text)
      if self.tokenizer is not None:
        files = self.tokenizer
        text["tokenizer"] = str(files.path or files.built_in)
        text["clean"] = files.clean
      else:
        text["tokenizer"] = ""  # Training asks for one.
    return {**image, "preprocess": preprocess, "text": text}


def describe(path: str | os.PathLike) -> Description:
  """Reads the description of a run, an export or a Hugging Face folder.

  Raises:
    MissingFileError: the path is none of these.
    InputError: a file in it can't be used.
  """
  folder = loading.open_folder(path)
  if loading.is_run(folder):
    config, model = loading.read_run_config(folder)
    contrast = _contrast_of_objectives(config)
    weights = loading.default_weights(folder)
  else:
    model, weights = huggingface.read(folder, with_params=False), "student"
    contrast = _contrast_of_export(folder, model.spec)
  with foreign.errors_of(path):
    preprocess = Preprocess.from_dict(model.preprocess)
  return Description(model.spec, preprocess, model.tokenizer, contrast, weights)


def _contrast_of_objectives(config: Mapping[str, Any]) -> dict[str, Any]:
  for name, entry in (config.get("objectives") or {}).items():
    if entry.get("type", name) == "contrastive":
      options = {"loss_type": entry.get("loss_type", "sigmoid")}
      if (max_scale := entry.get("max_scale")) is not None:
        options["max_scale"] = max_scale
      return options
  return {}


def _contrast_of_export(
  folder: pathlib.PurePath, spec: ModelSpec
) -> dict[str, Any]:
  if spec.text is None:
    return {}
  if (contrast := huggingface.read_contrastive(folder)) is None:
    return {}
  loss_type, scale = contrast
  options: dict[str, Any] = {"loss_type": loss_type}
  if loss_type == "softmax":
    options["max_scale"] = max(_MAX_SCALE, scale)
  return options
