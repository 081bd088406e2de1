"""Token sequences of the captioning decoder's tasks (Wan et al. 2024, LocCa).

    caption          [caption]                     -> caption
    referring        [referring] phrase            -> y0 x0 y1 x1   (AREF)
    region_caption   [region_caption] y0 x0 y1 x1  -> phrase        (GCAP)

The vocabulary is the tokenizer's, then one token per coordinate bin, then, as
inputs only, one start token per task and a mask token. LocCa starts tasks with
words ("ARef:"); start tokens are our choice, since they need no tokenizer.
Captions and phrases end with the tokenizer's end of text.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.utils.tree import pytree_dataclass

TASKS = ("caption", "referring", "region_caption")
CORNERS = 4  # Coordinates of a box: y0, x0, y1, x1.


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Token ids of the decoder: text, coordinate bins, tasks, mask."""

  text: int  # Size of the tokenizer's vocabulary.
  bins: int

  @property
  def outputs(self) -> int:
    """Number of ids that the decoder predicts: text and bins."""
    return self.text + self.bins

  @property
  def inputs(self) -> int:
    """Number of all ids."""
    return self.outputs + len(TASKS) + 1

  @property
  def mask(self) -> int:
    """The mask token of parallel prediction."""
    return self.inputs - 1

  def begin(self, task: str) -> int:
    """The start token of a task."""
    return self.outputs + TASKS.index(task)

  def quantize(self, boxes: Float[Array, "*b 4"]) -> Int[Array, "*b 4"]:
    """Ids of the bins nearest to coordinates in 0..1.

    The first bin is 0, the last bin 1. LocCa has 500 bins, and does not specify
    their positions; ours are a choice.
    """
    last = self.bins - 1
    index = jnp.round(jnp.clip(boxes, 0.0, 1.0) * last)
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
  """Joins right-padded prompts and answers to `[begin, prompt, answer]`.

  l = p + a.
  """
  both = jnp.concatenate([prompt, answer], axis=-1)
  p, index = prompt.shape[-1], np.arange(both.shape[-1])
  start, end = prompt_length[..., None], answer_length[..., None]
  order = jnp.where(index < start, index, index + p - start)
  order = jnp.minimum(order, len(index) - 1)
  targets = jnp.take_along_axis(both, order, axis=-1)
  first = jnp.full_like(targets[..., :1], begin)
  return Sequences(
    inputs=jnp.concatenate([first, targets[..., :-1]], axis=-1),
    targets=targets,
    is_answer=(index >= start) & (index < start + end),
  )


def text_length(tokens: Int[Array, "*b t"], eos_id: int) -> Int[Array, "*b"]:
  """Number of tokens up to and including the first end of text."""
  ends = tokens == eos_id
  before = jnp.cumsum(ends, axis=-1) - ends
  return jnp.sum(before == 0, axis=-1)
