"""Copies of teachers between the updates of a run.

An EMA teacher that is first read after step 0 starts as a copy of the student
at that step. Snapshot teachers are copies of the EMA teacher; some are
refreshed every few updates.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp

from mtv_jax.objectives.base import TEACHER
from mtv_jax.train.spec import StepSpec, teacher_params
from mtv_jax.train.state import TrainState
from mtv_jax.train.step import Program

log = logging.getLogger(__name__)


class TeacherCopies:
  """Copies the teachers that are due before an update."""

  def __init__(self, program: Program):
    self._program = program

  @staticmethod
  def are_needed(spec: StepSpec) -> bool:
    """Whether a run copies a teacher at or after its start."""
    starts_late = spec.first_reads.get(TEACHER, 0) > 0
    return starts_late or any(t.copies for t in spec.teachers.values())

  def starts_ema(self, step: int) -> bool:
    """Whether the EMA teacher is first read after `step` updates."""
    return step > 0 and self._program.spec.first_reads.get(TEACHER) == step

  def due(self, step: int) -> tuple[str, ...]:
    """The frozen teachers to copy from the EMA teacher after `step` updates."""
    spec = self._program.spec
    return tuple(
      name
      for name, teacher in spec.teachers.items()
      if teacher.due(step - spec.first_reads[name])
    )

  def __call__(self, state: TrainState, step: int) -> TrainState:
    """Copies the teachers due after `step` updates; donates `state`."""
    names = self.due(step)
    starts_ema = self.starts_ema(step)
    if not names and not starts_ema:
      return state
    if names:
      text = ", ".join(names)
      log.info("Step %d copies the EMA teacher to %s.", step + 1, text)

    def copy(state):
      if starts_ema:
        teacher = teacher_params(self._program.spec, state.params)
        state = state.replace(teacher=jax.tree.map(jnp.copy, teacher))
      # A teacher with heads only uses the student's encoder.
      image = {**state.params, **state.teacher}["image"]
      new = {name: {"image": jax.tree.map(jnp.copy, image)} for name in names}
      return state.replace(teachers={**state.teachers, **new})

    shardings = self._program.shardings
    return jax.jit(copy, out_shardings=shardings, donate_argnums=0)(state)
