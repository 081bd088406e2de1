"""Decoder-only language model with Llama's or Qwen2's layout.

Pre-norm blocks of grouped-query attention (Ainslie et al. 2023) with rotary
positions (Su et al. 2021) and SwiGLU (Shazeer 2020), with RMSNorm: Llama
(Touvron et al. 2023), Qwen2 (Yang et al. 2024).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.config import options
from mtv_jax.models import layers, linear, positions
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.attention import build_attention
from mtv_jax.parallel.rules import all_gather_params
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import pytree_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelSpec:
  """Architecture of a language model; SmolLM2-135M's sizes by default."""

  vocab_size: layers.VocabularySize = 49_152
  width: layers.Width = 576
  depth: layers.NumLayers = 30
  heads: layers.Width = 9  # Heads of the queries.
  kv_heads: layers.Width = 3  # Heads of keys and values; divides `heads`.
  head_dim: layers.Width | None = None  # None: width / heads.
  mlp_dim: layers.Width = 1536
  qkv_bias: bool = False  # Qwen2 has one.
  tied: bool = True  # Whether the output layer is the embedding's transpose.
  norm_eps: options.PositiveFloat = 1e-5
  rope_theta: options.PositiveFloat = 100_000.0
  # Llama 3's frequency scaling: factor, low and high frequency factor, and the
  # context length before scaling.
  rope_scaling: tuple[float, float, float, float] | None = None

  @property
  def channels(self) -> int:
    """Channels of a head."""
    return self.head_dim or self.width // self.heads

  def check(self) -> None:
    """Raises InputError for sizes that don't fit together."""
    options.check_fields(self)
    if self.heads % self.kv_heads or (
      self.head_dim is None and self.width % self.heads
    ):
      raise InputError(
        f"{self.heads} heads must divide the width {self.width}, and "
        f"{self.kv_heads} key heads must divide the heads."
      )
    if self.channels % 2:
      raise InputError(f"Heads of {self.channels} channels can't be rotated.")

  def angles(self, index: Int[Array, "*b n"]) -> Float[Array, "*b n a"]:
    """Rotation angles of tokens at these positions, see `positions.rotate`."""
    channels = self.channels
    rates = self.rope_theta ** -(np.arange(0, channels, 2) / channels)
    if self.rope_scaling is not None:
      factor, low, high, length = self.rope_scaling
      turns = length * rates / (2 * np.pi)  # In the original context.
      unscaled = np.clip((turns - low) / (high - low), 0, 1)
      rates = rates * (unscaled + (1 - unscaled) / factor)
    return index[..., None] * jnp.asarray(rates, jnp.float32)


@pytree_dataclass
class TokenLogits:
  """Logits `vectors @ kernel + bias`, stored as float32 factors.

  The logits themselves would be the largest array of a step.
  """

  vectors: Float[Array, "b s l d"]
  kernel: Float[Array, "d v"]
  bias: Float[Array, " v"]

  def chunk(
    self, kernel: Float[Array, "d c"], bias: Float[Array, " c"]
  ) -> Float[Array, "b s l c"]:
    """Logits for a subset of the columns."""
    return linear.linear(self.vectors, kernel, bias)


@pytree_dataclass
class Cache:
  """Keys and values of the tokens so far, zero-padded at the end.

  In a stack of blocks the arrays have a leading `[depth]`.
  """

  keys: Float[Array, "*depth b s k d"]
  values: Float[Array, "*depth b s k d"]

  def write(self, keys: Array, values: Array, at: Int[Array, ""]) -> Cache:
    """Writes n tokens `[b, n, k, d]` from index `at` on."""
    put = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1
    )
    keys, values = put(self.keys, keys), put(self.values, values)
    return Cache(keys=keys, values=values)


class CausalAttention(nn.Module):
  """Causal grouped-query attention, with or without a cache."""

  spec: LanguageModelSpec
  dtype: Any
  attention_fn: Callable[..., Array]

  @nn.compact
  def __call__(self, x, angles, cache=None, at=None, mask=None):
    spec, kwargs = self.spec, dict(dtype=self.dtype)
    q = layers.Dense(
      spec.heads * spec.channels, use_bias=spec.qkv_bias, name="q", **kwargs
    )(x)
    q = q.reshape(*x.shape[:2], spec.heads, -1)  # [B, N, H, d]
    kv = layers.FusedDense(
      spec.kv_heads * spec.channels, spec.kv_heads, (spec.qkv_bias,) * 2,
      name="kv", **kwargs,
    )  # fmt: skip
    k, v = kv(x)  # [B, N, K, d]
    q, k = positions.rotate(q, angles), positions.rotate(k, angles)
    if cache is None:
      y = self.attention_fn(q, k, v, causal=True)
    else:
      cache = cache.write(k, v, at)
      y = jax.nn.dot_product_attention(q, cache.keys, cache.values, mask=mask)
    out = layers.Dense(spec.width, use_bias=False, name="out", **kwargs)
    return out(y.reshape(*x.shape[:2], -1)), cache


class CausalBlock(nn.Module):
  """Pre-norm block: attention, then SwiGLU."""

  spec: LanguageModelSpec
  dtype: Any
  attention_fn: Callable[..., Array]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    angles: Float[Array, "#b n a"],
    cache: Cache | None = None,
    at: Int[Array, ""] | None = None,
    mask: Bool[Array, "b 1 n s"] | None = None,
  ) -> Any:
    """Without a cache, attends to earlier tokens and returns the tokens.

    With one, writes keys and values at its index `at`, attends to the indices
    in `mask`, and returns tokens and cache.
    """
    spec = self.spec
    norm = functools.partial(layers.norm, spec.norm_eps, self.dtype, kind="rms")
    attention = CausalAttention(
      spec, self.dtype, self.attention_fn, name="attention"
    )
    y, new_cache = attention(norm("norm1")(x), angles, cache, at, mask)
    x = x + y
    mlp = layers.Mlp(
      spec.mlp_dim, kind="swiglu", dtype=self.dtype, use_bias=False, name="mlp"
    )
    x = x + mlp(norm("norm2")(x))
    return x if cache is None else (x, new_cache)


class LanguageModel(nn.Module):
  """The language model; computes in the dtype of the embedded tokens."""

  spec: LanguageModelSpec
  remat: str = "none"  # remat, scan, mesh: see `stack.run_stack`.
  scan: bool = True
  mesh: Mesh | None = None

  def setup(self):
    spec = self.spec
    spec.check()
    init, shape = nn.initializers.normal(0.02), (spec.vocab_size, spec.width)
    self.token_embedding = self.param("token_embedding", init, shape)
    angles = spec.angles(jnp.zeros((1, 1), int))
    block = self._block(jnp.float32)
    init = stack_lib.stacked_init(block, spec.depth, spec.width, (angles,))
    self.blocks = self.param("blocks", init)
    self.norm = nn.RMSNorm(spec.norm_eps)
    if not spec.tied:
      init = nn.initializers.normal(0.02)
      self.projection = self.param(
        "projection", lambda key: {"kernel": init(key, shape[::-1])}
      )

  def _block(self, dtype: Any) -> CausalBlock:
    attention = build_attention(mesh=self.mesh)
    return CausalBlock(self.spec, jnp.dtype(dtype), attention, parent=None)

  def embed(self, tokens: Int[Array, "*b n"]) -> Float[Array, "*b n d"]:
    """Token embeddings, float32."""
    return jnp.take(self.token_embedding, tokens, axis=0)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Runs the blocks and the final norm on embeddings, from position 0 on."""
    angles = self.spec.angles(jnp.arange(x.shape[1])[None])
    x, _ = stack_lib.run_stack(
      self._block(x.dtype), self.blocks, x, context=(angles,),
      remat=self.remat, scan=self.scan, mesh=self.mesh,
    )  # fmt: skip
    return self.norm(x.astype(jnp.float32))

  def logits(self, vectors: Float[Array, "b s l d"]) -> TokenLogits:
    """Logits of the next token for each output of the blocks."""
    if self.spec.tied:
      table = {"token_embedding": self.token_embedding}
      kernel = all_gather_params(table, self.mesh)["token_embedding"].T
    else:
      kernel = self.projection["kernel"]
    return TokenLogits(vectors, kernel, jnp.zeros(self.spec.vocab_size))

  def generate(
    self,
    prompt: Float[Array, "b n d"],
    length: Int[Array, " b"],
    *,
    max_tokens: int,
    stop: int,
  ) -> Int[Array, "b {max_tokens}"]:
    """Greedy decoding after prompts of embeddings, padded on the right.

    An answer ends with the token `stop`, which also pads it. Runs each prompt
    once, then one token at a time with a cache. Prompts are shifted to the
    right, so that all rows write at one index; their padding is masked, so it
    changes no value.
    """
    batch, n, _ = prompt.shape
    max_length, spec = n + max_tokens, self.spec
    shift = (n - length)[:, None]  # [B, 1]
    index = jnp.arange(max_length)[None]
    order = jnp.maximum(index[:, :n] - shift, 0)
    prompt = jnp.take_along_axis(prompt, order[..., None], axis=1)
    is_token = index >= shift  # [B, S]
    block, dtype = self._block(prompt.dtype), prompt.dtype
    shape = (spec.depth, batch, max_length, spec.kv_heads, spec.channels)
    cache = Cache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def run(x, cache, at):
      """Runs tokens from index `at` on; returns the next token's logits."""
      slots = at + jnp.arange(x.shape[1])[None]  # [1, n]
      angles = spec.angles(slots - shift)
      mask = is_token[:, None] & (index[:, None] <= slots[..., None])

      def step(x, layer):
        params, cache = layer
        args = x, angles, cache, at, mask[:, None]
        return block.apply({"params": params}, *args)

      x, cache = jax.lax.scan(step, x, (self.blocks, cache))
      last_output = self.norm(x[:, -1:].astype(jnp.float32))[:, None]
      logits = self.logits(last_output)
      return logits.chunk(logits.kernel, logits.bias)[:, 0, 0], cache

    def step(i, _, state):
      scores, cache = state
      token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
      x = self.embed(token)[:, None].astype(dtype)
      return token, run(x, cache, n + i)

    state = run(prompt, cache, jnp.zeros((), jnp.int32))
    return decode_greedily(
      step, state, (batch,), count=max_tokens, stop=stop, fill=stop
    )


def decode_greedily(
  step: Callable[[Array, Array, Any], tuple[Array, Any]],
  state: Any,
  shape: Sequence[Any],
  *,
  count: int,
  fill: int,
  stop: int | None = None,
) -> Int[Array, "*shape count"]:
  """Decodes `count` tokens for each row of `shape`, which may be symbolic.

  `step(i, tokens, state)` returns token i and the next state; `tokens` are
  `fill` from i on. `stop` ends a row and pads it; decoding stops once all rows
  have ended.
  """

  def is_unfinished(carry):
    i, _, is_done, _ = carry
    return (i < count) & ~is_done.all()

  def body(carry):
    i, tokens, is_done, state = carry
    token, state = step(i, tokens, state)
    if stop is not None:
      token = jnp.where(is_done, stop, token)
      is_done |= token == stop
    return i + 1, tokens.at[..., i].set(token), is_done, state

  tokens = jnp.full((*shape, count), fill, jnp.int32)
  carry = 0, tokens, jnp.zeros(shape, bool), state
  return jax.lax.while_loop(is_unfinished, body, carry)[1]
