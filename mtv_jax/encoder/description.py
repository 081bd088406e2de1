"""A folder's model without its parameters, and as sections of a config.

Recipes read it, before JAX may use its devices: nothing here makes an array.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Literal

from ml_collections import ConfigDict

from mtv_jax.config import foreign
from mtv_jax.convert import huggingface
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import VARIANTS, ModelSpec

LossType = Literal["sigmoid", "softmax"]


@dataclasses.dataclass(frozen=True)
class Description:
  """What a folder says of its model.

  Attributes:
    spec: architecture of the towers.
    preprocess: of the encoder's images.
    tokenizer: None if there is none.
    loss_type: of its image-text contrast; None for a model without.
    weights: which weights of a run `mtv_jax.load` takes; "student" of other
      folders, which have one set.
  """

  spec: ModelSpec
  preprocess: Preprocess
  tokenizer: TokenizerFiles | None
  loss_type: LossType | None
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
    loss_type = _of_objectives(config)
    weights = loading.default_weights(folder)
  else:
    model, weights = huggingface.read(folder, with_params=False), "student"
    loss_type = _of_export(folder, model.spec)
  with foreign.errors_of(path):
    preprocess = Preprocess.from_dict(model.preprocess)
  return Description(
    model.spec, preprocess, model.tokenizer, loss_type, weights
  )


def _of_objectives(config: ConfigDict) -> LossType | None:
  for name, entry in (config.get("objectives") or {}).items():
    if entry.get("type", name) == "contrastive":
      return entry.get("loss_type", "sigmoid")
  return None


def _of_export(folder: pathlib.PurePath, spec: ModelSpec) -> LossType | None:
  if spec.text is None:
    return None
  if (described := huggingface.read_contrastive(folder)) is not None:
    return "sigmoid" if "logit_bias" in described.leaves else "softmax"
  # CLIP's texts are causal, and its loss has no bias.
  return "softmax" if spec.text.causal else "sigmoid"
