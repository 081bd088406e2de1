"""Reader of timm's vision transformers, also in transformers' `timm_wrapper`.

The architecture's name determines what tensor shapes don't show: heads,
activation and epsilon. Covers plain ViTs (DeiT, DINO, MAE), CLIP, SigLIP,
DINOv2, DINOv3, TIPSv2, AIMv2, EVA, EVA-02 and Perception Encoders (PE), and
DINOv2's own tensor names. timm's EVA-02 and PE rotate pairs of neighbouring
channels, PE columns first; we rotate the two halves of a head, rows first. The
reader permutes the channels of queries and keys; their products don't change.
"""

import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.config.options import PositiveFloat, Range, Side
from mtv_jax.convert import dinov2, hf_files, processors, tables, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.convert.tensors import TensorFile
from mtv_jax.models.layers import Width
from mtv_jax.models.positions import Rope
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

_NAME = re.compile(
  r"(vit_pe_(core|lang|spatial)|eva(02)?)_[a-z]+_patch\d{1,3}_\d{2,4}"
  r"|(vit|deit3?|aimv2)_[a-z0-9]+(_plus)?_patch\d{1,3}"
  r"(_(plus|clip|quickgelu|siglip|gap|map|reg\d|dinov2|dinov3|qkvb|tipsv2))*"
  r"(_\d{3,4})?(_miil)?"
)
# Heads by a pattern of the architecture; the first match wins.
_HEADS = (
  (r"^aimv2_large", 8), (r"^aimv2_(huge)", 12), (r"^aimv2_1b", 16),
  (r"^aimv2_3b", 24), (r"_base_patch\d+_plus", 14), (r"_huge_plus", 20),
  (r"_base_patch16_gap_224", 16), (r"_7b_", 32), (r"_tiny_", 3),
  (r"_(xsmall|wee)_", 4), (r"_little_", 5), (r"_small_", 6), (r"_mediumd?_", 8),
  (r"_betwixt_", 10), (r"_base_", 12), (r"_so150m2_", 13), (r"_so150m_", 14),
  (r"_giant_.*_(dinov2|tipsv2)", 24),
  (r"_(large|huge|giant|giantopt|gigantic|so400m|intern300m)_", 16),
)  # fmt: skip
_TANH = r"_(giantopt_|base_patch32_|so400m_patch16_)|large_patch16_.*_512"
PE_POOL_HEADS = 8
_EVA_GRID = 16  # Pretraining grid, for images of any size.
_CROP_PCT = 0.875  # timm's default.
_WRAPPER = "timm_model."  # Prefix of `timm_wrapper`.
_POOLS = {"token": "cls", "avg": "mean"}
# Arguments of `timm.create_model`; shapes determine the others.
_Pool = Literal["token", "avg", "map"]
_ARGUMENTS = {"global_pool": _Pool, "num_heads": Width}
# Accepted values of arguments that change the function but no tensor's name;
# without any, the argument must be absent.
_ACCEPTED = {
  "act_layer": (), "norm_layer": (), "pool_include_prefix": (False,),
  "ref_feat_shape": (), "rope_grid_indexing": (), "rope_grid_offset": (),
  "rope_rotate_half": (), "rope_temperature": (), "rope_type": (),
  "use_post_norm": (False,),
}  # fmt: skip
_PRETRAINED = {
  "crop_mode": Literal["center", "squash"],
  "crop_pct": Annotated[float, Range(min=0.1, max=2)],
  "input_size": tuple[int, Side, Side],
  "interpolation": str,
  "mean": tuple[float, float, float],
  "std": tuple[PositiveFloat, PositiveFloat, PositiveFloat],
}
# Alternatives: the first that a file has.
_BLOCK = "blocks.{i}."
_NAMES = {
  "patch_embed": ("patch_embed.proj",),
  "patch_norm": ("patch_embed.norm",),
  "pre_norm": ("norm_pre",),
  "cls_token": ("cls_token",),
  "mask_token": ("mask_token",),
  "registers": ("reg_token", "register_tokens"),
  "position_embedding": ("pos_embed",),
  "blocks/norm1": (f"{_BLOCK}norm1",),
  "blocks/attention/out": (f"{_BLOCK}attn.proj",),
  "blocks/scale1": (f"{_BLOCK}ls1.gamma", f"{_BLOCK}gamma_1"),
  "blocks/norm2": (f"{_BLOCK}norm2",),
  "blocks/mlp/gate": (f"{_BLOCK}mlp.fc1_g",),
  "blocks/mlp/fc1": tuple(f"{_BLOCK}mlp.{n}" for n in ("fc1", "fc1_x", "w12")),
  "blocks/mlp/norm": (f"{_BLOCK}mlp.norm",),
  "blocks/mlp/fc2": (f"{_BLOCK}mlp.fc2", f"{_BLOCK}mlp.w3"),
  "blocks/scale2": (f"{_BLOCK}ls2.gamma", f"{_BLOCK}gamma_2"),
  "norm": ("norm",),
  "pool_norm": ("fc_norm",),
  "projection": ("head",),
  "pool/probe": ("attn_pool.latent",),
  **{
    f"pool/{ours}": (f"attn_pool.{theirs}",)
    for ours, theirs in (
      ("attention/q", "q"), ("attention/out", "proj"), ("norm", "norm"),
      ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2"),
    )
  },
}  # fmt: skip
BUFFERS = r"(^|\.)rope\.|\.attn\.qkv\.bias_mask$"
_IGNORED = rf"{BUFFERS}|(^|\.)(head|head_dist)\."  # Classifiers.


class _Trunk:
  """The tensors of a timm model in a file, whose names start with `prefix`."""

  def __init__(self, store: TensorFile, prefix: str):
    self._store, self._prefix = store, prefix
    self._names = set(store.names)

  def find(self, leaf: str) -> str | None:
    """Finds the file's name of one of our layers or leaves; None if absent."""
    for name in _NAMES[leaf]:
      name = self._prefix + name
      first_name = name.replace("{i}", "0")
      if {first_name, f"{first_name}.weight"} & self._names:
        return name
    return None

  def has(self, name: str) -> bool:
    return self._prefix + name in self._names

  def shape(self, leaf: str, axes: int) -> tuple[int, ...]:
    name = (self.find(leaf) or self._prefix + _NAMES[leaf][0]).replace(
      "{i}", "0"
    )
    name = name if name in self._names else f"{name}.weight"
    if name not in self._names:
      raise ConversionError(f"{name!r} is missing: incomplete weights.")
    sizes = tuple(self._store.shape(name))
    if len(sizes) != axes or 0 in sizes:
      raise ConversionError(f"{name} is {sizes}, expected {axes} axes.")
    return sizes

  def depth(self) -> int:
    pattern = re.compile(rf"{re.escape(self._prefix)}blocks\.(\d{{1,4}})\.")
    matches = map(pattern.match, self._names)
    return max((int(m[1]) for m in matches if m), default=-1) + 1

  def split_positions(self, prefix: int) -> tuple[int, int]:
    """Grid side, and the number of prefix tokens that have positions."""
    rows = self.shape("position_embedding", 3)[1]
    for count in (0, 1, prefix):
      side = math.isqrt(max(rows - count, 0))
      if count <= prefix and side > 0 and side**2 + count == rows:
        return side, count
    raise ConversionError(
      f"pos_embed has {rows} rows: not a square of patches."
    )


def read_model(
  folder: pathlib.Path, config: Mapping[str, Any], *, with_params: bool = True
) -> ConvertedModel:
  """Reads a timm folder, with or without its parameters."""
  with hf_files.open_weights(folder) as store:
    # transformers omits it when it saves a model of `from_pretrained`.
    has_prefix = any(name.startswith(_WRAPPER) for name in store.names)
    prefix = _WRAPPER if has_prefix else ""
    with foreign.errors_of(folder / "config.json"):
      image = read_spec(config, store, prefix)
      preprocess = read_preprocess(config, image)
    spec, params = ModelSpec(image=image), {}
    if with_params:
      mapping = param_mapping(spec, store, prefix)
      params = tensors.load(mapping, store, ignore=_IGNORED)
  return ConvertedModel(spec, params, preprocess)


def read_name(config: Mapping[str, Any]) -> tuple[str, int]:
  """Reads the architecture, without its tag, and its number of heads."""
  full_name = config["architecture"]
  name = full_name.partition(".")[0] if isinstance(full_name, str) else ""
  if _NAME.fullmatch(name):
    for pattern, heads in _HEADS:
      if re.search(pattern, name):
        return name, heads
  raise ConversionError(
    f"timm's architecture {options.shorten_repr(full_name)} is not supported. "
    "Expected a plain ViT, DeiT, CLIP, SigLIP, DINOv2, DINOv3, TIPSv2, AIMv2, "
    "EVA-02 or Perception Encoder, such as 'vit_base_patch14_dinov2'. "
    "EVA-CLIP, hybrids and other rotary ViTs have layers that the tower lacks. "
    "Use eva02_*.mim_* (images) or vit_*_clip_* (two towers) for EVA-CLIP, "
    "transformers' facebook/deit-* for a distilled DeiT, nvidia/C-RADIO* for "
    "RADIO."
  )


def read_spec(
  config: Mapping[str, Any], store: TensorFile, prefix: str = ""
) -> ViTSpec:
  """Reads the spec from a timm `config.json` and tensor shapes."""
  name, heads = read_name(config)
  arguments = foreign.read_fields(
    config.get("model_args") or {}, _ARGUMENTS, where="model_args."
  )
  trunk, is_pe = _Trunk(store, prefix), "_pe_" in name
  is_rotary = is_pe or name.startswith("eva02") or "dinov3" in name
  accepted = {
    **_ACCEPTED,
    "attn_pool_num_heads": (PE_POOL_HEADS,) if is_pe else (),
    "use_pre_transformer_norm": (is_pe,),
    "use_rot_pos_emb": (is_rotary,),
  }
  for argument, values in accepted.items():
    if argument in arguments and arguments[argument] not in values:
      raise ConversionError(
        f"model_args.{argument} is {options.shorten_repr(arguments[argument])}"
        ", but only the architecture's own is supported."
      )
  width, _, patch, _ = trunk.shape("patch_embed", 4)
  mlp_dim = trunk.shape("blocks/mlp/fc2", 2)[1]
  is_packed = trunk.shape("blocks/mlp/fc1", 2)[0] == 2 * mlp_dim
  has_cls = trunk.find("cls_token") is not None
  registers = trunk.shape("registers", 3)[1] if trunk.find("registers") else 0
  gelu = "tanh" if "siglip" in name and re.search(_TANH, name) else "exact"
  is_rms = name.startswith("aimv2")
  has_large_eps = is_rms or re.search("_(clip|dinov3|pe)_", f"{name}_")
  biases = ("none", "query_value", "all")
  names = "q_bias", "q_proj.bias", "qkv.bias"
  has_bias = [trunk.has(f"blocks.0.attn.{n}") for n in names]
  return ViTSpec(
    patch_size=patch,
    width=width,
    depth=trunk.depth(),
    heads=arguments.get("num_heads", heads),
    mlp_dim=mlp_dim,
    mlp="swiglu" if is_packed or trunk.find("blocks/mlp/gate") else "plain",
    mlp_norm=trunk.find("blocks/mlp/norm") is not None,
    cls_token=has_cls,
    mask_token=trunk.find("mask_token") is not None,
    registers=registers,
    layer_scale=0.1 if trunk.find("blocks/scale1") else None,
    pre_norm=trunk.find("pre_norm") is not None,
    patch_norm=trunk.find("patch_norm") is not None,
    final_norm=trunk.find("norm") is not None,
    pool_norm=trunk.find("pool_norm") is not None,
    norm_kind="rms" if is_rms else "layer",
    norm_eps=1e-5 if has_large_eps else 1e-6,
    patch_bias=trunk.has("patch_embed.proj.bias"),
    qkv_bias=biases[2 * has_bias[2] or int(any(has_bias))],
    bias=trunk.has("blocks.0.attn.proj.bias"),
    gelu="quick" if "quickgelu" in name else gelu,
    position_resize="antialiased",
    **_read_positions(name, config, trunk, has_cls + registers),
    **_read_pool(config, arguments, trunk, is_pe),
    projection=read_projection(store, prefix) if is_pe else None,
  )


def read_projection(store: TensorFile, prefix: str) -> int | None:
  """Width of a PE-Core's projection, whose bias is 0; a classifier's is not."""
  bias = f"{prefix}head.bias"
  if bias not in store.names or store.read(bias).any():
    return None
  return store.shape(bias)[0]


def _read_pretrained(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Reads `pretrained_cfg`, which older files have at the top level."""
  section = config.get("pretrained_cfg") or config
  fields = foreign.read_fields(section, _PRETRAINED, where="pretrained_cfg.")
  sides = {*fields.get("input_size", ())[1:]}
  if len(sides) > 1:
    raise ConversionError(f"pretrained_cfg.input_size has sides {sides}.")
  return {key: fields[key] for key in _PRETRAINED if key in fields}


def _read_positions(
  name: str, config: Mapping[str, Any], trunk: _Trunk, prefix: int
) -> dict[str, Any]:
  """Fields of the spec's positions and image size."""
  patch, is_pe = trunk.shape("patch_embed", 4)[2], "_pe_" in name
  if "dinov3" in name:
    size = _read_pretrained(config).get("input_size", (3, 224, 224))[1]
    size = max(size // patch, 1) * patch
    return {"image_size": size, "positions": "rope", "rope": Rope()}
  size = trunk.split_positions(prefix)[0] * patch
  if is_pe:
    rope = pe_rope(name, patch, prefix)
  elif name.startswith("eva02"):
    rope = Rope(base=10_000.0, normalize="index", reference=_EVA_GRID)
  else:
    return {"image_size": size, "positions": "learned"}
  return {"image_size": size, "positions": "learned_rope", "rope": rope}


def pe_rope(name: str, patch: int, prefix: int) -> Rope:
  """Rotary positions of a Perception Encoder with `prefix` tokens."""
  return Rope(
    base=10_000.0,
    normalize="index",
    # Rescales the positions of any grid to the pretraining grid.
    reference=int(name.rpartition("_")[2]) // patch,
    offset=float(prefix),
  )


def _read_pool(
  config: Mapping[str, Any],
  arguments: Mapping[str, Any],
  trunk: _Trunk,
  is_pe: bool,
) -> dict[str, Any]:
  """Fields of the spec's pooling."""
  if trunk.find("pool/probe"):
    mlp_dim = trunk.shape("pool/mlp/fc1", 2)[0]
    fields = {"pool": "map", "pool_mlp_dim": mlp_dim, "pool_prefix": is_pe}
    return {**fields, "pool_heads": PE_POOL_HEADS if is_pe else None}
  # timm's DINOv3 and PE have CLS tokens, and pool patches, as do models with a
  # norm of the mean.
  is_token = trunk.find("cls_token") and trunk.find("position_embedding")
  is_mean = is_pe or trunk.find("pool_norm")
  default = "token" if is_token and not is_mean else "avg"
  configured = foreign.read_field(config, "global_pool", _Pool, default=default)
  if (pool := arguments.get("global_pool", configured)) not in _POOLS:
    raise ConversionError("'attn_pool.latent' is missing: incomplete weights.")
  return {"pool": _POOLS[pool]}


def read_preprocess(config: Mapping[str, Any], spec: ViTSpec) -> dict[str, Any]:
  """Fields of `Preprocess` from timm's `pretrained_cfg`, with its defaults.

  timm resizes to `1 / crop_pct` of the size and crops. Without the section, a
  Perception Encoder uses its publisher's: squash, bilinear.
  """
  pretrained, size = _read_pretrained(config), spec.image_size
  if not pretrained and "_pe_" in config["architecture"]:
    half = processors.HALF
    return {"size": size, "resize": "squash", "mean": half, "std": half}
  if not pretrained:
    log.warning(
      "config.json has no pretrained_cfg: images get ImageNet's mean and std, "
      "and timm's default crop. Copy the section from the model's config.json."
    )
  size = pretrained.get("input_size", (3, size, size))[-1]
  is_squashed = pretrained.get("crop_mode") == "squash"
  resized = max(math.floor(size / pretrained.get("crop_pct", _CROP_PCT)), size)
  is_cropped = resized != size or not is_squashed
  crop_fields = {"crop": "center", "crop_rounding": "nearest"}  # torchvision's
  return processors.fit_patches(
    {
      "size": size,
      "resize": "squash" if is_squashed else "shortest",
      **(crop_fields if is_cropped else {}),
      **({"resize_size": resized} if resized != size else {}),
      "interpolation": pretrained.get("interpolation", "bicubic"),
      "mean": pretrained.get("mean", processors.IMAGENET_MEAN),
      "std": pretrained.get("std", processors.IMAGENET_STD),
    },
    spec.patch_size,
  )


def _channel_order(image: ViTSpec) -> np.ndarray:
  """Maps each of our channels of a head to timm's channel."""
  # In each half, our channels rotate by row angles, then by column angles.
  pairs = np.arange(image.width // image.heads // 2)
  # PE rotates by column angles first. Among rotary towers only PE has this
  # norm: `read_spec` refuses `use_pre_transformer_norm` for others.
  if image.pre_norm:
    pairs = np.roll(pairs, len(pairs) // 2)
  return np.concatenate([2 * pairs, 2 * pairs + 1])


def param_mapping(
  spec: ModelSpec, store: TensorFile, prefix: str = ""
) -> list[Rule]:
  """Conversion rules for the image tower of a file with these tensors."""
  image, trunk = spec.image, _Trunk(store, prefix)
  # If the file lacks a leaf, an error names the first alternative.
  leaves = {k: trunk.find(k) or prefix + v[0] for k, v in _NAMES.items()}
  attention = f"{prefix}blocks.{{i}}.attn."
  is_rotary = image.positions == "learned_rope"
  order = _channel_order(image) if is_rotary else None
  kernel, bias = tables.stacked_qkv("image", image, f"{attention}qkv.", order)
  suffix = "_bias"
  if trunk.has("blocks.0.attn.q_proj.weight"):
    names = (f"{attention}{part}_proj.weight" for part in "qkv")
    kernel, suffix = tables.split_rows(kernel, *names), "_proj.bias"
  if image.qkv_bias == "query_value":
    query, value = (f"{attention}{part}{suffix}" for part in "qv")
    bias = tables.split_rows(bias, query, None, value)
  special = [kernel, bias] if image.qkv_bias != "none" else [kernel]
  if "learned" in image.positions:
    _, count = trunk.split_positions(image.prefix)
    tokens = ["cls_token", "registers"] if count > 1 else ["cls_token"][:count]
    folded = {f"image/{k}": leaves[k] for k in tokens if trunk.find(k)}
    if folded:
      positions = leaves["position_embedding"]
      special.append(tables.folded_positions(folded, positions, image))
  if image.mlp == "swiglu" and not trunk.find("blocks/mlp/gate"):
    special += dinov2.fused_swiglu_rule(leaves["blocks/mlp/fc1"], image)
  if image.pool == "map":
    special += tables.stacked_projections(
      {"image/pool/attention/kv": 2},
      f"{prefix}attn_pool.kv.",
      image.width,
      image.pool_heads or image.heads,
    )
  if image.projection:
    zeros = np.zeros(image.projection)
    special.append(tables.constant(f"{prefix}head.bias", zeros))
  axes = {"cls_token": 2, "mask_token": 1, "pool/probe": 2}
  axes |= {"registers": 1, "position_embedding": 1}
  return tables.tower_rules(
    ModelSpec(image=image),
    tables.nest("image/", "", leaves),
    *special,
    num_unit_axes={f"image/{name}": count for name, count in axes.items()},
  )
