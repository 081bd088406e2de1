"""The train state: a tree of arrays without code."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int, PyTree

from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TrainState:
  """All arrays that training updates and a checkpoint stores."""

  step: Int[Array, ""]  # Number of updates done.
  params: PyTree  # `image`, `text` and `heads/NAME`, float32.
  opt_state: Any  # Moments have the parameters' names and shapes.
  # EMA of `image` and heads, or of heads; {} if no objective reads it.
  teacher: PyTree
  ema: PyTree  # EMA of all parameters, for evaluation and export, or {}.
  statistics: PyTree  # By objective, such as DINO's centre.
  # Frozen encoders of `config.teachers` by name, each `{image: ...}`, or {}.
  teachers: PyTree = flax.struct.field(default_factory=dict)
  # State of the balancing method, see `train/balance/`, or {}.
  balance: PyTree = flax.struct.field(default_factory=dict)

  @property
  def fixed_params(self) -> dict[str, PyTree]:
    """The parameters without gradient, by `Encoding.weights`."""
    return {"teacher": self.teacher, **self.teachers}

  def weights(self, which: str) -> PyTree:
    """The parameters to evaluate: `'student'`, `'teacher'` or `'ema'`.

    A teacher's image encoder comes with the student's text tower and heads.
    """
    weights = {"student": self.params}
    if self.ema:
      weights["ema"] = self.ema
    if "image" in self.teacher:
      weights["teacher"] = {**self.params, "image": self.teacher["image"]}
    if which not in weights:
      hint = did_you_mean(str(which), weights)
      raise ConfigError(
        f"this run has no {which!r} weights. {hint} 'ema' needs config.ema, "
        "'teacher' an objective that reads one and teacher.ema='all'."
      )
    return weights[which]
