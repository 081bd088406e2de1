"""Captioning loss of LocCa (Wan et al. 2024) and CapPa (Tschannen et al. 2023).

Cross-entropy of captions, boxes given phrases, and phrases given boxes, as in
SigLIP 2's decoder:

    L = -(1/n) sum log softmax_v(logits)[token],  over the n tokens of answers

Prompts (the task token, a phrase or a box) are excluded from the loss. For a
share of the examples the caption is predicted in parallel, from mask tokens
only. With `average="answers"` the sum is a mean over an answer's tokens, then
over a task's answers, then over tasks, as in CapPa's code, which has one task;
otherwise all tokens have equal weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mtv_jax.augment import geometry
from mtv_jax.augment import random as random_lib
from mtv_jax.config import options
from mtv_jax.models.heads import caption_decoder as decoders
from mtv_jax.models.remat import build_policy
from mtv_jax.objectives import base
from mtv_jax.objectives.token_loss import cross_entropies
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TokenSums:
  """Sums over the answers' tokens of each example."""

  loss: Float[Array, " b"]
  correct: Float[Array, " b"]  # Number of argmax predictions.
  count: Float[Array, " b"]
  # Sum over answers of the mean loss per token, and number of answers.
  answer_loss: Float[Array, " b"]
  answers: Float[Array, " b"]


@pytree_dataclass
class LossInputs:
  """Sums of each example by task; `parallel` captions count as a task."""

  sums: dict[str, TokenSums]
  labelled: Float[Array, " b"]  # Whether the example has an answer.


@dataclasses.dataclass(frozen=True)
class Captioning(base.Objective):
  """Trains a decoder on captions, referring boxes and region captions."""

  group = "vl"

  # The decoder; its options share the config entry.
  head: decoders.CaptionHead = decoders.CaptionHead()
  view: str = "image"  # The view to read; only its first crop is used.
  # Share of captions to predict in parallel; 0.5 in SigLIP 2, 0.75 in CapPa.
  parallel: options.Fraction = 0.5
  # Maximum regions per image: the first ones that are visible in the view, in
  # the host's random order.
  regions: options.PositiveInt = 4
  min_visible: float = 0.4  # See `geometry.crop_boxes`.
  min_size: float = 1 / 56
  average: Literal["tokens", "answers"] = "tokens"
  # Vocabulary columns to compute at a time, to bound memory; None for all.
  chunk: options.PositiveInt | None = 8192
  remat: str = "none"  # One choice of `models.remat`; not 'auto'.
  scan: bool = True

  def __post_init__(self):
    build_policy(self.remat, where="Captioning.remat")

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> Captioning:
    base.check_visible("captioning", self.view, views)
    return dataclasses.replace(self, head=self.head.resolve(spec))

  @property
  def _region_tasks(self) -> tuple[str, ...]:
    tasks = ("referring", "region_caption")
    return tuple(t for t in tasks if t in self.head.tasks)

  @property
  def decoder_calls(self) -> int:
    """Decoder calls per step: one for captions, one for regions."""
    return ("caption" in self.head.tasks) + bool(self._region_tasks)

  def needs(self) -> base.Needs:
    fields = ()
    if "caption" in self.head.tasks:
      fields = ("caption", "caption_valid")
    if self._region_tasks:
      fields += ("boxes", "box_phrase", "box_valid")
    return base.Needs(encodings={self.image: ()}, fields=fields)

  def heads(self) -> dict[str, base.Head]:
    module = self.head.module(remat=self.remat, scan=self.scan)
    return {self.head.params_key: base.Head(module, self.head.example)}

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    patches = encodings[self.image].patches[:, 0]
    decoder = heads[self.head.params_key]
    sums = {}
    if "caption" in self.head.tasks:
      sums |= self._sum_captions(decoder, patches, batch)
    if self._region_tasks:
      sums |= self._sum_regions(decoder, patches, batch)
    count = sum(part.count for part in sums.values())
    return LossInputs(sums=sums, labelled=(count > 0).astype(jnp.float32))

  def _sum_captions(self, decoder, patches, batch) -> dict[str, TokenSums]:
    """Sums over the tokens of autoregressive and of parallel captions."""
    vocabulary, caption = self.head.vocabulary, batch["caption"][:, None]
    valid = batch["caption_valid"].astype(bool)[:, None]
    rows = decoders.make_sequences(
      vocabulary.begin("caption"),
      caption[..., :0],
      jnp.zeros_like(caption[..., 0]),
      caption,
      jnp.where(valid, decoders.text_length(caption, self.head.eos_id), 0),
    )
    keys = batch["keys"][self.view]
    is_parallel = _draw_parallel(keys, self.parallel)[:, None]  # [b, 1]
    # All inputs are masks, padding included: as in CapPa, the decoder does not
    # know the length.
    inputs = jnp.where(is_parallel[..., None], vocabulary.mask, rows.inputs)
    masks = {"caption": ~is_parallel, "parallel": is_parallel}
    return self._sum_rows(decoder(inputs, is_parallel, patches), rows, masks)

  def _sum_regions(self, decoder, patches, batch) -> dict[str, TokenSums]:
    """Sums over the tokens of boxes given phrases, and phrases given boxes."""
    box_indices, boxes, valid = geometry.choose_boxes(
      batch["boxes"],
      batch["box_valid"].astype(bool),
      batch["views"][self.view],
      self.regions,
      min_visible=self.min_visible,
      min_size=self.min_size,
    )
    phrase = geometry.take_boxes(batch["box_phrase"], box_indices)  # [b, k, P]
    corners = self.head.vocabulary.quantize(boxes)
    phrase_length = decoders.text_length(phrase, self.head.eos_id)
    box_length = jnp.full_like(phrase_length, decoders.CORNERS)
    pairs = {
      "referring": (phrase, phrase_length, corners, box_length),
      "region_caption": (corners, box_length, phrase, phrase_length),
    }
    parts = [
      decoders.make_sequences(
        self.head.vocabulary.begin(task),
        *prompt,
        answer,
        jnp.where(valid, answer_length, 0),
      )
      for task in self._region_tasks
      for *prompt, answer, answer_length in [pairs[task]]
    ]
    # Sequences of both tasks have equal length.
    rows = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    parallel = jnp.zeros(rows.inputs.shape[:2], bool)
    task = jnp.arange(parallel.shape[1]) // valid.shape[1]
    masks = {name: task == i for i, name in enumerate(self._region_tasks)}
    return self._sum_rows(decoder(rows.inputs, parallel, patches), rows, masks)

  def _sum_rows(self, logits, rows, masks) -> dict[str, TokenSums]:
    """Sums over each example's answers; `masks` selects each sum's rows."""
    losses, correct = cross_entropies(logits, rows.targets, chunk=self.chunk)
    length = rows.is_answer.sum(axis=2, keepdims=True)
    share = 1.0 / jnp.maximum(length, 1)  # A token's share of its answer.
    correct = correct.astype(jnp.float32)
    terms, sums = (losses, correct, 1.0, losses * share, share), {}
    for name, mask in masks.items():
      weights = rows.is_answer & mask[..., None]
      parts = (jnp.where(weights, x, 0.0).sum(axis=(1, 2)) for x in terms)
      sums[name] = TokenSums(*parts)
    return sums

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    totals = jax.tree.map(jnp.sum, loss_inputs.sums)
    loss, correct, count = (
      sum(getattr(part, name) for part in totals.values())
      for name in ("loss", "correct", "count")
    )
    mean, labelled = base.WeightedMean, loss_inputs.labelled
    report = {name: mean(x.loss, x.count) for name, x in totals.items()}
    report["accuracy"] = mean(correct, count)
    report["labelled"] = mean(labelled.sum(), jnp.float32(labelled.size))
    if self.average == "answers":
      loss, count = _sum_task_means(totals)
    return base.Terms(loss=mean(loss, count), report=report)


def _sum_task_means(
  totals: Mapping[str, TokenSums],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sum of the tasks' mean losses per answer, and number of tasks with answers.

  Parallel captions belong to the caption task.
  """
  tasks: dict[str, list[TokenSums]] = {}
  for name, part in totals.items():
    tasks.setdefault(name.replace("parallel", "caption"), []).append(part)
  means, has_answer = [], []
  for parts in tasks.values():
    answers = sum(part.answers for part in parts)
    means.append(sum(p.answer_loss for p in parts) / jnp.maximum(answers, 1.0))
    has_answer.append((answers > 0).astype(jnp.float32))
  return sum(means), sum(has_answer)


def _draw_parallel(keys: Key[Array, " b"], share: float) -> Bool[Array, " b"]:
  keys = random_lib.image_keys(keys, "captioning", 1)
  return random_lib.bernoulli(jax.vmap(jax.random.uniform)(keys), share)
