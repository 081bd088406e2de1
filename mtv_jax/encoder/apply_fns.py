"""Towers and heads as compiled functions, shared by all encoders of a shape.

They are made once per architecture, mesh and request; parameters are
arguments, so that other parameters compile nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import dpt, projection, prompter
from mtv_jax.models.heads.predictors import DepthHead, GroundingHeads
from mtv_jax.parallel import sharding
from mtv_jax.utils import xla_flags

# From parameters and a batch to arrays by name, replicated.
Function = Callable[[PyTree, PyTree], dict[str, jax.Array]]
# The largest side of a depth map where the config names none, in training as
# here (`objectives.depth.MAX_SIDE`).
MAX_DEPTH_SIDE = 112


@functools.lru_cache(maxsize=64)
def image_function(
  spec: models.ModelSpec,
  dtype: str,
  taps: tuple[int, ...],
  outputs: tuple[str, ...],
  mesh: Mesh,
) -> Function:
  """The image tower: from normalised `[B, H, W, 3]` to float32 features.

  `patches` and `layerI` are `[B, h, w, D]`, `prefix` and `prefixI` `[B, P, D]`,
  `pooled` `[B, E]`. jit compiles it again for every size of image.
  """
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  first = spec.image.prefix

  def run(params, images):
    with precision(dtype):
      out = tower.apply({"params": params}, images, taps=taps)
    kept = {name: getattr(out, name) for name in outputs}
    for tap in taps:
      kept[f"layer{tap}"] = out.taps[tap][:, first:]
      kept[f"prefix{tap}"] = out.taps[tap][:, :first]
    grid = spec.image.grid_of(*images.shape[1:3])
    for name in kept:
      if name == "patches" or name.startswith("layer"):
        kept[name] = kept[name].reshape(len(images), *grid, -1)
    return jax.tree.map(lambda x: x.astype(jnp.float32), kept)

  return _compiled(run, mesh)


@functools.lru_cache(maxsize=64)
def text_function(spec: models.ModelSpec, dtype: str, mesh: Mesh) -> Function:
  """The text tower: from token ids `[B, T]` to `pooled` `[B, E]`."""
  tower = models.text_tower(spec, dtype=jnp.dtype(dtype))

  def run(params, tokens):
    with precision(dtype):
      out = tower.apply({"params": params}, tokens)
    return {"pooled": out.pooled.astype(jnp.float32)}

  return _compiled(run, mesh)


@functools.lru_cache(maxsize=16)
def depth_function(
  spec: models.ModelSpec, head: DepthHead, dtype: str, mesh: Mesh
) -> Function:
  """The depth head: from `images` `[B, s, s, 3]` to `depth` `[B, h, w]`."""
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  module = dpt.DPT(
    features=head.features,
    channels=head.channels,
    tap_norm=head.tap_norm,
    upsample=1,  # As trained: the map is no larger than the last fusion's.
  )
  first = spec.image.prefix

  def run(params, rows):
    images = rows["images"]
    grid = spec.image.grid_of(*images.shape[1:3])
    side = head.size or min(4 * grid[0], MAX_DEPTH_SIDE)
    with precision(dtype):
      out = tower.apply({"params": params["image"]}, images, taps=head.taps)
      stages = [
        out.taps[i][:, first:].reshape(len(images), *grid, -1)
        for i in head.taps
      ]
      variables = {"params": params["heads"]["depth"]}
      depth = module.apply(variables, stages, (side, side))
    return {"depth": depth.astype(jnp.float32)}

  return _compiled(run, mesh)


@functools.lru_cache(maxsize=16)
def ground_function(
  spec: models.ModelSpec, head: GroundingHeads, dtype: str, mesh: Mesh
) -> Function:
  """The prompter: from `images` and `boxes` `[B, m, 4]` to `regions`.

  They are `[B, m, E]`, of unit length.
  """
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  module = prompter.Prompter(head.attention_heads)

  def run(params, rows):
    with precision(dtype):
      out = tower.apply({"params": params["image"]}, rows["images"])
      variables = {"params": params["heads"]["prompter"]}
      regions = module.apply(
        variables, out.patches, rows["boxes"], spec.embed_dim
      )
    return {"regions": projection.unit(regions)}

  return _compiled(run, mesh)


@functools.lru_cache(maxsize=16)
def locate_function(
  spec: models.ModelSpec, head: GroundingHeads, dtype: str, mesh: Mesh
) -> Function:
  """The locator: from `images` and `texts` `[B, m, E]` to `boxes`.

  They are `[B, m, 4]`, (y0, x0, y1, x1).
  """
  tower = models.image_tower(spec, dtype=jnp.dtype(dtype))
  module = prompter.Locator(head.attention_heads)

  def run(params, rows):
    with precision(dtype):
      out = tower.apply({"params": params["image"]}, rows["images"])
      variables = {"params": params["heads"]["locator"]}
      texts = projection.unit(rows["texts"])  # As in training.
      located = module.apply(variables, out.patches, texts)
    centre, half = located[..., :2], located[..., 2:] / 2
    return {"boxes": jnp.concatenate([centre - half, centre + half], axis=-1)}

  return _compiled(run, mesh)


def _compiled(run: Callable, mesh: Mesh) -> Function:
  return jax.jit(
    run,
    out_shardings=sharding.replicated(mesh),
    compiler_options=xla_flags.compiler_options(mesh),
  )


def precision(dtype: str) -> Any:
  """float32 means float32: a TPU's default would multiply in bfloat16."""
  return jax.default_matmul_precision(
    "highest" if dtype == "float32" else "default"
  )
