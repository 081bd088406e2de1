"""Reader of transformers' Depth Anything V2 folders.

A DINOv2 (`backbone.`), a DPT neck and its head, see `models/dpt.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from mtv_jax.convert import checks, dinov2, folders, tables
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.heads import dpt
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.errors import did_you_mean

DEFAULTS = {
  "reassemble_hidden_size": 384,
  "reassemble_factors": (4, 2, 1, 0.5),
  "neck_hidden_sizes": (48, 96, 192, 384),
  "fusion_hidden_size": 64,
  "head_hidden_size": 32,
  "head_in_index": -1,
  "patch_size": 14,
  "depth_estimation_type": "relative",
  "max_depth": 1,
}
# Of a config without a backbone's, and of a backbone's that is silent.
BACKBONE = {
  "model_type": "dinov2",
  "image_size": 518,
  "hidden_size": 384,
  "num_attention_heads": 6,
  "out_indices": (9, 10, 11, 12),
}
BACKBONE_DEFAULTS = {"patch_size": 14, "apply_layernorm": True}
# The deepest fusion has nothing to join, and its first unit is never run.
IGNORE = r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."


@dataclasses.dataclass(frozen=True)
class DepthSpec:
  """The shape of a Depth Anything V2.

  Attributes:
    image: the encoder.
    taps: blocks that the head reads, from 0; the encoder's last norm is
      applied to each.
    features: channels of the fused maps.
    channels: of the reassembled maps.
    head_features: channels before the last layer.
  """

  image: ViTSpec
  taps: tuple[int, ...]
  features: int
  channels: tuple[int, ...]
  head_features: int


@dataclasses.dataclass(frozen=True)
class DepthModel:
  """A model from a folder, before anything runs.

  Attributes:
    spec: its shape.
    params: `image` and `depth`, nested dicts of float32 NumPy arrays.
  """

  spec: DepthSpec
  params: dict[str, Any]


def read(folder: str | os.PathLike) -> DepthModel:
  """Reads a folder of `DepthAnythingForDepthEstimation.save_pretrained`.

  Raises:
    FileNotFoundError: there is no folder.
    ConversionError: it holds another model, one that is not supported, or
      tensors that are missing, unexpected or of another shape, each named.
  """
  path = folders.require_folder(folder)
  config = folders.read_json(path / "config.json")
  kind = config.get("model_type")
  if kind != "depth_anything":
    raise ConversionError(
      f"{path / 'config.json'} says model_type {kind!r}; expected "
      "'depth_anything', as in Depth-Anything-V2-Small-hf."
    )
  with folders.open_weights(path) as store:
    spec = read_spec(config, store.names)
    table = rules(spec)
    what = f"{path / folders.WEIGHTS}"
    checks.check(table, store, what=what, ignore=IGNORE)
    params = tables.load(table, store)
  return DepthModel(spec, params)


def read_spec(config: Mapping[str, Any], names: Iterable[str]) -> DepthSpec:
  """The shape that a `config.json` describes.

  Args:
    config: of model_type depth_anything.
    names: of the tensors.

  Raises:
    ConversionError: for what is not supported.
  """
  backbone = config.get("backbone_config")
  if backbone is None:
    backbone = BACKBONE
    if config.get("backbone"):
      raise ConversionError(
        f"backbone={config['backbone']!r}: only a backbone_config of "
        "model_type 'dinov2' is supported."
      )
  if backbone.get("model_type") != "dinov2":
    raise ConversionError(
      f"backbone_config.model_type={backbone.get('model_type')!r}: only "
      "'dinov2' is supported."
    )
  backbone = folders.with_defaults(backbone, BACKBONE_DEFAULTS)
  config = folders.with_defaults(config, DEFAULTS)
  prefixed = [n for n in names if n.startswith("backbone.")]
  image = dinov2.spec(backbone, prefixed).image
  _check(config, backbone, image)
  return DepthSpec(
    image=image,
    taps=_taps(backbone, image.depth),
    features=config["fusion_hidden_size"],
    channels=tuple(config["neck_hidden_sizes"]),
    head_features=config["head_hidden_size"],
  )


def _check(
  config: Mapping[str, Any], backbone: Mapping[str, Any], image: ViTSpec
) -> None:
  """Raises ConversionError for what our DPT is not."""
  if config["depth_estimation_type"] != "relative":
    raise ConversionError(
      f"depth_estimation_type={config['depth_estimation_type']!r}: labels are "
      "of inverse depth, which a 'relative' model predicts; a metric one "
      "predicts depth. Take Depth-Anything-V2-Small-hf, -Base-hf or -Large-hf."
    )
  wrong = {
    "reassemble_factors": (list(config["reassemble_factors"]), [4, 2, 1, 0.5]),
    "len(neck_hidden_sizes)": (len(config["neck_hidden_sizes"]), dpt.STAGES),
    "reassemble_hidden_size": (config["reassemble_hidden_size"], image.width),
    "patch_size": (
      folders.read_side(config["patch_size"], "patch_size"),
      image.patch_size,
    ),
    "max_depth": (config["max_depth"], 1),
    "backbone_config.apply_layernorm": (backbone["apply_layernorm"], True),
  }
  if config["head_in_index"] not in (-1, dpt.STAGES - 1):
    wrong["head_in_index"] = (config["head_in_index"], -1)
  for field, (found, expected) in wrong.items():
    if found != expected:
      raise ConversionError(
        f"{field}={found} is not supported; expected {expected}."
      )


def _taps(backbone: Mapping[str, Any], depth: int) -> tuple[int, ...]:
  """The blocks whose outputs the backbone gives, from 0.

  Theirs are counted from the embedding, which is stage 0 and called 'stem'.
  """
  stages = ["stem", *(f"stage{i + 1}" for i in range(depth))]
  found = backbone.get("out_indices")
  if found is None:
    names = backbone.get("out_features") or []
    for name in names:
      if name not in stages:
        raise ConversionError(
          f"backbone_config.out_features has {name!r}. "
          f"{did_you_mean(name, stages)}"
        )
    found = [stages.index(name) for name in names]
  taps = sorted(i % len(stages) - 1 for i in found)
  beyond = any(not -len(stages) <= i < len(stages) for i in found)
  if beyond or len(taps) != dpt.STAGES or min(taps) < 0:
    raise ConversionError(
      f"backbone_config.out_indices={list(found)}: expected {dpt.STAGES} of "
      f"1..{depth}, such as {[t + 1 for t in dpt.quarter_taps(depth)]}."
    )
  return tuple(taps)


def rules(spec: DepthSpec) -> list[Rule]:
  """The table of a Depth Anything V2."""
  backbone = dinov2.rules(ModelSpec(image=spec.image), prefix="backbone")
  width, features = spec.image.width, spec.features
  found = list(backbone)
  for i, channels in enumerate(spec.channels):
    ours = f"depth/reassemble{i + 1}"
    theirs = f"neck.reassemble_stage.layers.{i}"
    found += _conv(
      f"{ours}/projection", f"{theirs}.projection", 1, width, channels
    )
    found += _resize(f"{ours}/resize", f"{theirs}.resize", i, channels)
    found += _conv(
      f"depth/lateral{i + 1}",
      f"neck.convs.{i}",
      3,
      channels,
      features,
      bias="none",
    )
    found += _fusion(i, len(spec.channels), features)
  half = features // 2
  return [
    *found,
    *_conv("depth/conv1", "head.conv1", 3, features, half),
    *_conv("depth/conv2", "head.conv2", 3, half, spec.head_features),
    *_conv("depth/conv3", "head.conv3", 1, spec.head_features, 1),
  ]


def _fusion(stage: int, stages: int, features: int) -> list[Rule]:
  """A fusion; theirs are counted from the deepest."""
  ours = f"depth/fusion{stage + 1}"
  theirs = f"neck.fusion_stage.layers.{stages - 1 - stage}"
  found = _conv(
    f"{ours}/projection", f"{theirs}.projection", 1, features, features
  )
  for unit in (1, 2) if stage < stages - 1 else (2,):
    for k in (1, 2):
      found += _conv(
        f"{ours}/residual{unit}/conv{k}",
        f"{theirs}.residual_layer{unit}.convolution{k}",
        3,
        features,
        features,
      )
  return found


def _resize(ours: str, theirs: str, stage: int, channels: int) -> list[Rule]:
  factor = (4, 2, 1, 0.5)[stage]
  if factor == 1:
    return []
  if factor < 1:
    return _conv(ours, theirs, 3, channels, channels)
  return _enlarge(ours, theirs, int(factor), channels)


def _conv(
  ours: str,
  theirs: str,
  size: int,
  n_in: int,
  n_out: int,
  *,
  bias: str = "bias",
) -> list[Rule]:
  """A convolution, [out, in, y, x] in the file and [y, x, in, out] here."""
  found = [
    Rule(
      (f"{ours}/kernel",),
      (f"{theirs}.weight",),
      ((n_out, n_in, size, size),),
      to_ours=lambda a: (a.transpose(2, 3, 1, 0),),
    )
  ]
  if bias != "none":
    found.append(tables.vector(f"{ours}/bias", f"{theirs}.{bias}", n_out))
  return found


def _enlarge(ours: str, theirs: str, factor: int, channels: int) -> list[Rule]:
  """A transposed convolution, [in, out, y, x] there; columns (y, x, out)."""
  return [
    Rule(
      (f"{ours}/kernel",),
      (f"{theirs}.weight",),
      ((channels, channels, factor, factor),),
      to_ours=lambda a: (a.transpose(0, 2, 3, 1).reshape(channels, -1),),
    ),
    tables.vector(f"{ours}/bias", f"{theirs}.bias", channels),
  ]
