"""transformers Depth Anything V2 folders: read and export.

The model is a DINOv2 (`backbone.`) with a DPT neck and head, see
`models/heads/dpt.py`. `read` serves the labelling expert, `read_model` an
`Encoder` with a depth head.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtv_jax.config import foreign
from mtv_jax.convert import dinov2, hf_files, processors, tables, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models import two_tower
from mtv_jax.models.heads import dpt
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
NORM_EPS = 1e-6  # Epsilon of the norms in `dpt.DPT`.
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
  # Indices of blocks whose outputs the head reads, after the final norm.
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
  By default, images are squashed to the pretraining size; the evaluation
  `relative_depth` can resize them as published.
  """
  spec, params = read(folder, with_params=with_params)
  eps = spec.image.norm_eps
  hf_files.require(("backbone_config.layer_norm_eps", eps, NORM_EPS))
  head = dpt.DepthHead(
    taps=spec.layers,
    features=spec.head.features,
    channels=spec.head.channels,
    tap_norm="layer",
    scale=spec.image.patch_size,
    head_features=spec.head.head_features,
    upsample=2,
    activation=spec.head.activation,
  )
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
  valid = [i for i in indices if type(i) is int and -count <= i < count]
  layers = sorted(i % count - 1 for i in valid)
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


def export_head(
  model: ConvertedModel, backbone: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Rule]] | None:
  """Builds the `config.json` and rules of a tower with its depth head.

  `backbone` is the tower's `config.json`. Returns None if the model is not
  exactly a Depth Anything V2.
  """
  image, heads = model.spec.image, model.prediction_heads
  if backbone.get("model_type") != "dinov2" or image.norm_eps != NORM_EPS:
    return None
  if not has_heads(model, {"depth": dpt.DepthHead}):
    return None
  head, required = heads["depth"], {"tap_norm": "layer", "activation": "relu"}
  required |= {"scale": image.patch_size, "upsample": 2, "size": None}
  if dataclasses.replace(head, **required) != head:
    return None
  module = dataclasses.replace(head.module(), tap_norm="none")
  rules = dinov2.DINOV2.param_mapping(model.spec, "backbone.")
  for rule in head_mapping(DepthSpec(image, head.taps, module)):
    leaves = tuple(f"heads/{leaf}" for leaf in rule.leaves)
    rules.append(dataclasses.replace(rule, leaves=leaves))
  width = head.features
  for k in (1, 2):  # Unused, see _IGNORE.
    name = f"neck.fusion_stage.layers.0.residual_layer1.convolution{k}."
    kernel = np.zeros((width, width, 3, 3))
    rules.append(tables.constant(f"{name}weight", kernel))
    rules.append(tables.constant(f"{name}bias", np.zeros(width)))
  return {
    "architectures": ["DepthAnythingForDepthEstimation"],
    "model_type": "depth_anything",
    **write_stages(head, backbone),
    "patch_size": image.patch_size,
    "reassemble_hidden_size": image.width,
    "head_hidden_size": head.head_features,
  }, rules


def has_heads(model: ConvertedModel, kinds: Mapping[str, type]) -> bool:
  """Whether a model has exactly these DPT heads, with the tower's norm."""
  heads, params = model.prediction_heads, model.params.get("heads", {})
  if {name: type(head) for name, head in heads.items()} != dict(kinds):
    return False
  norms = flatten_with_names(stage_norms(model.params["image"]))
  trees = [dict(flatten_with_names(params.get(name, {}))) for name in kinds]
  return all(np.array_equal(x.get(n), norm) for x in trees for n, norm in norms)


def write_stages(head: Any, backbone: Mapping[str, Any]) -> dict[str, Any]:
  """Builds the config keys that all models with DPT heads share."""
  stages = {"out_indices": [i + 1 for i in head.taps], "apply_layernorm": True}
  return {
    "backbone_config": {
      **{k: v for k, v in backbone.items() if k != "architectures"},
      **stages,
      "reshape_hidden_states": False,
    },
    "neck_hidden_sizes": list(head.channels),
    "fusion_hidden_size": head.features,
  }
