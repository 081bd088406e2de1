"""Hugging Face folders: reading and export, without PyTorch.

`read` opens SigLIP (and SigLIP 2 of fixed resolution, and MTV), CLIP, DINOv2
and Depth Anything V2 folders, our exports and native folders; `write` makes a
folder that `AutoModel` and `AutoProcessor` of `transformers` open without
custom code.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mtv_jax.convert import (
  card,
  clip,
  depth_anything,
  dinov2,
  folders,
  native,
  processors,
  siglip,
  tensors,
)
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.heads import contrastive_head
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)

_HEADS = "heads.safetensors"
# By model_type.
_FAMILIES: dict[str, ModuleType] = {
  "siglip": siglip,
  "siglip_vision_model": siglip,
  "clip": clip,
  "clip_vision_model": clip,
  "dinov2": dinov2,
  "dinov2_with_registers": dinov2,
}
_NAFLEX = (
  "SigLIP 2 NaFlex (variable aspect ratio) is not supported; SigLIP 2 of fixed "
  "resolution is, such as siglip2-base-patch16-224: its model_type is 'siglip'."
)
_TEXT_ONLY = "A text tower alone does not encode images."
_UNSUPPORTED = {
  "siglip2": _NAFLEX,
  "siglip2_vision_model": _NAFLEX,
  "siglip_text_model": _TEXT_ONLY,
  "clip_text_model": _TEXT_ONLY,
}
# Every file that an export may contain.
_EXPORTED = (
  folders.WEIGHTS,
  _HEADS,
  "README.md",
  "config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "special_tokens_map.json",
  "spiece.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
)


def read(folder: str | os.PathLike) -> ConvertedModel:
  """Reads a model from a folder.

  Args:
    folder: a Hugging Face folder of model_type siglip, siglip_vision_model,
      clip, clip_vision_model, dinov2, dinov2_with_registers or
      depth_anything; an export of ours (restored with its heads and spec); or
      a native folder.

  Raises:
    ConversionError: another kind of model or weights, or tensors that are
      missing, unexpected or of another shape, each named.
  """
  path = folders.require_folder(folder)
  if (path / native.PARAMS).is_file():
    return native.read(path)
  config = folders.read_json(path / "config.json")
  if config.get("model_type") == "depth_anything":
    return depth_anything.read_model(path)
  module = _find_family(path, config)
  description = native.read_description(path)
  with folders.open_weights(path) as store:
    spec = module.read_spec(config, store.names)
    rules = module.rules(spec, prefix=_image_prefix(config, store.names))
    params = tensors.load(rules, store, ignore=module.IGNORE)
  if description:
    return _restore_export(path, description, params)
  family = module.__name__.rpartition(".")[2]
  sizes = dict(
    image_size=spec.image.image_size, patch_size=spec.image.patch_size
  )
  preprocess = processors.read_preprocess(path, family, **sizes)
  tokenizer = spec.text and processors.read_tokenizer(path, family)
  return ConvertedModel(spec, params, preprocess, tokenizer)


def _find_family(path: pathlib.Path, config: Mapping[str, Any]) -> ModuleType:
  if not config:
    present = sorted(p.name for p in path.iterdir())[:8]
    raise ConversionError(
      f"{path} has no config.json; it contains {present}. Expected: a Hugging "
      f"Face folder, or a native one with {native.PARAMS}."
    )
  kind = config.get("model_type")
  if kind is None:
    raise ConversionError(
      f"{path / 'config.json'} has no model_type; its keys are "
      f"{sorted(config)[:8]}. mtv_jax.load and `mtv-jax convert to_hf` open "
      "a training run."
    )
  if kind in _UNSUPPORTED:
    raise ConversionError(f"{path}: model_type {kind!r}. {_UNSUPPORTED[kind]}")
  if kind not in _FAMILIES:
    raise ConversionError(
      f"{path}: model_type {kind!r} is not supported. "
      f"{did_you_mean(kind, _FAMILIES)}"
    )
  return _FAMILIES[kind]


def _image_prefix(config: Mapping[str, Any], names: Sequence[str]) -> str:
  """Prefix of the image tower's tensors.

  `vision_model.` in two-tower files and, before transformers 5, in files of a
  vision tower; `dinov2.` in a classifier's.
  """
  kind = config["model_type"]
  for prefix in ("vision_model.", f"{kind}."):
    if any(name.startswith(prefix) for name in names):
      return prefix
  return "vision_model." if kind in ("siglip", "clip") else ""


def _restore_export(
  path: pathlib.Path, description: Mapping[str, Any], params: dict[str, Any]
) -> ConvertedModel:
  """An export's model with the heads' original names, and the other heads."""
  leaves = dict(flatten_with_names(params))
  contrastive = description.get("contrastive")
  for name in [n for n in leaves if n.startswith("heads/contrastive/")]:
    value, leaf = leaves.pop(name), name.rsplit("/", 1)[1]
    if contrastive and leaf in contrastive["leaves"]:
      leaves[f"heads/{contrastive['name']}/{leaf}"] = value
  if (path / _HEADS).is_file():
    with folders.TensorFiles(path / _HEADS) as store:
      leaves |= {name: store.read(name) for name in store.names}
  try:
    native.check_params(ModelSpec.from_dict(description["model"]), leaves)
  except ConversionError as error:
    raise ConversionError(
      f"{path / native.DESCRIPTION} and config.json describe different "
      f"models. {error}\nDelete {native.DESCRIPTION} to read the folder as any "
      "Hugging Face folder."
    ) from None
  return native.restore_model(path, description, leaves)


def write(folder: str | os.PathLike, model: ConvertedModel) -> pathlib.Path:
  """Writes a folder that `transformers` opens as a SigLIP or a CLIP.

  Beside their files, `heads.safetensors` has the other objectives' heads and a
  mask token under our names, and `mtv_jax.json` our spec, from which `read`
  restores the model. Without a text tower it is a `SiglipVisionModel`. Fixed
  positions become stored ones.

  Args:
    folder: new, empty, or of an earlier export, which it replaces.
    model: needs a contrastive head if it has a text tower.

  Raises:
    ConversionError: neither model can express this one; names every field of
      the nearer one.
  """
  model = model.store_positions()
  path, spec = pathlib.Path(folder), model.spec
  tokenizer = model.tokenizer and model.tokenizer.build()
  module = _find_exporter(spec)
  config = module.to_hf_config(spec, pad_id=tokenizer and tokenizer.pad_id)
  processor = processors.write_processor(
    model.preprocess,
    spec.image.image_size,
    family="clip" if module is clip else "siglip",
  )
  if spec.text is None:
    del processor["processor_class"]
  leaves = native.numpy_leaves(model.params)
  native.check_params(spec, leaves)
  leaves, others, contrastive = _split_leaves(model, leaves)
  bias = leaves.get("heads/contrastive/logit_bias", 0)
  if module is clip and bias != 0:
    raise ConversionError(
      f"transformers' CLIPModel has no bias of the similarity, which is "
      f"{float(bias):g} in this model: only the softmax loss has none."
    )
  weights = tensors.save(module.rules(spec), leaves)

  native.prepare_folder(path, _EXPORTED, tokenizer=model.tokenizer)
  folders.write_tensors(path / folders.WEIGHTS, weights)
  if others:
    folders.write_tensors(path / _HEADS, others)
  folders.write_json(path / "config.json", config)
  folders.write_json(path / "preprocessor_config.json", processor)
  files = _export_tokenizer(path, model, tokenizer)
  native.write_description(
    path,
    dataclasses.replace(model, tokenizer=files),
    contrastive=contrastive,
  )
  readme = card.write_card(spec, sorted(others))
  (path / "README.md").write_text(readme, "utf-8")
  return path


def _find_exporter(spec: ModelSpec) -> ModuleType:
  """The family of an export; ConversionError if none can express the model."""
  # A CLIPModel has two towers.
  modules = (siglip,) if spec.text is None else (siglip, clip)
  lines, module = min(
    ((module.mismatches(spec), module) for module in modules),
    key=lambda pair: len(pair[0]),
  )
  if lines:
    name = {siglip: "SiglipModel", clip: "CLIPModel"}[module]
    raise ConversionError(
      f"transformers' {name} can't express this model:\n"
      + "".join(lines)
      + "Train with these settings to export it, or keep a native folder "
      "(from_hf), which mtv_jax.load opens."
    )
  return module


def _split_leaves(
  model: ConvertedModel, leaves: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
  """Splits parameters into those of `transformers` and those only we read.

  Also returns which head became the temperature and bias, and which of its
  leaves exist.
  """
  exported, others = {}, {}
  for name, leaf in leaves.items():
    is_other = name.startswith("heads/") or name == "image/mask_token"
    (others if is_other else exported)[name] = leaf
  if model.spec.text is None:
    return exported, others, None
  try:
    head = contrastive_head(model.params.get("heads", {}))
  except ValueError as error:
    raise ConversionError(f"An export has one temperature. {error}") from None
  scale = {
    leaf: others.pop(f"heads/{head}/{leaf}")
    for leaf in ("logit_scale", "logit_bias")
    if f"heads/{head}/{leaf}" in others
  }
  contrastive = {"name": head, "leaves": sorted(scale)}
  # A softmax loss has no bias.
  scale.setdefault("logit_bias", np.zeros((), np.float32))
  exported |= {f"heads/contrastive/{k}": v for k, v in scale.items()}
  return exported, others, contrastive


def _export_tokenizer(
  path: pathlib.Path, model: ConvertedModel, tokenizer: Any | None
) -> TokenizerFiles | None:
  """Writes the tokenizer's files; returns those that `read` builds."""
  if model.spec.text is None:
    return None
  if tokenizer is None:
    log.warning("No tokenizer: AutoProcessor needs one beside the model.")
    return None
  # Imported late: reading a model needs no tokenizer library.
  from mtv_jax.data import tokenizers

  tokenizers.export_files(tokenizer, path, length=model.spec.text.length)
  if tokenizer.kind == "json":
    # The file cleans texts itself now; cleaning twice changes nothing.
    return TokenizerFiles(path / "tokenizer.json", tokenizer.clean)
  return native.copy_tokenizer(path, model.tokenizer)
