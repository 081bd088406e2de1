"""Depth Anything V2 for the expert benchmark, see `experts`."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtv_jax.convert import depth_anything as weights
from mtv_jax.experts import depth_anything as expert_lib
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import dpt
from mtv_jax.perf.bench import experts

SIZE = 518


def make_config(variant: str) -> dict[str, Any]:
  """The `config.json` of any variant in `models.VARIANTS`."""
  shape = models.VARIANTS[variant]
  width, depth = shape["width"], shape["depth"]
  return dict(
    backbone_config=dict(
      model_type="dinov2",
      image_size=SIZE,
      patch_size=14,
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=shape["heads"],
      out_indices=[tap + 1 for tap in dpt.quarter_taps(depth)],
      reshape_hidden_states=False,
    ),
    reassemble_hidden_size=width,
    neck_hidden_sizes=list(dpt.default_shape(width)[1]),
    fusion_hidden_size=dpt.default_shape(width)[0],
    head_hidden_size=32,
  )


def ours(variant: str, folder: pathlib.Path, batch_size: int) -> experts.RunFn:
  """A function that runs one batch on this host's devices."""
  del variant
  expert = expert_lib.load_expert(
    folder, preprocess="square", size=SIZE, batch_size=batch_size
  )
  arrays = {"images": experts.random_pixels(expert.rows, SIZE)}
  return lambda: expert.run(arrays)["depth"]


def program(
  variant: str, batch_size: int, mesh: Mesh, dtype: str
) -> experts.ExpertProgram:
  """The per-device program."""
  names = ["backbone.embeddings.mask_token"]
  spec = weights.read_spec(make_config(variant), names)
  shape = (batch_size * mesh.size, SIZE, SIZE, 3)
  return experts.ExpertProgram(
    expert_lib.make_function(spec, dtype=dtype, mesh=mesh),
    weights.abstract_params(spec),
    {"images": jax.ShapeDtypeStruct(shape, np.float32)},
  )
