"""Depth Anything V2 as `benchmarks/experts.py` times it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtv_jax.experts import local_mesh
from mtv_jax.experts.depth_anything import expert as expert_lib
from mtv_jax.experts.depth_anything.inputs import Inputs
from mtv_jax.experts.depth_anything.weights import DepthModel, DepthSpec
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import dpt
from mtv_jax.models.vit import ViTSpec
from mtv_jax.perf.bench.experts import Program, Side

VARIANTS = ("S", "B", "L")
SIZE = 518


def make_spec(variant: str) -> DepthSpec:
  """The shape of a released model; of `models.VARIANTS` any, smaller ones."""
  shape = models.VARIANTS[variant]
  return DepthSpec(
    image=ViTSpec(
      image_size=SIZE,
      patch_size=14,
      pool="cls",
      cls_token=True,
      layer_scale=1.0,
      gelu="exact",
      mask_token=True,
      **shape,
    ),
    taps=dpt.quarter_taps(shape["depth"]),
    features=dpt.default_features(shape["width"]),
    channels=dpt.default_channels(shape["width"]),
    head_features=32,
  )


def write(variant: str, folder: pathlib.Path) -> Any:
  """A folder by `transformers`, with random weights; its model.

  They are drawn so that no activation dies and positions are seen.
  """
  import torch
  import transformers

  spec = make_spec(variant)
  config = transformers.DepthAnythingConfig(
    backbone_config=transformers.Dinov2Config(
      image_size=SIZE,
      patch_size=14,
      hidden_size=spec.image.width,
      num_hidden_layers=spec.image.depth,
      num_attention_heads=spec.image.heads,
      out_indices=[tap + 1 for tap in spec.taps],
      reshape_hidden_states=False,
    ),
    reassemble_hidden_size=spec.image.width,
    neck_hidden_sizes=list(spec.channels),
    fusion_hidden_size=spec.features,
    head_hidden_size=spec.head_features,
  )
  model = transformers.DepthAnythingForDepthEstimation(config).eval()
  randomise(model, torch.Generator().manual_seed(0))
  model.save_pretrained(folder)
  return model


def randomise(model: Any, generator: Any) -> None:
  """Draws a model of `transformers` anew: a map that is positive and varied."""
  import torch

  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "position_embeddings" in name or "cls_token" in name:
        scale = 1.0
      elif parameter.dim() > 1:
        scale = parameter[0].numel() ** -0.5
      else:
        scale = 0.2
      parameter.normal_(0.0, scale, generator=generator)
    # What comes in is a ReLU's, and so the map is positive.
    model.head.conv3.weight.abs_()
    model.head.conv3.bias.fill_(0.1)


def ours(variant: str, folder: pathlib.Path | None, batch_size: int) -> Side:
  """One batch through our expert, on this host's devices."""
  options = dict(mesh=local_mesh.local_mesh(), batch_size=batch_size)
  if folder is not None:
    expert = expert_lib.load_expert(folder, preprocess="square", **options)
  else:
    expert = expert_lib.DepthExpert(
      _random(variant),
      inputs=Inputs("square", SIZE),
      dtype="float32",
      side=128,
      **options,
    )
  arrays = {"images": _images(expert.rows)}

  def run() -> np.ndarray:
    return np.asarray(expert.run(arrays)["depth"])

  return run


def theirs(model: Any, batch_size: int) -> Side:
  """The same batch through the model of `transformers`."""
  import torch

  pixels = _images(batch_size).transpose(0, 3, 1, 2)
  pixels = torch.from_numpy(np.ascontiguousarray(pixels))

  def run() -> np.ndarray:
    with torch.inference_mode():
      return model(pixel_values=pixels).predicted_depth.numpy()

  return run


def program(variant: str, batch_size: int, mesh: Mesh) -> Program:
  """What runs on one device, in bfloat16."""
  spec = make_spec(variant)
  shape = (batch_size * mesh.size, SIZE, SIZE, 3)
  return Program(
    expert_lib.make_function(spec, dtype="bfloat16", mesh=mesh),
    expert_lib.abstract_params(spec),
    {"images": jax.ShapeDtypeStruct(shape, np.float32)},
  )


def _images(rows: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.normal(size=(rows, SIZE, SIZE, 3)).astype(np.float32)


def _random(variant: str) -> DepthModel:
  spec = make_spec(variant)
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    noise = rng.standard_normal(leaf.shape, np.float32)
    return noise * np.float32(fan_in**-0.5)

  return DepthModel(spec, jax.tree.map(draw, expert_lib.abstract_params(spec)))
