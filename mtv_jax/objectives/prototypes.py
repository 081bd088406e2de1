"""Prototype assignments of DINO and iBOT: Sinkhorn-Knopp, centring, losses.

A teacher assigns each vector to K prototypes; a student predicts the
assignment. The logits `[n, K]` of a batch would be the largest arrays of the
step, so they are computed in chunks of prototypes, and recomputed when needed
again. Assignments are therefore represented by scalings:

    log q_ik = logits_ik / temperature + rows_i + columns_k

Sinkhorn-Knopp and centring differ only in how they compute both vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.config import options
from mtv_jax.config.options import Range
from mtv_jax.models import linear
from mtv_jax.models.heads.projection import PrototypeHead
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class PrototypeLogits:
  """`vectors @ prototypes / temperature` for v views, computed in chunks."""

  vectors: Float[Array, "n v d"]
  prototypes: Float[Array, "d k"]
  temperature: Float[Array, ""] | float

  def chunk(self, prototypes: Float[Array, "d c"]) -> Float[Array, "n v c"]:
    """Logits / temperature for a chunk of the prototypes."""
    # Default precision, since this is by far the largest product. Both sides
    # have unit length; bfloat16 inputs change a logit by about 2e-4.
    return linear.linear(self.vectors, prototypes) / self.temperature


@pytree_dataclass
class Scalings:
  """Logarithms of the scalings from exp(logits) to assignments."""

  rows: Float[Array, "n v"]
  columns: Float[Array, " k"]


def sinkhorn(
  teacher: PrototypeLogits,
  valid: Bool[Array, "n v"],
  *,
  iterations: int = 3,
  chunk: int | None = None,
) -> Scalings:
  """Log-domain Sinkhorn-Knopp (Cuturi 2013; SwAV, Caron et al. 2020).

  Each iteration scales the prototypes to equal shares of the valid rows, then
  each row to sum 1. Constants such as SwAV's 1/B and 1/K cancel. Outside the
  log domain, exp(logits / 0.06) overflows float32 for logits above 5.3. A pass
  over the prototypes per iteration scales both, since a chunk's columns need
  only the last iteration's rows.

  `teacher`, all rows of the global batch, is not differentiated. Invalid rows
  get an assignment but don't affect the iterations; without a valid row,
  assignments are plain softmaxes.
  """
  teacher = jax.lax.stop_gradient(teacher)
  has_valid = jnp.any(valid)
  rows = jnp.zeros(valid.shape)
  columns = jnp.zeros(teacher.prototypes.shape[1])
  for _ in range(iterations):

    def scale(prototypes, rows=rows):
      logits = teacher.chunk(prototypes)  # [n, v, c]
      columns = -jax.nn.logsumexp(
        logits + rows[..., None], axis=(0, 1), where=valid[..., None]
      )
      # The logarithm is infinite without a valid row.
      columns = jnp.where(has_valid, columns, 0.0)
      return columns, jax.nn.logsumexp(logits + columns, axis=-1)

    columns, sums = map_chunks(scale, chunk, teacher.prototypes)
    rows = -jax.nn.logsumexp(sums, axis=0)
    columns = _join_chunks(columns)
  return Scalings(rows=rows, columns=columns)


def centered_softmax(
  teacher: PrototypeLogits, center: Float[Array, " k"], chunk: int | None = None
) -> Scalings:
  """DINO's softmax((logits - center) / temperature) (Caron et al. 2021).

  `center` is the running mean of the logits, before the temperature. `teacher`
  is not differentiated.
  """
  teacher = jax.lax.stop_gradient(teacher)
  columns = -center / teacher.temperature

  def sum_chunk(prototypes, columns):
    return jax.nn.logsumexp(teacher.chunk(prototypes) + columns, axis=-1)

  sums = map_chunks(sum_chunk, chunk, teacher.prototypes, columns)
  return Scalings(rows=-jax.nn.logsumexp(sums, axis=0), columns=columns)


def update_center(
  center: Float[Array, " k"],
  teacher: PrototypeLogits,
  valid: Bool[Array, "n v"],
  *,
  momentum: float,
) -> Float[Array, " k"]:
  """EMA of the mean logits of the valid rows; unchanged without a valid row."""
  teacher = jax.lax.stop_gradient(teacher)
  weights = valid.astype(jnp.float32)
  count = jnp.sum(weights)
  # The mean of the logits is the logits of the mean vector.
  mean = jnp.einsum("nv,nvd->d", weights, teacher.vectors, precision="highest")
  mean = mean / jnp.maximum(count, 1.0)
  mean = jnp.matmul(mean, teacher.prototypes, precision="highest")
  new_center = momentum * center + (1.0 - momentum) * mean
  return jnp.where(count > 0, new_center, center)


@pytree_dataclass
class CrossEntropies:
  """Cross-entropies of a student's predictions, with diagnostics.

  Only `cross_entropy` is differentiable, with respect to the student.
  """

  cross_entropy: Float[Array, "n g v"]  # Per pair of teacher and student view.
  entropy: Float[Array, "n g"]  # Per assignment, in nats.
  mean_entropy: Float[Array, ""]  # Entropy of the valid rows' mean assignment.
  # Prototypes that are a valid row's argmax, divided by min(K, valid rows).
  share_used: Float[Array, ""]


def cross_entropies(
  teacher: PrototypeLogits,
  scalings: Scalings,
  student: PrototypeLogits,
  valid: Bool[Array, "n g"],
  *,
  chunk: int | None = None,
) -> CrossEntropies:
  """Cross-entropies -sum_k q_ik log softmax_k(student), and diagnostics.

  `teacher` has g vectors per item, `student` v; `valid` masks the teacher rows
  in the diagnostics. The backward pass recomputes each chunk's logits.
  """
  teacher, scalings = jax.lax.stop_gradient((teacher, scalings))

  def score_chunk(teachers, students, columns):
    log_q = teacher.chunk(teachers) + scalings.rows[..., None] + columns
    q, logits = jnp.exp(log_q), student.chunk(students)  # [n, g | v, c]
    return {
      "hit": jnp.einsum("ngk,nvk->ngv", q, logits, precision="highest"),
      "sum": jax.nn.logsumexp(logits, axis=-1),
      "entropy": -jnp.sum(q * log_q, axis=-1),
      "mass": jnp.sum(q, axis=(0, 1), where=valid[..., None]),
      "best": jnp.argmax(log_q, axis=-1),
      "top": jnp.max(log_q, axis=-1),
    }

  parts = map_chunks(
    score_chunk, chunk, teacher.prototypes, student.prototypes, scalings.columns
  )
  # An assignment sums to 1, so the normaliser factors out of the sum.
  total = jax.nn.logsumexp(parts["sum"], axis=0)  # [n, v]
  count = jnp.sum(valid.astype(jnp.float32))
  mean = _join_chunks(parts["mass"]) / jnp.maximum(count, 1.0)  # [k]
  return CrossEntropies(
    cross_entropy=total[:, None, :] - jnp.sum(parts["hit"], axis=0),
    entropy=jnp.sum(parts["entropy"], axis=0),
    mean_entropy=jnp.sum(jax.scipy.special.entr(mean)),
    share_used=_share_used(parts["top"], parts["best"], valid, mean.shape[0]),
  )


def _share_used(top, best, valid, num_prototypes):
  """Distinct best prototypes, divided by min(K, valid rows)."""
  chunks = top.shape[0]
  chunk = jnp.argmax(top, axis=0)
  offset = jnp.take_along_axis(best, chunk[None], axis=0)[0]
  index = offset * chunks + chunk  # Chunks are strided, see `map_chunks`.
  is_used = jnp.zeros(num_prototypes).at[index].max(valid.astype(jnp.float32))
  max_used = jnp.minimum(jnp.sum(valid), num_prototypes)
  return jnp.sum(is_used) / jnp.maximum(max_used, 1)


def map_chunks(
  function: Callable[..., Any], chunk: int | None, *arrays: Array
) -> Any:
  """Maps `function` over chunks of the last axis; results are stacked."""
  size = arrays[0].shape[-1]
  if chunk is None or chunk >= size:
    return jax.tree.map(lambda x: x[None], function(*arrays))
  num_chunks = size // chunk

  # Strided chunks: if the last axis is sharded, each device has a share of each
  # chunk, and no data moves.
  def split(x):
    return jnp.moveaxis(x.reshape(*x.shape[:-1], chunk, num_chunks), -1, 0)

  chunk_fn = jax.checkpoint(lambda x: function(*x))
  return jax.lax.map(chunk_fn, tuple(map(split, arrays)))


def _join_chunks(chunks: Float[Array, "parts chunk"]) -> Float[Array, " k"]:
  return chunks.T.reshape(-1)


@dataclasses.dataclass(frozen=True)
class PrototypeObjective(base.Objective):
  """Base class of DINO and iBOT: options, head, schedules, report.

  The loss is the cross-entropy between student and teacher assignments.

  Defaults are DINOv2's (`ssl_default_config.yaml`) unless stated otherwise.
  Durations are percentages of the run.

  Signs of collapse in the report: `teacher_entropy` near log K if all inputs
  get a uniform assignment; `teacher_entropy` and `prototypes_used` near 0 if
  all inputs are assigned to one prototype. `mean_entropy` then also falls under
  centring; with Sinkhorn it is near log K by construction.
  """

  # Objectives with equal head names share a head, and must agree on its shape.
  head: str = "dino"
  prototypes: Annotated[int, Range(min=2)] = 65_536  # K.
  hidden: options.PositiveInt = 2048
  bottleneck: options.PositiveInt = 256
  student_temp: options.PositiveFloat = 0.1
  # Rises linearly from `teacher_temp_start`, in DINOv2 over 30 of 100 epochs.
  teacher_temp: options.PositiveFloat = 0.07
  teacher_temp_start: options.PositiveFloat = 0.04
  teacher_temp_warmup_percent: Annotated[float, Range(min=0, max=100)] = 30.0
  # Share of the run with frozen student prototypes; DINOv2: 1 of 100 epochs. As
  # there, Adam's moments advance (`base.Head`).
  freeze_last_layer_percent: Annotated[float, Range(min=0, max=100)] = 1.0
  # Sinkhorn: DINOv2's large models, DINOv3. Centring: DINO, DINOv2's default.
  target: Literal["sinkhorn", "centering"] = "sinkhorn"
  iterations: options.PositiveInt = 3  # Sinkhorn-Knopp iterations.
  center_momentum: Annotated[float, Range(min=0, max=0.9999)] = 0.9
  # Prototypes whose logits are in memory at a time; None for all. The backward
  # pass and each iteration recompute the chunks. Not an option of DINOv2.
  chunk: options.PositiveInt | None = 8192

  def __post_init__(self):
    count = self.prototypes
    if count % min(self.chunk or count, count):
      raise ConfigError(
        f"chunk is {self.chunk}; expected a divisor of prototypes={count}, or "
        "None."
      )

  def heads(self) -> dict[str, base.Head]:
    frozen_percent = {"last_layer": self.freeze_last_layer_percent}
    module = PrototypeHead(self.prototypes, self.hidden, self.bottleneck)

    def example(spec):
      return (jax.ShapeDtypeStruct((1, self._channels(spec)), "float32"),)

    return {self.head: base.Head(module, example, True, frozen_percent)}

  def _channels(self, spec) -> int:
    """Channels of the head's input."""
    raise NotImplementedError

  def initial_statistics(self) -> dict[str, jax.Array]:
    if self.target == "sinkhorn":
      return {}
    return {"center": jnp.zeros(self.prototypes)}

  def prototype_loss(
    self,
    teacher: Float[Array, "n g d"],
    student: Float[Array, "n v d"],
    *,
    valid: Bool[Array, "n g"],
    weights: Float[Array, "n g v"],
    heads: base.BoundHeads,
    context: base.Context,
  ) -> tuple[Array, dict[str, base.WeightedMean], dict[str, Array]]:
    """Weighted sum of cross-entropies, diagnostics and running statistics.

    `teacher` and `student` are bottleneck vectors for views of n items, `valid`
    masks the teacher's vectors, and `weights` are the pairs' weights in the
    sum, 0 for all pairs with an invalid vector.
    """
    progress = jnp.ones(())
    if self.teacher_temp_warmup_percent:
      steps = self.teacher_temp_warmup_percent / 100 * context.total_steps
      progress = jnp.clip(context.step / steps, 0.0, 1.0)
    start = self.teacher_temp_start
    temperature = start + progress * (self.teacher_temp - start)
    matrix = heads[self.head, base.TEACHER](method="prototypes")
    targets = PrototypeLogits(teacher, matrix, temperature)
    matrix = heads[self.head](method="prototypes")
    predictions = PrototypeLogits(student, matrix, self.student_temp)
    if self.target == "sinkhorn":
      kwargs = dict(iterations=self.iterations, chunk=self.chunk)
      scalings, statistics = sinkhorn(targets, valid, **kwargs), {}
    else:
      center = context.statistics["center"]
      scalings = centered_softmax(targets, center, self.chunk)
      momentum = self.center_momentum
      center = update_center(center, targets, valid, momentum=momentum)
      statistics = {"center": center}
    losses = cross_entropies(
      targets, scalings, predictions, valid, chunk=self.chunk
    )
    total = jnp.sum(weights * losses.cross_entropy)  # [n, g, v] -> []
    entropies = jnp.sum(weights * losses.entropy[..., None])
    entropy, rows = (
      jnp.sum(valid * losses.entropy),
      jnp.sum(valid, dtype=jnp.float32),
    )
    mean, ones = base.WeightedMean, jnp.ones(())
    has_valid = jnp.any(valid).astype(jnp.float32)
    report = {
      "teacher_entropy": mean(entropy, rows),
      "mean_entropy": mean(has_valid * losses.mean_entropy, has_valid),
      "prototypes_used": mean(has_valid * losses.share_used, has_valid),
      "kl": mean(total - entropies, jnp.sum(weights)),
      "teacher_temp": mean(temperature * ones, ones),
    }
    return total, *jax.lax.stop_gradient((report, statistics))
