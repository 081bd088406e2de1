"""Hugging Face TIPSv2, with or without text tower: read and export.

Also TIPSv2 with dense heads: depth, normals, segmentation.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from mtv_jax.config import foreign
from mtv_jax.convert import dinov2, hf_files, tables, tensors
from mtv_jax.convert.depth_anything import (
  FACTORS,
  has_heads,
  read_layers,
  stage_norms,
  write_stages,
)
from mtv_jax.convert.family import (
  AnyOf,
  Family,
  Key,
  TowerTable,
  block_size_defaults,
)
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models import heads as heads_lib
from mtv_jax.models.heads import dpt
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec

_TEMPERATURE = 0.005065968260169029


class Tipsv2(Family):
  """TIPSv2."""

  name = "tipsv2"
  class_name = "Tipsv2"
  image = TowerTable(
    {
      **block_size_defaults(768, 12, 12, layer_norm_eps=1e-6),
      "image_size": 448,
      "patch_size": 14,
      "hidden_act": "gelu",
      "mlp_ratio": 4,
      "num_channels": 3,
      "qkv_bias": True,
      "layerscale_value": 1.0,
      "use_swiglu_ffn": False,
      "num_register_tokens": 1,
    },
    {
      "pool": "cls",
      "cls_token": True,
      "position_resize": "bilinear_antialiased",
    },
    {
      "patch_embed": "patch_embed.proj",
      "mask_token": "mask_token",
      "registers": "register_tokens",
      **tables.nest(
        "blocks/",
        "blocks.{i}.",
        {
          "norm1": "norm1",
          "attention/out": "attn.proj",
          "scale1": "ls1.gamma",
          "norm2": "norm2",
          "mlp/fc1": "mlp.c_fc",
          "mlp/fc2": "mlp.c_proj",
          "scale2": "ls2.gamma",
        },
      ),
      "norm": "norm",
    },
    gated={"blocks/mlp/fc2": "blocks.{i}.mlp.w3"},
    keys=dinov2.MLP_KEYS,
  )
  text = TowerTable(
    {
      **block_size_defaults(768, 12, 12, 3072, layer_norm_eps=1e-5),
      "vocab_size": 32_000,
      "max_position_embeddings": 64,
      "hidden_act": "relu",
      "attention_dropout": 0.0,
      "pad_token_id": 0,
      "scale_sqrt_depth": True,
    },
    {
      "pool": "mean",
      "causal": False,
      "projection": None,
      # Without a projection, its bias is irrelevant.
      "projection_bias": AnyOf((False, True)),
      "positions": "sinusoidal",
    },
    {
      "token_embedding": "text_encoder.token_embedding.weight",
      **tables.nest(
        "blocks/",
        "text_encoder.transformer.resblocks.{i}.",
        {
          "norm1": "ln_1",
          "attention/out": "attn.out_proj",
          "norm2": "ln_2",
          "mlp/fc1": "mlp.c_fc",
          "mlp/fc2": "mlp.c_proj",
        },
      ),
      "norm": "text_encoder.ln_final",
    },
    keys={
      "pad_token_id": Key(
        "pad_id",
        check=lambda spec: (
          "pad_id is None but must be a token" if spec.pad_id is None else None
        ),
      ),
      "scale_sqrt_depth": Key("token_scale"),
    },
  )
  image_prefix = "vision_encoder."
  text_prefix = "text_encoder."
  num_unit_axes = {"image/mask_token": 1, "image/registers": 1}
  neutral = ("layer_scale", "mask_token")
  resampling = "bilinear_antialiased"
  own_processors = {"torchvision": "Tipsv2"}
  preprocess = {
    "interpolation": "bilinear",
    "resize": "squash",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
  }
  lower_case = True
  add_end = False

  def tokenizer_config(self, spec: TextSpec) -> dict[str, list[str]]:
    # Without a mask, `transformers` attends to padding.
    return {"model_input_names": ["input_ids", "attention_mask"]}

  def special_rules(self, spec: ModelSpec, prefix: str) -> list[Rule]:
    rules = [
      tables.folded_positions(
        {"image/cls_token": f"{prefix}cls_token"},
        f"{prefix}pos_embed",
        spec.image,
      ),
      *tables.stacked_qkv(
        "image", spec.image, f"{prefix}blocks.{{i}}.attn.qkv."
      ),
    ]
    if spec.image.mlp == "swiglu":
      layer = f"{prefix}blocks.{{i}}.mlp.w12"
      rules += dinov2.fused_swiglu_rule(layer, spec.image)
    if not spec.image.registers:
      empty = np.zeros((1, 0, spec.image.width))
      rules.append(tables.constant(f"{prefix}register_tokens", empty))
    if spec.text is not None:
      layer = "text_encoder.transformer.resblocks.{i}.attn.in_proj_"
      rules += tables.stacked_qkv("text", spec.text, layer)
    return rules

  def temperature_rules(self) -> list[Rule]:
    return [_temperature_rule()]


def _temperature_rule() -> Rule:
  """The temperature rule: the inverse of our scale, without a bias."""
  head = "heads/contrastive/logit_"

  def read(temperature: np.ndarray) -> tuple[np.ndarray, ...]:
    scale = -np.log(temperature.astype(np.float64))
    return np.array(scale, np.float32), np.zeros((), np.float32)

  def write(scale: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.array(np.exp(-scale.astype(np.float64)), np.float32),)

  return Rule(
    (f"{head}scale", f"{head}bias"),
    ("temperature",),
    ((),),
    read,
    write,
    default=(np.array(_TEMPERATURE, np.float32),),
  )


TIPSV2 = Tipsv2()
_DEFAULTS = {
  "neck_hidden_sizes": (96, 192, 384, 768),
  "fusion_hidden_size": 256,
  "reassemble_factors": FACTORS,
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
# Prefixes in the file by head.
_HEAD_PREFIXES = {
  "metric_depth": "depth_head",
  "normals": "normals_head",
  "segmentation": "segmentation_head",
}
_PREFIX = "vision_encoder."


def read_dense_model(
  folder: str | os.PathLike, *, with_params: bool = True
) -> ConvertedModel:
  """Reads a folder as an encoder with its dense heads."""
  path, config = hf_files.read_config(
    folder, model_type="tipsv2_dpt", example="google/tipsv2-b14-dpt"
  )
  with hf_files.open_weights(path) as store:
    with foreign.errors_of(path / "config.json"):
      shapes = {name: store.shape(name) for name in store.names}
      spec, heads = _read_dense_spec(config, shapes)
    params = {}
    if with_params:
      rules = TIPSV2.param_mapping(spec, _PREFIX)
      for name, head in heads.items():
        rules += _head_rules(spec, name, head)
      params = tensors.load(rules, store)
      for leaves in params["heads"].values():
        leaves.update(stage_norms(params["image"]))
  preprocess = TIPSV2.read_preprocess(path, config, spec)
  return ConvertedModel(spec, params, preprocess, prediction_heads=heads)


def _read_dense_spec(
  config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ModelSpec, dict[str, dpt.DenseHead]]:
  """Reads tower and heads from a `config.json` and the tensors' shapes."""
  backbone = config.get("backbone_config")
  backbone = hf_files.with_defaults(backbone, _BACKBONE, "backbone_config")
  config = hf_files.with_defaults(config, _DEFAULTS)
  hf_files.require(
    ("model_type", backbone["model_type"], "tipsv2_vision_model"),
    ("apply_layernorm", backbone["apply_layernorm"], True),
    ("reassemble_factors", tuple(config["reassemble_factors"]), FACTORS),
    ("len(neck_hidden_sizes)", len(config["neck_hidden_sizes"]), dpt.STAGES),
    *(
      (key, config[key], _DEFAULTS[key])
      for key in ("readout_activation", "depth_decoder_activation")
    ),
  )
  names = [n for n in shapes if n.startswith(_PREFIX)]
  spec = TIPSV2.read_spec(backbone, names)
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
  classifier = "segmentation_head.segmentation_head.weight"
  if classifier in shapes:
    heads["segmentation"] = dpt.SegmentationHead(
      **common, outputs=shapes[classifier][0]
    )
  if not heads:
    raise ConversionError("the file lacks all heads of a TIPSv2-DPT.")
  return spec, heads


def _head_rules(spec: ModelSpec, name: str, head: dpt.DenseHead) -> list[Rule]:
  theirs, ours = f"{_HEAD_PREFIXES[name]}.", f"heads/{name}/"
  names = {
    f"{ours}conv1": f"{theirs}project",
    # Stored as a linear layer.
    f"{ours}conv2": f"{theirs}{_HEAD_PREFIXES[name]}",
  }
  special = [
    tables.transpose_rule(
      f"{ours}conv2/kernel",
      f"{theirs}{_HEAD_PREFIXES[name]}.weight",
      (1, 1, head.features, head.outputs),
      (head.features, head.outputs),
      (1, 0),
    )
  ]
  for i in range(dpt.STAGES):
    block = f"{theirs}fusion_blocks.{dpt.STAGES - 1 - i}."
    fusion = f"{ours}fusion{i + 1}/"
    reassemble = f"{theirs}reassemble."
    names |= {
      f"{ours}readout{i + 1}": f"{reassemble}readout_projects.{i}",
      f"{ours}reassemble{i + 1}/projection": f"{reassemble}out_projections.{i}",
      f"{ours}reassemble{i + 1}/resize": f"{reassemble}resize_layers.{i}",
      f"{ours}lateral{i + 1}": f"{theirs}convs.{i}",
      f"{fusion}projection": f"{block}out_conv",
    }
    for unit, residual in (("residual_unit", 1), ("main_unit", 2)):
      for k in (1, 2):
        names[f"{fusion}residual{residual}/conv{k}"] = f"{block}{unit}.conv{k}"
    if FACTORS[i] > 1:
      resize = tables.transposed_conv_rule(
        f"{ours}reassemble{i + 1}/resize/kernel",
        f"{reassemble}resize_layers.{i}.weight",
        FACTORS[i],
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


def export_heads(
  model: ConvertedModel, backbone: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Rule]] | None:
  """As `depth_anything.export_head`, for the three dense heads."""
  kinds = {k: heads_lib.RELEASED[k] for k in _HEAD_PREFIXES}
  heads, names = model.prediction_heads, ("taps", "features", "channels")
  if not (
    backbone.get("model_type") == "tipsv2_vision_model"
    and has_heads(model, kinds)
    and len({tuple(getattr(h, n) for n in names) for h in heads.values()}) == 1
    and {h.norm_eps for h in heads.values()} == {model.spec.image.norm_eps}
  ):
    return None
  rules = TIPSV2.param_mapping(model.spec, _PREFIX)
  for name, head in heads.items():
    rules += _head_rules(model.spec, name, head)
  depth = heads["metric_depth"]
  return {
    "architectures": ["Tipsv2DptForDensePrediction"],
    "model_type": "tipsv2_dpt",
    **write_stages(depth, backbone),
    "num_depth_bins": depth.outputs,
    "min_depth": depth.min_depth,
    "max_depth": depth.max_depth,
    "num_labels": heads["segmentation"].outputs,
  }, rules
