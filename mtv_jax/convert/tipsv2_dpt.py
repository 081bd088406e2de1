"""Reader of TIPSv2 with dense heads: depth, normals, segmentation."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from mtv_jax.config import foreign
from mtv_jax.convert import hf_files, processors, tables, tensors, tipsv2
from mtv_jax.convert.depth_anything import read_layers
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.heads import dpt
from mtv_jax.models.two_tower import ModelSpec

_FACTORS = (4, 2, 1, 0.5)
_DEFAULTS = {
  "neck_hidden_sizes": (96, 192, 384, 768),
  "fusion_hidden_size": 256,
  "reassemble_factors": _FACTORS,
  "readout_activation": "gelu_pytorch_tanh",
  "num_depth_bins": 256,
  "min_depth": 0.001,
  "max_depth": 10.0,
  "depth_decoder_activation": "relu",
}
_BACKBONE = {
  "model_type": "tipsv2_vision_model",
  "out_indices": (3, 6, 9, 12),
  "apply_layernorm": True,
}
# Prefix in the file by head.
_FILES = {
  "metric_depth": "depth_head",
  "normals": "normals_head",
  "segmentation": "segmentation_head",
}
_PREFIX = "vision_encoder."


def read_model(
  folder: str | os.PathLike, *, with_params: bool = True
) -> ConvertedModel:
  """Reads a folder as an encoder with its dense heads.

  `with_params=False` skips reading the parameters.
  """
  path, config = hf_files.read_config(
    folder, model_type="tipsv2_dpt", example="google/tipsv2-b14-dpt"
  )
  with hf_files.open_weights(path) as store:
    with foreign.errors_of(path / "config.json"):
      spec, heads = read_spec(config, {n: store.shape(n) for n in store.names})
    params = _read_params(spec, heads, store) if with_params else {}
  preprocess = processors.read_preprocess(
    path,
    tipsv2.TIPSV2.default_preprocess(spec),
    patch_size=spec.image.patch_size,
  )
  return ConvertedModel(spec, params, preprocess, prediction_heads=heads)


def _read_params(
  spec: ModelSpec,
  heads: Mapping[str, dpt.DenseHead],
  store: hf_files.TensorFiles,
) -> dict[str, Any]:
  rules = tipsv2.TIPSV2.param_mapping(spec, _PREFIX)
  for name, head in heads.items():
    rules += _head_rules(spec, name, head)
  params = tensors.load(rules, store)
  # The backbone's final norm normalises every stage.
  norms = {f"norm{i + 1}": params["image"]["norm"] for i in range(dpt.STAGES)}
  params["heads"] = {
    name: {**leaves, **norms} for name, leaves in params["heads"].items()
  }
  return params


def read_spec(
  config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ModelSpec, dict[str, dpt.DenseHead]]:
  """Reads tower and heads from a `config.json` and the tensors' shapes."""
  backbone = config.get("backbone_config")
  backbone = hf_files.with_defaults(backbone, _BACKBONE, "backbone_config")
  config = hf_files.with_defaults(config, _DEFAULTS)
  hf_files.require(
    ("model_type", backbone["model_type"], "tipsv2_vision_model"),
    ("apply_layernorm", backbone["apply_layernorm"], True),
    ("reassemble_factors", tuple(config["reassemble_factors"]), _FACTORS),
    ("len(neck_hidden_sizes)", len(config["neck_hidden_sizes"]), dpt.STAGES),
    *(
      (key, config[key], _DEFAULTS[key])
      for key in ("readout_activation", "depth_decoder_activation")
    ),
  )
  names = [n for n in shapes if n.startswith(_PREFIX)]
  spec = tipsv2.TIPSV2.read_spec(backbone, names)
  common = {
    "taps": read_layers(backbone, spec.image.depth),
    "features": config["fusion_hidden_size"],
    "channels": tuple(config["neck_hidden_sizes"]),
    "norm_eps": spec.image.norm_eps,
  }
  heads: dict[str, dpt.DenseHead] = {}
  if any(n.startswith("depth_head.") for n in shapes):
    heads["metric_depth"] = dpt.MetricDepthHead(
      **common,
      outputs=config["num_depth_bins"],
      min_depth=config["min_depth"],
      max_depth=config["max_depth"],
    )
  if any(n.startswith("normals_head.") for n in shapes):
    heads["normals"] = dpt.NormalsHead(**common)
  last = "segmentation_head.segmentation_head.weight"
  if last in shapes:
    heads["segmentation"] = dpt.SegmentationHead(
      **common, outputs=shapes[last][0]
    )
  if not heads:
    raise ConversionError("the file has none of the heads of a TIPSv2-DPT.")
  return spec, heads


def _head_rules(spec: ModelSpec, name: str, head: dpt.DenseHead) -> list[Rule]:
  file, ours = f"{_FILES[name]}.", f"heads/{name}/"
  names = {
    f"{ours}conv1": f"{file}project",
    # Stored as a linear layer.
    f"{ours}conv2": f"{file}{_FILES[name]}",
  }
  special = [
    tables.transpose_rule(
      f"{ours}conv2/kernel",
      f"{file}{_FILES[name]}.weight",
      (1, 1, head.features, head.outputs),
      (head.features, head.outputs),
      (1, 0),
    )
  ]
  for i in range(dpt.STAGES):
    block = f"{file}fusion_blocks.{dpt.STAGES - 1 - i}."
    fusion = f"{ours}fusion{i + 1}/"
    reassemble = f"{file}reassemble."
    names |= {
      f"{ours}readout{i + 1}": f"{reassemble}readout_projects.{i}",
      f"{ours}reassemble{i + 1}/projection": f"{reassemble}out_projections.{i}",
      f"{ours}reassemble{i + 1}/resize": f"{reassemble}resize_layers.{i}",
      f"{ours}lateral{i + 1}": f"{file}convs.{i}",
      f"{fusion}projection": f"{block}out_conv",
    }
    for unit, residual in (("residual_unit", 1), ("main_unit", 2)):
      for k in (1, 2):
        names[f"{fusion}residual{residual}/conv{k}"] = f"{block}{unit}.conv{k}"
    if _FACTORS[i] > 1:
      resize = tables.transposed_conv_rule(
        f"{ours}reassemble{i + 1}/resize/kernel",
        f"{reassemble}resize_layers.{i}.weight",
        _FACTORS[i],
        head.channels[i],
      )
      special.append(resize)
  params = {"heads": {name: _abstract_params(spec, head)}}
  return [*special, *tables.leaf_rules(params, names, *special)]


def _abstract_params(spec: ModelSpec, head: dpt.DenseHead) -> dict[str, PyTree]:
  """Shapes of a head's parameters, without the stages' norms."""
  stages, grid = head.example(spec)
  init = functools.partial(head.module().init, grid=grid)
  params = jax.eval_shape(init, jax.random.key(0), stages)["params"]
  return {k: v for k, v in params.items() if not k.startswith("norm")}
