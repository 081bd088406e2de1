"""Image-text contrastive losses: sigmoid (SigLIP) and softmax (CLIP)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.config import options
from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base, pairwise
from mtv_jax.parallel import ring
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class ExampleIds:
  """Indices of examples in the global batch, and their mask."""

  index: Int[Array, " n"]
  valid: Bool[Array, " n"]


@pytree_dataclass
class NearestText:
  """Each image's largest logit with a valid text, and the text's index."""

  logit: Float[Array, " n"]
  index: Int[Array, " n"]


def nearest_text(logits: Float[Array, "n m"], texts: ExampleIds) -> NearestText:
  """Each image's nearest text; ties go to the first."""
  logits = jax.lax.stop_gradient(logits)
  masked_logits = jnp.where(texts.valid, logits, -jnp.inf)
  best_index = jnp.argmax(masked_logits, axis=1)
  return NearestText(jnp.max(masked_logits, axis=1), texts.index[best_index])


def merge_nearest(a: NearestText, b: NearestText) -> NearestText:
  """Takes the nearer text per image; ties go to the lower batch index."""
  a_wins_tie = (a.logit == b.logit) & (a.index < b.index)
  take_a = (a.logit > b.logit) | a_wins_tie
  return jax.tree.map(lambda x, y: jnp.where(take_a, x, y), a, b)


def sigmoid_losses(
  images: ring.EmbeddingBatch,
  texts: ring.EmbeddingBatch,
  affine: pairwise.Affine,
) -> tuple[Float[Array, " n"], NearestText]:
  """SigLIP's loss (Zhai et al. 2023, Algorithm 1; MTV Eq. 1).

      L = -(1/B) sum_i sum_j log sigmoid(y_ij * logits_ij),
      y_ii = 1, y_ij = -1 for i != j,  logits = exp(t') u_i.v_j + b

  Pairs are independent; no softmax over the batch. MTV prints the bias with the
  opposite sign; this is big_vision's form. Pairs with an invalid image or text
  are excluded. Both sides are unit embeddings with `ExampleIds`; texts may be a
  chunk of the batch. Returns each image's sum over the texts, and its nearest
  text.
  """
  logits = pairwise.logits(images.embedding, texts.embedding, affine)  # [n, m]
  image_ids, text_ids = images.metadata, texts.metadata
  positive = image_ids.index[:, None] == text_ids.index
  pairs = image_ids.valid[:, None] & text_ids.valid
  losses = jnp.where(pairs, pairwise.sigmoid_losses(logits, positive), 0.0)
  return losses.sum(axis=1), nearest_text(logits, text_ids)


def softmax_losses(
  images: ring.EmbeddingBatch,
  texts: ring.EmbeddingBatch,
  affine: pairwise.Affine,
) -> tuple[Float[Array, " b"], NearestText]:
  """CLIP's symmetric cross-entropy (Radford et al. 2021, Figure 3).

      L = (1/2B) sum_i [ lse_j(l_ij) - l_ii + lse_j(l_ji) - l_ii ]

  Arguments and results as in `sigmoid_losses`, but `texts` is the whole batch.
  Invalid examples are neither queries nor negatives.
  """
  logits = pairwise.logits(images.embedding, texts.embedding, affine)  # [B, B]
  valid = images.metadata.valid
  # Not -inf: a row without a valid column would give a NaN gradient.
  masked_logits = jnp.where(valid[:, None] & valid, logits, -1e30)
  diagonal = jnp.diagonal(logits)
  to_text = jax.nn.logsumexp(masked_logits, axis=1) - diagonal
  to_image = jax.nn.logsumexp(masked_logits, axis=0) - diagonal
  losses = jnp.where(valid, 0.5 * (to_text + to_image), 0.0)
  return losses, nearest_text(logits, texts.metadata)


CAPTION = base.Encoding("text", "caption")
LOSSES = {"sigmoid": sigmoid_losses, "softmax": softmax_losses}


@pytree_dataclass
class LossInputs:
  """Per example: unit embeddings of image and text, and the mask."""

  image: Float[Array, "b n d"]  # One per crop.
  text: Float[Array, "b d"]
  valid: Bool[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Contrastive(base.Objective):
  """Contrastive loss between images and captions."""

  group = "vl"

  loss_type: Literal["sigmoid", "softmax"] = "sigmoid"  # SigLIP's or CLIP's.
  view: str = "image"
  # The first crop of an image, or the mean loss over all crops, each against
  # the batch's captions (SILC, Naeem et al. 2023).
  crops: Literal["first", "all"] = "first"
  # None: SigLIP's 10 for sigmoid, CLIP's 1 / 0.07 for softmax.
  init_scale: options.PositiveFloat | None = None
  # Clips the scale to [1, max_scale] after each update; CLIP uses 100 (Radford
  # et al. 2021, 2.5). None for no bound.
  max_scale: Annotated[float, options.Range(min=1)] | None = None
  init_bias: float | None = None  # None: -10 for sigmoid, no bias for softmax.
  method: ring.Method = "auto"  # For the sigmoid loss.

  def __post_init__(self):
    if self.loss_type == "softmax" and self.method == "ring":
      raise ConfigError(
        "method='ring' needs loss_type='sigmoid': a softmax needs all columns."
      )
    scale, max_scale = self._init_scale, self.max_scale
    if max_scale is not None and not 1 <= scale <= max_scale:
      expected = f"1 <= init_scale <= max_scale={max_scale:g}"
      raise ConfigError(f"init_scale is {scale:g}, expected {expected}.")

  @property
  def _init_scale(self) -> float:
    if self.init_scale is not None:
      return self.init_scale
    return 10.0 if self.loss_type == "sigmoid" else 1 / 0.07

  def needs(self) -> base.Needs:
    fields = ("caption", "caption_valid")
    return base.Needs({self.image: (), CAPTION: ()}, fields)

  def heads(self) -> dict[str, base.Head]:
    bias = self.init_bias
    if bias is None and self.loss_type == "sigmoid":
      bias = -10.0
    module = pairwise.Temperature(init_scale=self._init_scale, init_bias=bias)
    bounds = {}
    if self.max_scale is not None:
      bounds["logit_scale"] = (0.0, math.log(self.max_scale))
    return {"contrastive": base.Head(module, bounds=bounds)}

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    image = encodings[self.image].pooled  # [b, n, d]
    return LossInputs(
      image=unit(image if self.crops == "all" else image[:, :1]),
      text=unit(encodings[CAPTION].pooled),
      valid=batch["caption_valid"].astype(bool),
    )

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    affine = heads["contrastive"]()
    valid = loss_inputs.valid
    ids = ExampleIds(jnp.arange(valid.shape[0]), valid)
    count = jnp.sum(valid.astype(jnp.float32))
    crops = loss_inputs.image.shape[1]
    texts = ring.EmbeddingBatch(loss_inputs.text, ids)
    loss, hits = jnp.zeros(()), jnp.zeros(())
    for i in range(crops):
      crop_loss, nearest = pairwise.sum_losses(
        ring.EmbeddingBatch(loss_inputs.image[:, i], ids),
        texts,
        affine,
        pair_loss_fn=LOSSES[self.loss_type],
        merge_fn=merge_nearest,
        method=self.method if self.loss_type == "sigmoid" else "gathered",
        mesh=context.mesh,
      )
      hit = (nearest.index == ids.index) & valid
      loss += crop_loss / crops
      hits += jnp.sum(hit.astype(jnp.float32)) / crops
    return base.Terms(
      loss=base.WeightedMean(loss, count),
      report={
        "accuracy": base.WeightedMean(hits, count),
        "labelled": base.WeightedMean(count, jnp.float32(valid.shape[0])),
        **affine.report(),
      },
    )
