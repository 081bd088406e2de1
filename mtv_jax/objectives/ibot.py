"""iBOT masked-patch loss (Zhou et al. 2022), as in DINOv2 and SigLIP 2.

Cross-entropy between the student's predictions at masked patches and the
teacher's prototype assignments of these patches, unmasked.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.config import options
from mtv_jax.objectives import base
from mtv_jax.objectives.prototypes import PrototypeObjective
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class LossInputs:
  """Per example, bottleneck vectors at `p` patches of `n` crops."""

  teacher: Float[Array, "b p d"]  # From the unmasked crops.
  student: Float[Array, "b p d"]  # From the masked crops.
  weights: Float[Array, "b p"]  # 0 for padding.
  masked: Bool[Array, "b n"]  # Whether a crop has masked patches.


def masked_first(
  mask: Bool[Array, "b patches"], count: int
) -> Int[Array, "b {count}"]:
  """Indices of `count` patches: masked ones in order, then visible ones."""
  return jnp.argsort(~mask, axis=-1, stable=True)[..., :count]


def patch_weights(counted: Bool[Array, "b n p"]) -> Float[Array, "b n p"]:
  """Weights 1 / (the crop's counted patches), as in DINOv2.

  A crop's weight does not depend on its share of masked patches.
  """
  counted = counted.astype(jnp.float32)
  return counted / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1.0)


@dataclasses.dataclass(frozen=True)
class IBOT(PrototypeObjective):
  """iBOT masked-patch loss.

  Averages over all crops. Crops without masked patches add 0, as in DINOv2, so
  that an image's gradient does not depend on the number of masked images in its
  batch.
  """

  group = "ssl"

  # A separate head, as in DINOv2's large models and DINOv3; 'dino' shares
  # DINO's.
  head: str = "ibot"
  view: str = "global"  # Has masked patches; the teacher sees it unmasked.
  # 'all' adds targets on the visible patches of every crop (TIPSv2's iBOT++).
  patches: Literal["masked", "all"] = "masked"
  # Maximum masked patches of an image over all crops; `resolve` takes it from
  # the view. None runs the head on all patches, with an equal result.
  max_masked: options.PositiveInt | None = None

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> IBOT:
    if self.view not in views:
      return self
    view, patch = views[self.view], spec.image.patch_size
    if not view.max_masked:
      raise ConfigError(
        f"ibot: the view '{self.view}' hides no patches: add blocks(0.1, 0.5)."
      )
    if view.patch != patch:
      raise ConfigError(
        f"config.views.{self.view}: expected blocks(..., patch={patch})."
      )
    if self.max_masked not in (None, view.max_masked):
      raise ConfigError(
        f"ibot: max_masked is {self.max_masked}, expected {view.max_masked}."
      )
    return dataclasses.replace(self, max_masked=view.max_masked)

  def _channels(self, spec) -> int:
    return spec.image.width

  @property
  def _teacher(self) -> base.Encoding:
    return base.Encoding("image", self.view, base.TEACHER)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self.image: (), self._teacher: ()})

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    mask = batch["views"][self.view].mask  # [b, n, P]
    uses_all_patches = self.patches == "all"
    weights = patch_weights(jnp.ones_like(mask) if uses_all_patches else mask)
    # Joins an image's crops, since their numbers of masked patches differ.
    # [b, n * P, D], [b, n * P, D], [b, n * P]
    outputs = (encodings[e].patches for e in (self.image, self._teacher))
    student, teacher, weights = (
      x.reshape(len(mask), -1, *x.shape[3:]) for x in (*outputs, weights)
    )
    if not uses_all_patches and self.max_masked is not None:
      indices = masked_first(weights > 0, self.max_masked)  # [b, p]
      weights = jnp.take_along_axis(weights, indices, axis=1)
      teacher, student = (
        jnp.take_along_axis(x, indices[..., None], axis=1)
        for x in (teacher, student)
      )
    return LossInputs(
      teacher=heads[self.head, base.TEACHER](teacher),
      student=heads[self.head](student),
      weights=weights,
      masked=jnp.any(mask, axis=2),
    )

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    channels = loss_inputs.teacher.shape[-1]
    weights = loss_inputs.weights.reshape(-1, 1)  # [B * p, 1]
    total, report, statistics = self.prototype_loss(
      loss_inputs.teacher.reshape(-1, 1, channels),
      loss_inputs.student.reshape(-1, 1, channels),
      valid=weights > 0,
      weights=weights[..., None],
      heads=heads,
      context=context,
    )
    count = jnp.ones(()) * loss_inputs.masked.size
    masked = jnp.sum(loss_inputs.masked.astype(jnp.float32))
    # A crop's weights sum to one, so this is a mean over masked crops. Unlike
    # the loss it does not depend on their number.
    mean = base.WeightedMean(jax.lax.stop_gradient(total), jnp.sum(weights))
    labelled = base.WeightedMean(masked, count)
    report = {**report, "cross_entropy": mean, "labelled": labelled}
    return base.Terms(base.WeightedMean(total, count), report, statistics)
