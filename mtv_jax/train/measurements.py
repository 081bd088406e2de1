"""Measurements of the objectives' gradients on the image encoder, in a run.

Norms and interference every few steps, if configured, for the log or a
balancing method; norms also after a spike or a non-finite update.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.train import interference
from mtv_jax.train.encoder_gradients import compute_encoder_grad_norms
from mtv_jax.train.spec import StepSpec
from mtv_jax.train.state import TrainState
from mtv_jax.train.step import Program

log = logging.getLogger(__name__)


class GradientMeasurements:
  """The compiled measurements of a program."""

  def __init__(self, program: Program):
    self._program = program

  @functools.cached_property
  def encoder_grad_norms(self) -> Any:
    """`(state, batch, active) -> {name: norm}`, jitted."""

    def norms(state, batch, active):
      spec = self._program.spec.select_objectives(active)
      return compute_encoder_grad_norms(spec, state, batch, self._program.mesh)

    replicated = replicated_sharding(self._program.mesh)
    return self._program.jit(norms, replicated, static_argnums=2)

  @functools.cached_property
  def interference(self) -> Any:
    """`(state, batch, active, lr) -> arrays`, see `measure_interference`.

    Skips the transfer if the learning rate is None.
    """

    def measure(state, batch, active, lr=None):
      spec = self._program.spec.select_objectives(active)
      return interference.measure_interference(
        spec, state, batch, lr, self._program.mesh
      )

    replicated = replicated_sharding(self._program.mesh)
    return self._program.jit(measure, replicated, replicated, static_argnums=2)

  @functools.cached_property
  def _observe(self) -> Any:
    def observe(balance, norms, step):
      spec = self._program.spec
      weights = spec.config_weights(step)
      return spec.balance.observe(balance, norms, weights, step)

    return jax.jit(observe, out_shardings=self._program.shardings.balance)

  def update_balance(
    self, state: TrainState, norms: Mapping[str, Array]
  ) -> TrainState:
    """Updates the balancing state from measured `encoder_grad_norms`."""
    balance = self._observe(state.balance, norms, state.step)
    return state.replace(balance=balance)

  def norms_or_warning(
    self, state: TrainState, batch: Any, active: tuple[str, ...]
  ) -> dict[str, float]:
    """Each objective's gradient norm on a batch, as metrics.

    Takes more memory than an update; returns {} if the devices run out.
    """
    try:
      return norm_metrics(self.encoder_grad_norms(state, batch, active))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      log.warning(
        "The objectives' gradient norms are unknown, as their measurement"
        " takes more memory than there is. %s",
        str(error).splitlines()[0],
      )
      return {}

  def measure_interference(
    self, state: TrainState, batch: Any, active: tuple[str, ...], lr: Any
  ) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Returns a row of `interference.jsonl`, its metrics, and norms by name."""
    measured = jax.device_get(self.interference(state, batch, active, lr))
    norms = np.linalg.norm(measured["norms"], axis=1)
    return (
      interference.interference_row(active, measured),
      interference.interference_scalars(measured),
      dict(zip(active, norms, strict=True)),
    )


def norm_metrics(norms: Mapping[str, Any]) -> dict[str, float]:
  """Gradient norms as metrics."""
  norms = jax.device_get(norms)
  return {f"{n}/encoder_grad_norm": float(v) for n, v in norms.items()}


def is_balance_due(spec: StepSpec, step: int) -> bool:
  """Whether the balance reads norms before update `step`, counted from 0."""
  if spec.balance.every_steps is None:
    return False
  starts = {weight.start for weight in spec.weights.values()}
  return step in starts or step % spec.balance.every_steps == 0
