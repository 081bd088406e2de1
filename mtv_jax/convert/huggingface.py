"""Hugging Face folders: reading and export, without PyTorch.

`read` opens SigLIP (and SigLIP 2 of fixed resolution, and MTV), CLIP and
DINOv2 folders, our exports and our own folders; `write` makes a folder that
`AutoModel` and `AutoProcessor` of `transformers` open with no code of ours.
"""

import logging
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from mtv_jax.convert import (
  card,
  checks,
  clip,
  dinov2,
  folders,
  native,
  processors,
  siglip,
  tables,
)
from mtv_jax.convert.converted import Converted, resize_positions
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.heads import PredictionHead, contrastive_head
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

log = logging.getLogger(__name__)

__all__ = [
  "ConversionError",
  "Converted",
  "TokenizerFiles",
  "read",
  "resize_positions",
  "write",
  "write_native",
]

HEADS = "heads.safetensors"
# Family and table of each model_type.
_FAMILIES: dict[str, tuple[str, ModuleType]] = {
  "siglip": ("siglip", siglip),
  "siglip_vision_model": ("siglip", siglip),
  "clip": ("clip", clip),
  "clip_vision_model": ("clip", clip),
  "dinov2": ("dinov2", dinov2),
  "dinov2_with_registers": ("dinov2", dinov2),
}
_NAFLEX = (
  "SigLIP 2 NaFlex (variable aspect ratio) is not supported; SigLIP 2 of fixed "
  "resolution is, such as siglip2-base-patch16-224: its model_type is 'siglip'."
)
_UNSUPPORTED = {
  "siglip2": _NAFLEX,
  "siglip2_vision_model": _NAFLEX,
  "siglip_text_model": "A text tower alone makes no encoder of images.",
  "clip_text_model": "A text tower alone makes no encoder of images.",
}
# Every file that an export may hold.
_EXPORTED = (
  folders.WEIGHTS,
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
)


def read(folder: str | os.PathLike) -> Converted:
  """Reads a model from a folder.

  Args:
    folder: a Hugging Face folder of model_type siglip, siglip_vision_model,
      clip, clip_vision_model, dinov2 or dinov2_with_registers; an export of
      ours (which comes back with the heads and the spec that it was written
      with); or a folder of `write_native`.

  Raises:
    ConversionError: another kind of model or weights, or tensors that are
      missing, unexpected or of another shape, each named.
  """
  path = folders.require_folder(folder)
  if (path / native.PARAMS).is_file():
    return native.read(path)
  config = folders.read_json(path / "config.json")
  family, module = _family(path, config)
  found = native.description(path)
  with folders.open_weights(path) as store:
    names, what = store.names, f"{path / folders.WEIGHTS}"
    spec = module.spec(config, names)
    rules = module.rules(spec, prefix=_prefix(config, names))
    checks.check(rules, store, what=what, ignore=module.IGNORE)
    params = tables.load(rules, store)
  if found:
    spec, params = _as_described(path, found, spec, params)
    preprocess = found["preprocess"]
    tokenizer = native.described_tokenizer(path, found)
  else:
    preprocess = processors.read_preprocess(
      path,
      family,
      image_size=spec.image.image_size,
      patch_size=spec.image.patch_size,
    )
    tokenizer = None
    if spec.text is not None:
      tokenizer = processors.read_tokenizer(path, family)
  heads = native.described_heads(found)
  return Converted(spec, params, preprocess, tokenizer, heads)


def _family(
  path: pathlib.Path, config: Mapping[str, Any]
) -> tuple[str, ModuleType]:
  if not config:
    present = sorted(p.name for p in path.iterdir())[:8]
    raise ConversionError(
      f"{path} has no config.json; it holds {present}. Expected: a Hugging "
      f"Face folder, or one of ours with {native.PARAMS}."
    )
  kind = config.get("model_type")
  if kind is None:
    raise ConversionError(
      f"{path / 'config.json'} has no model_type; its keys are "
      f"{sorted(config)[:8]}. If this is a training run, mtv_jax.load and "
      "`tools/convert.py to_hf` open it."
    )
  if kind in _UNSUPPORTED:
    raise ConversionError(f"{path}: model_type {kind!r}. {_UNSUPPORTED[kind]}")
  if kind not in _FAMILIES:
    raise ConversionError(
      f"{path}: model_type {kind!r} is not supported. "
      f"{did_you_mean(kind, _FAMILIES)}"
    )
  return _FAMILIES[kind]


def _prefix(config: Mapping[str, Any], names: list[str]) -> str:
  """What comes before the image tower's names in this file.

  Two-tower files say `vision_model.`; a vision tower's own file says so up to
  transformers 4 and leaves it out from 5 on; a classifier's says `dinov2.`.
  """
  kind = config["model_type"]
  for prefix in ("vision_model", kind):
    if any(name.startswith(f"{prefix}.") for name in names):
      return prefix
  return "vision_model" if kind in ("siglip", "clip") else ""


def _as_described(
  path: pathlib.Path,
  found: Mapping[str, Any],
  spec: ModelSpec,
  params: dict[str, Any],
) -> tuple[ModelSpec, dict[str, Any]]:
  """An export's params under the names they had, with the other heads."""
  own = ModelSpec.from_dict(found["model"])
  leaves = dict(flatten_with_names(params))
  kept = found.get("contrastive")
  for name in [n for n in leaves if n.startswith("heads/contrastive/")]:
    value, leaf = leaves.pop(name), name.rsplit("/", 1)[1]
    if kept and leaf in kept["leaves"]:
      leaves[f"heads/{kept['name']}/{leaf}"] = value
  if (path / HEADS).is_file():
    with folders.TensorFiles([path / HEADS]) as store:
      leaves |= {name: store.read(name) for name in store.names}
  try:
    native.check_params(own, leaves)
  except ConversionError as error:
    raise ConversionError(
      f"{path / native.DESCRIPTION} and config.json describe different "
      f"models. {error}\nDelete {native.DESCRIPTION} to read the folder as any "
      "Hugging Face folder."
    ) from None
  return own, unflatten_names(leaves)


# ---------------------------------------------------------------------------
# Writing.


def write(
  folder: str | os.PathLike,
  spec: ModelSpec,
  params: Mapping[str, Any],
  *,
  preprocess: Mapping[str, Any],
  tokenizer: Any | None = None,
  heads: Mapping[str, Any] | None = None,
  prediction_heads: Mapping[str, PredictionHead] | None = None,
) -> pathlib.Path:
  """Writes a folder that `transformers` opens as a SigLIP.

  It holds `model.safetensors`, `config.json`, `preprocessor_config.json`, the
  tokenizer's files and a README; beside them `heads.safetensors` (other
  objectives' heads and temperatures, and a mask token, by our names) and
  `mtv_jax.json` (our spec), which `read` uses to give everything back.

  Args:
    folder: new, empty, or of an earlier export, which it replaces.
    spec: the model. Without a text tower it becomes a `SiglipVisionModel`.
    params: `image`, `text`, and `heads` unless given apart.
    preprocess: fields of `Preprocess`.
    tokenizer: one of `data.tokenizers`, or its files, or None.
    heads: of all objectives, by name; `params['heads']` by default.
    prediction_heads: configuration of the heads that predict, by name.

  Returns:
    The folder.

  Raises:
    ConversionError: `SiglipModel` can't express the model; every field that
      stands in the way is named.
  """
  path = pathlib.Path(folder)
  if isinstance(tokenizer, TokenizerFiles):
    tokenizer = tokenizer.build()
  config = siglip.config(spec, pad_id=getattr(tokenizer, "pad_id", None))
  processor = processors.written(preprocess, spec.image.image_size)
  towers = {k: params[k] for k in ("image", "text") if k in params}
  leaves = native.numpy_leaves(towers)
  native.check_params(spec, leaves)
  heads = params.get("heads", {}) if heads is None else heads
  tensors, beside, contrastive = _split_heads(spec, leaves, heads)

  native.prepare(path, _EXPORTED, tokenizer=TokenizerFiles.of(tokenizer))
  folders.write_tensors(path / folders.WEIGHTS, tensors)
  if beside:
    folders.write_tensors(path / HEADS, beside)
  folders.write_json(path / "config.json", config)
  if spec.text is None:
    del processor["processor_class"]
  folders.write_json(path / "preprocessor_config.json", processor)
  files = _export_tokenizer(path, spec, tokenizer)
  folders.write_json(
    path / native.DESCRIPTION,
    native.describe(
      spec,
      preprocess,
      files,
      prediction_heads=prediction_heads,
      contrastive=contrastive,
    ),
  )
  (path / "README.md").write_text(card.text(spec, sorted(beside)), "utf-8")
  return path


def _split_heads(
  spec: ModelSpec,
  leaves: dict[str, np.ndarray],
  heads: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any] | None]:
  """Splits all leaves into SigLIP's tensors and what goes beside them.

  Also says which head became SigLIP's temperature and bias, and which of its
  leaves were there.
  """
  beside = native.numpy_leaves({"heads": dict(heads)})
  towers = dict(leaves)
  if "image/mask_token" in towers:
    # Training's own; SigLIP has no place for it.
    beside["image/mask_token"] = towers.pop("image/mask_token")
  contrastive = None
  if spec.text is not None:
    try:
      name = contrastive_head(heads)
    except ValueError as error:
      raise ConversionError(f"A SigLIP has one temperature. {error}") from None
    found = {
      leaf: beside.pop(f"heads/{name}/{leaf}")
      for leaf in ("logit_scale", "logit_bias")
      if f"heads/{name}/{leaf}" in beside
    }
    contrastive = {"name": name, "leaves": sorted(found)}
    # A softmax loss has no bias.
    found.setdefault("logit_bias", np.zeros((), np.float32))
    towers |= {f"heads/contrastive/{k}": v for k, v in found.items()}
  return tables.save(siglip.rules(spec), towers), beside, contrastive


def _export_tokenizer(
  path: pathlib.Path, spec: ModelSpec, tokenizer: Any | None
) -> TokenizerFiles | None:
  """Writes the tokenizer's files; returns what `read` is to build again."""
  if spec.text is None:
    return None
  if tokenizer is None:
    log.warning("No tokenizer: AutoProcessor needs one beside the model.")
    return None
  # Imported here: reading a model needs no tokenizer library.
  from mtv_jax.data import tokenizers

  tokenizers.export_files(tokenizer, path, length=spec.text.length)
  files = TokenizerFiles.of(tokenizer)
  if tokenizer.kind == "json":
    # The cleaning has become a part of the file.
    return TokenizerFiles(path / "tokenizer.json", "none")
  return native.copy_tokenizer(path, files)


def write_native(
  folder: str | os.PathLike,
  spec: ModelSpec,
  params: Mapping[str, Any],
  *,
  preprocess: Mapping[str, Any],
  tokenizer: Any | None = None,
  prediction_heads: Mapping[str, PredictionHead] | None = None,
) -> pathlib.Path:
  """Writes any model in our own form, which `read` and training's init open.

  Args:
    folder: new, empty, or of an earlier conversion, which it replaces.
    spec: the model.
    params: `image`, and maybe `text` and `heads`.
    preprocess: fields of `Preprocess`.
    tokenizer: one of `data.tokenizers`, or its files, or None.
    prediction_heads: configuration of the heads that predict, by name.

  Returns:
    The folder.
  """
  path = pathlib.Path(folder)
  native.write(
    path,
    spec,
    params,
    preprocess=preprocess,
    tokenizer=TokenizerFiles.of(tokenizer),
    prediction_heads=prediction_heads,
  )
  return path
