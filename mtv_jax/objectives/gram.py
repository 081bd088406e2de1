"""Gram anchoring (DINOv3, Siméoni et al. 2025, arXiv 2508.10104, section 4.2).

The student's similarities between patches of a crop follow a Gram teacher's,
an encoder of an earlier iteration whose patch features are cleaner.
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

# Rows of a Gram matrix that are computed at once, of up to P.
_CHUNK = 256


def gram_losses(
  student: Float[Array, "*b p d"], teacher: Float[Array, "*b p e"]
) -> Float[Array, "*b"]:
  """Mean squared difference of two Gram matrices (Eq. 2).

      L = (1/P^2) || X_S X_S^T - X_G X_G^T ||_F^2,  |x| = 1

  The paper's equation is the sum over the matrix; its released code takes the
  mean, which the published weights refer to. Features are normalised here. The
  `[P, P]` matrices exist in chunks of rows, recomputed in the backward pass.
  """
  student, teacher = unit(student), unit(teacher)
  patches = student.shape[-2]
  chunk = min(patches, _CHUNK)
  padding = -patches % chunk

  def rows(x):
    # Padded rows are zero in both, so that they add nothing.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
    x = x.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)  # [P / chunk, *b, chunk, D]

  def similarities(rows, x):
    return jnp.einsum("...qd,...pd->...qp", rows, x, precision="highest")

  @jax.checkpoint
  def chunk_sum(parts):
    of_student, of_teacher = parts
    difference = similarities(of_student, student)
    difference = difference - similarities(of_teacher, teacher)
    return jnp.sum(jnp.square(difference), axis=(-2, -1))  # [*b]

  sums = jax.lax.map(chunk_sum, (rows(student), rows(teacher)))
  return jnp.sum(sums, axis=0) / patches**2


@dataclasses.dataclass(frozen=True)
class Gram(base.Objective):
  """Gram anchoring of the student's patches to a teacher's.

  The loss is the mean over all crops. Patches are compared after the final
  norm, masked ones included, as in the released configurations.
  """

  view: str = "global"  # The student's.
  # The teacher's: crops of the same boxes at another resolution (section 4.3:
  # twice the student's, whose features are then smoother). None: `view`.
  view_teacher: str | None = None
  teacher: str = "gram"  # In `config.teachers`, or 'teacher': EMA.
  # Pixels per side that the teacher sees; `resolve` takes them from
  # `config.teachers`. None: the view's.
  teacher_size: options.PositiveInt | None = None

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> Gram:
    names = [self.view, self._teacher.view]
    if not all(name in views for name in names):
      return self
    base.check_all_patches("gram", names, views)
    student, teacher = (views[name] for name in names)
    if student is not teacher and teacher.crops_of != self.view:
      raise ConfigError(
        f"gram: {names[1]!r} has other crops than {self.view!r}. Set "
        f"config.views.{names[1]}.crops_of={self.view!r}."
      )
    frozen = teachers.get(self.teacher)
    if frozen is None or frozen.size in (None, teacher.size):
      return self
    return dataclasses.replace(self, teacher_size=frozen.size)

  @property
  def _teacher(self) -> base.Encoding:
    view = self.view if self.view_teacher is None else self.view_teacher
    size = self.teacher_size or 0
    return base.Encoding("image", view, self.teacher, size)

  def needs(self) -> base.Needs:
    return base.Needs(encodings={self.image: (), self._teacher: ()})

  def loss_inputs(
    self, encodings: base.Encodings, heads: base.BoundHeads, batch: base.Batch
  ) -> Float[Array, "b n"]:
    """The loss of each crop, since it depends on no other image."""
    student = encodings[self.image].patches.astype(jnp.float32)  # [b, n, P, D]
    teacher = encodings[self._teacher].patches.astype(jnp.float32)
    teacher = positions.resize_patches(
      teacher, student.shape[-2]
    )  # [b, n, P, E]
    return gram_losses(student, teacher)

  def loss(
    self,
    loss_inputs: Float[Array, "b n"],
    heads: base.BoundHeads,
    context: base.Context,
  ) -> base.Terms:
    count = jnp.float32(loss_inputs.size)
    return base.Terms(loss=base.WeightedMean(jnp.sum(loss_inputs), count))
