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

# Kinds of inputs that are strings, see `PredictionHead.inputs`: the head gets
# the text tower's embeddings, or the token ids.
TEXT = "text"
TOKENS = "tokens"


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
  # image any number of rows, of so many channels, or of strings (`TEXT`,
  # `TOKENS`).
  inputs: ClassVar[Mapping[str, int | str]] = {}
  taps: ClassVar[tuple[int, ...]] = ()  # Image-tower blocks it reads, from 0.

  def resolve(self, spec: Any) -> PredictionHead:
    """The head with open options filled in from a `two_tower.ModelSpec`."""
    del spec
    return self

  def is_trained(self, name: str) -> bool:
    """Whether its objective trains what `Encoder.predict(name)` runs."""
    del name
    return True

  def check_tokenizer(self, tokenizer: Any) -> None:
    """Raises ConfigError for a tokenizer that it can't be trained with."""
    del tokenizer

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
      **inputs: float32 `[B, m, C]`, as `inputs` names them.
    """
    raise NotImplementedError

  def decode(self, out: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Adds to predictions, as NumPy arrays, what the tokenizer says of them.

    Args:
      out: by name, `[n, ...]`.
      tokenizer: None for an encoder without one.
    """
    del tokenizer
    return out
