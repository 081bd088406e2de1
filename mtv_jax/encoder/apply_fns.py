"""Jitted apply functions of towers and heads.

Compiled once per architecture, mesh and request. Parameters are arguments, so
encoders of one architecture share the compiled functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.models import two_tower as models
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.models.heads.language_model import LanguageHead
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils import xla_flags

# (parameters, batch) -> replicated arrays by name.
Function = Callable[[PyTree, PyTree], dict[str, jax.Array]]


@functools.lru_cache(maxsize=64)
def image_function(
  spec: models.ModelSpec,
  dtype: str,
  layers: tuple[int, ...],
  outputs: tuple[str, ...],
  mesh: Mesh,
) -> Function:
  """The image tower: normalised `[B, H, W, 3]` to float32 features.

  Returns `patches` and `layerI` `[B, h, w, D]`, `prefix` and `prefixI`
  `[B, P, D]`, and `pooled` `[B, E]`. Also accepts rows of `Preprocess.patches`;
  patches and layers are then `[B, N, D]`. Compiled per image size.
  """
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  num_prefix = spec.image.prefix

  def run(params, rows):
    is_native = isinstance(rows, Mapping)
    images = rows["patches"] if is_native else rows
    grids = rows["grids"] if is_native else None
    out = tower.apply({"params": params}, images, grids=grids, layers=layers)
    features = {name: getattr(out, name) for name in outputs}
    for layer in layers:
      features[f"layer{layer}"] = out.intermediates[layer][:, num_prefix:]
      features[f"prefix{layer}"] = out.intermediates[layer][:, :num_prefix]
    if is_native:
      return {**features, "grids": grids}
    grid = spec.image.grid_of(*images.shape[1:3])
    for name, value in features.items():
      if name == "patches" or name.startswith("layer"):
        features[name] = value.reshape(images.shape[0], *grid, -1)
    return features

  return _compile(run, dtype, mesh)


@functools.lru_cache(maxsize=64)
def text_function(spec: models.ModelSpec, dtype: str, mesh: Mesh) -> Function:
  """The text tower: token ids `[B, T]` to `pooled` `[B, E]`."""
  tower = models.text_tower(spec, dtype=jnp.dtype(dtype))

  def run(params, tokens):
    return {"pooled": tower.apply({"params": params}, tokens).pooled}

  return _compile(run, dtype, mesh)


@functools.lru_cache(maxsize=16)
def head_function(
  spec: models.ModelSpec, head: PredictionHead, dtype: str, mesh: Mesh
) -> Function:
  """A prediction head, applied to `images` `[B, H, W, 3]` and its inputs.

  Takes the parameters `image` and `heads/NAME`.
  """
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  module = head.module()

  def run(params, rows):
    images = rows["images"]
    inputs = {name: rows[name] for name in head.inputs}
    grid = spec.image.grid_of(*images.shape[1:3])
    variables = {"params": params["heads"][head.params_key]}
    out = tower.apply({"params": params["image"]}, images, layers=head.taps)
    apply = functools.partial(module.apply, variables)
    return head.predict(apply, out, grid, **inputs)

  return _compile(run, dtype, mesh)


@functools.lru_cache(maxsize=16)
def generate_function(
  head: LanguageHead, max_tokens: int, stop: int, dtype: str, mesh: Mesh
) -> Function:
  """Greedy decoding after prompts: `tokens` `[B, max_tokens]`.

  Takes the head's parameters, and rows of prompt `tokens`, their `length` and
  `patches`.
  """
  module = head.module()
  options = dict(max_tokens=max_tokens, stop=stop, method="generate")

  def run(params, rows):
    inputs = rows["tokens"], rows["length"], rows["patches"].astype(dtype)
    return {"tokens": module.apply({"params": params}, *inputs, **options)}

  return _compile(run, dtype, mesh)


def _compile(function: Callable, dtype: str, mesh: Mesh) -> Function:
  """Jits a function with the matmul precision of `dtype`; outputs float32."""

  def cast(x):
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    return x.astype(jnp.float32) if is_float else x

  def run(params, batch):
    with precision(dtype):
      out = function(params, batch)
    return jax.tree.map(cast, out)

  return jax.jit(
    run,
    out_shardings=replicated_sharding(mesh),
    compiler_options=xla_flags.compiler_options(mesh),
  )


def precision(dtype: str) -> Any:
  """Matmul precision; TPUs multiply float32 in bfloat16 by default."""
  return jax.default_matmul_precision(
    "highest" if dtype == "float32" else "default"
  )
