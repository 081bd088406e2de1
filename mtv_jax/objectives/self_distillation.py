"""What DINO and iBOT share as objectives: settings, head, schedules, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtv_jax.models.heads.projection import PrototypeHead
from mtv_jax.objectives import base, prototypes
from mtv_jax.utils.errors import check_choice
from mtv_jax.utils.tree import pytree_dataclass

TARGETS = ("sinkhorn", "centering")


@pytree_dataclass
class Matched:
  """A weighted sum of cross-entropies, with what goes beside it.

  Attributes:
    sum: over all pairs, each with its weight.
    report: means for the log.
    statistics: new running statistics.
  """

  sum: Float[Array, ""]
  report: dict[str, base.WeightedMean]
  statistics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SelfDistillation(base.Objective):
  """A student predicts its teacher's assignments to prototypes.

  Defaults are DINOv2's (its `ssl_default_config.yaml`) unless said otherwise.
  Durations are shares of the run.

  Collapse shows in the report. `teacher_entropy` near log K: all inputs look
  alike. `teacher_entropy` near 0 with `prototypes_used` near 0: all go to one
  prototype. `mean_entropy` falls with it under centring; Sinkhorn holds it
  near log K by construction.

  Attributes:
    head: its name; objectives that name the same one share it, and then have
      to agree on its shape.
    prototypes: how many (K).
    hidden: units of the head's hidden layers.
    bottleneck: channels of the head's bottleneck.
    student_temp: temperature of the predictions.
    teacher_temp: temperature of the assignments after the warm-up.
    teacher_temp_start: at step 0, from where it rises linearly.
    teacher_temp_warmup_percent: 30 of DINOv2's 100 epochs.
    freeze_last_layer_percent: for how long the student's prototypes get no
      gradient; 1 of DINOv2's 100 epochs.
    target: `'sinkhorn'` (DINOv2's large models, DINOv3) or `'centering'`
      (DINO; DINOv2's plain default).
    iterations: of Sinkhorn-Knopp.
    center_momentum: of the running mean that centring subtracts.
    chunk: prototypes whose logits exist at a time, None for all; ours, to fit
      65,536 prototypes beside a ViT-L. Chunks are computed again in the
      backward pass and in each iteration.
  """

  head: str = "dino"
  prototypes: int = 65_536
  hidden: int = 2048
  bottleneck: int = 256
  student_temp: float | int = 0.1
  teacher_temp: float | int = 0.07
  teacher_temp_start: float | int = 0.04
  teacher_temp_warmup_percent: float | int = 30.0
  freeze_last_layer_percent: float | int = 1.0
  target: str = "sinkhorn"
  iterations: int = 3
  center_momentum: float | int = 0.9
  chunk: int | None = 8192

  def __post_init__(self):
    self._choice("target", TARGETS)
    for key in ("student_temp", "teacher_temp", "teacher_temp_start"):
      self._require(key, getattr(self, key) > 0, "a number above 0")
    for key in ("teacher_temp_warmup_percent", "freeze_last_layer_percent"):
      good = 0 <= getattr(self, key) <= 100
      self._require(key, good, "0 to 100, a share of the run")
    good = 0 <= self.center_momentum < 1
    self._require("center_momentum", good, "at least 0 and below 1")
    for key in ("hidden", "bottleneck", "iterations"):
      self._require(key, getattr(self, key) >= 1, "at least 1")
    self._require("prototypes", self.prototypes >= 2, "at least 2")
    if self.chunk is not None and self.chunk < self.prototypes:
      good = self.chunk >= 1 and self.prototypes % self.chunk == 0
      divisor = f"a divisor of prototypes={self.prototypes}, or None"
      self._require("chunk", good, divisor)

  def _require(self, key: str, good: bool, expected: str) -> None:
    if not good:
      raise ValueError(
        f"{type(self).__name__}: {key}={getattr(self, key)!r}; expected "
        f"{expected}."
      )

  def _choice(self, key: str, choices: Sequence[str]) -> None:
    what = f"{type(self).__name__}.{key}"
    check_choice(what, getattr(self, key), choices)

  def heads(self) -> dict[str, base.Head]:
    module = PrototypeHead(
      count=self.prototypes, hidden=self.hidden, bottleneck=self.bottleneck
    )

    def example(spec):
      return (jax.ShapeDtypeStruct((1, self._channels(spec)), "float32"),)

    return {self.head: base.Head(module, example=example, teacher=True)}

  def _channels(self, spec) -> int:
    """Of what the head reads."""
    raise NotImplementedError

  def initial_statistics(self) -> dict[str, jax.Array]:
    if self.target == "sinkhorn":
      return {}
    return {"center": jnp.zeros(self.prototypes)}

  def match(
    self,
    teacher: Float[Array, "n g d"],
    student: Float[Array, "n v d"],
    *,
    valid: Bool[Array, "n g"],
    weights: Float[Array, "n g v"],
    heads: base.BoundHeads,
    context: base.Context,
  ) -> Matched:
    """Assigns the teacher's vectors and lets the student's predict them.

    Args:
      teacher: bottleneck vectors of the whole global batch.
      student: the same of the student's views of the same things.
      valid: teacher vectors that count.
      weights: of each pair in the sum; 0 for all pairs of an invalid vector.
      heads: with this objective's head, of student and teacher.
      context: for the schedules and the centre.
    """
    matrix = heads[self.head](method="prototypes")
    if self.freeze_last_layer_percent:
      frozen = _progress(context, self.freeze_last_layer_percent) < 1
      matrix = jnp.where(frozen, jax.lax.stop_gradient(matrix), matrix)
    temperature = self._teacher_temp(context)
    targets = prototypes.Side(
      teacher,
      heads[self.head, base.TEACHER](method="prototypes"),
      temperature,
    )
    predictions = prototypes.Side(student, matrix, self.student_temp)
    scalings, statistics = self._assign(targets, valid, context.statistics)
    found = prototypes.compare(
      targets, scalings, predictions, valid, chunk=self.chunk
    )
    total = jnp.sum(weights * found.cross_entropy)
    rows, pairs = jnp.sum(valid.astype(jnp.float32)), jnp.sum(weights)
    entropies = jnp.sum(weights * found.entropy[..., None])
    one = jnp.ones(())
    some = jnp.any(valid).astype(jnp.float32)
    report = {
      "teacher_entropy": base.WeightedMean(
        jnp.sum(valid * found.entropy), rows
      ),
      "mean_entropy": base.WeightedMean(some * found.mean_entropy, some),
      "prototypes_used": base.WeightedMean(some * found.used, some),
      "kl": base.WeightedMean(total - entropies, pairs),
      "teacher_temp": base.WeightedMean(temperature * one, one),
    }
    stop = jax.lax.stop_gradient
    return Matched(total, stop(report), stop(statistics))

  def _assign(
    self,
    teacher: prototypes.Side,
    valid: Bool[Array, "n g"],
    statistics: Mapping[str, Array],
  ) -> tuple[prototypes.Scalings, dict[str, Array]]:
    """The teacher's assignments, and the statistics after them."""
    if self.target == "sinkhorn":
      found = prototypes.sinkhorn(
        teacher, valid, iterations=self.iterations, chunk=self.chunk
      )
      return found, {}
    center = statistics["center"]
    found = prototypes.centring(teacher, center, chunk=self.chunk)
    moved = prototypes.next_center(
      center, teacher, valid, momentum=self.center_momentum
    )
    return found, {"center": moved}

  def _teacher_temp(self, context: base.Context) -> Float[Array, ""]:
    share = jnp.ones(())
    if self.teacher_temp_warmup_percent:
      share = _progress(context, self.teacher_temp_warmup_percent)
    start = self.teacher_temp_start
    return start + share * (self.teacher_temp - start)


def _progress(context: base.Context, percent: float | int) -> Float[Array, ""]:
  """Of the first `percent` of the run: 0 at its start, 1 from its end on."""
  steps = percent / 100 * context.total_steps
  return jnp.clip(context.step / steps, 0.0, 1.0)
