"""open_clip folders (`open_clip_config.json`): CLIP read and written.

Two-tower models whose image tower is timm's, as SigLIP's are in open_clip, are
read.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from mtv_jax.config import foreign
from mtv_jax.convert import dinov2, hf_files, processors, tables, timm
from mtv_jax.convert.family import Family, Key, Section, Spec, TowerTable
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.convert.tensors import TensorFile
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
TORCH_WEIGHTS = "open_clip_pytorch_model.bin"
_TRUNK = "visual.trunk."
_README = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

# An image-text model trained with mtv_jax

`open_clip.create_model_and_transforms("local-dir:FOLDER")` and
`open_clip.get_tokenizer("local-dir:FOLDER")` open this folder. On the hub, set
`hf_tokenizer_name` in `open_clip_config.json` to the repository's name.
"""
_PREPROCESS = {
  "interpolation": str,
  "mean": tuple[float, float, float],
  "std": tuple[float, float, float],
  "resize_mode": Literal["shortest", "squash"],
}
_BLOCK_NAMES = {
  "norm1": "ln_1",
  "attention/out": "attn.out_proj",
  "scale1": "ls_1.gamma",
  "norm2": "ln_2",
  "mlp/fc1": "mlp.c_fc",
  "mlp/fc2": "mlp.c_proj",
  "scale2": "ls_2.gamma",
}
_BLOCKS = "transformer.resblocks.{i}."
# Keys with one supported value, in both sections.
_FIXED = {
  "final_ln_after_pool": False,
  "block_type": None,
  **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), False),
  **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), False),
}


def _read_gelu(section: Section) -> dict[str, Any]:
  gelus = {None: "exact", "none": "exact", "tanh": "tanh"}
  kind = (section["act_kwargs"] or {}).get("approximate")
  if kind not in gelus:
    raise ConversionError(f"act_kwargs has approximate={kind!r}.")
  return {"gelu": "quick" if section["quick_gelu"] else gelus[kind]}


def _read_pool(section: Section, pools: Mapping[str, str]) -> dict[str, Any]:
  kind = section["pool_type"]
  if kind not in pools:
    raise ConversionError(f"pool_type={kind!r}; expected one of {[*pools]}.")
  if "eos_id" not in section:
    return {"pool": pools[kind]}
  # See `TextSpec.eos_id`.
  eos_id = 2 if kind == "argmax" else section["eos_id"]
  return {"pool": pools[kind], "eos_id": eos_id}


def _write_pool(spec: Spec, pools: Mapping[str, str]) -> str | None:
  if spec.pool == "eos" and spec.eos_id != 2:
    return "eos"
  names = {pool: name for name, pool in pools.items()}
  return names.get(spec.pool)


def _check_pool(spec: Spec, pools: Mapping[str, str]) -> str | None:
  if _write_pool(spec, pools):
    return None
  return (
    f"pool is {spec.pool!r} and would have to be one of {[*pools.values()]}"
  )


def _pool_key(**pools: str) -> Key:
  """The key `pool_type`, by our `pool`."""
  functions = (_read_pool, _write_pool, _check_pool)
  return Key("pool", *(functools.partial(f, pools=pools) for f in functions))


def _negated(key: str, field: str) -> Key:
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
  "eos_id": Key("eos_id", lambda _: {}),
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
  "no_causal_mask": _negated("no_causal_mask", "causal"),
  "no_ln_pre": _negated("no_ln_pre", "pre_norm"),
  "norm_kwargs": Key(
    "norm_eps",
    lambda c: {"norm_eps": (c["norm_kwargs"] or {}).get("eps", 1e-5)},
    lambda spec: None if spec.norm_eps == 1e-5 else {"eps": spec.norm_eps},
  ),
  "patch_dropout": Key(None, lambda _: {}),
  "proj_bias": Key("projection_bias"),
  "width": Key("width"),
}
_IMAGE = TowerTable(
  {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "act_kwargs": None,
    "norm_kwargs": None,
    **_FIXED,
  },
  {"cls_token": True, "patch_bias": False},
  {
    "patch_embed": "conv1",
    "pre_norm": "ln_pre",
    "mask_token": None,
    **tables.nest("blocks/", _BLOCKS, _BLOCK_NAMES),
    "norm": "ln_post",
  },
  keys={**_KEYS, "pool_type": _pool_key(tok="cls", avg="mean")},
)
_TEXT = TowerTable(
  {
    "context_length": 77,
    "vocab_size": 49_408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "embed_cls": False,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    **_FIXED,
  },
  {},
  {
    "token_embedding": "token_embedding.weight",
    "position_embedding": "positional_embedding",
    **tables.nest("blocks/", _BLOCKS, _BLOCK_NAMES),
    "norm": "ln_final",
    "projection": "text_projection",
  },
  keys={
    **_KEYS,
    "ls_init_value": Key(),
    "pool_type": _pool_key(
      argmax="eos", eos="first_eos", last="last", first="first"
    ),
  },
)


class OpenClip(Family):
  """open_clip's CLIP, of one folder or of an export.

  `store` has the file's tensors, of a text tower "text." (open_clip's
  `CustomTextCLIP`) or none. An export has a bias if `has_bias`.
  """

  name = "open_clip"
  class_name = "open_clip's CLIP"
  image = _IMAGE
  projection_dim = 512
  image_prefix = "visual."
  projection_name = "visual.head.proj"  # timm's; otherwise a matrix.
  exports_image = False
  ignored = rf"attn_mask$|^visual\.head\.|{timm.IGNORED}"
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
    self._text = "text." if "text.ln_final.weight" in names else ""
    self._trunk = any(name.startswith(_TRUNK) for name in names)
    self.loss = "sigmoid" if has_bias or "logit_bias" in names else "softmax"
    names = tables.nest("", self._text, _TEXT.names)
    self.text = dataclasses.replace(_TEXT, names=names)

  def full_class_name(self, spec: ModelSpec) -> str:
    return self.class_name

  def find_prefix(self, config: Section, names: Collection[str]) -> str:
    return self.image_prefix

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    model = _read_model_config(config)
    width, quick = model["embed_dim"], {"quick_gelu": model.get("quick_gelu")}
    section = _section(model, "text_cfg", self.text.defaults)
    fields = self.text.read_fields(section | quick)
    text = TextSpec(**fields, projection=width)
    section = _section(model, "vision_cfg", self.image.defaults)
    if not self._trunk:
      fields = self.image.read_fields(section | quick)
      image = ViTSpec(**fields, projection=width)
      return ModelSpec(image=image, text=text)
    trunk = {
      "architecture": section.get("timm_model_name"),
      "global_pool": section.get("timm_pool") or None,
    }
    image = timm.read_spec(trunk, self._store, _TRUNK)
    if "visual.head.proj.weight" in names:
      image = dataclasses.replace(image, projection=width)
    return ModelSpec(image=image, text=text)

  def read_preprocess(
    self, folder: pathlib.Path, config: Section, spec: ModelSpec
  ) -> dict[str, Any]:
    del folder
    fields = foreign.read_fields(
      config.get("preprocess_cfg") or {}, _PREPROCESS, where="preprocess_cfg."
    )
    mode = fields.get("resize_mode", "shortest")
    given = {key: fields[key] for key in self.preprocess if key in fields}
    return {
      "size": spec.image.image_size,
      "resize": mode,
      "crop": "center" if mode == "shortest" else "none",
      "crop_rounding": "nearest",  # torchvision's
      **self.preprocess,
      **given,
    }

  def read_tokenizer(
    self, folder: pathlib.Path
  ) -> processors.TokenizerFiles | None:
    text = _read_model_config(foreign.read_object(folder / CONFIG))["text_cfg"]
    files = super().read_tokenizer(folder)
    clean = (text.get("tokenizer_kwargs") or {}).get("clean")
    if files and files.clean == "none" and clean in ("canonicalize", "lower"):
      return dataclasses.replace(files, clean=clean)
    if files is None:
      name = text.get("hf_tokenizer_name") or "openai/clip-vit-base-patch32"
      log.warning(
        "%s lacks a tokenizer.json: give --tokenizer=%s.", folder, name
      )
    return files

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    image, text = spec.image, spec.text
    blocks = {"text": f"{self._text}{_BLOCKS}"}
    # open_clip multiplies by these matrices, not by their transposes.
    matrices = {} if text.projection_bias else {"text": "text_projection"}
    matrices = {k: self._text + name for k, name in matrices.items()}
    rules = []
    if self._trunk:
      trunk = ModelSpec(image=dataclasses.replace(image, projection=None))
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
      size = getattr(spec, tower)
      rules += tables.stacked_projections(
        {f"{tower}/blocks/attention/qkv": 3},
        f"{name}attn.in_proj_",
        size.width,
        size.heads,
        depth=size.depth,
      )
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
    quick = {spec.image.gelu == "quick", spec.text.gelu == "quick"}
    return lines + (
      ["  gelu is 'quick' in one tower\n"] if len(quick) > 1 else []
    )

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    sections = {
      "vision_cfg": self.image.write_section(spec.image),
      # open_clip takes the tokenizer of the folder if this is set.
      "text_cfg": {
        **self.text.write_section(spec.text), "hf_tokenizer_name": "."
      },
    }  # fmt: skip
    is_quick = {"quick_gelu": True} if spec.image.gelu == "quick" else {}
    bias = {"init_logit_bias": -10.0} if self.loss == "sigmoid" else {}
    for name, section in sections.items():
      kept = {k: v for k, v in section.items() if v not in (None, False)}
      sections[name] = kept
    return {"embed_dim": spec.embed_dim, **is_quick, **bias, **sections}

  def write_files(
    self, config: Section, preprocess: Mapping[str, Any]
  ) -> dict[str, Any]:
    return {CONFIG: {"model_cfg": config, "preprocess_cfg": preprocess}}

  def write_preprocess(self, fields: Section, size: int) -> dict[str, Any]:
    """`preprocess_cfg`, from the fields of `Preprocess`."""
    resized = fields.get("resize_size") or size
    if fields["resize"] == "native" or {fields["size"], resized} != {size}:
      raise ConversionError(
        f"open_clip resizes images to the model's {size} pixels, and this "
        "model's preprocessing does not: export it to_hf."
      )
    values = {key: fields[key] for key in self.preprocess if key in fields}
    return {
      "size": size,
      "mode": "RGB",
      "resize_mode": fields["resize"],
      **values,
    }


def _read_model_config(config: Section) -> dict[str, Any]:
  model = foreign.read_field(config, "model_cfg", dict)
  if "multimodal_cfg" in model:
    raise ConversionError(
      "model_cfg is CoCa's, whose decoder is not supported."
    )
  for name in ("vision_cfg", "text_cfg"):
    foreign.read_field(model, name, dict, where="model_cfg.")
  return hf_files.with_defaults(model, {"embed_dim": 512}, "model_cfg")


def _section(model: Section, name: str, defaults: Section) -> dict[str, Any]:
  if isinstance(model[name].get("layers"), list):
    raise ConversionError(f"model_cfg.{name}: ResNets are not supported.")
  return hf_files.with_defaults(model[name], defaults, f"model_cfg.{name}")
