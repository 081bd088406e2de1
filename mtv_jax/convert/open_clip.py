"""open_clip folders (`open_clip_config.json`): reads and writes CLIP.

Also reads two-tower models whose image tower is timm's, such as open_clip's
SigLIP.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Collection
from typing import Any, Literal

from mtv_jax.config import foreign
from mtv_jax.config.options import PositiveFloat
from mtv_jax.convert import dinov2, hf_files, processors, tables, timm
from mtv_jax.convert.family import (
  Family,
  Key,
  Section,
  Spec,
  TowerTable,
  ignore,
)
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.convert.tensors import TensorFile
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models.layers import Length, NumLayers, Width
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
TORCH_WEIGHTS = "open_clip_pytorch_model.bin"
_TRUNK = "visual.trunk."
_TRUNK_HEAD = f"{_TRUNK}head"  # The projection if timm_proj is null (PE-Core).
_README = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

# An image-text model trained with mtv_jax

In this folder, `open_clip.create_model_and_transforms("local-dir:.")` opens it.
Before you upload it, set `hf_tokenizer_name` in `open_clip_config.json` to the
repository's name, from which open_clip loads the tokenizer.
"""
_PIXELS = ("interpolation", "mean", "std")
_PREPROCESS = {
  "interpolation": str,
  "mean": tuple[float, float, float],
  "std": tuple[PositiveFloat, PositiveFloat, PositiveFloat],
  "resize_mode": Literal["shortest", "squash"],
}
_FIELD_TYPES = {
  **dict.fromkeys(("no_causal_mask", "no_ln_pre", "quick_gelu"), bool),
  **dict.fromkeys(("hf_tokenizer_name", "timm_model_name", "timm_pool"), str),
  **dict.fromkeys(("embed_dim", "head_width", "heads", "width"), Width),
  "act_kwargs": dict[str, str],
  "context_length": Length,
  "eos_id": int,
  "layers": NumLayers,
  "ls_init_value": PositiveFloat,
  "norm_kwargs": dict[str, PositiveFloat],
  "pool_type": Literal["argmax", "avg", "eos", "first", "last", "tok"],
  "tokenizer_kwargs": dict,
}
_BLOCK_NAMES = {
  "norm1": "ln_1", "attention/out": "attn.out_proj", "scale1": "ls_1.gamma",
  "norm2": "ln_2", "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj",
  "scale2": "ls_2.gamma",
}  # fmt: skip
_BLOCKS = "transformer.resblocks.{i}."
# Our `pool` by `pool_type`, of both towers.
_POOLS = {
  "tok": "cls", "avg": "mean", "argmax": "eos", "eos": "first_eos",
  "last": "last", "first": "first",
}  # fmt: skip
# Our `clean` by open_clip's, whose `lower` first repairs texts as CLIP does.
_CLEANINGS = {"canonicalize": "canonicalize", "lower": "clip"}
# Keys of both sections; the last ones have one supported value.
_COMMON = {
  "ls_init_value": None, "act_kwargs": None, "norm_kwargs": None,
  "final_ln_after_pool": False, "block_type": None, "qk_norm": False,
  "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
  "scale_attn": False, "scale_fc": False,
}  # fmt: skip


def _read_gelu(section: Section) -> dict[str, Any]:
  gelus = {None: "exact", "none": "exact", "tanh": "tanh"}
  kind = (section["act_kwargs"] or {}).get("approximate")
  if kind not in gelus:
    raise ConversionError(f"act_kwargs has approximate={kind!r}.")
  return {"gelu": "quick" if section["quick_gelu"] else gelus[kind]}


def _write_pool(spec: Spec) -> str | None:
  if spec.pool == "eos" and spec.eos_id != 2:  # See `TextSpec.eos_id`.
    return "eos"
  return {pool: name for name, pool in _POOLS.items()}.get(spec.pool)


def _check_pool(spec: Spec) -> str | None:
  if _write_pool(spec):
    return None
  return f"pool is {spec.pool!r}, not one of {sorted(_POOLS.values())}"


def _negated_key(key: str, field: str) -> Key:
  return Key(
    field,
    lambda section: {field: not section[key]},
    lambda spec: not getattr(spec, field),
  )


_KEYS = {
  "act_kwargs": Key(
    "gelu",
    _read_gelu,
    lambda spec: {"approximate": "tanh"} if spec.gelu == "tanh" else None,
    lambda spec: "gelu is 'relu'" if spec.gelu == "relu" else None,
  ),
  "context_length": Key("length"),
  "eos_id": Key(
    "eos_id",
    lambda c: {"eos_id": 2 if c["pool_type"] == "argmax" else c["eos_id"]},
  ),
  "head_width": Key(
    "heads",
    lambda c: {"heads": c["width"] // c["head_width"]},
    lambda spec: spec.width // spec.heads,
  ),
  "heads": Key("heads"),
  "layers": Key("depth"),
  "ls_init_value": Key("layer_scale"),
  "mlp_ratio": Key(
    "mlp_dim",
    lambda c: {"mlp_dim": int(c["width"] * c["mlp_ratio"])},
    dinov2.mlp_ratio,
  ),
  "no_causal_mask": _negated_key("no_causal_mask", "causal"),
  "no_ln_pre": _negated_key("no_ln_pre", "pre_norm"),
  "norm_kwargs": Key(
    "norm_eps",
    lambda c: {"norm_eps": (c["norm_kwargs"] or {}).get("eps", 1e-5)},
    lambda spec: None if spec.norm_eps == 1e-5 else {"eps": spec.norm_eps},
  ),
  "patch_dropout": Key(None, ignore),
  "pool_type": Key(
    "pool",
    lambda c: {"pool": _POOLS[c["pool_type"]]},
    _write_pool,
    _check_pool,
  ),
  "proj_bias": Key("projection_bias"),
  "width": Key("width"),
}
_IMAGE = TowerTable(
  {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0,
    "patch_size": 16, "image_size": 224, "patch_dropout": 0.0,
    "attentional_pool": False, "no_ln_pre": False,
    "pos_embed_type": "learnable", "pool_type": "tok", **_COMMON,
  },
  {"cls_token": True, "patch_bias": False},
  {
    "patch_embed": "conv1",
    "pre_norm": "ln_pre",
    "mask_token": None,
    **tables.nest("blocks/", _BLOCKS, _BLOCK_NAMES),
    "norm": "ln_post",
  },
  keys=_KEYS,
)  # fmt: skip
_TEXT = TowerTable(
  {
    "context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8,
    "layers": 12, "mlp_ratio": 4.0, "embed_cls": False, "eos_id": 2,
    "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False,
    "proj_type": "linear", "hf_model_name": None, **_COMMON,
  },
  {},
  {
    "token_embedding": "token_embedding.weight",
    "position_embedding": "positional_embedding",
    **tables.nest("blocks/", _BLOCKS, _BLOCK_NAMES),
    "norm": "ln_final",
    "projection": "text_projection",
  },
  keys={**_KEYS, "ls_init_value": Key()},
)  # fmt: skip


class OpenClip(Family):
  """open_clip's CLIP, in one folder or for an export.

  `store` has the file's tensors; the text tower's prefix is "text."
  (open_clip's `CustomTextCLIP`) or empty. An export has a bias if `has_bias`.
  """

  name = "open_clip"
  class_name = "open_clip's CLIP"
  image = _IMAGE
  projection_dim = 512
  image_prefix = "visual."
  projection_name = "visual.head.proj"  # timm's; otherwise a matrix.
  exports_image = False
  ignored = rf"attn_mask$|{timm.BUFFERS}"
  config_file = CONFIG
  weights = WEIGHTS
  readme = _README
  preprocess = {
    "interpolation": "bicubic",
    "mean": processors.CLIP_MEAN,
    "std": processors.CLIP_STD,
  }

  def __init__(
    self, store: TensorFile | None = None, *, has_bias: bool = False
  ):
    names = set(store.names) if store else set()
    self._store = store
    self._text_prefix = "text." if "text.ln_final.weight" in names else ""
    self._has_trunk = any(name.startswith(_TRUNK) for name in names)
    self._has_trunk_head = f"{_TRUNK_HEAD}.weight" in names
    if self._has_trunk_head:
      self.projection_name = _TRUNK_HEAD
    self.loss = "sigmoid" if has_bias or "logit_bias" in names else "softmax"
    names = tables.nest("", self._text_prefix, _TEXT.names)
    self.text = dataclasses.replace(_TEXT, names=names)

  def full_class_name(self, spec: ModelSpec) -> str:
    return self.class_name

  def find_prefix(self, config: Section, names: Collection[str]) -> str:
    return self.image_prefix

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    model = _read_model_config(config)
    width, quick = model["embed_dim"], {"quick_gelu": model.get("quick_gelu")}
    section = _read_tower(model, "text_cfg", self.text.defaults)
    fields = self.text.read_fields(section | quick)
    text = TextSpec(**fields, projection=width)
    section = _read_tower(model, "vision_cfg", self.image.defaults)
    if not self._has_trunk:
      fields = self.image.read_fields(section | quick)
      image = ViTSpec(**fields, projection=width)
      return ModelSpec(image=image, text=text)
    trunk = {
      "architecture": section.get("timm_model_name"),
      "global_pool": section.get("timm_pool", "avg") or None,
    }
    image = timm.read_spec(trunk, self._store, _TRUNK)
    if self._has_trunk_head:
      width = timm.read_projection(self._store, _TRUNK)
      if width is None:
        raise ConversionError(
          f"{_TRUNK_HEAD}.bias is not zero, but the projection lacks a bias."
        )
    elif f"{self.projection_name}.weight" not in names:
      width = None
    image = dataclasses.replace(image, projection=width)
    return ModelSpec(image=image, text=text)

  def read_preprocess(
    self, folder: pathlib.Path, config: Section, spec: ModelSpec
  ) -> dict[str, Any]:
    del folder
    model = _read_model_config(config)
    section = _read_tower(model, "vision_cfg", self.image.defaults)
    fields = foreign.read_fields(
      config.get("preprocess_cfg") or {}, _PREPROCESS, where="preprocess_cfg."
    )
    mode = fields.pop("resize_mode", "shortest")
    fields = {key: fields.get(key, self.preprocess[key]) for key in _PIXELS}
    # open_clip overrides the size in preprocess_cfg.
    size = hf_files.read_side(section["image_size"], "image_size")
    fields |= {"size": size, "resize": mode}
    if mode == "shortest":  # As torchvision crops.
      fields |= {"crop": "center", "crop_rounding": "nearest"}
    return processors.fit_patches(fields, spec.image.patch_size)

  def read_tokenizer(self, folder: pathlib.Path) -> TokenizerFiles | None:
    model = _read_model_config(foreign.read_object(folder / CONFIG))
    text = _read_tower(model, "text_cfg", {})
    files = super().read_tokenizer(folder)
    # The default of SimpleTokenizer; HFTokenizer's keeps capitals.
    default = None if text.get("hf_tokenizer_name") else "lower"
    clean = (text.get("tokenizer_kwargs") or {}).get("clean", default)
    is_known = isinstance(clean, str) and clean in _CLEANINGS
    if files and files.clean == "none" and is_known:
      return dataclasses.replace(files, clean=_CLEANINGS[clean])
    if files is None:
      name = text.get("hf_tokenizer_name") or "openai/clip-vit-base-patch32"
      log.warning(
        "%s lacks a tokenizer.json: pass --tokenizer=%s.", folder, name
      )
    return files

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    image, text = spec.image, spec.text
    blocks = {"text": f"{self._text_prefix}{_BLOCKS}"}
    # open_clip multiplies by these matrices, not by their transposes.
    matrices = {} if text.projection_bias else {"text": "text_projection"}
    matrices = {k: self._text_prefix + name for k, name in matrices.items()}
    rules = []
    if self._has_trunk:
      if not self._has_trunk_head:
        image = dataclasses.replace(image, projection=None)
      trunk = ModelSpec(image=image)
      rules += timm.param_mapping(trunk, self._store, _TRUNK)
    else:
      blocks["image"] = f"{prefix}{_BLOCKS}"
      matrices["image"] = f"{prefix}proj"
      tokens = {"image/cls_token": f"{prefix}class_embedding"}
      positions = f"{prefix}positional_embedding"
      rules.append(
        tables.folded_positions(tokens, positions, image, is_flat=True)
      )
    for tower, name in blocks.items():
      layer = f"{name}attn.in_proj_"
      rules += tables.stacked_qkv(tower, getattr(spec, tower), layer)
    for tower, name in matrices.items():
      shape = (getattr(spec, tower).width, getattr(spec, tower).projection)
      leaf = f"{tower}/projection/kernel"
      rules.append(tables.transpose_rule(leaf, name, shape, shape))
    return rules

  def temperature_rules(self) -> list[Rule]:
    if self.loss == "sigmoid":
      return tables.scale_and_bias("logit_scale", "logit_bias", ())
    return super().temperature_rules()

  def unsupported_fields(self, spec: ModelSpec) -> list[str]:
    lines = super().unsupported_fields(spec)
    if (spec.image.gelu == "quick") != (spec.text.gelu == "quick"):
      lines.append("  gelu is 'quick' in one tower\n")
    return lines

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    config = {"embed_dim": spec.embed_dim}
    if spec.image.gelu == "quick":
      config["quick_gelu"] = True
    if self.loss == "sigmoid":
      config["init_logit_bias"] = -10.0
    for name, table, tower in (
      ("vision_cfg", self.image, spec.image),
      ("text_cfg", self.text, spec.text),
    ):
      section = table.write_section(tower)
      config[name] = {
        k: v for k, v in section.items() if v is not None and v is not False
      }
    # open_clip reads a local folder's tokenizer if this is set.
    config["text_cfg"]["hf_tokenizer_name"] = "."
    return config

  def write_files(
    self, spec: ModelSpec, config: Section, fields: Section, size: int
  ) -> dict[str, Any]:
    full_size = size + fields.get("drop", 0)
    resize_size = fields.get("resize_size") or full_size
    if fields["resize"] == "native" or (fields["size"], resize_size) != (
      size,
      full_size,
    ):
      raise ConversionError(
        f"open_clip resizes images to the model's {size} pixels, but this "
        "model's preprocessing does not: export it to_hf."
      )
    processors.warn_of_pixels(fields, "open_clip")
    config["vision_cfg"]["image_size"] = full_size
    pixels = {"size": full_size, "mode": "RGB", "resize_mode": fields["resize"]}
    pixels |= {key: fields[key] for key in _PIXELS if key in fields}
    return {CONFIG: {"model_cfg": config, "preprocess_cfg": pixels}}


def is_folder(folder: pathlib.Path) -> bool:
  """Whether a folder has open_clip's config, but not transformers'."""
  config = foreign.read_object(folder / "config.json")
  return "model_type" not in config and bool(
    foreign.read_object(folder / CONFIG)
  )


def _read_model_config(config: Section) -> dict[str, Any]:
  model = foreign.read_field(config, "model_cfg", dict)
  defaults = {"embed_dim": 512}
  return hf_files.with_defaults(model, defaults, "model_cfg", _FIELD_TYPES)


def _read_tower(model: Section, name: str, defaults: Section) -> dict[str, Any]:
  where = f"model_cfg.{name}"
  return hf_files.with_defaults(model.get(name), defaults, where, _FIELD_TYPES)
