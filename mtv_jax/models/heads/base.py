"""Base class of prediction heads.

An objective trains the head, `Encoder.predict` runs it, and an export describes
it, all from one configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
from jaxtyping import Array

# Kinds of string inputs, see `PredictionHead.inputs`: the head receives text
# tower embeddings, or token ids.
TEXT = "text"
TOKENS = "tokens"


@dataclasses.dataclass(frozen=True)
class PredictionHead:
  """Configuration of a prediction head, which builds and runs its module.

  A subclass is a frozen dataclass. Its fields are options in the config entry
  of the objective that trains it. That objective stores the head in its field
  `head`.
  """

  params_key: ClassVar[str]  # The head's parameters are `heads/PARAMS_KEY`.
  # Inputs besides the image, by keyword of `Encoder.predict`: channels per row,
  # or strings (`TEXT`, `TOKENS`). An image may have any number of rows.
  inputs: ClassVar[Mapping[str, int | str]] = {}
  taps: ClassVar[tuple[int, ...]] = ()  # Image-tower layers it reads, from 0.
  # The tokenizer of its texts: the text tower's, or the op `conversation`'s.
  tokenizer: ClassVar[Literal["text", "conversation"]] = "text"

  def resolve(self, spec: Any) -> PredictionHead:
    """Fills in unset options from a `two_tower.ModelSpec`."""
    del spec
    return self

  def predictions(self) -> dict[str, PredictionHead]:
    """The heads that `Encoder.predict` runs, by name."""
    return {self.params_key: self}

  def check_tokenizer(self, tokenizer: Any) -> None:
    """Raises ConfigError for a tokenizer that the head can't train with."""
    del tokenizer

  def module(self) -> nn.Module:
    """The linen module."""
    raise NotImplementedError

  def example(self, spec: Any) -> tuple:
    """Arguments that initialise the module, see `objectives.base.Head`."""
    raise NotImplementedError

  def predict(
    self,
    head: Callable[..., Any],  # The module with its parameters.
    image: Any,  # `vit.ImageOutput` of B images, with layers `taps`.
    grid: tuple[int, int],  # Rows and columns of its patches.
    **inputs: Array,  # float32 `[B, m, C]`, by the names in `inputs`.
  ) -> dict[str, Array]:
    """Predicts `[B, ...]`, or `[B, m, ...]` for the m rows of an input."""
    raise NotImplementedError

  def decode(self, out: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Adds the text that the tokenizer, if any, decodes from predictions."""
    del tokenizer
    return out


@dataclasses.dataclass(frozen=True)
class UnloadedHead(PredictionHead):
  """A head of a run or an export whose module is not imported."""

  params_key = ""  # Unknown: it can't predict.

  plugin: str  # `MODULE:NAME` of the head, or of the run's objective.
  fields: Mapping[str, Any] | None = None  # An export's description.
