"""Patch embeddings in the space of the texts.

A contrastive model compares a text with the pooled image. The embedding of a
patch is that of an image whose only token is the patch:

  map    Attention pooling of that patch alone: its value through the pool's
         output projection and MLP. (The softmax over one token is 1, so the
         probe and the keys drop out.) Our choice for SigLIP.
  cls    The token after the final norm, as in TIPSv2.
  mean   The same.

and then the projection, where the tower has one. With `values`, the
last block's attention is replaced by each token's own value (MaskCLIP, Zhou et
al. 2022, in TIPSv2's form, with the residual and the MLP), since attention
mixes the features of the whole image into each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from mtv_jax.encoder import apply_fns, batched
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.models import layers
from mtv_jax.models import two_tower as models
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError, check_choice

LAST_BLOCKS = ("attention", "values")


def default_last_block(encoder: Encoder) -> str:
  """`attention` for attention pooling, which reads whole tokens; else `values`.

  A tower of one block has no choice.
  """
  image = encoder.spec.image
  return "attention" if image.pool == "map" or image.depth < 2 else "values"


def embed_patches(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  *,
  last_block: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w e"]:
  """Embeddings of patches, comparable with `encoder.text`, not normalised.

  Args:
    encoder: with a text tower.
    images: of one size that the patch divides, in 0..255.
    last_block: `attention` as it was trained, or `values`.
    batch_size: images a step.

  Raises:
    InputError: where the tower lacks weights for embedding a patch.
  """
  check(encoder, last_block)
  depth = encoder.spec.image.depth
  if last_block == "values":
    out = encoder.dense(
      images, layers=(depth - 2,), outputs=(), batch_size=batch_size
    )
    tokens = out.layers[depth - 2]
  else:
    tokens = encoder.dense(images, batch_size=batch_size).patches
  function = _embed_fn(encoder.spec, encoder.dtype, last_block, encoder.mesh)
  out = batched.in_batches(
    functools.partial(function, _weights(encoder, last_block)),
    lambda i: tokens[i],
    count=len(tokens),
    blank=np.zeros_like(tokens[0]),
    batch_size=batch_size,
    mesh=encoder.mesh,
  )
  return out["patches"]


def check(encoder: Encoder, last_block: str) -> None:
  """Raises ValueError where an encoder's patches can't be embedded."""
  check_choice("last_block", last_block, LAST_BLOCKS)
  spec, params = encoder.spec, encoder.params["image"]
  needed = ["pool"] if spec.image.pool == "map" else []
  if spec.image.projection:
    needed.append("projection")
  if last_block == "values":
    needed += ["blocks", "norm"]
    if spec.image.depth < 2:
      raise InputError(
        "last_block='values' reads the input of the last block as the output "
        "of the one before it, and this encoder has one block; use "
        "last_block='attention'"
      )
  missing = [name for name in needed if name not in params]
  if missing:
    raise InputError(
      f"{encoder!r} pools by {spec.image.pool!r}, and its image tower has no "
      f"{', '.join(missing)}: its patches can't be embedded in the space of "
      f"its texts. The tower has {sorted(params)}."
    )


def _weights(encoder: Encoder, last_block: str) -> dict[str, Any]:
  params = encoder.params["image"]
  weights = {k: params[k] for k in ("pool", "projection") if k in params}
  if last_block == "values":
    weights["norm"] = params["norm"]
    weights["block"] = params["blocks"]
  return weights


@functools.lru_cache(maxsize=16)
def _embed_fn(
  spec: models.ModelSpec, dtype: str, last_block: str, mesh: Mesh
) -> apply_fns.Function:
  values = last_block == "values"
  module = _ToText(spec, jnp.dtype(dtype), values=values)

  def run(params, tokens):
    if values:
      last = jax.tree.map(lambda p: p[-1], params["block"])
      params = {**params, "block": last}
    with apply_fns.precision(dtype):
      return {"patches": module.apply({"params": params}, tokens)}

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


class _ToText(nn.Module):
  """Embeds each patch alone; parameter names are the tower's."""

  spec: models.ModelSpec
  dtype: Any
  values: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w e"]:
    spec = self.spec.image
    x = x.astype(self.dtype)
    if self.values:
      x = _ValueBlock(spec, self.dtype, name="block")(x)
      x = layers.norm(spec.norm_eps, self.dtype, "norm")(x)
    if spec.pool == "map":
      x = _ValuePool(spec, self.dtype, name="pool")(x)
    flat = layers.project(x.reshape(-1, x.shape[-1]), spec.projection)
    return flat.reshape(*x.shape[:-1], -1)


class _ValueBlock(nn.Module):
  """A transformer block whose tokens attend only to themselves."""

  spec: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    spec = self.spec
    norm = functools.partial(layers.norm, spec.norm_eps, self.dtype)
    values = _Values(spec.heads, 3, "qkv", self.dtype, name="attention")
    mlp = layers.Mlp(spec.mlp_dim, spec.gelu, spec.mlp, self.dtype, name="mlp")
    x = x + self._scaled(values(norm("norm1")(x)), "scale1")
    return x + self._scaled(mlp(norm("norm2")(x)), "scale2")

  def _scaled(self, y, name):
    if self.spec.layer_scale is None:
      return y
    scale = self.param(name, nn.initializers.ones, (y.shape[-1],))
    return y * scale.astype(y.dtype)


class _ValuePool(nn.Module):
  """`MapPool` of every patch alone."""

  spec: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    spec = self.spec
    x = _Values(spec.heads, 2, "kv", self.dtype, name="attention")(x)
    y = layers.norm(spec.norm_eps, self.dtype, "norm")(x)
    mlp = layers.Mlp(spec.mlp_dim, spec.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(y)


class _Values(nn.Module):
  """Attention's value and output projections.

  Columns of the fused projection are ordered (head, part, dim), and the value
  is its last part.
  """

  heads: int
  parts: int
  fused: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    d = x.shape[-1]
    y = nn.Dense(self.parts * d, dtype=self.dtype, name=self.fused)(x)
    y = y.reshape(*x.shape[:-1], self.heads, self.parts, d // self.heads)
    y = y[..., -1, :].reshape(x.shape)
    return nn.Dense(d, dtype=self.dtype, name="out")(y)
