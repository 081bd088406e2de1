"""Base class of DINO and iBOT: options, prototype head, schedules, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.config import options
from mtv_jax.config.options import Range
from mtv_jax.models.heads.projection import PrototypeHead
from mtv_jax.objectives import base, prototypes
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class PrototypeLoss:
  """Weighted sum of cross-entropies, diagnostics and running statistics."""

  sum: Float[Array, ""]
  report: dict[str, base.WeightedMean]
  statistics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SelfDistillation(base.Objective):
  """Cross-entropy between student and teacher prototype assignments.

  Defaults are DINOv2's (its `ssl_default_config.yaml`) unless stated otherwise.
  Durations are percentages of the run.

  Signs of collapse in the report: `teacher_entropy` near log K, where all
  inputs get the same assignment; `teacher_entropy` and `prototypes_used` near
  0, where all inputs are assigned to one prototype. `mean_entropy` falls with
  it under centring; Sinkhorn makes it near log K by construction.
  """

  # Objectives whose heads have one name share it, and must agree on its shape.
  head: str = "dino"
  prototypes: Annotated[int, Range(min=2)] = 65_536  # K.
  hidden: options.PositiveInt = 2048
  bottleneck: options.PositiveInt = 256
  student_temp: options.PositiveFloat = 0.1
  # Rises linearly from its start, over the first 30 of DINOv2's 100 epochs.
  teacher_temp: options.PositiveFloat = 0.07
  teacher_temp_start: options.PositiveFloat = 0.04
  teacher_temp_warmup_percent: Annotated[float, Range(min=0, max=100)] = 30.0
  # Part of the run in which the student's prototypes are not updated: 1 of
  # DINOv2's 100 epochs. As there, Adam's moments advance (`base.Head`).
  freeze_last_layer_percent: Annotated[float, Range(min=0, max=100)] = 1.0
  # Sinkhorn: DINOv2's large models, DINOv3. Centring: DINO, DINOv2's default.
  target: Literal["sinkhorn", "centering"] = "sinkhorn"
  iterations: options.PositiveInt = 3  # Of Sinkhorn-Knopp.
  center_momentum: Annotated[float, Range(min=0, max=0.9999)] = 0.9
  # Prototypes whose logits are in memory at a time, None for all. Not DINOv2's:
  # 65,536 prototypes then fit beside a ViT-L. Chunks are recomputed in the
  # backward pass and in each iteration.
  chunk: options.PositiveInt | None = 8192

  def __post_init__(self):
    chunked = self.chunk is not None and self.chunk < self.prototypes
    if chunked and self.prototypes % self.chunk:
      raise ConfigError(
        f"chunk is {self.chunk}; expected a divisor of prototypes="
        f"{self.prototypes}, or None."
      )

  def heads(self) -> dict[str, base.Head]:
    module = PrototypeHead(
      count=self.prototypes, hidden=self.hidden, bottleneck=self.bottleneck
    )

    def example(spec):
      return (jax.ShapeDtypeStruct((1, self._channels(spec)), "float32"),)

    head = base.Head(
      module,
      example=example,
      teacher=True,
      frozen_percent={"last_layer": self.freeze_last_layer_percent},
    )
    return {self.head: head}

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
  ) -> PrototypeLoss:
    """Weighted cross-entropies of the global batch.

    `teacher` and `student` are bottleneck vectors of views of the same n items,
    `valid` marks the teacher's vectors that count, and `weights` are those of
    the pairs in the sum, 0 for all pairs of an invalid vector.
    """
    matrix = heads[self.head](method="prototypes")
    temperature = self._teacher_temp(context)
    teacher_matrix = heads[self.head, base.TEACHER](method="prototypes")
    targets = prototypes.PrototypeLogits(teacher, teacher_matrix, temperature)
    predictions = prototypes.PrototypeLogits(student, matrix, self.student_temp)
    scalings, statistics = self._assign(targets, valid, context.statistics)
    losses = prototypes.cross_entropies(
      targets, scalings, predictions, valid, chunk=self.chunk
    )
    total = jnp.sum(weights * losses.cross_entropy)  # [n, g, v] -> []
    rows, pairs = jnp.sum(valid.astype(jnp.float32)), jnp.sum(weights)
    entropies = jnp.sum(weights * losses.entropy[..., None])
    one = jnp.ones(())
    some = jnp.any(valid).astype(jnp.float32)
    report = {
      "teacher_entropy": base.WeightedMean(
        jnp.sum(valid * losses.entropy), rows
      ),
      "mean_entropy": base.WeightedMean(some * losses.mean_entropy, some),
      "prototypes_used": base.WeightedMean(some * losses.used, some),
      "kl": base.WeightedMean(total - entropies, pairs),
      "teacher_temp": base.WeightedMean(temperature * one, one),
    }
    stop = jax.lax.stop_gradient
    return PrototypeLoss(total, stop(report), stop(statistics))

  def _assign(
    self,
    teacher: prototypes.PrototypeLogits,
    valid: Bool[Array, "n g"],
    statistics: Mapping[str, Array],
  ) -> tuple[prototypes.Scalings, dict[str, Array]]:
    """The teacher's assignments, and the new statistics."""
    if self.target == "sinkhorn":
      scalings = prototypes.sinkhorn(
        teacher, valid, iterations=self.iterations, chunk=self.chunk
      )
      return scalings, {}
    center = statistics["center"]
    scalings = prototypes.centered_softmax(teacher, center, chunk=self.chunk)
    center = prototypes.update_center(
      center, teacher, valid, momentum=self.center_momentum
    )
    return scalings, {"center": center}

  def _teacher_temp(self, context: base.Context) -> Float[Array, ""]:
    share = jnp.ones(())
    if self.teacher_temp_warmup_percent:
      steps = self.teacher_temp_warmup_percent / 100 * context.total_steps
      share = jnp.clip(context.step / steps, 0.0, 1.0)
    start = self.teacher_temp_start
    return start + share * (self.teacher_temp - start)
