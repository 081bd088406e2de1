"""Text tower: a transformer over token ids, as SigLIP's or CLIP's."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mtv_jax.models import layers
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.tree import pytree_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
  """Architecture of a text tower; InputError for inconsistent fields."""

  vocab_size: int = 32_000
  length: int = 64  # Most tokens; shorter texts use the first positions.
  width: int = 768  # Channels of a token (D).
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  # The text's embedding: the token 'last' (SigLIP), 'eos' (CLIP) or 'first', or
  # the 'mean' of all, padding included.
  pool: str = "last"
  causal: bool = False  # Whether a token sees only those before it (CLIP).
  gelu: str = "tanh"  # SigLIP's; 'exact', or CLIP's 'quick'.
  norm_eps: float = 1e-6
  projection: int = 768  # Channels of the embedding (E).
  projection_bias: bool = True  # SigLIP has one.
  # The end-of-text token of pool 'eos', which takes the first one of a text. As
  # in `transformers`, 2 means the position of the highest id: CLIP's
  # configurations said 2 while the token was the last of the vocabulary.
  eos_id: int = 1

  def __post_init__(self):
    layers.check_tower(self)
    check_choice("TextSpec.pool", self.pool, ("last", "eos", "first", "mean"))
    for field in ("vocab_size", "length", "projection"):
      if getattr(self, field) < 1:
        raise InputError(
          f"TextSpec.{field} is {getattr(self, field)}; it must be at least 1."
        )

  @property
  def embed_dim(self) -> int:
    """Channels of `pooled` (E)."""
    return self.projection


@pytree_dataclass
class TextOutput:
  """Output of the text tower."""

  tokens: Float[Array, "b t d"]  # After the final norm.
  pooled: Float[Array, "b e"]  # The text's embedding, float32, not normalised.


class TextTower(layers.Tower):
  """The text tower."""

  spec: TextSpec

  @nn.compact
  def __call__(self, tokens: Int[Array, "b t"]) -> TextOutput:
    """Encodes texts of T <= `spec.length` tokens.

    Padding is attended to, as in SigLIP and CLIP: there is no mask. An id
    outside the vocabulary gives NaN rather than some other token's embedding.

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
    positions = self.param(
      "position_embedding",
      nn.initializers.normal(0.01),
      (spec.length, spec.width),
    )
    x = jnp.take(table, tokens, axis=0) + positions[:length]  # [B, T, D]
    x, _ = self.run_blocks(x, causal=spec.causal)
    pooled = layers.project(
      _pool(spec, tokens, x), spec.projection, bias=spec.projection_bias
    )
    return TextOutput(tokens=x, pooled=pooled)


def _pool(spec, tokens, x):
  """Pooled tokens: [B, D]."""
  if spec.pool == "last":
    return x[:, -1]
  if spec.pool == "first":
    return x[:, 0]
  if spec.pool == "mean":
    return x.mean(axis=1, dtype=jnp.float32)
  # argmax takes the first of equals: padding may be EOS too.
  at = tokens if spec.eos_id == 2 else tokens == spec.eos_id
  at = jnp.argmax(at, axis=1)
  return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
