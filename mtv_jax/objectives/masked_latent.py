"""iBOT: hidden patches are to mean what the teacher sees there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.config import ConfigError
from mtv_jax.objectives import base
from mtv_jax.objectives.self_distillation import SelfDistillation


@no_type_check  # JAX rebuilds trees with leaves that are not arrays.
@flax.struct.dataclass
class Evidence:
  """Of each example's `n` crops, at `p` patches each.

  Attributes:
    teacher: bottleneck vectors of the crop seen whole.
    student: bottleneck vectors at the same patches of the masked crop.
    valid: which of the patches count; the others fill up to `p`.
    masked: whether any patch of the crop is hidden.
  """

  teacher: Float[Array, "b n p d"]
  student: Float[Array, "b n p d"]
  valid: Bool[Array, "b n p"]
  masked: Bool[Array, "b n"]


def masked_first(
  mask: Bool[Array, "b n patches"], count: int
) -> Int[Array, "b n {count}"]:
  """Indices of `count` patches: the hidden ones in order, then visible ones."""
  return jnp.argsort(~mask, axis=-1, stable=True)[..., :count]


def patch_weights(valid: Bool[Array, "n p"]) -> Float[Array, "n p"]:
  """A mean over each crop's valid patches, then a sum over the crops.

  As in DINOv2: 1 / (the crop's masked patches), so that a crop counts the same
  however much of it is hidden.
  """
  valid = valid.astype(jnp.float32)
  return valid / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1.0)


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
    max_masked: the most hidden patches of a crop; `resolve` reads it off the
      view. Without it the head runs on all patches, to the same end.
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
    if not view.mask_count:
      raise ConfigError(self._hides_nothing())
    if view.patch != patch:
      raise ConfigError(
        f"config.views.{self.view}: blocks() hides patches of {view.patch} "
        f"pixels, the model's are {patch}: write blocks(..., patch={patch})."
      )
    if self.max_masked not in (None, view.mask_count):
      raise ConfigError(
        f"masked_latent: max_masked is {self.max_masked}, but the view "
        f"'{self.view}' hides up to {view.mask_count}. Leave it out."
      )
    return dataclasses.replace(self, max_masked=view.mask_count)

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

  def evidence(
    self,
    encodings: Mapping[base.Encoding, Any],
    heads: base.BoundHeads,
    batch: Mapping[str, Any],
  ) -> Evidence:
    made = batch["views"][self.view]
    if made.mask is None:
      raise ConfigError(self._hides_nothing())
    mask = made.mask
    student = encodings[self._student].patches
    teacher = encodings[self._teacher].patches
    valid = jnp.ones_like(mask)
    if self.patches == "masked":
      where = masked_first(mask, self.max_masked or mask.shape[-1])
      valid = jnp.take_along_axis(mask, where, axis=2)
      teacher, student = (
        jnp.take_along_axis(x, where[..., None], axis=2)
        for x in (teacher, student)
      )
    return Evidence(
      teacher=heads[self.head, base.TEACHER](teacher),
      student=heads[self.head](student),
      valid=valid,
      masked=jnp.any(mask, axis=2),
    )

  def loss(
    self,
    evidence: Evidence,
    heads: base.BoundHeads,
    context: base.Context,
  ) -> base.Terms:
    rows, crops, patches, channels = evidence.teacher.shape
    valid = evidence.valid.reshape(-1, patches)
    matched = self.match(
      evidence.teacher.reshape(-1, 1, channels),
      evidence.student.reshape(-1, 1, channels),
      valid=valid.reshape(-1, 1),
      weights=patch_weights(valid).reshape(-1, 1, 1),
      heads=heads,
      context=context,
    )
    count = jnp.ones(()) * rows * crops
    masked = jnp.sum(evidence.masked.astype(jnp.float32))
    compared = jnp.sum(jnp.any(valid, axis=1).astype(jnp.float32))
    report = {
      **matched.report,
      # Unlike the loss it does not follow how many crops happened to be masked.
      "cross_entropy": base.Mean(jax.lax.stop_gradient(matched.sum), compared),
      "labelled": base.Mean(masked, count),
    }
    return base.Terms(
      loss=base.Mean(matched.sum, count),
      report=report,
      statistics=matched.statistics,
    )
