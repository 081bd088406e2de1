"""Token sequences of the captioning decoder's tasks (Wan et al. 2024, LocCa).

    caption          [caption]                     -> caption
    referring        [referring] phrase            -> y0 x0 y1 x1   (AREF)
    region_caption   [region_caption] y0 x0 y1 x1  -> phrase        (GCAP)

The vocabulary is that of the tokenizer, then one token for each bin of a
coordinate, then, as inputs only, a token that begins each task, and a mask
token. LocCa begins tasks with words ("ARef:"); tokens are our choice, as they
need no tokenizer. Captions and phrases end with the tokenizer's end of text.
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
  """Ids of the decoder: texts, bins of coordinates, tasks, the mask."""

  text: int  # Ids of the tokenizer.
  bins: int

  @property
  def outputs(self) -> int:
    """Ids that are predicted: texts and bins."""
    return self.text + self.bins

  @property
  def inputs(self) -> int:
    """All ids."""
    return self.outputs + len(TASKS) + 1

  @property
  def mask(self) -> int:
    """The mask token of parallel prediction."""
    return self.inputs - 1

  def begin(self, task: str) -> int:
    """The token that begins a task."""
    return self.outputs + TASKS.index(task)

  def quantize(self, boxes: Float[Array, "*b 4"]) -> Int[Array, "*b 4"]:
    """Ids of the bins nearest to coordinates in 0..1.

    The first bin is 0 and the last one 1. LocCa has 500 bins, and does not say
    where they are; this is our choice.
    """
    last = self.bins - 1
    index = jnp.round(jnp.clip(boxes, 0.0, 1.0) * last)
    return self.text + index.astype(jnp.int32)

  def dequantize(self, ids: Int[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Coordinates of ids of bins."""
    return (ids - self.text).astype(jnp.float32) / (self.bins - 1)


@pytree_dataclass
class Sequences:
  """Rows of a prompt, given, and an answer, predicted.

  An answer starts right after its prompt, so that nothing depends on padding.
  """

  inputs: Int[Array, "b s l"]
  targets: Int[Array, "b s l"]  # The token that follows each input.
  is_answer: Bool[Array, "b s l"]  # Which targets belong to the answer.


def make_sequences(
  begin: int,
  prompt: Int[Array, "b s p"],
  prompt_length: Int[Array, "b s"],
  answer: Int[Array, "b s a"],
  answer_length: Int[Array, "b s"],
) -> Sequences:
  """Sequences `[begin, prompt, answer]` of prompts and answers of any length.

  Both are padded on the right; l = p + a.
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
  """Number of tokens up to the first end of text, it included."""
  ends = tokens == eos_id
  before = jnp.cumsum(ends, axis=-1) - ends
  return jnp.sum(before == 0, axis=-1)
