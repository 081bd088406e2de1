"""Text tower: a transformer over token ids, with the options of `TextSpec`.

They cover the towers of SigLIP, CLIP, AIMv2 and TIPS.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtv_jax.config.options import PositiveFloat
from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.layers import Depth, Length, Vocabulary, Width
from mtv_jax.models.positions import sinusoidal_positions
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.tree import pytree_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
  """Architecture of a text tower; InputError for inconsistent fields."""

  vocab_size: Vocabulary = 32_000
  length: Length = 64  # Most tokens; shorter texts use the first positions.
  width: Width = 768  # Channels of a token (D).
  depth: Depth = 12
  heads: Width = 12
  mlp_dim: Width = 3072
  # The text's embedding: the token 'last' (SigLIP), 'eos' (CLIP) or 'first', or
  # the 'mean' of all, padding included.
  pool: str = "last"
  causal: bool = False  # Whether a token sees only those before it (CLIP).
  gelu: str = "tanh"  # SigLIP's; 'exact', CLIP's 'quick', or TIPS' 'relu'.
  mlp: str = "plain"  # Or 'swiglu' (AIMv2).
  qkv_bias: layers.QkvBias = "all"
  bias: bool = True  # Of the blocks' other linear layers; AIMv2 has none.
  norm_kind: layers.NormKind = "layer"  # Or 'rms' (AIMv2).
  # 'learned', or fixed 'sinusoidal' ones, which are no parameters (TIPS).
  positions: str = "learned"
  token_scale: bool = False  # Multiply embeddings of tokens by sqrt(D) (TIPS).
  # Padding, which attention and the pool 'mean' leave out (TIPS). None: all
  # tokens are attended to, padding included (SigLIP, CLIP).
  pad_id: int | None = None
  norm_eps: PositiveFloat = 1e-6
  # Channels of the embedding (E); None: the width, without a projection (TIPS).
  projection: Width | None = 768
  projection_bias: bool = True  # SigLIP has one.
  # The end-of-text token of pool 'eos', which takes the first one of a text. As
  # in `transformers`, 2 means the position of the highest id: CLIP's
  # configurations said 2 while the token was the last of the vocabulary.
  eos_id: int = 1

  def __post_init__(self):
    stack_lib.check_tower(self)
    check_choice("TextSpec.pool", self.pool, ("last", "eos", "first", "mean"))
    positions_kinds = ("learned", "sinusoidal")
    check_choice("TextSpec.positions", self.positions, positions_kinds)

  @property
  def embed_dim(self) -> int:
    """Channels of `pooled` (E)."""
    return self.projection or self.width


@pytree_dataclass
class TextOutput:
  """Output of the text tower."""

  tokens: Float[Array, "b t d"]  # After the final norm.
  pooled: Float[Array, "b e"]  # The text's embedding, float32, not normalised.


class TextTower(stack_lib.Tower):
  """The text tower."""

  spec: TextSpec

  @nn.compact
  def __call__(self, tokens: Int[Array, "b t"]) -> TextOutput:
    """Encodes texts of T <= `spec.length` tokens.

    Padding is attended to, as in SigLIP and CLIP, unless `pad_id` says which it
    is. An id outside the vocabulary gives NaN rather than some other token's
    embedding.

    Raises:
      InputError: for too many tokens.
    """
    spec = self.spec
    length = tokens.shape[1]
    if not 1 <= length <= spec.length:
      raise InputError(
        f"The texts have {length} tokens; the tower has positions for 1 to "
        f"{spec.length}. Tokenize to at most {spec.length}, or build the model "
        f"with length={length}."
      )
    # Initialised as CLIP's (Radford et al. 2021).
    table = self.param(
      "token_embedding",
      nn.initializers.normal(0.02),
      (spec.vocab_size, spec.width),
    )
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
  # argmax takes the first of equals: padding may be EOS too.
  at = tokens if spec.eos_id == 2 else tokens == spec.eos_id
  at = jnp.argmax(at, axis=1)
  return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
