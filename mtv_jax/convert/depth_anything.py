"""transformers Depth Anything V2 folders: read and export.

The model is a DINOv2 (`backbone.`) with a DPT neck and head, see
`models/heads/dpt.py`. `read` serves the labelling expert, `read_model` an
`Encoder` with a depth head.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtv_jax.config import foreign
from mtv_jax.convert import dinov2, hf_files, processors, tables, tensors
from mtv_jax.convert.family import Family
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models import two_tower
from mtv_jax.models.heads import PredictionHead, dpt
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names

# Resolutions of the reassembled maps relative to the patch grid.
FACTORS = (4, 2, 1, 0.5)
_DEFAULTS = {
  "reassemble_hidden_size": 384,
  "reassemble_factors": FACTORS,
  "neck_hidden_sizes": (48, 96, 192, 384),
  "fusion_hidden_size": 64,
  "head_hidden_size": 32,
  "head_in_index": -1,
  "patch_size": 14,
  "depth_estimation_type": "relative",
  "max_depth": 1,
}
# The default backbone.
_BACKBONE = {
  "model_type": "dinov2",
  "image_size": 518,
  "hidden_size": 384,
  "num_attention_heads": 6,
  "out_indices": (9, 10, 11, 12),
}
NORM_EPS = 1e-6  # epsilon of the norms in `dpt.DPT`
_BACKBONE_DEFAULTS = {"patch_size": 14, "apply_layernorm": True}
# The deepest fusion has a single input, so its first unit is unused.
_IGNORE = r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."
_REASSEMBLE = {"projection": "projection", "resize": "resize"}
_FUSION = {
  "projection": "projection",
  "residual1/conv1": "residual_layer1.convolution1",
  "residual1/conv2": "residual_layer1.convolution2",
  "residual2/conv1": "residual_layer2.convolution1",
  "residual2/conv2": "residual_layer2.convolution2",
}
_NAMES = {f"depth/conv{k}": f"head.conv{k}" for k in (1, 2, 3)}
for _i in range(dpt.STAGES):
  # Checkpoints count fusions from the deepest.
  _reassemble = f"neck.reassemble_stage.layers.{_i}."
  _fusion = f"neck.fusion_stage.layers.{dpt.STAGES - 1 - _i}."
  _NAMES |= {
    **tables.nest(f"depth/reassemble{_i + 1}/", _reassemble, _REASSEMBLE),
    f"depth/lateral{_i + 1}": f"neck.convs.{_i}",
    **tables.nest(f"depth/fusion{_i + 1}/", _fusion, _FUSION),
  }


@dataclasses.dataclass(frozen=True)
class DepthSpec:
  """Architecture of a Depth Anything V2."""

  image: ViTSpec
  # Block indices that the head reads, each normalised by the final norm.
  layers: tuple[int, ...]
  head: dpt.DPT


def read(
  folder: str | os.PathLike, *, with_params: bool = True
) -> tuple[DepthSpec, dict[str, Any]]:
  """Reads a folder of `DepthAnythingForDepthEstimation.save_pretrained`.

  Returns the architecture, and the parameters `image` and `depth` as NumPy
  arrays, or {} with `with_params=False`.
  """
  path, config = hf_files.read_config(
    folder, model_type="depth_anything", example="Depth-Anything-V2-Small-hf"
  )
  with hf_files.open_weights(path) as store:
    with foreign.errors_of(path / "config.json"):
      spec = read_spec(config, store.names)
    params = {}
    if with_params:
      params = tensors.load(param_mapping(spec), store, ignore=_IGNORE)
    return spec, params


def read_model(
  folder: str | os.PathLike, *, with_params: bool = True
) -> ConvertedModel:
  """Reads a folder as an encoder with the head `depth`; arguments as in `read`.

  The backbone's final norm is copied into the head as the norm of every stage.
  By default, images are squashed to the pretraining size; `relative_depth`
  feeds the published input.
  """
  spec, params = read(folder, with_params=with_params)
  eps = spec.image.norm_eps
  hf_files.require(("backbone_config.layer_norm_eps", eps, NORM_EPS))
  head = _make_head(spec.image, taps=spec.layers, **_sizes(spec.head))
  if params:
    leaves = {**params["depth"], **stage_norms(params["image"])}
    params = {"image": params["image"], "heads": {head.params_key: leaves}}
  return ConvertedModel(
    ModelSpec(image=spec.image),
    params,
    {
      "size": spec.image.image_size,
      "interpolation": "bicubic",
      "mean": processors.IMAGENET_MEAN,
      "std": processors.IMAGENET_STD,
    },
    prediction_heads={"depth": head},
  )


def _sizes(head: dpt.DPT | dpt.DepthHead) -> dict[str, Any]:
  names = ("features", "channels", "head_features")
  return {name: getattr(head, name) for name in names}


def _make_head(image: ViTSpec, **sizes: Any) -> dpt.DepthHead:
  """The depth head of a Depth Anything V2."""
  return dpt.DepthHead(
    tap_norm="layer",
    scale=image.patch_size,
    upsample=2,
    activation="relu",
    **sizes,
  )


def stage_norms(image: Mapping[str, Any]) -> dict[str, Any]:
  """Norms of the head's stages: the backbone's final norm."""
  return {f"norm{i + 1}": image["norm"] for i in range(dpt.STAGES)}


def read_spec(config: Mapping[str, Any], names: Collection[str]) -> DepthSpec:
  """Reads the architecture from a `config.json` and the tensors' names."""
  backbone = config.get("backbone_config") or _BACKBONE
  name = "backbone_config"
  if config.get("backbone") and backbone is _BACKBONE:
    raise ConversionError(
      f"backbone={config['backbone']!r}: only a backbone_config of model_type "
      "'dinov2' is supported."
    )
  backbone = hf_files.with_defaults(backbone, _BACKBONE_DEFAULTS, name)
  model_type = backbone.get("model_type")
  hf_files.require(("backbone_config.model_type", model_type, "dinov2"))
  config = hf_files.with_defaults(config, _DEFAULTS)
  prefixed = [n for n in names if n.startswith("backbone.")]
  image = dinov2.DINOV2.read_spec(backbone, prefixed).image
  _check_supported(config, backbone, image)
  head = dpt.DPT(
    features=config["fusion_hidden_size"],
    channels=tuple(config["neck_hidden_sizes"]),
    head_features=config["head_hidden_size"],
    tap_norm="none",
    activation="relu",
  )
  return DepthSpec(image, read_layers(backbone, image.depth), head)


def _check_supported(
  config: Mapping[str, Any], backbone: Mapping[str, Any], image: ViTSpec
) -> None:
  if config["depth_estimation_type"] != "relative":
    raise ConversionError(
      f"depth_estimation_type={config['depth_estimation_type']!r}: labels are "
      "inverse depth, which only a 'relative' model predicts, such as "
      "Depth-Anything-V2-Small-hf, -Base-hf or -Large-hf."
    )
  patch = hf_files.read_side(config["patch_size"], "patch_size")
  head_index = config["head_in_index"]
  hf_files.require(
    ("reassemble_factors", tuple(config["reassemble_factors"]), FACTORS),
    ("len(neck_hidden_sizes)", len(config["neck_hidden_sizes"]), dpt.STAGES),
    ("reassemble_hidden_size", config["reassemble_hidden_size"], image.width),
    ("patch_size", patch, image.patch_size),
    ("max_depth", config["max_depth"], 1),
    ("backbone_config.apply_layernorm", backbone["apply_layernorm"], True),
    ("head_in_index", -1 if head_index == dpt.STAGES - 1 else head_index, -1),
  )


def read_layers(backbone: Mapping[str, Any], depth: int) -> tuple[int, ...]:
  """Block indices, from 0, whose outputs the head reads.

  Configs count from the embedding, stage 0, named 'stem'.
  """
  stages = ["stem", *(f"stage{i + 1}" for i in range(depth))]
  indices = backbone.get("out_indices")
  names = backbone.get("out_features") or []
  if indices is None:
    for name in names:
      if name not in stages:
        raise ConversionError(
          f"backbone_config.out_features has {name!r}. "
          f"{did_you_mean(name, stages)}"
        )
    indices = [stages.index(name) for name in names]
  count = len(stages)
  known = [i for i in indices if type(i) is int and -count <= i < count]
  layers = sorted(i % count - 1 for i in known)
  if not len(indices) == len(layers) == dpt.STAGES or min(layers) < 0:
    raise ConversionError(
      f"backbone_config.out_indices={list(indices)}: expected {dpt.STAGES} of "
      f"1..{depth}, such as {[i + 1 for i in dpt.quarter_layers(depth)]}."
    )
  return tuple(layers)


def param_mapping(spec: DepthSpec) -> list[Rule]:
  """Conversion rules for Depth Anything V2."""
  tower = ModelSpec(image=spec.image)
  rules = dinov2.DINOV2.param_mapping(tower, "backbone.")
  return [*rules, *head_mapping(spec)]


def head_mapping(spec: DepthSpec) -> list[Rule]:
  """Conversion rules for the neck and the head, without norms of the stages."""
  params = {"depth": abstract_params(spec)["depth"]}
  resize = [
    tables.transposed_conv_rule(
      f"depth/reassemble{i + 1}/resize/kernel",
      f"neck.reassemble_stage.layers.{i}.resize.weight",
      FACTORS[i],
      spec.head.channels[i],
    )
    for i in range(2)
  ]
  return [*resize, *tables.leaf_rules(params, _NAMES, *resize)]


def abstract_params(spec: DepthSpec) -> dict[str, PyTree]:
  """Parameter shapes by name."""
  size = (spec.image.image_size,) * 2
  stage = jax.ShapeDtypeStruct(
    (1, *spec.image.grid_of(*size), spec.image.width), jnp.float32
  )
  init = functools.partial(spec.head.init, size=size)
  head = jax.eval_shape(init, jax.random.key(0), [stage] * dpt.STAGES)
  image = two_tower.abstract_params(ModelSpec(image=spec.image))
  return {**image, "depth": head["params"]}


class DenseExporter(Family):
  """Mixin: exports a tower with its DPT heads, whose norms are the tower's."""

  kinds: ClassVar[Mapping[str, type[PredictionHead]]]  # All heads, by name.
  task: ClassVar[str]  # Class in transformers.
  task_type: ClassVar[str]  # Its model_type.
  backbone_prefix: ClassVar[str] = "backbone."
  derived = r"heads/\w+/norm\d/"

  def __init__(self, heads: Mapping[str, Any]):
    self.heads = heads

  @classmethod
  def find(cls, model: ConvertedModel) -> Family | None:
    """The exporter of exactly this model, or None."""
    heads = model.prediction_heads
    if {name: type(head) for name, head in heads.items()} != dict(cls.kinds):
      return None
    norms = dict(flatten_with_names(stage_norms(model.params["image"])))
    for head in heads.values():
      params = model.params.get("heads", {}).get(head.params_key, {})
      leaves = dict(flatten_with_names(params))
      if not all(np.array_equal(leaves.get(n), norms[n]) for n in norms):
        return None
    exporter = cls(heads)
    return exporter if exporter.fits(model.spec) else None

  def fits(self, spec: ModelSpec) -> bool:
    """Whether the class has the heads' other fields."""
    raise NotImplementedError

  def full_class_name(self, spec: ModelSpec) -> str:
    return self.task

  def write_config(
    self, spec: ModelSpec, *, pad_id: int | None = None
  ) -> dict[str, Any]:
    backbone = super().write_config(spec, pad_id=pad_id)
    head = next(iter(self.heads.values()))
    backbone |= {
      "out_indices": [i + 1 for i in head.taps],
      "apply_layernorm": True,
      "reshape_hidden_states": False,
    }
    return {
      "architectures": backbone.pop("architectures"),
      "model_type": self.task_type,
      "backbone_config": backbone,
      "neck_hidden_sizes": list(head.channels),
      "fusion_hidden_size": head.features,
    }


class DepthAnything(DenseExporter, dinov2.Dinov2):
  """Depth Anything V2."""

  kinds = {"depth": dpt.DepthHead}
  task, task_type = "DepthAnythingForDepthEstimation", "depth_anything"
  processor = "Siglip"  # Squashes, as DPT's by default.
  own_processors = {"pillow": "DPT"}

  def fits(self, spec: ModelSpec) -> bool:
    head = self.heads["depth"]
    want = _make_head(spec.image, taps=head.taps, **_sizes(head))
    return head == want and spec.image.norm_eps == NORM_EPS

  def write_config(self, spec: ModelSpec, **options: Any) -> dict[str, Any]:
    return {
      **super().write_config(spec, **options),
      "patch_size": spec.image.patch_size,
      "reassemble_hidden_size": spec.image.width,
      "head_hidden_size": self.heads["depth"].head_features,
    }

  def param_mapping(
    self, spec: ModelSpec, prefix: str | None = None
  ) -> list[Rule]:
    head = self.heads["depth"]
    module = dataclasses.replace(head.module(), tap_norm="none")
    ours = f"heads/{head.params_key}/"
    rules = head_mapping(DepthSpec(spec.image, head.taps, module))
    return super().param_mapping(spec, self.backbone_prefix) + [
      dataclasses.replace(
        rule,
        leaves=tuple(leaf.replace("depth/", ours, 1) for leaf in rule.leaves),
      )
      for rule in rules
    ]

  def constants(self, spec: ModelSpec) -> list[Rule]:
    """The unused unit of the deepest fusion."""
    unit, width = (
      "neck.fusion_stage.layers.0.residual_layer1.",
      self.heads["depth"].features,
    )
    return [
      tables.constant(f"{unit}convolution{k}.{leaf}", np.zeros(shape))
      for k in (1, 2)
      for leaf, shape in (("weight", (width, width, 3, 3)), ("bias", width))
    ]
