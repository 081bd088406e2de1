"""Captioning decoder of CapPa and LocCa, and the heads that decode with it.

A transformer decoder attends to the image's patch tokens and predicts the
answers of its tasks token by token (Wan et al. 2024, LocCa; Tschannen
et al. 2025, SigLIP 2).

In CapPa's parallel prediction (Tschannen et al. 2023) all inputs are mask
tokens, without a causal mask. The tasks' sequences (LocCa):

    caption          [caption]                     -> caption
    referring        [referring] phrase            -> y0 x0 y1 x1   (AREF)
    region_caption   [region_caption] y0 x0 y1 x1  -> phrase        (GCAP)

The vocabulary is the tokenizer's, then one token per coordinate bin, then, as
inputs only, one start token per task and a mask token. LocCa starts tasks with
words ("ARef:"); start tokens are our choice, since they need no tokenizer.
Captions and phrases end with the tokenizer's end-of-text token.
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
from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.heads import base
from mtv_jax.models.language_model import TokenLogits, decode_greedily
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import pytree_dataclass

TASKS = ("caption", "referring", "region_caption")
CORNERS = 4  # Coordinates of a box: y0, x0, y1, x1.


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Token ids of the decoder: text, coordinate bins, tasks, mask."""

  text: int  # Size of the tokenizer's vocabulary.
  bins: int

  @property
  def outputs(self) -> int:  # Ids that the decoder predicts: text and bins.
    return self.text + self.bins

  @property
  def inputs(self) -> int:  # All ids.
    return self.outputs + len(TASKS) + 1

  @property
  def mask(self) -> int:  # The mask token of parallel prediction.
    return self.inputs - 1

  def begin(self, task: str) -> int:
    """The start token of a task."""
    return self.outputs + TASKS.index(task)

  def quantize(self, boxes: Float[Array, "*b 4"]) -> Int[Array, "*b 4"]:
    """Ids of the bins nearest to coordinates in 0..1.

    The first bin is 0, the last bin 1. LocCa does not specify their positions.
    """
    index = jnp.round(jnp.clip(boxes, 0.0, 1.0) * (self.bins - 1))
    return self.text + index.astype(jnp.int32)

  def dequantize(self, ids: Int[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Coordinates of bin ids."""
    return (ids - self.text).astype(jnp.float32) / (self.bins - 1)


@pytree_dataclass
class Sequences:
  """Token sequences: a given prompt, then the answer to predict.

  The answer directly follows the prompt, so that padding has no effect.
  """

  inputs: Int[Array, "b s l"]
  targets: Int[Array, "b s l"]  # The token after each input.
  is_answer: Bool[Array, "b s l"]  # Which targets belong to the answer.


def make_sequences(
  begin: int,
  prompt: Int[Array, "b s p"],
  prompt_length: Int[Array, "b s"],
  answer: Int[Array, "b s a"],
  answer_length: Int[Array, "b s"],
) -> Sequences:
  """Joins right-padded prompts and answers: `[begin, prompt, answer]`."""
  tokens = jnp.concatenate([prompt, answer], axis=-1)
  p, index = prompt.shape[-1], np.arange(tokens.shape[-1])
  start, count = prompt_length[..., None], answer_length[..., None]
  order = jnp.where(index < start, index, index + p - start)
  order = jnp.minimum(order, len(index) - 1)
  targets = jnp.take_along_axis(tokens, order, axis=-1)
  begin_token = jnp.full_like(targets[..., :1], begin)
  inputs = jnp.concatenate([begin_token, targets[..., :-1]], axis=-1)
  return Sequences(inputs, targets, (index >= start) & (index < start + count))


def text_length(tokens: Int[Array, "*b t"], eos_id: int) -> Int[Array, "*b"]:
  """Number of tokens up to and including the first end of text."""
  ends = tokens == eos_id
  ends_before = jnp.cumsum(ends, axis=-1) - ends
  return jnp.sum(ends_before == 0, axis=-1)


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
    """Runs r / b sequences per image; `parallel` ones lack the causal mask."""
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
    cross_attention = layers.CrossAttention(
      self.heads, self.dtype, jax.nn.dot_product_attention,
      name="cross_attention",
    )  # fmt: skip
    # All rows of an image at once, to read its keys and values once.
    queries = norm(2)(x).reshape(patches.shape[0], -1, x.shape[-1])
    x = x + cross_attention(queries, patches).reshape(x.shape)
    mlp = layers.Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name="mlp")
    return x + mlp(norm(3)(x))


class CaptionDecoder(nn.Module):
  """Decoder that predicts the next token's logits after each input.

  Computes in the dtype of the patches. Embeddings and last layer start as in
  CapPa's code (normal(1), zero). Unlike CapPa's, its layers have biases,
  as in our text tower.
  """

  stacks = ("blocks",)  # See `objectives.base.Head`.

  vocabulary: Vocabulary
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
        f"Sequences have {length} tokens, but the captioning decoder takes "
        f"{self.length}: shorten the texts by {length - self.length} tokens."
      )
    dtype = patches.dtype
    width = self.width
    init = nn.initializers.normal(1.0)
    table = self.param("token_embedding", init, (self.vocabulary.inputs, width))
    init = nn.initializers.normal(width**-0.5)
    positions = self.param("position_embedding", init, (self.length, width))
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
    stack = self.param(
      "blocks", stack_lib.stacked_init(block, self.depth, width, context)
    )
    runtime = dict(remat=self.remat, scan=self.scan, mesh=self.mesh)
    x, _ = stack_lib.run_stack(block, stack, x, context=context, **runtime)
    x = layers.norm(self.norm_eps, jnp.float32, "norm")(x)
    size = self.vocabulary.outputs
    shapes = {"kernel": (width, size), "bias": (size,)}
    last_layer = self.param(
      "projection", lambda key: {k: jnp.zeros(s) for k, s in shapes.items()}
    )
    return TokenLogits(x.reshape(*rows, length, width), **last_layer)


def greedy_decode(
  decoder: Callable[..., TokenLogits],
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

  `decoder` is a `CaptionDecoder` with its parameters. It runs over the whole
  sequence for each token, without a KV cache: the cost grows quadratically with
  the length. `ids` are the first allowed id and one past the last. `stop` ends
  an answer and pads it; decoding stops once all rows end.
  """
  low, high = ids
  shape = prompt.shape[:2]
  parallel = jnp.zeros(shape, bool)
  lengths = jnp.full(shape, count)

  def step(i, answer, state):
    rows = make_sequences(begin, prompt, prompt_length, answer, lengths)
    logits = decoder(rows.inputs, parallel, patches)
    index = (prompt_length + i)[..., None, None]
    vectors = jnp.take_along_axis(logits.vectors, index, axis=2)  # [B, s, 1, D]
    scores = dataclasses.replace(logits, vectors=vectors).chunk(
      logits.kernel[:, low:high], logits.bias[low:high]
    )
    return low + jnp.argmax(scores[:, :, 0], axis=-1).astype(jnp.int32), state

  fill = low if stop is None else stop
  return decode_greedily(step, (), shape, count=count, fill=fill, stop=stop)


# Head options that default to the text tower's options of the same name.
_TEXT_OPTIONS = (
  "width", "mlp_dim", "gelu", "norm_eps", "vocab_size", "length", "eos_id"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CaptionHead(base.PredictionHead):
  """Caption head: captions an image.

  The decoder defaults to the text tower's shape with half of its layers
  (SigLIP 2).
  """

  params_key = "caption_decoder"

  # Tasks to train.
  tasks: tuple[Literal[TASKS], ...] = TASKS
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
      raise ConfigError(f"tasks is empty; expected some of {TASKS}.")

  def predictions(self) -> dict[str, base.PredictionHead]:
    kwargs = dataclasses.asdict(self)
    heads = self, ReferringHead(**kwargs), RegionCaptionHead(**kwargs)
    by_task = zip(TASKS, heads, strict=True)
    return {task: head for task, head in by_task if task in self.tasks}

  def resolve(self, spec: Any) -> CaptionHead:
    text = spec.text
    if text is None:
      raise ConfigError("captioning needs a tokenizer: set config.model.text.")
    defaults = {name: getattr(text, name) for name in _TEXT_OPTIONS}
    defaults["depth"] = max(text.depth // 2, 1)
    defaults["attention_heads"] = text.heads
    overrides = {k: v for k, v in vars(self).items() if v is not None}
    head = dataclasses.replace(self, **(defaults | overrides))
    if head.width % head.attention_heads or head.bins < 2:
      raise ConfigError(
        f"captioning: width {head.width} is not divisible by attention_heads "
        f"{head.attention_heads}, or bins {head.bins} is less than 2."
      )
    return head

  @property
  def vocabulary(self) -> Vocabulary:
    """The decoder's vocabulary; requires a resolved head."""
    return Vocabulary(self.vocab_size, self.bins)

  def module(self, **runtime: Any) -> CaptionDecoder:
    """Builds the decoder; `runtime`: `remat` and `scan`."""
    return CaptionDecoder(
      vocabulary=self.vocabulary,
      length=self.length + CORNERS,
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
        f"captioning ends texts with {self.eos_id}, but {tokenizer!r} "
        f"ends them with {tokenizer.eos_id}: set objectives.captioning.eos_id."
      )

  def predict(self, head, image, grid) -> dict[str, Array]:
    """Predicts `tokens` `[B, length]`, padded with the end of text."""
    del grid
    prompt = jnp.zeros((image.patches.shape[0], 1, 0), jnp.int32)
    return {"tokens": self._predict_text(head, image, "caption", prompt)[:, 0]}

  def _predict_text(self, head, image, task, prompt):
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
    answers = [row[~end].tolist() for row, end in zip(flat, ends, strict=True)]
    text = np.empty(len(answers), object)
    text[:] = tokenizer.decode(answers)
    return {**out, "text": text.reshape(tokens.shape[:-1])}


@dataclasses.dataclass(frozen=True)
class ReferringHead(CaptionHead):
  """Referring head: a box for each phrase."""

  inputs = {"phrases": base.TOKENS}

  def predict(self, head, image, grid, *, phrases) -> dict[str, Array]:
    """Predicts `boxes` `[B, m, 4]`, `(y0, x0, y1, x1)`, from phrase tokens.

    `phrases`: `[B, m, P]`, float.
    """
    del grid
    prompt = phrases.astype(jnp.int32)
    ids = greedy_decode(
      head,
      image.patches,
      self.vocabulary.begin("referring"),
      prompt,
      text_length(prompt, self.eos_id),
      count=CORNERS,
      ids=(self.vocab_size, self.vocabulary.outputs),
    )
    return {"boxes": self.vocabulary.dequantize(ids)}


@dataclasses.dataclass(frozen=True)
class RegionCaptionHead(CaptionHead):
  """Region caption head: a phrase for each box."""

  inputs = {"boxes": CORNERS}

  def predict(self, head, image, grid, *, boxes) -> dict[str, Array]:
    """Predicts `tokens` `[B, m, length]` for boxes `(y0, x0, y1, x1)`."""
    del grid
    prompt = self.vocabulary.quantize(boxes)
    return {"tokens": self._predict_text(head, image, "region_caption", prompt)}
