"""Patch embeddings in the space of the texts.

A contrastive model compares a text with the pooled image. The embedding of a
patch is that of an image whose only token is the patch:

  map    Attention pooling of that patch alone: its value through the pool's
         output projection and MLP. (The softmax over one token is 1.) Our
         choice for SigLIP.
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
from mtv_jax.models import layers, pooling
from mtv_jax.models import stack as stack_lib
from mtv_jax.models import two_tower as models
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError, check_choice


def default_last_block(encoder: Encoder) -> str:
  """`attention` for attention pooling or a single block, else `values`."""
  image = encoder.spec.image
  return (
    "attention" if image.pool in pooling.KINDS or image.depth < 2 else "values"
  )


def embed_patches(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  *,
  last_block: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w e"]:
  """Embeddings of patches, comparable with `encoder.text`, not normalised.

  `last_block` is `attention`, as it was trained, or `values`; images are as for
  `Encoder.dense`, errors as of `check`.
  """
  check(encoder, last_block)
  if last_block == "values":
    before = encoder.spec.image.depth - 2
    out = encoder.dense(
      images, layers=(before,), outputs=(), batch_size=batch_size
    )
    tokens = out.layers[before]
  else:
    tokens = encoder.dense(images, batch_size=batch_size).patches
  params = encoder.params["image"]
  names = ("pool", "projection")
  if last_block == "values":
    names += ("norm", "blocks")
  function = _embed_fn(encoder.spec, encoder.dtype, last_block, encoder.mesh)
  out = batched.in_batches(
    functools.partial(function, {k: params[k] for k in names if k in params}),
    lambda i: tokens[i],
    count=len(tokens),
    blank=np.zeros_like(tokens[0]),
    batch_size=batch_size,
    mesh=encoder.mesh,
  )
  return out["patches"]


def check(encoder: Encoder, last_block: str) -> None:
  """Raises ValueError if an encoder's patches can't be embedded."""
  check_choice("last_block", last_block, ("attention", "values"))
  spec, params = encoder.spec.image, encoder.params["image"]
  required = ["pool"] if spec.pool in pooling.KINDS else []
  if spec.projection:
    required.append("projection")
  if last_block == "values":
    required += ["blocks", *(["norm"] if spec.final_norm else [])]
    if spec.depth < 2:
      raise InputError(
        "last_block='values' reads the output of the block before the last, "
        "and this encoder has one block; use last_block='attention'"
      )
  missing = [name for name in required if name not in params]
  if missing:
    raise InputError(
      f"{encoder!r} pools by {spec.pool!r}, and its image tower has no "
      f"{', '.join(missing)}: its patches can't be embedded in the space of "
      f"its texts. The tower has {sorted(params)}."
    )


@functools.lru_cache(maxsize=16)
def _embed_fn(
  spec: models.ModelSpec, dtype: str, last_block: str, mesh: Mesh
) -> apply_fns.Function:
  module = _TokenTower(spec.image, jnp.dtype(dtype), last_block == "values")

  def run(params, tokens):
    if "blocks" in params:
      last = jax.tree.map(lambda p: p[-1], params["blocks"])
      params = {**params, "block": last}
    with apply_fns.precision(dtype):
      flat = module.apply(
        {"params": params}, tokens.reshape(-1, tokens.shape[-1])
      )
    return {"patches": flat.reshape(*tokens.shape[:-1], -1)}

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


class _TokenTower(nn.Module):
  """Runs an image tower's last layers on images of a single token.

  The parameters have the names of the tower.
  """

  spec: Any
  dtype: Any
  block: bool  # whether to run the last block and the final norm

  @nn.compact
  def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n e"]:
    spec = self.spec
    x = x[:, None].astype(self.dtype)  # [N, 1, D]
    if self.block:
      x = layers.Block(
        **stack_lib.block_options(spec), dtype=self.dtype, name="block"
      )(x)
      x = stack_lib.final_norm(spec, self.dtype)(x)
    if spec.pool in pooling.KINDS:
      x = pooling.build(spec, self.dtype)(x)  # [N, D]
    return layers.project(x.reshape(-1, x.shape[-1]), spec.projection)
