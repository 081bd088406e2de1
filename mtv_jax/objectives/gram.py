"""Gram anchoring (DINOv3, Siméoni et al. 2025, arXiv 2508.10104, section 4.2).

Patch similarities of the student in a crop match a Gram teacher's, an earlier
checkpoint with cleaner patch features.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models import positions
from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError

# Rows of a Gram matrix to compute at a time.
_CHUNK = 256


def gram_losses(
  student: Float[Array, "*b p d"], teacher: Float[Array, "*b p e"]
) -> Float[Array, "*b"]:
  """Mean squared difference of two Gram matrices (Eq. 2).

      L = (1/P^2) || X_S X_S^T - X_G X_G^T ||_F^2,  |x| = 1

  The paper's equation sums over the matrix; its code takes the mean, to which
  the published weights refer. Normalises the features. Computes the `[P, P]`
  matrices in chunks of rows, which the backward pass recomputes.
  """
  student, teacher = unit(student), unit(teacher)
  patches = student.shape[-2]
  chunk = min(patches, _CHUNK)
  padding = -patches % chunk

  def rows(x):
    # Padded rows are zero in both, so they add nothing.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
    x = x.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)  # [P / chunk, *b, chunk, D]

  def similarities(rows, x):
    return jnp.einsum("...qd,...pd->...qp", rows, x, precision="highest")

  @jax.checkpoint
  def chunk_sum(parts):
    s_rows, t_rows = parts
    difference = similarities(s_rows, student) - similarities(t_rows, teacher)
    return jnp.sum(jnp.square(difference), axis=(-2, -1))  # [*b]

  sums = jax.lax.map(chunk_sum, (rows(student), rows(teacher)))
  return jnp.sum(sums, axis=0) / patches**2


@dataclasses.dataclass(frozen=True)
class Gram(base.Objective):
  """Gram anchoring of the student's patches to a teacher's.

  Averages over all crops. Compares patches after the final norm, masked patches
  included, as in the released configurations.
  """

  group = "ssl"

  view: str = "global"  # The student's view.
  # The teacher's view: equal crops at another resolution. Section 4.3 doubles
  # the student's, for smoother features. None: `view`.
  view_teacher: str | None = None
  teacher: str = "gram"  # A name in `config.teachers`, or 'teacher': the EMA.
  # Pixels per side of the teacher's input; `resolve` takes it from
  # `config.teachers`. None: the view's.
  teacher_size: options.PositiveInt | None = None

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> Gram:
    names = [self.view, self._teacher.view]
    if not all(name in views for name in names):
      return self
    for name in names:
      base.check_visible("gram", name, views, True)
    student, teacher = (views[name] for name in names)
    if student is not teacher and teacher.crops_of != self.view:
      raise ConfigError(
        f"gram: set config.views.{names[1]}.crops_of={self.view!r}: the two "
        "views differ in their crops."
      )
    frozen_teacher = teachers.get(self.teacher)
    if frozen_teacher is None or frozen_teacher.size in (None, teacher.size):
      return self
    return dataclasses.replace(self, teacher_size=frozen_teacher.size)

  @property
  def _teacher(self) -> base.Encoding:
    view = self.view if self.view_teacher is None else self.view_teacher
    size = self.teacher_size or 0
    return base.Encoding("image", view, self.teacher, size)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self.image: (), self._teacher: ()})

  def loss_inputs(self, encodings, heads, batch) -> Float[Array, "b n"]:
    """Computes the loss per crop, which is independent across images."""
    student = encodings[self.image].patches.astype(jnp.float32)  # [b, n, P, D]
    teacher = encodings[self._teacher].patches.astype(jnp.float32)
    teacher = positions.resize_patches(teacher, student.shape[-2])
    return gram_losses(student, teacher)

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    count = jnp.float32(loss_inputs.size)
    return base.Terms(loss=base.WeightedMean(jnp.sum(loss_inputs), count))
