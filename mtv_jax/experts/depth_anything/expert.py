"""Depth Anything V2 (Yang et al. 2024): expert of inverse depth.

`experts/depth_expert.py` turns the predictions into labels.
"""

import os
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.config.options import PositiveInt, Range
from mtv_jax.convert import depth_anything
from mtv_jax.convert.depth_anything import DepthSpec
from mtv_jax.data.labels import label_values
from mtv_jax.encoder import apply_fns
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import check_options
from mtv_jax.experts.depth_anything.preprocess import DepthPreprocess
from mtv_jax.experts.depth_expert import DepthExpert
from mtv_jax.models import layers, vit


@check_options
def load_expert(
  path: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  batch_size: PositiveInt = 1,
  dtype: Literal["float32", "bfloat16"] = "float32",
  preprocess: str = "original",
  size: int = 518,
  side: Annotated[int, Range(min=label_values.MIN_SIDE)] = 128,
  max_aspect: float = 2.0,
) -> DepthExpert:
  """Opens a Depth Anything V2 of `transformers` as an expert of depth.

  Args:
    path: folder with `config.json` and `model.safetensors`, such as
      Depth-Anything-V2-Small-hf.
    mesh: mesh of this host's devices; all of them by default.
    batch_size: images per device.
    dtype: computation dtype.
    preprocess, size, max_aspect: see `DepthPreprocess`; "square" compiles one
      program, the others one for each shape of image.
    side: the labels' side, in pixels.

  Raises:
    MissingFileError: the folder is missing.
    ConversionError: it contains another model, or not all of this one.
    ConfigError: an option is out of its range.
  """
  spec, params = depth_anything.read(path)
  inputs = DepthPreprocess(preprocess, size, spec.image.patch_size, max_aspect)
  mesh = local_mesh.local_mesh() if mesh is None else mesh
  return DepthExpert(
    make_function(spec, dtype=dtype, mesh=mesh),
    params,
    inputs,
    mesh=mesh,
    batch_size=batch_size,
    side=side,
    settings={
      "expert": "depth_anything",
      "hash": local_mesh.fingerprint(params),
      "dtype": dtype,
      "preprocess": preprocess,
      "size": size,
      "max_aspect": max_aspect,
    },
  )


def make_function(
  spec: DepthSpec, *, dtype: str, mesh: Mesh
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
  """The model: from its parameters and `images` to `depth` `[n, h, w]`.

  The map is float32; the mesh's platform chooses the head's resampling.
  """
  compute = jnp.dtype(dtype)
  tower = vit.ViT(spec.image, dtype=compute)
  norm = layers.norm(spec.image.norm_eps, compute, "norm")
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  head = spec.head.clone(resize="neighbours" if on_cpu else "products")
  first = spec.image.prefix

  def run(params, rows):
    images = rows["images"]
    n, *size = images.shape[:3]
    grid = spec.image.grid_of(*size)
    with apply_fns.precision(dtype):
      out = tower.apply({"params": params["image"]}, images, taps=spec.layers)
      normed = [
        norm.apply({"params": params["image"]["norm"]}, out.taps[tap])
        for tap in spec.layers
      ]
      stages = [x[:, first:].reshape(n, *grid, -1) for x in normed]
      depth = head.apply({"params": params["depth"]}, stages, tuple(size))
    return {"depth": depth}

  return run
