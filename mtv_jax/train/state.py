"""The train state: a tree of arrays, and nothing that computes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Int, PyTree

from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TrainState:
  """Everything that training changes, and all that a checkpoint holds.

  Attributes:
    step: number of updates done.
    params: `image`, `text` and `heads/NAME`, float32.
    opt_state: the optimizer's; moments have the parameters' names and shapes.
    teacher: EMA of `image` and of the heads marked for it; `{}` where no
      objective reads a teacher.
    ema: EMA of all parameters, for evaluation and export; `{}` if not asked
      for.
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
      ValueError: for weights that this run does not keep.
    """
    found = {"student": self.params}
    if self.ema:
      found["ema"] = self.ema
    if self.teacher:
      found["teacher"] = {**self.params, "image": self.teacher["image"]}
    if which not in found:
      raise ValueError(
        f"this run keeps no {which!r} weights, only {sorted(found)}. 'ema' "
        "needs config.ema, 'teacher' an objective that has one."
      )
    return found[which]
