"""The train state: a tree of arrays without code."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Int, PyTree

from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TrainState:
  """Everything that training changes and a checkpoint stores.

  Attributes:
    step: number of updates done.
    params: `image`, `text` and `heads/NAME`, float32.
    opt_state: moments have the parameters' names and shapes.
    teacher: EMA of `image` and of the heads marked for it; `{}` where no
      objective reads a teacher.
    ema: EMA of all parameters, for evaluation and export, or `{}`.
    statistics: running statistics by objective, such as DINO's centre.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: Any
  teacher: PyTree
  ema: PyTree
  statistics: PyTree

  def weights(self, which: str) -> PyTree:
    """The parameters to evaluate: `'student'`, `'teacher'` or `'ema'`.

    A teacher is an image encoder; the text tower and the temperature that go
    with it are the student's.

    Raises:
      ConfigError: for weights that this run lacks.
    """
    weights = {"student": self.params}
    if self.ema:
      weights["ema"] = self.ema
    if self.teacher:
      weights["teacher"] = {**self.params, "image": self.teacher["image"]}
    if which not in weights:
      raise ConfigError(
        f"this run has no {which!r} weights. {did_you_mean(which, weights)} "
        "'ema' needs config.ema, 'teacher' an objective that reads one."
      )
    return weights[which]
