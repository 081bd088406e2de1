"""iBOT: hidden patches are to mean what the teacher sees there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.objectives import base
from mtv_jax.objectives.self_distillation import SelfDistillation
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class LossInputs:
  """Of each example, at `p` patches of its `n` crops together.

  Attributes:
    teacher: bottleneck vectors of the crops seen whole.
    student: bottleneck vectors at the same patches of the masked crops.
    weights: of the patches; 0 for those that fill up to `p`.
    masked: whether any patch of a crop is hidden.
  """

  teacher: Float[Array, "b p d"]
  student: Float[Array, "b p d"]
  weights: Float[Array, "b p"]
  masked: Bool[Array, "b n"]


def masked_first(
  mask: Bool[Array, "b patches"], count: int
) -> Int[Array, "b {count}"]:
  """Indices of `count` patches: the hidden ones in order, then visible ones."""
  return jnp.argsort(~mask, axis=-1, stable=True)[..., :count]


def patch_weights(counted: Bool[Array, "b n p"]) -> Float[Array, "b n p"]:
  """A mean over each crop's patches that count, then a sum over the crops.

  As in DINOv2: 1 / (the crop's masked patches), so that a crop counts the same
  however much of it is hidden.
  """
  counted = counted.astype(jnp.float32)
  return counted / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1.0)


@dataclasses.dataclass(frozen=True)
class MaskedLatent(SelfDistillation):
  """iBOT (Zhou et al. 2022) as in DINOv2 and SigLIP 2.

  The loss is the mean over all crops, those with nothing hidden included (they
  add 0, as in DINOv2): an image's gradient does not depend on how many others
  of its batch happen to be masked.

  Attributes:
    head: its own, as DINOv2's large models and DINOv3 have it; `'dino'` to
      share the one of distillation.
    view: a view with masked patches; the teacher sees it whole.
    patches: `'masked'`, or `'all'` for a target on visible patches too (iBOT++
      of TIPSv2), of every crop.
    max_masked: the most hidden patches of an image, in all its crops together;
      `resolve` reads it off the view. Without it the head runs on all patches,
      to the same end.
  """

  head: str = "ibot"
  view: str = "global"
  patches: str = "masked"
  max_masked: int | None = None

  def __post_init__(self):
    super().__post_init__()
    self._choice("patches", ("masked", "all"))

  def resolve(self, spec: Any, views: Mapping[str, Any]) -> MaskedLatent:
    """This objective with `max_masked` filled in from its view.

    Args:
      spec: `models.model.ModelSpec`.
      views: by name, `views.View`.

    Raises:
      ConfigError: if the view hides no patches, or patches of another size
        than the model's, or not as many as this objective says.
    """
    if self.view not in views:
      return self  # Whoever collects the encodings says so, for all objectives.
    view, patch = views[self.view], spec.image.patch_size
    if not view.max_masked:
      raise ConfigError(self._hides_nothing())
    if view.patch != patch:
      raise ConfigError(
        f"config.views.{self.view}: blocks() hides patches of {view.patch} "
        f"pixels, the model's are {patch}: write blocks(..., patch={patch})."
      )
    if self.max_masked not in (None, view.max_masked):
      raise ConfigError(
        f"masked_latent: max_masked is {self.max_masked}, but the view "
        f"'{self.view}' hides up to {view.max_masked}. Leave it out."
      )
    return dataclasses.replace(self, max_masked=view.max_masked)

  def _hides_nothing(self) -> str:
    return (
      f"masked_latent: the view '{self.view}' hides no patches. Add an op such "
      "as blocks(0.1, 0.5) to its ops, or name another view."
    )

  def _channels(self, spec) -> int:
    return spec.image.width

  @property
  def _student(self) -> base.Encoding:
    return base.Encoding("image", self.view)

  @property
  def _teacher(self) -> base.Encoding:
    return base.Encoding("image", self.view, base.TEACHER)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self._student: (), self._teacher: ()})

  def loss_inputs(
    self,
    encodings: Mapping[base.Encoding, Any],
    heads: base.BoundHeads,
    batch: Mapping[str, Any],
  ) -> LossInputs:
    made = batch["views"][self.view]
    if made.mask is None:
      raise ConfigError(self._hides_nothing())
    mask = made.mask
    whole = self.patches == "all"
    weights = patch_weights(jnp.ones_like(mask) if whole else mask)
    # The crops of an image side by side: how much is hidden of each differs.
    student, teacher, weights = (
      x.reshape(len(mask), -1, *x.shape[3:])
      for x in (
        encodings[self._student].patches,
        encodings[self._teacher].patches,
        weights,
      )
    )
    if not whole and self.max_masked is not None:
      where = masked_first(weights > 0, self.max_masked)
      weights = jnp.take_along_axis(weights, where, axis=1)
      teacher, student = (
        jnp.take_along_axis(x, where[..., None], axis=1)
        for x in (teacher, student)
      )
    return LossInputs(
      teacher=heads[self.head, base.TEACHER](teacher),
      student=heads[self.head](student),
      weights=weights,
      masked=jnp.any(mask, axis=2),
    )

  def loss(
    self,
    loss_inputs: LossInputs,
    heads: base.BoundHeads,
    context: base.Context,
  ) -> base.Terms:
    channels = loss_inputs.teacher.shape[-1]
    weights = loss_inputs.weights.reshape(-1, 1)
    matched = self.match(
      loss_inputs.teacher.reshape(-1, 1, channels),
      loss_inputs.student.reshape(-1, 1, channels),
      valid=weights > 0,
      weights=weights[..., None],
      heads=heads,
      context=context,
    )
    count = jnp.ones(()) * loss_inputs.masked.size
    masked = jnp.sum(loss_inputs.masked.astype(jnp.float32))
    # Those of a crop add up to one.
    compared = jnp.sum(weights)
    report = {
      **matched.report,
      # Unlike the loss it does not follow how many crops happened to be masked.
      "cross_entropy": base.WeightedMean(
        jax.lax.stop_gradient(matched.sum), compared
      ),
      "labelled": base.WeightedMean(masked, count),
    }
    return base.Terms(
      loss=base.WeightedMean(matched.sum, count),
      report=report,
      statistics=matched.statistics,
    )
