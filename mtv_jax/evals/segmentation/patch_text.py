"""Patches in the space of texts, for encoders trained on whole images.

A contrastive model compares a text with the pooled image; what a patch alone
would have been pooled to is read off its weights:

  map    Attention pooling of that patch alone: its value through the pool's
         output projection and MLP. (The softmax over one token is 1, so the
         probe and the keys drop out.) Our choice for SigLIP and its kind.
  cls    The token after the final norm, as TIPSv2 reads it.
  mean   The same.

and then through the projection, where the tower has one. With `values`, the
last block's attention is replaced by each token's own value (MaskCLIP, Zhou et
al. 2022, in TIPSv2's form, which keeps the residual and the MLP): what a token
gathers from others serves the image as a whole.
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
from mtv_jax.utils.errors import did_you_mean

LAST_BLOCKS = ("attention", "values")


def default_last_block(encoder: Encoder) -> str:
  """`attention` for attention pooling, which reads whole tokens; else `values`.

  A tower of one block has no choice.
  """
  image = encoder.spec.image
  return "attention" if image.pool == "map" or image.depth < 2 else "values"


def patches(
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
    ValueError: for weights that do not lead from a patch to the embedding.
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
  function = _function(encoder.spec, encoder.dtype, last_block, encoder.mesh)
  found = batched.in_batches(
    functools.partial(function, _weights(encoder, last_block)),
    lambda i: tokens[i],
    count=len(tokens),
    blank=np.zeros_like(tokens[0]),
    batch_size=batch_size,
    mesh=encoder.mesh,
  )
  return found["patches"]


def check(encoder: Encoder, last_block: str) -> None:
  """Raises ValueError where patches can't reach the space of texts."""
  if last_block not in LAST_BLOCKS:
    raise ValueError(
      f"last_block={last_block!r}. {did_you_mean(last_block, LAST_BLOCKS)}"
    )
  spec, params = encoder.spec, encoder.params["image"]
  wanted = ["pool"] if spec.image.pool == "map" else []
  if spec.image.projection:
    wanted.append("projection")
  if last_block == "values":
    wanted += ["blocks", "norm"]
    if spec.image.depth < 2:
      raise ValueError(
        "last_block='values' reads the input of the last block as the output "
        "of the one before it, and this encoder has one block; use "
        "last_block='attention'"
      )
  lost = [name for name in wanted if name not in params]
  if lost:
    raise ValueError(
      f"{encoder!r} pools by {spec.image.pool!r}, and its image tower has no "
      f"{', '.join(lost)}: its patches can't be brought to the space of its "
      f"texts. The tower holds {sorted(params)}."
    )


def _weights(encoder: Encoder, last_block: str) -> dict[str, Any]:
  params = encoder.params["image"]
  kept = {k: params[k] for k in ("pool", "projection") if k in params}
  if last_block == "values":
    kept["norm"] = params["norm"]
    kept["block"] = params["blocks"]
  return kept


@functools.lru_cache(maxsize=16)
def _function(
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
  """From tokens to embeddings, patch by patch; names are the tower's."""

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
  """A block whose tokens attend to themselves alone."""

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
