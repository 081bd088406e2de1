"""Text tower: a transformer over token ids, with the options of `TextSpec`.

Covers the towers of SigLIP, CLIP, AIMv2 and TIPS.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtv_jax.config.options import PositiveFloat
from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.layers import Length, NumLayers, VocabularySize, Width
from mtv_jax.models.positions import sinusoidal_positions
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import pytree_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
  """Architecture of a text tower; raises InputError if inconsistent."""

  vocab_size: VocabularySize = 32_000
  length: Length = 64  # Maximum tokens; shorter texts use the first positions.
  width: Width = 768  # Channels of a token (D).
  depth: NumLayers = 12
  heads: Width = 12
  mlp_dim: Width = 3072
  # Pooled token: 'last' (SigLIP), 'eos' (CLIP), 'first_eos' (MetaCLIP 2),
  # 'first', or the 'mean' of all tokens, padding included unless `pad_id` is
  # set.
  pool: Literal["last", "eos", "first_eos", "first", "mean"] = "last"
  causal: bool = False  # A token attends to itself and earlier tokens (CLIP).
  gelu: layers.Gelu = "tanh"
  mlp: layers.MlpKind = "plain"  # Or 'swiglu' (AIMv2).
  qkv_bias: layers.QkvBias = "all"
  bias: bool = True  # In the blocks' other linear layers; AIMv2 has none.
  norm_kind: layers.NormKind = "layer"  # Or 'rms' (AIMv2).
  # 'learned', or fixed 'sinusoidal' without parameters (TIPS).
  positions: Literal["learned", "sinusoidal"] = "learned"
  token_scale: bool = False  # Multiply token embeddings by sqrt(D) (TIPS).
  # Padding token, excluded from attention and 'mean' pooling (TIPS). None:
  # attention includes padding (SigLIP, CLIP).
  pad_id: int | None = None
  norm_eps: PositiveFloat = 1e-6
  # Channels of the embedding (E); None: the width, without a projection (TIPS).
  projection: Width | None = 768
  projection_bias: bool = True  # SigLIP has one.
  # End-of-text token: 'eos' and 'first_eos' pool the first in a text. As in
  # `transformers`, eos_id=2 with 'eos' pools the highest id instead: CLIP's
  # configs say 2, although their end of text is the vocabulary's last id.
  eos_id: int = 1

  def __post_init__(self):
    stack_lib.check_tower(self)

  @property
  def embed_dim(self) -> int:
    """Channels of `pooled` (E)."""
    return self.projection or self.width


@pytree_dataclass
class TextOutput:
  """Output of the text tower."""

  tokens: Float[Array, "b t d"]  # After the final norm.
  pooled: Float[Array, "b e"]  # Text embedding, float32, not normalised.


class TextTower(stack_lib.Tower):
  """The text tower."""

  spec: TextSpec

  @nn.compact
  def __call__(self, tokens: Int[Array, "b t"]) -> TextOutput:
    """Encodes texts of T <= `spec.length` tokens.

    Attention includes padding, as in SigLIP and CLIP, unless `pad_id` is set.
    An id outside the vocabulary gives NaN, not another token's embedding.
    """
    spec = self.spec
    length = tokens.shape[1]
    if not 1 <= length <= spec.length:
      raise InputError(
        f"The texts have {length} tokens, but the tower takes 1 to "
        f"{spec.length}. Shorten them, or build it with length={length}."
      )
    # CLIP's initialisation (Radford et al. 2021).
    init, shape = nn.initializers.normal(0.02), (spec.vocab_size, spec.width)
    table = self.param("token_embedding", init, shape)
    shape = (spec.length, spec.width)
    if spec.positions == "sinusoidal":
      positions = jnp.asarray(sinusoidal_positions(*shape))
    else:
      init = nn.initializers.normal(0.01)
      positions = self.param("position_embedding", init, shape)
    x = jnp.take(table, tokens, axis=0)  # [B, T, D]
    if spec.token_scale:
      x = x * spec.width**0.5
    valid = None if spec.pad_id is None else tokens != spec.pad_id
    context = () if valid is None else (None, valid)
    x, _ = self.run_blocks(x + positions[:length], context=context)
    pooled = layers.project(
      _pool(spec, tokens, x, valid), spec.projection, bias=spec.projection_bias
    )
    return TextOutput(tokens=x, pooled=pooled)


def _pool(spec, tokens, x, valid):
  """Pooled tokens: [B, D]."""
  if spec.pool == "last":
    return x[:, -1]
  if spec.pool == "first":
    return x[:, 0]
  if spec.pool == "mean":
    if valid is None:
      return x.mean(axis=1, dtype=jnp.float32)
    total = jnp.where(valid[..., None], x, 0).sum(axis=1, dtype=jnp.float32)
    return total / jnp.maximum(valid.sum(axis=1), 1)[:, None]
  # argmax returns the first maximum: padding may be EOS too.
  is_highest = spec.pool == "eos" and spec.eos_id == 2
  index = tokens if is_highest else tokens == spec.eos_id
  index = jnp.argmax(index, axis=1)
  return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
