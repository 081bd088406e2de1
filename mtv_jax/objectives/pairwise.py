"""Pairwise logits and sigmoid losses of the contrastive objectives."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.objectives import base
from mtv_jax.utils.tree import pytree_dataclass


def sigmoid_losses(
  logits: Float[Array, "n m"], positive: Bool[Array, "n m"]
) -> Float[Array, "n m"]:
  """`-log sigmoid(y * logit)` of each pair, y = 1 where positive, else -1.

  A binary classification of each pair (SigLIP; Zhai et al. 2023, Algorithm 1).
  """
  return -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))


@pytree_dataclass
class Affine:
  """Scale and bias of logits `scale * cosine + bias`."""

  scale: Float[Array, ""]
  bias: Float[Array, ""]


def affine_report(affine: Affine) -> dict[str, base.WeightedMean]:
  """Scale and bias as means for the log."""
  one = jnp.ones(())
  return {
    "scale": base.WeightedMean(affine.scale, one),
    "bias": base.WeightedMean(affine.bias, one),
  }


def logits(
  rows: Float[Array, "n d"], columns: Float[Array, "m d"], affine: Affine
) -> Float[Array, "n m"]:
  """`scale * cosine + bias` of rows and columns of unit length."""
  cosine = jnp.einsum("nd,md->nm", rows, columns, precision="highest")
  return affine.scale * cosine + affine.bias


class Temperature(nn.Module):
  """The learnt scale and bias of the logits.

  The parameter is the logarithm of the scale, which starts at 10 in SigLIP, at
  1/0.07 in CLIP. None omits the bias. SigLIP's -10 makes almost all pairs
  negative, as they are; log(1/B) balances the B pairs of a row.
  """

  init_scale: float
  init_bias: float | None

  @nn.compact
  def __call__(self) -> Affine:
    log_scale = self.param(
      "logit_scale", nn.initializers.constant(math.log(self.init_scale)), ()
    )
    bias = jnp.zeros(())
    if self.init_bias is not None:
      bias = self.param(
        "logit_bias", nn.initializers.constant(self.init_bias), ()
      )
    return Affine(scale=jnp.exp(log_scale), bias=bias)
