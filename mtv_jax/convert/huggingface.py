"""Reads and exports Hugging Face folders, without PyTorch.

`read` opens the families of docs/conversion.md, our exports and native folders.
`write` exports a folder that transformers' `AutoModel` and `AutoProcessor` open
without custom code.
"""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
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
  hf_files,
  native,
  open_clip,
  perception_encoder,
  radio,
  siglip,
  tensors,
  timm,
  tipsv2,
  vit,
)
from mtv_jax.convert.family import Family
from mtv_jax.convert.model import ConvertedModel, LossType
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models import two_tower
from mtv_jax.models.heads import contrastive_head
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)

HEADS = "heads.safetensors"
# `write` picks the first class with the fewest unsupported fields.
FAMILIES: tuple[Family, ...] = (
  siglip.SIGLIP2,
  siglip.SIGLIP,
  clip.CLIP,
  clip.METACLIP2,
  dinov2.DINOV2,
  dinov2.DINOV2_WITH_REGISTERS,
  dinov3.DINOV3,
  aimv2.AIMV2,
  radio.RADIO,
  tipsv2.TIPSV2,
  vit.VIT,
  vit.VIT_MAE,
  vit.DEIT,
  vit.IJEPA,
)
_BY_MODEL_TYPE = {
  name: family for family in FAMILIES for name in family.model_types()
}
_TEXT_ONLY = [f"{family.name}_text_model" for family in FAMILIES if family.text]
# Models with heads, by model_type.
_READERS = {
  "depth_anything": depth_anything.read_model,
  "tipsv2_dpt": tipsv2.read_dense_model,
}
_EXPORTERS = (*FAMILIES, perception_encoder.PERCEPTION_ENCODER)
_HEAD_EXPORTERS = (depth_anything.export_head, tipsv2.export_heads)
# All files that an export may contain.
_EXPORTS = (
  hf_files.WEIGHTS,
  open_clip.CONFIG,
  open_clip.WEIGHTS,
  HEADS,
  "README.md",
  "config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "special_tokens_map.json",
  "spiece.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  *native.ONNX,
)


def read(
  folder: str | os.PathLike, *, with_params: bool = True
) -> ConvertedModel:
  """Reads a model from a folder; `with_params=False` skips the parameters.

  The folder is a Hugging Face folder with a model_type in docs/conversion.md,
  one of our exports (restored with its heads and spec), or a native folder.
  Raises ConversionError for an unsupported model or weight format, and names
  each tensor that is missing, unexpected or mismatched.
  """
  path = hf_files.require_folder(folder)
  info = native.read_info(path)
  if info and not with_params:
    return native.restore_model(path, info, None)
  if (path / native.PARAMS).is_file():
    return native.read(path, info)
  is_export = info is not None
  model = _read_folder(path, with_params=with_params, is_export=is_export)
  if is_export:
    return _restore_export(path, info, model.params)
  return dataclasses.replace(model, origin=card.name_folder(path))


def _read_folder(
  path: pathlib.Path, *, with_params: bool, is_export: bool
) -> ConvertedModel:
  """Reads a folder of one of the families; only parameters if `is_export`."""
  config = foreign.read_object(path / "config.json")
  model_type = config.get("model_type")
  if isinstance(model_type, str) and model_type in _READERS:
    return _READERS[model_type](path, with_params=with_params)
  is_timm = "architecture" in config and not open_clip.is_folder(path)
  if model_type == "timm_wrapper" or (model_type is None and is_timm):
    return timm.read_model(path, config, with_params=with_params)
  with _open_folder(path) as (family, config, store):
    with foreign.errors_of(path / family.config_file):
      spec = family.read_spec(config, store.names)
    params = {}
    if with_params:
      prefix = family.find_prefix(config, store.names)
      mapping = family.param_mapping(spec, prefix)
      params = tensors.load(mapping, store, ignore=family.ignored)
  if is_export:
    return ConvertedModel(spec, params, {})
  with foreign.errors_of(path / family.config_file):
    preprocess = family.read_preprocess(path, config, spec)
  tokenizer = spec.text and family.read_tokenizer(path)
  return ConvertedModel(spec, params, preprocess, tokenizer)


def read_contrastive(
  folder: str | os.PathLike,
) -> tuple[LossType, float] | None:
  """Reads loss type and scale of a two-tower model's image-text contrast.

  Skips the towers' parameters. None for a native folder without a temperature.
  """
  path = hf_files.require_folder(folder)
  if (path / native.PARAMS).is_file():
    if (leaves := native.read_contrastive(path)) is None:
      return None
    scale, bias = leaves
    # Converted CLIPs have a bias of 0.
    return ("sigmoid" if bias else "softmax"), math.exp(scale)
  info = native.read_info(path)
  with _open_folder(path) as (family, config, store):
    spec = family.read_spec(config, store.names)
    mapping = [
      rule
      for rule in family.param_mapping(spec)
      if any(name.startswith("heads/contrastive/") for name in rule.leaves)
    ]
    leaves = tensors.load(mapping, store, ignore="")["heads"]["contrastive"]
  loss_type = family.loss
  if info and info.contrastive:
    has_bias = "logit_bias" in info.contrastive.leaves
    loss_type = "sigmoid" if has_bias else "softmax"
  return loss_type, math.exp(leaves["logit_scale"])


@contextlib.contextmanager
def _open_folder(
  path: pathlib.Path,
) -> Iterator[tuple[Family, dict[str, Any], hf_files.TensorFiles]]:
  """Opens a folder's weights; yields its family, config and tensors."""
  if open_clip.is_folder(path):
    config = foreign.read_object(path / open_clip.CONFIG)
    names = (open_clip.WEIGHTS, open_clip.TORCH_WEIGHTS)
    with hf_files.open_weights(path, *names) as store:
      yield open_clip.OpenClip(store), config, store
    return
  config = foreign.read_object(path / "config.json")
  family = find_family(path, config)
  with hf_files.open_weights(path) as store:
    yield family, config, store


def find_family(path: pathlib.Path, config: Mapping[str, Any]) -> Family:
  if not config:
    files = sorted(p.name for p in path.iterdir())[:8]
    raise ConversionError(
      f"{path} lacks a config.json; it contains {files}. Expected: a Hugging "
      f"Face folder, or a native one with {native.PARAMS}."
    )
  kind = config.get("model_type")
  if kind is None:
    raise ConversionError(
      f"{path / 'config.json'} lacks a model_type; its keys are "
      f"{sorted(config)[:8]}. mtv_jax.load and `mtv-jax convert to_hf` open "
      "a training run."
    )
  if kind in _TEXT_ONLY:
    raise ConversionError(
      f"{path}: model_type {kind!r} is a text tower, which encodes no images; "
      "pass a two-tower or vision checkpoint."
    )
  if not isinstance(kind, str) or kind not in _BY_MODEL_TYPE:
    section = config.get("vision_config")
    tower = section.get("model_type") if isinstance(section, Mapping) else None
    # A typo, not another model ('beit').
    hint, fix = did_you_mean(str(kind), _BY_MODEL_TYPE, cutoff=0.8), ""
    if isinstance(tower, str) and tower in _BY_MODEL_TYPE:
      fix = (
        f" Its vision tower is a supported {tower!r}: save that module of the "
        "model by its `save_pretrained`, and the image processor beside it."
      )
    elif not hint.startswith("Did you mean"):
      fix = (
        " If timm has the model under a name that docs/conversion.md lists, "
        "pass timm's folder, such as hf:timm/vit_base_patch14_dinov2.lvd142m."
      )
    raise ConversionError(
      f"{path / 'config.json'}: model_type {options.shorten_repr(kind)} is not "
      f"supported. {hint}{fix}"
    )
  return _BY_MODEL_TYPE[kind]


def _restore_export(
  path: pathlib.Path, info: native.ExportInfo, params: dict[str, Any]
) -> ConvertedModel:
  """Restores an export's model with all heads under their original names."""
  leaves = dict(flatten_with_names(params))
  contrastive = info.contrastive
  for name in [n for n in leaves if n.startswith("heads/contrastive/")]:
    value, leaf = leaves.pop(name), name.rsplit("/", 1)[1]
    if contrastive and leaf in contrastive.leaves:
      leaves[f"heads/{contrastive.name}/{leaf}"] = value
  if (path / HEADS).is_file():
    with hf_files.TensorFiles(path / HEADS) as store:
      leaves |= {name: tensors.read_float(store, name) for name in store.names}
  expected = flatten_with_names(two_tower.abstract_params(info.model))
  unexpected = leaves.keys() - dict(expected).keys()
  # Exports have parameters of `add_neutral_params`, which the model lacks.
  neutral = {"scale1": 1, "scale2": 1, "mask_token": 0}
  for name in unexpected:
    value = neutral.get(name.rpartition("/")[2])
    if value is not None and (leaves[name] == value).all():
      del leaves[name]
  try:
    native.check_params(info.model, leaves)
  except ConversionError as error:
    raise ConversionError(
      f"{path / native.INFO} and config.json describe different "
      f"models. {error}\nDelete {native.INFO} to read the folder as any "
      "Hugging Face folder."
    ) from None
  return native.restore_model(path, info, leaves)


def write(
  folder: str | os.PathLike,
  model: ConvertedModel,
  *,
  with_heads: bool = True,
  add_files: native.AddFiles = lambda _: None,
  families: Sequence[Family] = _EXPORTERS,
) -> pathlib.PurePath:
  """Exports a folder that `transformers` opens with the matching class.

  `heads.safetensors` stores parameters that the class lacks under our names:
  remaining heads and possibly the mask token. `mtv_jax.json` stores our spec,
  from which `read` restores the model. Fixed positions are stored as
  parameters. An earlier export in the folder is replaced. A model with a text
  tower needs a contrastive head. `with_heads` exports dense heads with the
  tower if a class has exactly them (Depth Anything, TIPSv2). `add_files` adds
  files to the finished folder, `families` are the possible layouts.
  Raises ConversionError with the unsupported fields of the closest class if no
  class can express the model.
  """
  model = model.store_positions()
  spec = model.spec
  tokenizer = model.tokenizer and model.tokenizer.build()
  family = find_exporter(spec, families)
  native.check_params(spec, native.numpy_leaves(model.params))
  full = model.add_neutral_params(family.neutral)
  config = family.write_config(full.spec, pad_id=tokenizer and tokenizer.pad_id)
  size = spec.image.image_size
  if family.takes_any_size(spec):  # Published DINOv2s: 518, processor 224.
    size = model.preprocess.get("size", size)
  mapping = family.param_mapping(full.spec)
  for export in _HEAD_EXPORTERS if with_heads else ():
    if dense := export(full, config):
      config, mapping = dense
  files = family.write_files(spec, config, model.preprocess, size)
  leaves, others, contrastive = _split_leaves(full, mapping)
  if "backbone_config" in config:  # The heads' norms are the tower's.
    heads = model.prediction_heads
    others = {k: v for k, v in others.items() if k.split("/")[1] not in heads}
  bias = leaves.get("heads/contrastive/logit_bias", 0)
  if family.loss == "softmax" and bias != 0:
    raise ConversionError(
      f"transformers' {family.full_class_name(spec)} lacks the bias of the "
      f"similarity ({float(bias):g} here); only the softmax loss exports to it."
    )
  weights = tensors.save([*mapping, *family.constants(full.spec)], leaves)

  with native.replace_conversion(path_lib.as_path(folder), _EXPORTS) as path:
    hf_files.write_tensors(path / family.weights, weights)
    if others:
      hf_files.write_tensors(path / HEADS, others)
    for name, content in files.items():
      hf_files.write_json(path / name, content)
    exported_tokenizer = _export_tokenizer(path, model, tokenizer, family)
    readme = family.readme or card.write_card(
      spec,
      sorted(others),
      class_name=config.get("architectures", [config.get("architecture")])[0],
      preprocess=model.preprocess,
    )
    (path / "README.md").write_text(readme, "utf-8")
    native.write_info(
      path,
      dataclasses.replace(model, tokenizer=exported_tokenizer),
      contrastive=contrastive,
    )
    add_files(path)
  return path_lib.as_path(folder)


def write_open_clip(
  folder: str | os.PathLike, model: ConvertedModel
) -> pathlib.PurePath:
  """Exports a two-tower model as an open_clip folder; see `write`."""
  if model.spec.text is None:
    raise ConversionError(
      "open_clip needs a text tower; export an image tower with to_hf."
    )
  leaves = native.numpy_leaves(model.params.get("heads", {}))
  has_bias = any(n.endswith("logit_bias") and v for n, v in leaves.items())
  family = open_clip.OpenClip(has_bias=has_bias)
  return write(folder, model, families=[family])


def find_exporter(
  spec: ModelSpec, families: Sequence[Family] = _EXPORTERS
) -> Family:
  """The family to export as; ConversionError if none can express the model."""
  lines, family = min(
    (
      (family.unsupported_fields(spec), family)
      for family in families
      if family.can_export(spec)
    ),
    key=lambda pair: len(pair[0]),
  )
  if lines:
    name = family.full_class_name(spec)
    if family in FAMILIES:
      name = f"transformers' {name}"
    raise ConversionError(
      f"{name} can't express this model:\n"
      + "".join(lines)
      + _suggest_export(spec, families)
    )
  return family


def warn_of_export(spec: ModelSpec) -> None:
  """Logs a warning if `write` has no class for a model."""
  if spec.image.positions == "sincos":  # Exports store them.
    image = dataclasses.replace(spec.image, positions="learned")
    spec = dataclasses.replace(spec, image=image)
  try:
    find_exporter(spec)
  except ConversionError as error:
    log.warning("`mtv-jax convert to_hf` will refuse this run. %s", error)


def _suggest_export(spec: ModelSpec, families: Sequence[Family]) -> str:
  """Suggests what to do with a model that `families` can't express."""
  if families is not _EXPORTERS:
    with contextlib.suppress(ConversionError):
      name = find_exporter(spec).full_class_name(spec)
      return f"Export it with to_hf, as {name}."
  image, fix = spec.image, "Train with these settings to export it, or write"
  is_eva = image.positions == "learned_rope" and not image.pre_norm
  if image.pool_norm or image.mlp_norm or is_eva:
    fix = (
      "EVA-02 and timm's ViTs that normalise the mean of patches (fc_norm) are "
      "only read. Write"
    )
  return (
    f"{fix} a native folder (from_hf), which mtv_jax.load opens, or "
    "functions for jax.export (to_stablehlo)."
  )


def _split_leaves(
  model: ConvertedModel, mapping: Sequence[Rule]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
  """Splits parameters into the ones that `transformers` reads and others.

  Also returns the name of the head exported as temperature and bias, and its
  existing leaves.
  """
  exported, others = {}, {}
  mapped = {leaf for rule in mapping for leaf in rule.leaves}
  for name, leaf in native.numpy_leaves(model.params).items():
    # The temperature is exported under its head's name, see below.
    is_other = name.startswith("heads/contrastive/") or name not in mapped
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
  # A softmax loss lacks a bias.
  scale.setdefault("logit_bias", np.zeros((), np.float32))
  exported |= {f"heads/contrastive/{k}": v for k, v in scale.items()}
  return exported, others, contrastive


def _export_tokenizer(
  path: pathlib.Path,
  model: ConvertedModel,
  tokenizer: Any | None,
  family: Family,
) -> TokenizerFiles | None:
  """Writes the tokenizer's files; returns them for `read`."""
  text = model.spec.text
  if text is None:
    return None
  if tokenizer is None:
    log.warning("The model lacks a tokenizer, which AutoProcessor needs.")
    return None
  # Lazy import: reading a model doesn't need the tokenizer libraries.
  from mtv_jax.data import tokenizers

  fields = family.tokenizer_config(text)
  tokenizers.export_files(tokenizer, path, length=text.length, fields=fields)
  if tokenizer.kind == "json":
    # The exported file also cleans texts; cleaning is idempotent.
    return TokenizerFiles(path / "tokenizer.json", tokenizer.clean)
  return native.copy_tokenizer(path, model.tokenizer)
