"""CLOC region-text contrastive loss, and box regression from phrases.

A prompter embeds a region from its box and the image's patches; the loss
contrasts the embedding with all phrases of the batch (Chen et al. 2025, CLOC;
with SigLIP's sigmoid loss, as reported for MTV).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mtv_jax.augment import geometry
from mtv_jax.config import options
from mtv_jax.models.heads import prompter
from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base, pairwise
from mtv_jax.parallel import ring
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class RegionIds:
  """Indices of regions in the global batch, their phrases, and the mask."""

  index: Int[Array, " n"]
  phrase_id: UInt32[Array, " n"]
  valid: Bool[Array, " n"]


@pytree_dataclass
class PhraseMatches:
  """Each region's largest logits with its own phrase and any other phrase."""

  same: Float[Array, " n"]
  other: Float[Array, " n"]  # -inf without another phrase.
  num_texts: Float[Array, " n"]  # Texts with the region's phrase.


def region_losses(
  regions: ring.EmbeddingBatch,
  texts: ring.EmbeddingBatch,
  affine: pairwise.Affine,
) -> tuple[Float[Array, " n"], PhraseMatches]:
  """SigLIP's loss between regions and phrases.

      L = -(1/n) sum_ab m_ab log sigmoid(y_ab (scale z_a.t_b + bias)),
      y_aa = 1, y_ab = -1 for a != b

  m_ab = 0 if a or b is invalid, or if a != b have equal phrases: with class
  names as phrases a batch has hundreds of "person", each of which would be both
  a positive and a negative. z and t are unit embeddings with `RegionIds`; texts
  may be a chunk of the batch. Returns each region's sum over the texts (0 if
  invalid), and its matches. L is the mean of the sums over valid regions.
  """
  logits = pairwise.logits(regions.embedding, texts.embedding, affine)  # [n, m]
  region_ids, text_ids = regions.metadata, texts.metadata
  positive = region_ids.index[:, None] == text_ids.index
  same_phrase = region_ids.phrase_id[:, None] == text_ids.phrase_id
  same, other = same_phrase & text_ids.valid, ~same_phrase & text_ids.valid
  pairs = region_ids.valid[:, None] & text_ids.valid & (positive | other)
  losses = jnp.where(pairs, pairwise.sigmoid_losses(logits, positive), 0.0)
  logits = jax.lax.stop_gradient(logits)
  return losses.sum(axis=1), PhraseMatches(
    same=jnp.where(same, logits, -jnp.inf).max(axis=1),
    other=jnp.where(other, logits, -jnp.inf).max(axis=1),
    num_texts=same.sum(axis=1).astype(jnp.float32),
  )


def merge_matches(a: PhraseMatches, b: PhraseMatches) -> PhraseMatches:
  """Merges the regions' matches with two sets of texts."""
  return PhraseMatches(
    same=jnp.maximum(a.same, b.same),
    other=jnp.maximum(a.other, b.other),
    num_texts=a.num_texts + b.num_texts,
  )


def centres(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
  """Converts (y0, x0, y1, x1) to (centre y, centre x, height, width)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def overlap(
  a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """IoU and GIoU (Rezatofighi et al. 2019) of boxes `(y0, x0, y1, x1)`.

      GIoU = IoU - (C - U) / C,  U the union's area, C the area of the
      smallest enclosing box

  Two boxes without area have IoU 0, and GIoU 0 if they are one point. Gradients
  are finite.
  """

  def area(low, high):
    sides = jnp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]

  def ratio(part, total):
    return jnp.where(total > 0, part / jnp.where(total > 0, total, 1.0), 0.0)

  (a0, a1), (b0, b1) = ((x[..., :2], x[..., 2:]) for x in (a, b))
  intersection = area(jnp.maximum(a0, b0), jnp.minimum(a1, b1))
  union = area(a0, a1) + area(b0, b1) - intersection
  enclosing = area(jnp.minimum(a0, b0), jnp.maximum(a1, b1))
  iou = ratio(intersection, union)
  return iou, iou - ratio(enclosing - union, enclosing)


def box_losses(
  located: Float[Array, "*b 4"], boxes: Float[Array, "*b 4"]
) -> Float[Array, "*b"]:
  """`5 L1 + 2 (1 - GIoU)` per box, as in DETR (Carion et al. 2020).

  `located` is (centre y, centre x, height, width), `boxes` (y0, x0, y1, x1).
  """
  distance = jnp.abs(located - centres(boxes)).sum(axis=-1)
  _, giou = overlap(prompter.corners(located), boxes)
  return 5.0 * distance + 2.0 * (1.0 - giou)


@pytree_dataclass
class LossInputs:
  """Per example, up to `m` regions."""

  region: Float[Array, "b m d"]  # Unit embeddings.
  text: Float[Array, "b m d"]  # Unit embeddings of the phrases.
  phrase_id: UInt32[Array, "b m"]  # Equal for equal phrases.
  valid: Bool[Array, "b m"]
  boxes: Float[Array, "b m 4"]  # (y0, x0, y1, x1) in the view.
  # The locator's (centre y, centre x, height, width); only with regression.
  located: Float[Array, "b m 4"] | None = None


@dataclasses.dataclass(frozen=True)
class Grounding(base.Objective):
  """Region-phrase contrastive loss, with optional box regression."""

  # Prompter and locator; their options share the config entry.
  head: prompter.GroundingHead = prompter.GroundingHead()
  view: str = "image"  # The view to read; only its first crop is used.
  # Whether `blocks` may mask patches of the view, to share it with iBOT.
  allow_masked: bool = False
  # Maximum visible regions per image. CLOC uses 4; 2 perform about as well.
  regions: options.PositiveInt = 4
  # Take the first regions (the host's order is random) or the highest scores.
  pick: Literal["first", "score"] = "first"
  min_visible: float = 0.4  # See `geometry.crop_boxes`.
  min_size: float = 1 / 56
  init_scale: options.PositiveFloat = 10.0
  init_bias: float = -10.0
  method: ring.Method = "auto"
  # Texts to compare with all regions at a time, to bound memory; None for the
  # whole batch. With the ring, a chunk is one device's texts.
  chunk: options.PositiveInt | None = None
  stop_text_gradient: bool = False
  # Below 1, a device encodes each distinct phrase once; if a device has more
  # than this share of distinct phrases, all are encoded.
  distinct_phrases: options.PositiveFraction = 1.0
  # Weight of the box regression; 0 disables it. CLOC gains little from it.
  regression: options.NonNegativeFloat = 0.0

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> Grounding:
    base.check_visible(
      "grounding", self.view, views, self.allow_masked, has_option=True
    )
    if spec.text is None:
      raise ConfigError("grounding needs a text tower: set config.model.text.")
    return self

  @property
  def phrase(self) -> base.Encoding:
    """The text encoding of the regions' phrases."""
    return base.Encoding("text", "box_phrase", distinct=self.distinct_phrases)

  def needs(self) -> base.Needs:
    fields = "boxes", "box_phrase", "box_phrase_id", "box_score", "box_valid"
    return base.Needs({self.image: (), self.phrase: ()}, fields)

  def heads(self) -> dict[str, base.Head]:
    temperature = pairwise.Temperature(self.init_scale, self.init_bias)
    heads = {"grounding": base.Head(temperature), **base.Head.of(self.head)}
    if self.regression:
      heads |= base.Head.of(self.head.locator)
    return heads

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    box_indices, boxes, valid = geometry.choose_boxes(
      batch["boxes"],
      batch["box_valid"].astype(bool),
      batch["views"][self.view],
      self.regions,
      score=batch["box_score"] if self.pick == "score" else None,
      min_visible=self.min_visible,
      min_size=self.min_size,
    )
    text = geometry.take_boxes(encodings[self.phrase].pooled, box_indices)
    if self.stop_text_gradient:
      text = jax.lax.stop_gradient(text)
    text = unit(text)  # [b, m, d]
    image = jax.tree.map(lambda x: x[:, 0], encodings[self.image])
    grid = (math.isqrt(image.patches.shape[1]),) * 2  # Views are squares.
    head = heads[self.head.params_key]
    region = self.head.predict(head, image, grid, boxes=boxes)
    located = None
    if self.regression:
      located = heads[self.head.locator.params_key](image.patches, text)
    return LossInputs(
      region=region["embeddings"],
      text=text,
      phrase_id=geometry.take_boxes(batch["box_phrase_id"], box_indices),
      valid=valid,
      boxes=boxes,
      located=located,
    )

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    # [B * m, ...]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), loss_inputs)
    affine = heads["grounding"]()
    ids = RegionIds(jnp.arange(len(flat.valid)), flat.phrase_id, flat.valid)
    total, matches = pairwise.sum_losses(
      ring.EmbeddingBatch(flat.region, ids),
      ring.EmbeddingBatch(flat.text, ids),
      affine,
      pair_loss_fn=region_losses,
      merge_fn=merge_matches,
      method=self.method,
      mesh=context.mesh,
      chunk=self.chunk,
    )
    weight = flat.valid.astype(jnp.float32)
    count = weight.sum()
    labelled = loss_inputs.valid.any(axis=1).astype(jnp.float32)
    ones = jnp.ones(())
    # Over distinct phrases: texts with equal phrases are one answer. A tie with
    # another phrase is a miss.
    hit = (matches.same > matches.other).astype(jnp.float32)
    phrases = weight / jnp.maximum(matches.num_texts, 1.0)
    loss = base.WeightedMean(total, count)
    report = {
      "accuracy": base.WeightedMean((hit * weight).sum(), count),
      "phrases": base.WeightedMean(phrases.sum(), ones),
      **affine.report(),
      "labelled": base.WeightedMean(labelled.sum(), ones * labelled.size),
      "regions": base.WeightedMean(count, labelled.sum()),
    }
    if self.regression:
      report |= _report_regression(loss_inputs)
      regression = self.regression * report["regression"].value()
      loss = base.WeightedMean(loss.sum + regression * count, count)
    return base.Terms(loss=loss, report=report)


def _report_regression(loss_inputs: LossInputs) -> dict[str, base.WeightedMean]:
  """Loss and IoU of the located phrases.

  A phrase has one answer: the first region of the image with that phrase. With
  `pick='score'` this is the region with the highest score.
  """
  phrase_id, valid = loss_inputs.phrase_id, loss_inputs.valid
  is_equal = phrase_id[:, :, None] == phrase_id[:, None]  # [B, m, m]
  is_earlier = jnp.tril(jnp.ones(is_equal.shape[1:], bool), -1)
  is_repeated = (is_equal & is_earlier & valid[:, None]).any(axis=-1)
  weights = (valid & ~is_repeated).astype(jnp.float32)
  losses = box_losses(loss_inputs.located, loss_inputs.boxes)
  predicted = prompter.corners(loss_inputs.located)
  iou, _ = overlap(predicted, loss_inputs.boxes)
  values = {"regression": losses, "iou": iou}
  return {
    name: base.WeightedMean((value * weights).sum(), weights.sum())
    for name, value in values.items()
  }
