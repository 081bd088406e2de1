"""Soft assignment to prototypes: what DINO and iBOT have in common.

A teacher assigns each vector to K prototypes, a student predicts the
assignment. Over a batch, logits `[n, K]` would be the largest arrays of the
step, so that they exist only a chunk of prototypes at a time and are computed
again where they are needed. Assignments are therefore kept as their scalings:

    log q_ik = logits_ik / temperature + rows_i + columns_k

Sinkhorn-Knopp and centring differ only in how they find these two vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.models import layers
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class Side:
  """A teacher or a student before its prototypes.

  Attributes:
    vectors: `v` views of each of `n` things.
    prototypes: one a column.
    temperature: divides the logits `vectors @ prototypes`.
  """

  vectors: Float[Array, "n v d"]
  prototypes: Float[Array, "d k"]
  temperature: Float[Array, ""] | float

  def logits(self, prototypes: Float[Array, "d c"]) -> Float[Array, "n v c"]:
    """Divided by the temperature, before a part of the prototypes."""
    # In the backend's default precision, as the largest product by far. Both
    # sides have unit length: bfloat16 inputs move a logit by about 2e-4.
    return layers.linear(self.vectors, prototypes) / self.temperature


@pytree_dataclass
class Scalings:
  """Logarithms of what scales exp(logits) to assignments."""

  rows: Float[Array, "n v"]
  columns: Float[Array, " k"]


def sinkhorn(
  teacher: Side,
  valid: Bool[Array, "n v"],
  *,
  iterations: int = 3,
  chunk: int | None = None,
) -> Scalings:
  """Sinkhorn-Knopp (Cuturi 2013; SwAV, Caron et al. 2020), in logarithms.

  Each iteration scales the prototypes to equal shares of the valid rows, then
  each row to sum 1. Constants as in SwAV's 1/B and 1/K cancel. Out of the
  logarithm, exp(logits / temperature) overflows float32 at a temperature of
  0.06 for logits above 5.3. One pass over the prototypes an iteration does
  both, since a chunk's columns need only the rows found before.

  Args:
    teacher: all rows of the global batch; no gradient is passed to it.
    valid: rows that count; the others get an assignment, but have no say in
      any iteration. With none valid, assignments are plain softmaxes.
    iterations: DINOv2's 3.
    chunk: prototypes at a time; None for all.
  """
  teacher = jax.lax.stop_gradient(teacher)
  some = jnp.any(valid)
  rows = jnp.zeros(valid.shape)
  columns = jnp.zeros(teacher.prototypes.shape[1])
  for _ in range(iterations):

    def scale(prototypes, rows=rows):
      logits = teacher.logits(prototypes)
      columns = -jax.nn.logsumexp(
        logits + rows[..., None], axis=(0, 1), where=valid[..., None]
      )
      # Of no rows at all, the logarithm is infinite.
      columns = jnp.where(some, columns, 0.0)
      return columns, jax.nn.logsumexp(logits + columns, axis=-1)

    columns, sums = _over_chunks(scale, chunk, teacher.prototypes)
    rows = -jax.nn.logsumexp(sums, axis=0)
    columns = _joined(columns)
  return Scalings(rows=rows, columns=columns)


def centring(
  teacher: Side, center: Float[Array, " k"], *, chunk: int | None = None
) -> Scalings:
  """DINO's softmax((logits - center) / temperature) (Caron et al. 2021).

  Args:
    teacher: no gradient is passed to it.
    center: running mean of the logits, before the temperature.
    chunk: prototypes at a time; None for all.
  """
  teacher = jax.lax.stop_gradient(teacher)
  columns = -center / teacher.temperature
  sums = _over_chunks(
    lambda prototypes, columns: jax.nn.logsumexp(
      teacher.logits(prototypes) + columns, axis=-1
    ),
    chunk,
    teacher.prototypes,
    columns,
  )
  return Scalings(rows=-jax.nn.logsumexp(sums, axis=0), columns=columns)


def next_center(
  center: Float[Array, " k"],
  teacher: Side,
  valid: Bool[Array, "n v"],
  *,
  momentum: float | int,
) -> Float[Array, " k"]:
  """The centre after this batch: an EMA of the mean logits of its valid rows.

  It stays as it is where no row is valid.
  """
  teacher = jax.lax.stop_gradient(teacher)
  weights = valid.astype(jnp.float32)
  count = jnp.sum(weights)
  # The mean of the logits is the logit of the mean: no logits are needed.
  mean = jnp.einsum("nv,nvd->d", weights, teacher.vectors, precision="highest")
  mean = jnp.matmul(
    mean / jnp.maximum(count, 1.0), teacher.prototypes, precision="highest"
  )
  moved = momentum * center + (1.0 - momentum) * mean
  return jnp.where(count > 0, moved, center)


@pytree_dataclass
class Comparison:
  """What comes of a teacher's assignments and a student's predictions.

  Only the cross-entropy has a gradient, and only to the student.

  Attributes:
    cross_entropy: of each teacher view against each student view of a thing.
    entropy: of each assignment, in nats.
    mean_entropy: of the mean assignment of the valid rows.
    used: prototypes that some valid row prefers to all others, as a share of
      the most that there could be, min(K, valid rows).
  """

  cross_entropy: Float[Array, "n g v"]
  entropy: Float[Array, "n g"]
  mean_entropy: Float[Array, ""]
  used: Float[Array, ""]


def compare(
  teacher: Side,
  scalings: Scalings,
  student: Side,
  valid: Bool[Array, "n g"],
  *,
  chunk: int | None = None,
) -> Comparison:
  """Cross-entropies -sum_k q_ik log softmax_k(student), and diagnostics.

  Args:
    teacher: `[n, g, d]`.
    scalings: of the teacher, by `sinkhorn` or `centring`.
    student: `[n, v, d]`.
    valid: teacher rows that the diagnostics speak of.
    chunk: prototypes at a time; None for all. With chunks, the backward pass
      computes the logits of each again.
  """
  teacher, scalings = jax.lax.stop_gradient((teacher, scalings))

  def part(teachers, students, columns):
    log_q = teacher.logits(teachers) + scalings.rows[..., None] + columns
    q, logits = jnp.exp(log_q), student.logits(students)
    return {
      "hit": jnp.einsum("ngk,nvk->ngv", q, logits, precision="highest"),
      "sum": jax.nn.logsumexp(logits, axis=-1),
      "entropy": -jnp.sum(q * log_q, axis=-1),
      "mass": jnp.sum(q, axis=(0, 1), where=valid[..., None]),
      "best": jnp.argmax(log_q, axis=-1),
      "top": jnp.max(log_q, axis=-1),
    }

  found = _over_chunks(
    part, chunk, teacher.prototypes, student.prototypes, scalings.columns
  )
  # An assignment sums to 1, so that the normaliser comes out of the sum.
  total = jax.nn.logsumexp(found["sum"], axis=0)
  count = jnp.sum(valid.astype(jnp.float32))
  mean = _joined(found["mass"]) / jnp.maximum(count, 1.0)
  return Comparison(
    cross_entropy=total[:, None, :] - jnp.sum(found["hit"], axis=0),
    entropy=jnp.sum(found["entropy"], axis=0),
    mean_entropy=jnp.sum(jax.scipy.special.entr(mean)),
    used=_share_used(found["top"], found["best"], valid, mean.shape[0]),
  )


def _share_used(top, best, valid, prototypes):
  """Distinct best prototypes over min(prototypes, valid rows)."""
  chunks = top.shape[0]
  which = jnp.argmax(top, axis=0)
  within = jnp.take_along_axis(best, which[None], axis=0)[0]
  index = within * chunks + which  # As `_over_chunks` deals them out.
  hits = jnp.zeros(prototypes).at[index].max(valid.astype(jnp.float32))
  most = jnp.minimum(jnp.sum(valid), prototypes)
  return jnp.sum(hits) / jnp.maximum(most, 1)


def _over_chunks(
  function: Callable[..., Any], chunk: int | None, *arrays: Array
) -> Any:
  """`function` of chunks of the last axis; results stacked, chunk first."""
  size = arrays[0].shape[-1]
  if chunk is None or chunk >= size:
    return jax.tree.map(lambda x: x[None], function(*arrays))
  parts = size // chunk

  # Dealt out like cards: where the last axis is split over devices, each of
  # them keeps a share of every chunk, and nothing has to move.
  def deal(x):
    return jnp.moveaxis(x.reshape(*x.shape[:-1], chunk, parts), -1, 0)

  return jax.lax.map(
    jax.checkpoint(lambda x: function(*x)), tuple(map(deal, arrays))
  )


def _joined(chunks: Float[Array, "parts chunk"]) -> Float[Array, " k"]:
  """The vector whose chunks `_over_chunks` has stacked."""
  return chunks.T.reshape(-1)
