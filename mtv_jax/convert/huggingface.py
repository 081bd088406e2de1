"""Hugging Face folders: reading and export, without PyTorch.

`read` opens the families of docs/conversion.md, our exports and native folders;
`write` makes a folder that `AutoModel` and `AutoProcessor` of `transformers`
open without custom code.
"""

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.convert import (
  aimv2,
  card,
  clip,
  depth_anything,
  dinov2,
  dinov3,
  folders,
  native,
  perception_encoder,
  processors,
  radio,
  siglip,
  siglip2,
  tensors,
  tipsv2,
  tipsv2_dpt,
)
from mtv_jax.convert.model import ConvertedModel, LossType
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models import two_tower
from mtv_jax.models.heads import contrastive_head
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)

_HEADS = "heads.safetensors"
# By model_type.
_FAMILIES: dict[str, ModuleType] = {
  "siglip": siglip,
  "siglip_vision_model": siglip,
  "siglip2": siglip2,
  "siglip2_vision_model": siglip2,
  "clip": clip,
  "clip_vision_model": clip,
  "dinov2": dinov2,
  "dinov2_with_registers": dinov2,
  "dinov3_vit": dinov3,
  "aimv2": aimv2,
  "aimv2_vision_model": aimv2,
  "radio": radio,
  "tipsv2": tipsv2,
  "tipsv2_vision_model": tipsv2,
}
# Families that `write` exports to, and the classes: of towers with text, and of
# an image tower alone, the first one for which the model needs fewest changes.
_TEXT_EXPORTERS = {
  siglip2: "Siglip2Model",
  siglip: "SiglipModel",
  clip: "CLIPModel",
  aimv2: "Aimv2Model",
  tipsv2: "Tipsv2Model",
}
_IMAGE_EXPORTERS = {
  siglip2: "Siglip2VisionModel",
  siglip: "SiglipVisionModel",
  dinov2: "Dinov2Model",
  dinov3: "DINOv3ViTModel",
  aimv2: "Aimv2VisionModel",
  radio: "RadioModel",
  tipsv2: "Tipsv2VisionModel",
}
_TEXT_ONLY = "A text tower alone does not encode images."
_UNSUPPORTED = {
  "siglip_text_model": _TEXT_ONLY,
  "siglip2_text_model": _TEXT_ONLY,
  "aimv2_text_model": _TEXT_ONLY,
  "tipsv2_text_model": _TEXT_ONLY,
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


def read(
  folder: str | os.PathLike, *, with_params: bool = True
) -> ConvertedModel:
  """Reads a model from a folder.

  Args:
    folder: a Hugging Face folder of a model_type of docs/conversion.md; an
      export of ours (restored with its heads and spec); or a native folder.
    with_params: False leaves the parameters out, and does not read them.

  Raises:
    ConversionError: another kind of model or weights, or tensors that are
      missing, unexpected or of another shape, each named.
  """
  path = folders.require_folder(folder)
  if not with_params and (described := native.read_description(path)):
    return native.describe_model(path, described)
  if (path / native.PARAMS).is_file():
    return native.read(path)
  config = foreign.read_object(path / "config.json")
  if config.get("model_type") == "depth_anything":
    return depth_anything.read_model(path, with_params=with_params)
  if config.get("model_type") == "tipsv2_dpt":
    return tipsv2_dpt.read_model(path, with_params=with_params)
  if "model_type" not in config and "architecture" in config:
    return _read_timm(path, config, with_params=with_params)
  module = _find_family(path, config)
  description = native.read_description(path)
  with folders.open_weights(path) as store:
    with foreign.errors_of(path / "config.json"):
      spec = module.read_spec(config, store.names)
    params = {}
    if with_params:
      rules = module.rules(spec, prefix=_image_prefix(config, store.names))
      params = tensors.load(rules, store, ignore=module.IGNORE)
  if description:
    return _restore_export(path, description, params)
  preprocess = processors.read_preprocess(
    path, module.default_preprocess(spec), patch_size=spec.image.patch_size
  )
  if module is radio:
    preprocess = radio.adapt_preprocess(config, preprocess)
  family = module.__name__.rpartition(".")[2]
  tokenizer = spec.text and processors.read_tokenizer(path, family)
  return ConvertedModel(spec, params, preprocess, tokenizer)


def _read_timm(
  path: pathlib.Path, config: Mapping[str, Any], *, with_params: bool
) -> ConvertedModel:
  """A folder of timm."""
  module, name = perception_encoder, config["architecture"]
  if not module.is_architecture(name):
    raise ConversionError(
      f"{path / 'config.json'} has timm's architecture "
      f"{options.shorten_repr(name)}; only Perception Encoders are supported, "
      f"such as {module.EXAMPLE!r}."
    )
  with folders.open_weights(path) as store:
    with foreign.errors_of(path / "config.json"):
      spec = module.read_spec(config, set(store.names), store.shape)
      preprocess = module.read_preprocess(config, spec)
    params = {}
    if with_params:
      params = tensors.load(module.rules(spec), store, ignore=module.IGNORE)
  return ConvertedModel(spec, params, preprocess)


def read_contrastive(
  folder: str | os.PathLike,
) -> tuple[LossType, float] | None:
  """The loss of a folder's image-text contrast, and its scale.

  Of a model with a text tower; None for a native folder that has no
  temperature. The towers' parameters are not read.
  """
  path = folders.require_folder(folder)
  if (path / native.PARAMS).is_file():
    if (leaves := native.read_contrastive(path)) is None:
      return None
    scale, bias = leaves
    # A conversion of CLIP has a bias of 0.
    return ("sigmoid" if bias else "softmax"), math.exp(scale)
  config = foreign.read_object(path / "config.json")
  module, described = _find_family(path, config), native.read_description(path)
  with folders.open_weights(path) as store:
    spec = module.read_spec(config, store.names)
    rules = [
      rule
      for rule in module.rules(spec)
      if any(name.startswith("heads/contrastive/") for name in rule.leaves)
    ]
    leaves = tensors.load(rules, store, ignore="")["heads"]["contrastive"]
  loss_type = module.LOSS
  if described and described.contrastive:
    has_bias = "logit_bias" in described.contrastive.leaves
    loss_type = "sigmoid" if has_bias else "softmax"
  return loss_type, math.exp(leaves["logit_scale"])


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
  if not isinstance(kind, str):
    raise ConversionError(
      f"{path / 'config.json'}: model_type is {options.shorten_repr(kind)}, "
      "expected a string."
    )
  if kind in _UNSUPPORTED:
    raise ConversionError(f"{path}: model_type {kind!r}. {_UNSUPPORTED[kind]}")
  if kind not in _FAMILIES:
    raise ConversionError(
      f"{path}: model_type {options.shorten_repr(kind)} is not supported. "
      f"{did_you_mean(kind, _FAMILIES)}"
    )
  return _FAMILIES[kind]


def _image_prefix(config: Mapping[str, Any], names: Sequence[str]) -> str:
  """Prefix of the image tower's tensors.

  `vision_model.` in two-tower files and, before transformers 5, in files of a
  vision tower; `dinov2.` in a classifier's.
  """
  kind = config["model_type"]
  for prefix in ("vision_model.", "vision_encoder.", f"{kind}."):
    if any(name.startswith(prefix) for name in names):
      return prefix
  return "vision_model." if kind in ("siglip", "siglip2", "clip") else ""


def _restore_export(
  path: pathlib.Path, description: native.Description, params: dict[str, Any]
) -> ConvertedModel:
  """An export's model with the heads' original names, and the other heads."""
  leaves = dict(flatten_with_names(params))
  contrastive = description.contrastive
  for name in [n for n in leaves if n.startswith("heads/contrastive/")]:
    value, leaf = leaves.pop(name), name.rsplit("/", 1)[1]
    if contrastive and leaf in contrastive.leaves:
      leaves[f"heads/{contrastive.name}/{leaf}"] = value
  if (path / _HEADS).is_file():
    with folders.TensorFiles(path / _HEADS) as store:
      leaves |= {name: tensors.read_float(store, name) for name in store.names}
  expected = flatten_with_names(two_tower.abstract_params(description.model))
  unused = leaves.keys() - dict(expected).keys()
  for name in [n for n in unused if _is_neutral(n, leaves[n])]:
    del leaves[name]
  try:
    native.check_params(description.model, leaves)
  except ConversionError as error:
    raise ConversionError(
      f"{path / native.DESCRIPTION} and config.json describe different "
      f"models. {error}\nDelete {native.DESCRIPTION} to read the folder as any "
      "Hugging Face folder."
    ) from None
  return native.restore_model(path, description, leaves)


def _is_neutral(name: str, leaf: np.ndarray) -> bool:
  """Whether `ConvertedModel.add_neutral` adds this parameter."""
  values = {"scale1": 1, "scale2": 1, "mask_token": 0}
  value = values.get(name.rpartition("/")[2])
  return value is not None and bool((leaf == value).all())


def write(folder: str | os.PathLike, model: ConvertedModel) -> pathlib.PurePath:
  """Writes a folder that `transformers` opens with the class that fits.

  Beside its files, `heads.safetensors` has the other objectives' heads and, if
  the class lacks it, the mask token under our names, and `mtv_jax.json` our
  spec, from which `read` restores the model. Fixed positions become stored
  ones.

  Args:
    folder: new, empty, or of an earlier export, which it replaces.
    model: needs a contrastive head if it has a text tower.

  Raises:
    ConversionError: no class can express this model; names every field of
      the nearest one.
  """
  model = model.store_positions()
  spec = model.spec
  tokenizer = model.tokenizer and model.tokenizer.build()
  module = _find_exporter(spec)
  native.check_params(spec, native.numpy_leaves(model.params))
  full = model.add_neutral(module.NEUTRAL)
  config = module.to_hf_config(full.spec, pad_id=tokenizer and tokenizer.pad_id)
  size = spec.image.image_size
  if spec.image.position_resize == "crop":
    # Positions are of the largest image.
    size = model.preprocess["size"]
  processor = processors.write_processor(
    model.preprocess, size, name=module.PROCESSOR
  )
  if spec.text is None:
    processor.pop("processor_class", None)
  rules = module.rules(full.spec)
  leaves, others, contrastive = _split_leaves(full, rules)
  bias = leaves.get("heads/contrastive/logit_bias", 0)
  if module in (clip, aimv2, tipsv2) and bias != 0:
    raise ConversionError(
      f"transformers' {_TEXT_EXPORTERS[module]} has no bias of the similarity, "
      f"which is {float(bias):g} here: only the softmax loss has none."
    )
  if module is radio:
    rules += radio.file_rules(full.spec)
  weights = tensors.save(rules, leaves)

  with native.replace_conversion(path_lib.as_path(folder), _EXPORTED) as path:
    folders.write_tensors(path / folders.WEIGHTS, weights)
    if others:
      folders.write_tensors(path / _HEADS, others)
    folders.write_json(path / "config.json", config)
    folders.write_json(path / "preprocessor_config.json", processor)
    files = _export_tokenizer(path, model, tokenizer, module=module)
    readme = card.write_card(
      spec,
      sorted(others),
      class_name=config["architectures"][0],
      max_patches=model.preprocess.get("max_patches"),
    )
    (path / "README.md").write_text(readme, "utf-8")
    native.write_description(
      path,
      dataclasses.replace(model, tokenizer=files),
      contrastive=contrastive,
    )
  return path_lib.as_path(folder)


def _find_exporter(spec: ModelSpec) -> ModuleType:
  """The family of an export; ConversionError if none can express the model."""
  exporters = _IMAGE_EXPORTERS if spec.text is None else _TEXT_EXPORTERS
  lines, module = min(
    ((module.mismatches(spec), module) for module in exporters),
    key=lambda pair: len(pair[0]),
  )
  if lines:
    name = exporters[module]
    raise ConversionError(
      f"transformers' {name} can't express this model:\n"
      + "".join(lines)
      + "Train with these settings to export it, or keep a native folder "
      "(from_hf), which mtv_jax.load opens."
    )
  return module


def _split_leaves(
  model: ConvertedModel, rules: Sequence[Rule]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
  """Splits parameters into those of `transformers` and those only we read.

  Also returns which head became the temperature and bias, and which of its
  leaves exist.
  """
  exported, others = {}, {}
  named = {leaf for rule in rules for leaf in rule.leaves}
  for name, leaf in native.numpy_leaves(model.params).items():
    is_other = name.startswith("heads/") or name not in named
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
  path: pathlib.Path,
  model: ConvertedModel,
  tokenizer: Any | None,
  *,
  module: ModuleType,
) -> TokenizerFiles | None:
  """Writes the tokenizer's files; returns those that `read` builds."""
  text = model.spec.text
  if text is None:
    return None
  if tokenizer is None:
    log.warning("No tokenizer: AutoProcessor needs one beside the model.")
    return None
  # Imported late: reading a model needs no tokenizer library.
  from mtv_jax.data import tokenizers

  config: dict[str, Any] = {}
  if module in (aimv2, tipsv2):
    # Without a mask, padding is attended to, and AIMv2's texts are not causal.
    config["model_input_names"] = ["input_ids", "attention_mask"]
  if module is siglip2:
    # The default of its processor is 64, whatever the tokenizer's.
    config["max_length"] = text.length
  tokenizers.export_files(tokenizer, path, length=text.length, fields=config)
  if tokenizer.kind == "json":
    # The file cleans texts itself now; cleaning twice changes nothing.
    return TokenizerFiles(path / "tokenizer.json", tokenizer.clean)
  return native.copy_tokenizer(path, model.tokenizer)
