"""Image and text tower as one model: variants, spec, initialisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtv_jax.config import options, sections
from mtv_jax.config.options import Range
from mtv_jax.models import init
from mtv_jax.models.attention import CHOICES, PLAIN
from mtv_jax.models.layers import NumLayers, Width
from mtv_jax.models.linear import build_linear_fn
from mtv_jax.models.positions import Rope
from mtv_jax.models.remat import build_policy
from mtv_jax.models.text import TextSpec, TextTower
from mtv_jax.models.vit import Pool, ViT, ViTSpec
from mtv_jax.utils import errors
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  check_choice,
  printable,
)

# width, depth, heads, mlp_dim. Ti, S: Touvron et al. 2021; B, L: Dosovitskiy et
# al. 2021; So400m: Alabdulmohsin et al. 2023; g: Zhai et al. 2022; g-opt: the
# giants of SigLIP 2 and DINOv2 (24 heads and SwiGLU of 4096 by config).
# mu is for tests.
_SHAPES = {
  "mu": (64, 2, 4, 256),
  "Ti": (192, 12, 3, 768),
  "S": (384, 12, 6, 1536),
  "B": (768, 12, 12, 3072),
  "L": (1024, 24, 16, 4096),
  "So400m": (1152, 27, 16, 4304),
  "g": (1408, 40, 16, 6144),
  "g-opt": (1536, 40, 16, 6144),
}
VARIANTS: dict[str, dict[str, int]] = {
  name: dict(zip(("width", "depth", "heads", "mlp_dim"), shape, strict=True))
  for name, shape in _SHAPES.items()
}

# Keys of `config.model` beyond the architecture.
_DROP_PATH = ("drop_path", "drop_path_uniform")  # Image tower only.
RUNTIME = (
  "dtype", "remat", "scan", "attention", "quantization", *_DROP_PATH
)  # fmt: skip
_TRAINING = (
  *RUNTIME, "init", "image_mean", "image_std", "preprocess", "mup"
)  # fmt: skip
_TEXT_INPUT = ("tokenizer", "clean", "mup")

# One number for all channels, or one per channel.
Channels = float | tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MupConfig:
  """`config.model.mup`, `config.model.text.mup`; see `train/mup.py`."""

  base_width: Width
  base_depth: NumLayers | None = None  # None: the tower's.
  base_heads: Width | None = None  # None: heads of the tower's channels.
  # 1: CompleteP; 0.5: depth-muP.
  depth_exponent: Annotated[float, Range(min=0.5, max=1)] = 1.0

  def base_options(self, spec: Any, where: str) -> dict[str, int]:
    """The fields of a tower's spec that differ at the base width."""
    ratio, channels = self.base_width / spec.width, spec.width // spec.heads
    heads = self.base_heads or max(round(self.base_width / channels), 1)
    if self.base_width % heads or (
      self.base_heads is None and heads * channels != self.base_width
    ):
      parts = self.base_heads or f"heads of {channels} channels"
      raise ConfigError(
        f"{where}.base_width {self.base_width} can't be split into {parts}."
      )
    fields = dict(width=self.base_width, heads=heads)
    fields["mlp_dim"] = round(spec.mlp_dim * ratio)
    if getattr(spec, "pool_mlp_dim", None):
      fields["pool_mlp_dim"] = round(spec.pool_mlp_dim * ratio)
    if getattr(spec, "pool_heads", None):
      pool_heads = round(spec.pool_heads * heads / spec.heads)
      fields["pool_heads"] = max(pool_heads, 1)
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """`config.model.text`."""

  variant: str = "B"
  length: int = 64
  # Rows of the embedding table. None: the tokenizer's size, see `run.resolve`.
  vocab_size: int | None = None
  # 'bytes', 'words', a path (*.model, *.json), 'ORG/NAME' on the hub, or
  # 'train:N' pieces from the run's captions. Training rejects "".
  tokenizer: str = "bytes"
  clean: Literal["lower", "none", "canonicalize", "clip"] = "lower"
  mup: MupConfig | None = sections.sparse(None)
  options: Mapping[str, Any] = sections.further_options()  # `TextSpec` fields.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """`config.model`: architecture and runtime options."""

  variant: str = "B/16"
  image_size: int = 224  # Resolution of the stored position embedding.
  pool: Pool = "map"
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: str = "none"  # See `models/remat.py`.
  scan: bool = True
  # See `models/attention.py`.
  attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
  # Experimental: not timed on an accelerator, see `models/linear.py`.
  quantization: Literal["none", "int8", "fp8"] = "none"
  init: str = "big_vision"  # See `models/init.py`.
  image_mean: Channels = 0.5  # For channels in 0..1.
  image_std: Channels = 0.5
  # Image tower, in training: see `stack.drop_path_scales`.
  drop_path: Annotated[float, Range(min=0, below=1)] = 0.0
  drop_path_uniform: bool = True
  text: TextConfig | None = None
  mup: MupConfig | None = sections.sparse(None)  # The image tower's.
  options: Mapping[str, Any] = sections.further_options()  # `ViTSpec` fields.

  def __post_init__(self):
    pixel_statistics(self.image_mean, self.image_std)

  @functools.cached_property
  def spec(self) -> ModelSpec:
    """The architecture."""
    return ModelSpec.from_config(sections.to_dict(self))

  @property
  def has_mup(self) -> bool:
    return bool(self.mup or (self.text and self.text.mup))

  @property
  def mup_base(self) -> ModelConfig:
    """muP's base model, at this model's depths."""
    options, text = self.options, self.text
    if self.mup:
      base = self.mup.base_options(self.spec.image, "config.model.mup")
      options = {**options, **base}
    if text and text.mup:
      base = text.mup.base_options(self.spec.text, "config.model.text.mup")
      text = dataclasses.replace(text, options={**text.options, **base})
    return dataclasses.replace(self, options=options, text=text)

  @property
  def depth_ratios(self) -> dict[str, tuple[float, float]]:
    """Ratio to muP's base depth, and the depth exponent, by tower."""
    pairs = {"image": (self.mup, self.spec.image)}
    if self.text:
      pairs["text"] = self.text.mup, self.spec.text
    return {
      tower: (spec.depth / mup.base_depth, mup.depth_exponent)
      for tower, (mup, spec) in pairs.items()
      if mup and mup.base_depth
    }

  @property
  def pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel."""
    return pixel_statistics(self.image_mean, self.image_std)

  @property
  def runtime(self) -> dict[str, Any]:
    """The towers' options `RUNTIME`."""
    return {name: getattr(self, name) for name in RUNTIME}


def pixel_statistics(
  mean: Channels, std: Channels
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std of each channel; raises ConfigError if not in 0..1."""
  statistics = []
  for name, value, minimum in (("mean", mean, 0.0), ("std", std, 1e-3)):
    channels = value if isinstance(value, tuple) else (value,) * 3
    if not all(minimum <= x <= 1 for x in channels):
      raise ConfigError(
        f"config.model.image_{name} is {value}, expected {minimum} to 1: "
        "divide pixel values by 255."
      )
    statistics.append(tuple(map(float, channels)))
  return statistics[0], statistics[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
  """Architecture of a model: an image tower and, unless None, a text tower."""

  image: ViTSpec
  text: TextSpec | None = None

  def __post_init__(self):
    if self.text and self.text.embed_dim != self.image.embed_dim:
      raise InputError(
        f"Image embeddings have {self.image.embed_dim} channels, but "
        f"text embeddings {self.text.embed_dim}. Set "
        f"model.text.projection={self.image.embed_dim}."
      )

  @property
  def embed_dim(self) -> int:
    """Channels of the pooled embeddings (E)."""
    return self.image.embed_dim

  @classmethod
  def from_config(cls, model: sections.Config) -> ModelSpec:
    """Builds the spec from `config.model`.

    `variant` ('B/16') sets width, depth, heads, mlp_dim and patch_size;
    `text.variant` ('B') sets the text tower's. Explicit fields of `ViTSpec` and
    `TextSpec` override the variant. Text embeddings have the image embeddings'
    width by default; `cls_token` defaults to true if `pool` is 'cls'. Ignores
    keys of the runtime (`RUNTIME`), the initialisation, the pixels and the text
    input (tokenizer, clean).

    Raises InputError for an unknown variant or key, or inconsistent fields.
    """
    fields = sections.to_dict(model)
    text = fields.pop("text", None)
    fields = _expand(fields, "model", ignored=_TRAINING, patch=True)
    fields.setdefault("cls_token", fields.get("pool") == "cls")
    fields = _build_rope(fields, "config.model")
    reserved, where = ("variant", "text", *_TRAINING), "config.model"
    image = options.build(ViTSpec, fields, where=where, reserved=reserved)
    if text is None:
      return cls(image=image)
    if not isinstance(text, Mapping):
      raise InputError(f"config.model.text is {text!r}, expected its options.")
    text = _expand(text, "model.text", ignored=_TEXT_INPUT, patch=False)
    text.setdefault("projection", image.embed_dim)
    if text.get("vocab_size") is None:
      text.pop("vocab_size", None)
    reserved, where = ("variant", *_TEXT_INPUT), "config.model.text"
    text = options.build(TextSpec, text, where=where, reserved=reserved)
    return cls(image=image, text=text)

  def to_dict(self) -> dict[str, Any]:
    """The spec as plain dicts, for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> ModelSpec:
    """The inverse of `to_dict`."""
    specs = {}
    for name, spec_cls in {"image": ViTSpec, "text": TextSpec}.items():
      if fields.get(name) is not None:
        where = f"the model's {name}"
        if not isinstance(fields[name], Mapping):
          value = options.shorten_repr(fields[name])
          raise InputError(f"{where} is {value}, expected an object.")
        tower_fields = _build_rope(fields[name], where)
        specs[name] = options.build(spec_cls, tower_fields, where=where)
    return options.build(cls, {**fields, **specs}, where="the model's spec")


def variant(name: str) -> dict[str, int]:
  """Fields of a variant: 'B' sets the shape, 'B/16' also patch_size.

  Raises InputError for a name that is not in `VARIANTS`, or an invalid patch
  size.
  """
  shape, slash, patch = name.partition("/")
  if shape not in VARIANTS:
    hint = errors.did_you_mean(shape, VARIANTS)
    raise InputError(f"Unknown variant {printable(name, 80)!r}. {hint}")
  if slash and not (patch.isdecimal() and int(patch)):
    raise InputError(
      f"The patch size of variant '{name}' is not a number: write '{shape}/16'."
    )
  return VARIANTS[shape] | ({"patch_size": int(patch)} if slash else {})


def image_tower(spec: ModelSpec, **options: Any) -> ViT:
  """Builds the image tower with the options `RUNTIME`."""
  return _check_options(ViT(spec.image, **options))


def text_tower(spec: ModelSpec, **options: Any) -> TextTower:
  """Builds the text tower with the options `RUNTIME`, without drop path."""
  if spec.text is None:
    raise InputError(
      "This model has no text tower: its config or folder is vision-only."
    )
  options = {n: v for n, v in options.items() if n not in _DROP_PATH}
  return _check_options(TextTower(spec.text, **options))


def _check_options(tower: Any) -> Any:
  """Rejects options that the first call would reject; converts the dtype."""
  build_policy(tower.remat)
  if tower.attention != PLAIN:
    check_choice("config.model.attention", tower.attention, CHOICES)
  build_linear_fn(tower.quantization)
  return tower.clone(dtype=jnp.dtype(tower.dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_params(
  spec: ModelSpec, rng: Array, scheme: str = "big_vision"
) -> dict[str, Any]:
  """Initialises float32 parameters, {'image': ..., 'text': ...}.

  Without a text tower 'text' is absent. Jitted, so that the forward pass that
  Flax traces is not computed; inside a jit with output shardings each device
  computes only its shard. `scheme`: a key of `init.SCHEMES`.
  """
  image_rng, text_rng = jax.random.split(rng)
  size = spec.image.image_size
  images = jnp.zeros((1, size, size, 3))
  params = {"image": image_tower(spec).init(image_rng, images)["params"]}
  if spec.text:
    tokens = jnp.zeros((1, spec.text.length), jnp.int32)
    params["text"] = text_tower(spec).init(text_rng, tokens)["params"]
  return init.reinitialize(params, spec, rng, scheme)


def abstract_params(spec: ModelSpec) -> dict[str, Any]:
  """Shapes and dtypes of `init_params`; computes nothing."""
  return jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))


def _build_rope(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
  fields = dict(fields)
  if isinstance(fields.get("rope"), Mapping):
    fields["rope"] = options.build(Rope, fields["rope"], where=f"{where}.rope")
  return fields


def _expand(
  fields: Mapping[str, Any], where: str, *, ignored: Sequence[str], patch: bool
) -> dict[str, Any]:
  """Replaces `variant` with its fields, which explicit fields override."""
  fields = {k: v for k, v in fields.items() if k not in ignored}
  name = fields.pop("variant", None)
  if name is None:
    return fields
  shape = variant(options.check_value(name, str, f"config.{where}.variant"))
  if patch and not {"patch_size"} & {*shape, *fields}:
    raise InputError(
      f"{where}.variant '{name}' names no patch size: write '{name}/16'."
    )
  if not patch and "patch_size" in shape:
    name = name.partition("/")[0]
    raise InputError(f"{where}.variant names a patch size: write '{name}'.")
  return shape | fields
