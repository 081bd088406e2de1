"""Captioning decoder of CapPa and LocCa, and the heads that decode with it.

A transformer decoder attends to the image's patch tokens and predicts the
answers of `caption_sequences` token by token (Wan et al. 2024, LocCa; Tschannen
et al. 2025, SigLIP 2).

In CapPa's parallel prediction (Tschannen et al. 2023) all inputs are mask
tokens, without a causal mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.config import options
from mtv_jax.models import layers, linear
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.heads import base
from mtv_jax.models.heads import caption_sequences as sequences
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TokenLogits:
  """Logits `vectors @ kernel + bias` as float32 factors.

  Computed whole, they would be the largest array of a step.
  """

  vectors: Float[Array, "b s l d"]
  kernel: Float[Array, "d v"]
  bias: Float[Array, " v"]

  def __call__(self) -> Float[Array, "b s l v"]:
    """All logits."""
    return self.chunk(self.kernel, self.bias)

  def chunk(
    self, kernel: Float[Array, "d c"], bias: Float[Array, " c"]
  ) -> Float[Array, "b s l c"]:
    """Logits for a subset of the columns."""
    return linear.linear(self.vectors, kernel, bias)


class DecoderBlock(nn.Module):
  """Pre-norm block: self-attention, cross-attention to an image, MLP."""

  heads: int
  mlp_dim: int
  gelu: str
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "r l d"],
    patches: Float[Array, "b n e"],
    parallel: Bool[Array, "r 1"],
  ) -> Float[Array, "r l d"]:
    """Runs `r / b` rows per image; `parallel` rows lack the causal mask."""
    length = x.shape[1]
    causal = np.tri(length, dtype=bool)
    mask = (causal | parallel[:, :, None])[:, None]  # [r, 1, l, l]

    def attend(q, k, v, causal=False):
      del causal
      y = jax.nn.dot_product_attention(q, k, v, mask=mask)
      return checkpoint_name(y, "attention")

    def norm(i):
      return layers.norm(self.norm_eps, self.dtype, f"norm{i}")

    attention = layers.Attention(
      self.heads, dtype=self.dtype, attention_fn=attend, name="attention"
    )
    x = x + attention(norm(1)(x))
    cross = layers.CrossAttention(
      self.heads, self.dtype, jax.nn.dot_product_attention,
      name="cross_attention",
    )  # fmt: skip
    # All rows of an image at once, to read its keys and values once.
    queries = norm(2)(x).reshape(len(patches), -1, x.shape[-1])
    x = x + cross(queries, patches).reshape(x.shape)
    mlp = layers.Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(norm(3)(x))


class CaptionDecoder(nn.Module):
  """Decoder that predicts the next token's logits after each input.

  Computes in the dtype of the patches. Embeddings and last layer start as in
  CapPa's code (normal(1), zero). Unlike CapPa's, its layers have biases,
  as in our text tower.
  """

  vocabulary: sequences.Vocabulary
  length: int  # Maximum tokens of a sequence.
  width: int
  depth: int
  heads: int
  mlp_dim: int
  gelu: str
  norm_eps: float
  remat: str = "none"  # remat, scan, mesh: see `stack.run_stack`.
  scan: bool = True
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "b s l"],
    parallel: Bool[Array, "b s"],
    patches: Float[Array, "b n e"],
  ) -> TokenLogits:
    """Logits for `s` sequences per image, see `DecoderBlock`."""
    *rows, length = tokens.shape
    if length > self.length:
      raise InputError(
        f"Sequences of {length} tokens for a captioning decoder of "
        f"{self.length}: shorten captions and phrases to "
        f"{self.length - sequences.CORNERS} tokens, or set the length to "
        f"{length - sequences.CORNERS}."
      )
    dtype = patches.dtype
    table = self.param(
      "token_embedding",
      nn.initializers.normal(1.0),
      (self.vocabulary.inputs, self.width),
    )
    positions = self.param(
      "position_embedding",
      nn.initializers.normal(self.width**-0.5),
      (self.length, self.width),
    )
    x = jnp.take(table, tokens.reshape(-1, length), axis=0)
    x = (x + positions[:length]).astype(dtype)  # [B * s, l, D]
    block = DecoderBlock(
      heads=self.heads,
      mlp_dim=self.mlp_dim,
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      dtype=dtype,
      parent=None,
    )
    context = (patches, parallel.reshape(-1, 1))
    init = stack_lib.stacked_init(block, self.depth, self.width, context)
    x, _ = stack_lib.run_stack(
      block,
      self.param("blocks", init),
      x,
      context=context,
      remat=self.remat,
      scan=self.scan,
      mesh=self.mesh,
    )
    x = layers.norm(self.norm_eps, jnp.float32, "norm")(x)
    kernel, bias = _Output(self.vocabulary.outputs, name="projection")(
      self.width
    )
    return TokenLogits(x.reshape(*rows, length, self.width), kernel, bias)


class _Output(nn.Module):
  """The last layer's parameters."""

  outputs: int

  @nn.compact
  def __call__(self, width):
    zeros = nn.initializers.zeros
    return (
      self.param("kernel", zeros, (width, self.outputs)),
      self.param("bias", zeros, (self.outputs,)),
    )


# (tokens, parallel, patches) -> TokenLogits: the module with its parameters.
Decoder = Callable[..., TokenLogits]


def greedy_decode(
  decoder: Decoder,
  patches: Float[Array, "b n e"],
  begin: int,
  prompt: Int[Array, "b s p"],
  prompt_length: Int[Array, "b s"],
  *,
  count: int,
  ids: tuple[int, int],
  stop: int | None = None,
) -> Int[Array, "b s {count}"]:
  """Greedy decoding of `count` tokens after `[begin, prompt]`.

  Runs the decoder over the whole sequence for each token, without a KV cache:
  the cost grows quadratically with the length.

  Args:
    ids: first allowed id, and one past the last.
    stop: id that ends an answer and pads it; decoding stops once all rows have
      it.
  """
  low, high = ids
  shape = prompt.shape[:2]
  parallel = jnp.zeros(shape, bool)
  full = jnp.full(shape, count)

  def unfinished(state):
    i, _, done = state
    return (i < count) & ~done.all()

  def step(state):
    i, answer, done = state
    rows = sequences.make_sequences(begin, prompt, prompt_length, answer, full)
    logits = decoder(rows.inputs, parallel, patches)
    at = (prompt_length + i)[..., None, None]
    vectors = jnp.take_along_axis(logits.vectors, at, axis=2)  # [B, s, 1, D]
    scores = dataclasses.replace(logits, vectors=vectors).chunk(
      logits.kernel[:, low:high], logits.bias[low:high]
    )
    token = low + jnp.argmax(scores[:, :, 0], axis=-1).astype(jnp.int32)
    if stop is not None:
      token = jnp.where(done, stop, token)
      done |= token == stop
    return i + 1, answer.at[..., i].set(token), done

  answer = jnp.full((*shape, count), low if stop is None else stop, jnp.int32)
  done = jnp.zeros(shape, bool)
  return jax.lax.while_loop(unfinished, step, (0, answer, done))[1]


@dataclasses.dataclass(frozen=True)
class CaptionHead(base.PredictionHead):
  """Caption head: captions an image.

  The decoder defaults to the text tower's shape with half of its layers
  (SigLIP 2).
  """

  objective = "captioning"
  params_key = "caption_decoder"

  # Tasks to train.
  tasks: tuple[Literal[sequences.TASKS], ...] = sequences.TASKS
  width: options.PositiveInt | None = None
  depth: options.PositiveInt | None = None
  attention_heads: options.PositiveInt | None = None
  mlp_dim: options.PositiveInt | None = None
  bins: options.PositiveInt = 500  # Bins per coordinate, as in LocCa.
  gelu: str | None = None
  norm_eps: float | None = None
  # `resolve` takes these from the text tower.
  vocab_size: options.PositiveInt | None = None
  length: options.PositiveInt | None = None  # Maximum tokens of a text.
  eos_id: options.NonNegativeInt | None = None  # The tokenizer's end of text.

  def __post_init__(self):
    if not self.tasks:
      raise ConfigError(f"tasks is empty; expected some of {sequences.TASKS}.")

  def is_trained(self, name: str) -> bool:
    return name in self.tasks

  def resolve(self, spec: Any) -> CaptionHead:
    text = spec.text
    if text is None:
      raise ConfigError(
        "captioning reads captions, whose tokens the text tower's options give "
        "(tokenizer, length, vocab_size): set config.model.text."
      )
    defaults = dict(
      width=text.width,
      depth=max(text.depth // 2, 1),
      attention_heads=text.heads,
      mlp_dim=text.mlp_dim,
      gelu=text.gelu,
      norm_eps=text.norm_eps,
      vocab_size=text.vocab_size,
      length=text.length,
      eos_id=text.eos_id,
    )
    given = {k: v for k, v in vars(self).items() if v is not None}
    head = dataclasses.replace(self, **(defaults | given))
    if head.width % head.attention_heads or head.bins < 2:
      raise ConfigError(
        f"captioning: width {head.width} is not divisible by attention_heads "
        f"{head.attention_heads}, or bins {head.bins} is less than 2."
      )
    return head

  @property
  def vocabulary(self) -> sequences.Vocabulary:
    """The decoder's vocabulary; requires a resolved head."""
    return sequences.Vocabulary(self.vocab_size, self.bins)

  def module(self, **runtime: Any) -> CaptionDecoder:
    """Builds the decoder; `runtime`: `remat` and `scan`."""
    return CaptionDecoder(
      vocabulary=self.vocabulary,
      length=self.length + sequences.CORNERS,
      width=self.width,
      depth=self.depth,
      heads=self.attention_heads,
      mlp_dim=self.mlp_dim,
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      **runtime,
    )

  def example(self, spec: Any) -> tuple:
    return (
      jax.ShapeDtypeStruct((1, 1, 1), "int32"),
      jax.ShapeDtypeStruct((1, 1), "bool"),
      jax.ShapeDtypeStruct((1, 1, spec.image.width), "float32"),
    )

  def check_tokenizer(self, tokenizer: Any) -> None:
    if tokenizer.eos_id != self.eos_id:
      raise ConfigError(
        f"captioning ends texts with the id {self.eos_id}, but {tokenizer!r} "
        f"ends them with {tokenizer.eos_id}: set config.objectives.captioning."
        f"eos_id to that, or use a tokenizer with an end of text."
      )

  def predict(
    self, head: Decoder, image: Any, grid: tuple[int, int]
  ) -> dict[str, Array]:
    """Predicts `tokens` `[B, length]`, padded with the end of text."""
    del grid
    prompt = jnp.zeros((len(image.patches), 1, 0), jnp.int32)
    return {"tokens": self._text(head, image, "caption", prompt)[:, 0]}

  def _text(self, head, image, task, prompt):
    return greedy_decode(
      head,
      image.patches,
      self.vocabulary.begin(task),
      prompt,
      jnp.full(prompt.shape[:2], prompt.shape[2]),
      count=self.length,
      ids=(0, self.vocab_size),
      stop=self.eos_id,
    )

  def decode(self, out: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Adds `text`, an array of strings, to `tokens`."""
    tokens = out.get("tokens")
    if tokens is None or tokenizer is None:
      return out
    flat = tokens.reshape(-1, tokens.shape[-1])
    ends = np.cumsum(flat == self.eos_id, axis=1) > 0
    rows = [row[~end].tolist() for row, end in zip(flat, ends, strict=True)]
    text = np.empty(len(rows), object)
    text[:] = tokenizer.decode(rows)
    return {**out, "text": text.reshape(tokens.shape[:-1])}


@dataclasses.dataclass(frozen=True)
class ReferringHead(CaptionHead):
  """Referring head: a box for each phrase."""

  inputs = {"phrases": base.TOKENS}

  def predict(
    self,
    head: Decoder,
    image: Any,
    grid: tuple[int, int],
    *,
    phrases: Float[Array, "b m p"],
  ) -> dict[str, Array]:
    """Predicts `boxes` `[B, m, 4]`, `(y0, x0, y1, x1)`, from phrase tokens."""
    del grid
    prompt = phrases.astype(jnp.int32)
    ids = greedy_decode(
      head,
      image.patches,
      self.vocabulary.begin("referring"),
      prompt,
      sequences.text_length(prompt, self.eos_id),
      count=sequences.CORNERS,
      ids=(self.vocab_size, self.vocabulary.outputs),
    )
    return {"boxes": self.vocabulary.dequantize(ids)}


@dataclasses.dataclass(frozen=True)
class RegionCaptionHead(CaptionHead):
  """Region caption head: a phrase for each box."""

  inputs = {"boxes": sequences.CORNERS}

  def predict(
    self,
    head: Decoder,
    image: Any,
    grid: tuple[int, int],
    *,
    boxes: Float[Array, "b m 4"],
  ) -> dict[str, Array]:
    """Predicts `tokens` `[B, m, length]` for boxes `(y0, x0, y1, x1)`."""
    del grid
    prompt = self.vocabulary.quantize(boxes)
    return {"tokens": self._text(head, image, "region_caption", prompt)}
