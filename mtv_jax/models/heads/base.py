"""The contract of a head that predicts.

An objective trains such a head, `Encoder.predict` runs it, and an export
describes it; all three build it from the same configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array

# The kind of input that the text tower embeds, see `PredictionHead.inputs`.
TEXT = "text"


@dataclasses.dataclass(frozen=True)
class PredictionHead:
  """Configuration of a head that predicts, with its module and its function.

  A subclass is a frozen dataclass, registered in `heads.HEADS`. Its fields are
  options of the head, which a config gives in the entry of the objective that
  trains it. That objective has the head as its field `head`.
  """

  objective: ClassVar[str]  # Its type, by which exports describe the head.
  params_key: ClassVar[str]  # The head's parameters are `heads/PARAMS_KEY`.
  # Inputs other than the image, by keyword of `Encoder.predict`: for each
  # image any number of rows, of so many channels, or of strings (`TEXT`) of
  # which it gets the text tower's embeddings.
  inputs: ClassVar[Mapping[str, int | str]] = {}
  taps: ClassVar[tuple[int, ...]] = ()  # Image-tower blocks it reads, from 0.

  def resolve(self, spec: Any) -> PredictionHead:
    """The head with open options filled in from a `two_tower.ModelSpec`."""
    del spec
    return self

  def module(self) -> nn.Module:
    """The linen module."""
    raise NotImplementedError

  def example(self, spec: Any) -> tuple:
    """Arguments to initialise the module with, see `objectives.base.Head`."""
    raise NotImplementedError

  def predict(
    self,
    head: Callable[..., Any],
    image: Any,
    grid: tuple[int, int],
    **inputs: Array,
  ) -> dict[str, Array]:
    """Predictions `[B, ...]`, or `[B, m, ...]` for the m rows of an input.

    Args:
      head: the module with its parameters.
      image: `vit.ImageOutput` of B images, with `taps`.
      grid: rows and columns of its patches.
      **inputs: `[B, m, C]`, as `inputs` names them.
    """
    raise NotImplementedError
