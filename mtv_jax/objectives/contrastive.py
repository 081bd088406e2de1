"""Image-text contrast: the sigmoid loss of SigLIP, the softmax loss of CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base, pairwise, ring
from mtv_jax.utils.errors import ConfigError, check_choice


@no_type_check  # JAX rebuilds trees with leaves that are not arrays.
@flax.struct.dataclass
class Marks:
  """Which examples of the batch these are, and whether they have both."""

  index: Int[Array, " n"]
  valid: Bool[Array, " n"]


@no_type_check  # The same.
@flax.struct.dataclass
class Nearest:
  """Each row's greatest logit with a valid column, and which column it is."""

  logit: Float[Array, " n"]
  index: Int[Array, " n"]


def judge(
  logits: Float[Array, "n c"], rows: Marks, columns: Marks
) -> tuple[Float[Array, " n"], Nearest]:
  """Each row's losses, summed over these columns, and its nearest column."""
  pairs = rows.valid[:, None] & columns.valid
  own = rows.index[:, None] == columns.index
  losses = jnp.where(pairs, pairwise.sigmoid_losses(logits, own), 0.0)
  return jnp.sum(losses, axis=1), nearest(logits, columns)


def nearest(logits: Float[Array, "n c"], columns: Marks) -> Nearest:
  """The nearest of these columns; of equals the first."""
  still = jax.lax.stop_gradient(logits)
  masked = jnp.where(columns.valid, still, -jnp.inf)
  best = jnp.argmax(masked, axis=1)
  return Nearest(jnp.max(masked, axis=1), columns.index[best])


def nearer(a: Nearest, b: Nearest) -> Nearest:
  """The nearer one for each row; of equals the first of the batch."""
  equal = (a.logit == b.logit) & (a.index < b.index)
  kept = (a.logit > b.logit) | equal
  return jax.tree.map(lambda x, y: jnp.where(kept, x, y), a, b)


def sigmoid_loss(
  logits: Float[Array, "b b"], valid: Bool[Array, " b"]
) -> base.WeightedMean:
  """SigLIP's loss (Zhai et al. 2023, Algorithm 1; MTV Eq. 1).

      L = -(1/B) sum_i sum_j log sigmoid(y_ij * logits_ij),
      y_ii = 1, y_ij = -1 for i != j,  logits = exp(t') u_i.v_j + b

  There is no normalisation over the batch. MTV prints the bias with the
  opposite sign; this is big_vision's form. Pairs with an invalid row or column
  don't count, and the mean is over the valid rows.

  Args:
    logits: images along rows, texts along columns; row i belongs to column i.
    valid: which examples have both an image and a text.
  """
  marks = Marks(jnp.arange(logits.shape[0]), valid)
  losses, _ = judge(logits, marks, marks)
  return base.WeightedMean(
    sum=jnp.sum(losses), count=jnp.sum(valid.astype(jnp.float32))
  )


def softmax_loss(
  logits: Float[Array, "b b"], valid: Bool[Array, " b"]
) -> base.WeightedMean:
  """CLIP's symmetric cross-entropy (Radford et al. 2021, Figure 3).

      L = (1/2B) sum_i [ lse_j(l_ij) - l_ii + lse_j(l_ji) - l_ii ]

  Args:
    logits: images along rows, texts along columns; row i belongs to column i.
    valid: which examples have both; the others are neither queries nor
      negatives.
  """
  # Not -inf: a row with no valid column would give NaN in the gradient.
  masked = jnp.where(valid[:, None] & valid[None, :], logits, -1e30)
  diagonal = jnp.diagonal(logits)
  to_text = jax.nn.logsumexp(masked, axis=1) - diagonal
  to_image = jax.nn.logsumexp(masked, axis=0) - diagonal
  losses = jnp.where(valid, 0.5 * (to_text + to_image), 0.0)
  return base.WeightedMean(
    sum=jnp.sum(losses), count=jnp.sum(valid.astype(jnp.float32))
  )


@no_type_check  # JAX rebuilds trees with leaves that are not arrays.
@flax.struct.dataclass
class LossInputs:
  """Per example: unit embeddings of image and text, and whether both are."""

  image: Float[Array, "b d"]
  text: Float[Array, "b d"]
  valid: Bool[Array, " b"]


LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}


@dataclasses.dataclass(frozen=True)
class Contrastive(base.Objective):
  """Pulls an image to its caption and away from the others of the batch.

  Attributes:
    loss_type: `'sigmoid'` (SigLIP) or `'softmax'` (CLIP).
    view: the image view it reads; with several crops each image's first.
    init_scale: initial multiplier of the cosine.
    init_bias: initial bias; None for the loss's own (-10 and none).
    method: of the sigmoid loss, see `ring`: `'gathered'` texts, `'ring'`, or
      `'auto'`: a ring where the batch is split over devices. The result is the
      same. Softmax, whose rows need all columns at once, is gathered.
  """

  loss_type: str = "sigmoid"
  view: str = "image"
  init_scale: float = 10.0
  init_bias: float | None = None
  method: str = "auto"

  def __post_init__(self):
    if self.loss_type not in LOSSES:
      raise ValueError(
        f"contrastive loss_type is '{self.loss_type}'; there are: "
        f"{sorted(LOSSES)}."
      )
    check_choice("contrastive: method", self.method, ring.METHODS)
    if self.loss_type == "softmax" and self.method == "ring":
      raise ConfigError(
        "contrastive: method='ring' goes with loss_type='sigmoid'; a softmax "
        "needs all columns at once. Leave method out, or take the sigmoid loss."
      )

  @property
  def _image(self) -> base.Encoding:
    return base.Encoding("image", self.view)

  @property
  def _text(self) -> base.Encoding:
    return base.Encoding("text", "caption")

  def needs(self) -> base.Needs:
    return base.Needs(
      encodings={self._image: (), self._text: ()},
      fields=("caption", "caption_valid"),
    )

  def heads(self) -> dict[str, base.Head]:
    bias = self.init_bias
    if bias is None and self.loss_type == "sigmoid":
      bias = -10.0
    module = pairwise.Temperature(init_scale=self.init_scale, init_bias=bias)
    return {"contrastive": base.Head(module)}

  def loss_inputs(
    self,
    encodings: Mapping[base.Encoding, Any],
    heads: base.BoundHeads,
    batch: Mapping[str, Any],
  ) -> LossInputs:
    return LossInputs(
      image=unit(encodings[self._image].pooled[:, 0]),
      text=unit(encodings[self._text].pooled),
      valid=batch["caption_valid"].astype(bool),
    )

  def loss(
    self,
    loss_inputs: LossInputs,
    heads: base.BoundHeads,
    context: base.Context,
  ) -> base.Terms:
    affine = heads["contrastive"]()
    valid = loss_inputs.valid
    marks = Marks(jnp.arange(valid.shape[0]), valid)
    count = jnp.sum(valid.astype(jnp.float32))
    one = jnp.ones(())
    loss, found = self._compare(loss_inputs, marks, affine, context)
    hit = (found.index == marks.index) & valid
    return base.Terms(
      loss=base.WeightedMean(loss, count),
      report={
        "accuracy": base.WeightedMean(jnp.sum(hit.astype(jnp.float32)), count),
        "scale": base.WeightedMean(affine.scale, one),
        "bias": base.WeightedMean(affine.bias, one),
        "labelled": base.WeightedMean(count, one * valid.shape[0]),
      },
    )

  def _compare(self, loss_inputs, marks, affine, context):
    """Sum of the losses, and each image's nearest text."""
    split = self.loss_type == "sigmoid" and ring.is_meant(
      self.method, context.mesh
    )
    if split:
      found = ring.around(
        ring.Side(loss_inputs.image, marks),
        ring.Side(loss_inputs.text, marks),
        affine,
        judge=judge,
        join=nearer,
        mesh=context.mesh,
      )
      return found.loss, found.report
    logits = pairwise.logits(loss_inputs.image, loss_inputs.text, affine)
    loss = LOSSES[self.loss_type](logits, loss_inputs.valid)
    return loss.sum, nearest(logits, marks)
