"""Depth Anything V2 (Yang et al. 2024): expert of inverse depth."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import Prepared
from mtv_jax.experts.depth_anything import weights
from mtv_jax.experts.depth_anything.inputs import Inputs
from mtv_jax.experts.depth_anything.weights import DepthModel, DepthSpec
from mtv_jax.models import layers, vit
from mtv_jax.utils.errors import InputError, check_choice

DTYPES = ("float32", "bfloat16")


def load_expert(
  path: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  batch_size: int = 1,
  dtype: str = "float32",
  preprocess: str = "original",
  size: int = 518,
  side: int = 128,
  max_aspect: float | int = 2.0,
) -> DepthExpert:
  """An expert from a folder of `transformers`.

  Args:
    path: with `config.json` and `model.safetensors`, such as
      Depth-Anything-V2-Small-hf.
    mesh: of this host's devices; all of them by default.
    batch_size: images a device.
    dtype: of the computation, "float32" or "bfloat16".
    preprocess: see `depth_anything_inputs`; "square" compiles one program,
      the others one for each shape of image.
    size: in pixels, that images are brought to.
    side: of the labels, in pixels.
    max_aspect: longer images are squeezed to it.

  Raises:
    FileNotFoundError: there is no such folder.
    ConversionError: it holds another model, or not all of this one.
    InputError: for an option that can't be.
  """
  model = weights.read(path)
  inputs = Inputs(preprocess, size, model.spec.image.patch_size, max_aspect)
  return DepthExpert(
    model,
    mesh=local_mesh.local_mesh() if mesh is None else mesh,
    batch_size=batch_size,
    dtype=dtype,
    inputs=inputs,
    side=side,
  )


class DepthExpert:
  """Depth Anything V2; see `load_expert` for the arguments."""

  kind = "depth"

  def __init__(
    self,
    model: DepthModel,
    *,
    mesh: Mesh,
    batch_size: int,
    dtype: str,
    inputs: Inputs,
    side: int,
  ):
    if batch_size < 1 or side < label_values.MIN_SIDE:
      raise InputError(
        f"batch_size={batch_size} and side={side}; expected at least 1 and"
        f" {label_values.MIN_SIDE}"
      )
    self.rows = batch_size * mesh.size
    self._mesh, self._inputs, self._side = mesh, inputs, side
    self._params = local_mesh.replicate(model.params, mesh)
    self._function = local_mesh.jit_per_device(
      make_function(model.spec, dtype=dtype, mesh=mesh), mesh
    )
    self.settings = {
      "expert": "depth_anything",
      "batch_size": batch_size,
      "hash": local_mesh.fingerprint(model.params),
      "dtype": dtype,
      "preprocess": inputs.preprocess,
      "size": inputs.size,
      "max_aspect": inputs.max_aspect,
      "side": side,
    }

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """The image as the model reads it; images of one size are a group."""
    del record
    pixels = self._inputs(image)
    return Prepared(pixels.shape[:2], {"images": pixels})

  def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """`depth` `[rows, h, w]`, inverse, each image's in a scale of its own."""
    return self._function(self._params, local_mesh.shard(arrays, self._mesh))

  def finish(self, outputs: Mapping[str, np.ndarray], meta: Any) -> Outcome:
    """The label of one image: the map, averaged to its own size."""
    del meta
    return label_values.make_depth(outputs["depth"], side=self._side)


def make_function(
  spec: DepthSpec, *, dtype: str, mesh: Mesh
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
  """The model: from its parameters and `images` to `depth` `[n, h, w]`.

  Args:
    spec: its shape.
    dtype: of the computation; the map is float32.
    mesh: of the devices that it is to be fast on.
  """
  check_choice("dtype", dtype, DTYPES)
  compute = jnp.dtype(dtype)
  tower = vit.ViT(spec.image, dtype=compute)
  norm = layers.norm(spec.image.norm_eps, compute, "norm")
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  head = spec.head(resize="neighbours" if on_cpu else "products")
  first = spec.image.prefix

  def run(params, rows):
    images = rows["images"]
    n, *size = images.shape[:3]
    grid = spec.image.grid_of(*size)
    with apply_fns.precision(dtype):
      out = tower.apply({"params": params["image"]}, images, taps=spec.taps)
      normed = [
        norm.apply({"params": params["image"]["norm"]}, out.taps[tap])
        for tap in spec.taps
      ]
      stages = [x[:, first:].reshape(n, *grid, -1) for x in normed]
      depth = head.apply({"params": params["depth"]}, stages, tuple(size))
    return {"depth": depth}

  return run
