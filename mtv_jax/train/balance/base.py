"""The contract of a balancing method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

from jaxtyping import Array, Float, Int, Key, PyTree

from mtv_jax.objectives.base import WeightedMean

Scalars = Mapping[str, Float[Array, ""]]  # By objective.


@dataclasses.dataclass(frozen=True)
class Balance:
  """Fixed weights, sum_i w_i L_i; base class of the methods.

  Mappings by objective cover the active ones; `state` covers all of the run.
  """

  every_steps = None  # Updates between measurements of gradient norms.
  combines: ClassVar[bool] = False  # Whether it has `combine_gradients`.

  @property
  def uses_encoder_gradients(self) -> bool:
    """Whether it depends on gradients on the image encoder."""
    return self.every_steps is not None

  def init(self, names: Iterable[str]) -> PyTree:
    """The state at step 0."""
    del names
    return {}

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    """The factor of each loss in the total, from the config's weights."""
    del state
    return weights

  def penalty(
    self, weights: Scalars, state: PyTree
  ) -> Float[Array, ""] | float:
    """Added to the weighted losses in the total loss."""
    del weights, state
    return 0.0

  def observe(
    self,
    state: PyTree,
    norms: Scalars,
    weights: Scalars,
    step: Int[Array, ""] | int,
  ) -> PyTree:
    """The state after a measurement of gradient norms, before an update.

    Args:
      state: state that weighted the measured losses.
      norms: gradient norms on the image encoder of w_i L_i, times the method's
        factor. A norm that is 0 (a batch without the objective's labels) or
        non-finite is ignored.
      weights: w_i.
      step: number of updates done.
    """
    del norms, weights, step
    return state

  def update(
    self, state: PyTree, losses: Mapping[str, WeightedMean], weights: Scalars
  ) -> PyTree:
    """The state after an update whose batch had the losses L_i."""
    del losses, weights
    return state

  def combine_gradients(
    self,
    gradients: Mapping[str, PyTree],
    shared: frozenset[str],
    keys: Mapping[str, Key[Array, ""]],
  ) -> PyTree:
    """The gradient of an update.

    Args:
      gradients: gradients of w_i L_i on all parameters.
      shared: modules that several objectives read: `image`, `text` or
        `heads/NAME`.
      keys: one random key per objective.
    """
    raise NotImplementedError
