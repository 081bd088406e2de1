"""Families of released models, as tables of config keys and tensors.

A family's tables read and write a `config.json`, convert parameters in both
directions, and list the fields that its `transformers` classes can't express.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from mtv_jax.convert import hf_files, processors, tables
from mtv_jax.convert.model import LossType
from mtv_jax.convert.tables import ConversionError, Names, Rule
from mtv_jax.data.tokenizers import source as tokenizer_source
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec

log = logging.getLogger(__name__)

Spec = ViTSpec | TextSpec
Section = Mapping[str, Any]
# transformers' names by our activation; exports write the first name.
_ACTIVATIONS = {
  "tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
  "exact": ("gelu", "gelu_python"),
  "quick": ("quick_gelu",),
  "relu": ("relu",),
}
_GELUS = {name: gelu for gelu, names in _ACTIVATIONS.items() for name in names}
_GATE = "silu"  # Gate activation of a SwiGLU.


@dataclasses.dataclass(frozen=True)
class Key:
  """Mapping between a key of a config section and a tower's spec.

  Without `field` and `read`, the key's default is the only supported value.

  Attributes:
    field: the spec's field that the key determines.
    read: maps a complete section to spec fields; by default sets `field` to the
      key's value.
    write: maps a spec to the key's value; by default the value of `field`, or
      the key's default without a field.
    check: returns why a spec can't be written, or None.
  """

  field: str | None = None
  read: Callable[[Section], dict[str, Any]] | None = None
  write: Callable[[Any], Any] | None = None
  check: Callable[[Any], str | None] = lambda _: None


def ignore(section: Section) -> dict[str, Any]:
  """`Key.read` for a key that does not set fields."""
  del section
  return {}


def read_activation(section: Section, *, gated: bool = False) -> dict[str, Any]:
  """Reads the activation of the MLP, or of the gate in a SwiGLU."""
  value = section["hidden_act"]
  if gated and value != _GATE:
    raise ConversionError(
      f"hidden_act={value!r} of a gated MLP is not supported; expected "
      f"{_GATE!r}."
    )
  if not gated and value not in _GELUS:
    raise ConversionError(
      f"hidden_act={value!r} is not supported; expected one of "
      f"{sorted(_GELUS)}."
    )
  return {} if gated else {"gelu": _GELUS[value]}


def write_activation(spec: Spec, *, gated: bool = False) -> str:
  """The inverse of `read_activation`."""
  return _GATE if gated else _ACTIVATIONS[spec.gelu][0]


def read_sizes(section: Section, key: str = "image_size") -> dict[str, Any]:
  """Reads `image_size` and `patch_size`."""
  size = hf_files.read_side(section[key], key)
  patch = hf_files.read_side(section["patch_size"], "patch_size")
  if patch > size:
    raise ConversionError(f"image_size={size} is below patch_size={patch}.")
  # transformers drops pixels that don't fill a patch.
  return {"image_size": size // patch * patch, "patch_size": patch}


def block_size_defaults(
  width: int, depth: int, heads: int, mlp_dim: int | None = None, **norm: float
) -> dict[str, Any]:
  """Default sizes of a tower's blocks, in writing order."""
  sizes = {"hidden_size": width, "num_hidden_layers": depth}
  sizes["num_attention_heads"] = heads
  return sizes | ({"intermediate_size": mlp_dim} if mlp_dim else {}) | norm


# Keys with one meaning in all families.
KEYS = {
  "attention_dropout": Key(read=ignore),
  "bos_token_id": Key(read=ignore),
  "eos_token_id": Key("eos_id"),
  "hidden_act": Key("gelu", read_activation, write_activation),
  "hidden_size": Key("width"),
  "image_size": Key("image_size", read_sizes),
  "intermediate_size": Key("mlp_dim"),
  "layer_norm_eps": Key("norm_eps"),
  "layerscale_value": Key(
    "layer_scale", lambda c: {"layer_scale": float(c["layerscale_value"])}
  ),
  "max_position_embeddings": Key("length"),
  "num_attention_heads": Key("heads"),
  "num_hidden_layers": Key("depth"),
  "num_register_tokens": Key("registers"),
  # Write-only, from the tokenizer: see `Family.write_config`.
  "pad_token_id": Key(read=ignore, write=lambda spec: spec.pad_id),
  "patch_size": Key("patch_size", ignore),
  # Sections repeat the config's width for both towers.
  "projection_dim": Key(
    read=ignore, write=lambda spec: spec.projection or spec.width
  ),
  "rms_norm_eps": Key("norm_eps"),
  # Whether an attention head pools the patches.
  "use_head": Key(
    read=lambda c: {"pool": "query" if c["use_head"] else "mean"},
    write=lambda spec: spec.pool == "query",
  ),
  "vision_use_head": Key(
    read=lambda c: {"pool": "map" if c["vision_use_head"] else "mean"},
    write=lambda spec: spec.pool == "map",
  ),
  "vocab_size": Key("vocab_size"),
}


@dataclasses.dataclass(frozen=True)
class AnyOf:
  """Supported values of a field; `read_fields` uses the first."""

  values: tuple[Any, ...]


# Required values of fields that neither a key nor `TowerTable.fields` sets.
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
  "image": {
    "pool_tokens": (0,),
    "pool_prefix": False,
    "pool_heads": None,
    "pool_norm": False,
    "positions": "learned",
    "registers": 0,
    "layer_scale": None,
    "mlp": "plain",
    "mlp_norm": False,
    "pre_norm": False,
    "patch_norm": False,
    "final_norm": True,
    "norm_kind": "layer",
    "patch_bias": True,
    "qkv_bias": "all",
    "bias": True,
    "projection": None,
  },
  "text": {
    "mlp": "plain",
    "qkv_bias": "all",
    "bias": True,
    "norm_kind": "layer",
    "positions": "learned",
    "token_scale": False,
    "pad_id": None,
  },
}


@dataclasses.dataclass(frozen=True)
class TowerTable:
  """Table of one tower.

  Attributes:
    defaults: transformers' defaults of the tower's config section, in writing
      order.
    fields: spec fields that the class fixes, possibly to `AnyOf`.
    names: tensor names by our layers, see `tables.Names`.
    gated: names that differ for a SwiGLU.
    keys: overrides of `KEYS`.
  """

  defaults: Mapping[str, Any]
  fields: Mapping[str, Any]
  names: Names
  gated: Names = dataclasses.field(default_factory=dict)
  keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)

  def read_fields(self, section: Section) -> dict[str, Any]:
    """Reads spec fields from a section that has all keys of `defaults`."""
    spec_fields = {
      name: value.values[0] if isinstance(value, AnyOf) else value
      for name, value in self.fields.items()
    }
    for name, default in self.defaults.items():
      key = self._find_key(name)
      if key.read:
        spec_fields |= key.read(section)
      elif key.field:
        spec_fields[key.field] = section[name]
      else:
        hf_files.require((name, section[name], default))
    return spec_fields

  def write_section(self, spec: Spec) -> dict[str, Any]:
    """Writes the config section; the inverse of `read_fields`."""
    section = {}
    for name, default in self.defaults.items():
      key = self._find_key(name)
      value = getattr(spec, key.field) if key.field else default
      section[name] = key.write(spec) if key.write else value
    return section

  def unsupported_fields(
    self, spec: Spec, tower: str, **fields: Any
  ) -> list[str]:
    """Returns a line per spec field that transformers' class can't express.

    `fields` override `self.fields`.
    """
    keys = [self._find_key(name) for name in self.defaults]
    mapped = {key.field for key in keys}
    lines = [reason for key in keys if (reason := key.check(spec))]
    for name, value in {**_REQUIRED[tower], **self.fields, **fields}.items():
      expected = value.values if isinstance(value, AnyOf) else (value,)
      if name not in mapped and (got := getattr(spec, name)) not in expected:
        choices = " or ".join(map(repr, expected))
        lines.append(f"{name} is {got!r} but must be {choices}")
    return [f"  {tower}.{line}\n" for line in lines]

  def _find_key(self, name: str) -> Key:
    return self.keys.get(name) or KEYS.get(name) or Key()


class Family:
  """A released model layout: an image tower, optionally with a text tower."""

  # The model_type. In a family with text towers, a standalone image tower has
  # the model_type `NAME_vision_model`.
  name: ClassVar[str]
  # Class in transformers, without the suffix "Model" or "VisionModel".
  class_name: ClassVar[str]
  image: ClassVar[TowerTable]
  text: ClassVar[TowerTable | None] = None
  # Default width of both towers' projections; None without projections.
  projection_dim: ClassVar[int | None] = None
  projection_name: ClassVar[str] = "visual_projection"  # The image tower's.
  # Prefixes of tensors: image tower with a text tower, standalone image tower,
  # text tower.
  image_prefix: ClassVar[str] = ""
  alone_prefix: ClassVar[str] = ""
  text_prefix: ClassVar[str] = "text_model."
  num_unit_axes: ClassVar[Mapping[str, int]] = {}  # See `tables.leaf_rules`.
  ignored: ClassVar[str] = r"(?!)"  # Pattern of unused tensors.
  # Loss of the image-text contrast.
  loss: ClassVar[LossType] = "softmax"
  # Files of a folder.
  config_file: ClassVar[str] = "config.json"
  weights: ClassVar[str] = hf_files.WEIGHTS
  readme: ClassVar[str | None] = None  # By default, `card.write_card`.
  # Whether a standalone image tower can be exported.
  exports_image: ClassVar[bool] = True
  # Parameters that exports require, see `ConvertedModel.add_neutral_params`.
  neutral: ClassVar[tuple[str, ...]] = ()
  config: ClassVar[Mapping[str, Any]] = {}  # Extra keys of a `config.json`.
  # Image processor of an export, and the family's own ones by `rounding`.
  processor: ClassVar[str] = "CLIP"
  own_processors: ClassVar[Mapping[str, str]] = {}
  # The class's `position_resize` for images of another size; None: it accepts
  # only images of its `image_size`.
  resampling: ClassVar[str | None] = None
  # Default fields of `Preprocess` without an image processor.
  preprocess: ClassVar[Mapping[str, Any]] = {}
  # Whether to lower-case texts and to add an end token, unless the tokenizer's
  # file specifies it.
  lower_case: ClassVar[bool] = False
  add_end: ClassVar[bool] = True

  def model_types(self) -> list[str]:
    """The supported values of `model_type`."""
    return [self.name, *([f"{self.name}_vision_model"] if self.text else ())]

  def full_class_name(self, spec: ModelSpec) -> str:
    """The transformers class that opens an export."""
    is_standalone = self.text is not None and spec.text is None
    return f"{self.class_name}{'VisionModel' if is_standalone else 'Model'}"

  def takes_any_size(self, spec: ModelSpec) -> bool:
    """Whether the class resamples positions as the model does."""
    resampling = spec.image.position_resize
    return spec.image.positions == "rope" or resampling == self.resampling

  def can_export(self, spec: ModelSpec) -> bool:
    """Whether the family has a class for the model's towers."""
    return self.exports_image if spec.text is None else self.text is not None

  def read_spec(self, config: Section, names: Collection[str]) -> ModelSpec:
    """Reads the spec from a `config.json` and the file's tensor names."""
    if self.text is None or config["model_type"] != self.name:
      section = hf_files.with_defaults(config, self.image.defaults)
      return ModelSpec(image=self._read_image(section, config, names))
    text = None
    if any(name.startswith(self.text_prefix) for name in names):
      section = _read_section(config, "text_config", self.text.defaults)
      fields = self.text.read_fields(section)
      if self.projection_dim:
        fields["projection"] = self._read_projection(config)
      text = TextSpec(**fields)
    else:
      log.info("No text tower in the file: only images can be encoded.")
    section = _read_section(config, "vision_config", self.image.defaults)
    image = self._read_image(section, config, names, text)
    return ModelSpec(image=image, text=text)

  def _read_image(
    self,
    section: Section,
    config: Section,
    names: Collection[str],
    text: TextSpec | None = None,
  ) -> ViTSpec:
    fields = self.image.read_fields(section)
    mask = self.image.names.get("mask_token")
    if mask and any(name.endswith(mask) for name in names):
      fields["mask_token"] = True
    is_projected = text is not None or "visual_projection.weight" in names
    if self.projection_dim and is_projected:
      fields["projection"] = self._read_projection(config)
    return ViTSpec(**fields)

  def _read_projection(self, config: Section) -> int:
    default = {"projection_dim": self.projection_dim}
    return hf_files.with_defaults(config, default)["projection_dim"]

  def read_preprocess(
    self, folder: pathlib.Path, config: Section, spec: ModelSpec
  ) -> dict[str, Any]:
    """Reads the fields of `Preprocess` from a folder."""
    del config
    defaults, patch = self.default_preprocess(spec), spec.image.patch_size
    return processors.read_preprocess(folder, defaults, patch_size=patch)

  def default_preprocess(self, spec: ModelSpec) -> dict[str, Any]:
    """Fields of `Preprocess` without an image processor."""
    return {"size": spec.image.image_size, **self.preprocess}

  def read_tokenizer(self, folder: pathlib.Path) -> TokenizerFiles | None:
    """Reads the folder's tokenizer."""
    return tokenizer_source.read_tokenizer(
      folder, lower_case=self.lower_case, add_end=self.add_end
    )

  def tokenizer_config(self, spec: TextSpec) -> dict[str, Any]:
    """Extra fields of an export's `tokenizer_config.json`."""
    del spec
    return {}

  def find_prefix(self, config: Section, names: Collection[str]) -> str:
    """Finds the prefix of the image tower's tensors in a file.

    `vision_model.` in two-tower files and, before transformers 5, in standalone
    vision towers; `dinov2.` in classifiers.
    """
    model_type = config["model_type"]
    for prefix in ("vision_model.", "vision_encoder.", f"{model_type}."):
      if any(name.startswith(prefix) for name in names):
        return prefix
    return self.image_prefix if model_type == self.name else ""

  def param_mapping(
    self, spec: ModelSpec, prefix: str | None = None
  ) -> list[Rule]:
    """Conversion rules for all parameters; `prefix` is the image tower's."""
    if prefix is None:
      prefix = self.image_prefix if spec.text else self.alone_prefix
    image = dict(self.image.names)
    if spec.image.mlp == "swiglu":
      image |= self.image.gated
    names = {
      **tables.nest("image/", prefix, image),
      "image/projection": self.projection_name,
    }
    special = self.special_rules(spec, prefix)
    if self.text is not None and spec.text is not None:
      names |= tables.nest("text/", "", self.text.names)
      special += self.temperature_rules()
    axes = self.num_unit_axes
    return tables.tower_rules(spec, names, *special, num_unit_axes=axes)

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    """Rules for parameters that `names` can't express."""
    del spec, prefix
    return []

  def temperature_rules(self) -> list[Rule]:
    """Rules for the contrast's temperature and bias."""
    if self.loss == "sigmoid":
      return tables.scale_and_bias("logit_scale", "logit_bias")
    return [tables.scale_without_bias("logit_scale", ())]

  def constants(self, spec: ModelSpec) -> list[Rule]:
    """Rules for an export's constant tensors."""
    del spec
    return []

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    """Writes the `config.json` of a model without `unsupported_fields`.

    `pad_id` is the tokenizer's; by default the end token pads texts.
    """
    common = {
      "dtype": "float32",
      "torch_dtype": "float32",
      "architectures": [self.full_class_name(spec)],
    }
    image, text = self.image.write_section(spec.image), spec.text
    if self.text is None:
      return {**common, "model_type": self.name, **image}
    image = {"model_type": f"{self.name}_vision_model", **image}
    if text is None:
      return {**image, **common}
    if text.pad_id is None:
      pad_id = text.eos_id if pad_id is None else pad_id
      text = dataclasses.replace(text, pad_id=pad_id)
    widths = {"projection_dim": spec.embed_dim} if self.projection_dim else {}
    model_type = {"model_type": f"{self.name}_text_model"}
    return {
      **common,
      "model_type": self.name,
      **self.config,
      **widths,
      "vision_config": image,
      "text_config": {**model_type, **self.text.write_section(text)},
    }

  def write_files(
    self, spec: ModelSpec, config: dict[str, Any], fields: Section, size: int
  ) -> dict[str, Any]:
    """Builds the JSON files of an export from the fields of `Preprocess`."""
    if not self.takes_any_size(spec) and (drop := fields.get("drop")):
      # transformers' image_size includes dropped pixels.
      config.get("vision_config", config)["image_size"] += drop
    processor = processors.write_processor(
      fields, size, self.processor, self.own_processors
    )
    if spec.text is None:
      processor.pop("processor_class", None)
    return {self.config_file: config, "preprocessor_config.json": processor}

  def unsupported_fields(self, spec: ModelSpec) -> list[str]:
    """Returns a line per spec field that transformers' class can't express."""
    fields = {}
    if self.projection_dim and spec.text is not None:
      fields["projection"] = spec.embed_dim
    elif "projection_dim" in self.image.defaults:
      fields["projection"] = spec.image.projection
    lines = []
    if self.text is not None and spec.text is not None:
      lines = self.text.unsupported_fields(spec.text, "text", **fields)
    elif {"use_head", "vision_use_head"} & self.image.defaults.keys():
      # Without its head, a standalone image tower returns only patches.
      fields["pool"] = AnyOf((self.image.fields["pool"], "mean"))
    fields["pool_mlp_dim"] = AnyOf((None, spec.image.mlp_dim))
    return self.image.unsupported_fields(spec.image, "image", **fields) + lines


def _read_section(
  config: Section, name: str, defaults: Section
) -> dict[str, Any]:
  """Reads a tower's section. Early CLIPs have two; the second one wins."""
  section = hf_files.with_defaults(config.get(name), defaults, name)
  if (second := config.get(f"{name}_dict")) is not None:
    section |= hf_files.with_defaults(second, defaults, f"{name}_dict")
  return section
