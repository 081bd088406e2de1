"""Balancing methods: how the objectives' losses or gradients are combined.

A method stores its state in `TrainState.balance`. It scales the loss weights
(`loss_weights`), which it learns from the losses of each update (`update`) or
from gradient norms on the image encoder, measured every few steps (`observe`);
or it combines the objectives' gradients itself (`combine_gradients`). The base
class `Balance` uses fixed weights.

L_i is an objective's loss, w_i its weight in the config, including the ramp.
w_i is the objective's intended share: if a method's own factors are 1, the
total is sum_i w_i L_i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.config.durations import PositiveDuration, RunLength
from mtv_jax.config.sections import further_options
from mtv_jax.train.balance.base import Balance
from mtv_jax.train.balance.pcgrad import PCGrad
from mtv_jax.train.balance.weighting import GradNorm, GradNormMean, Uncertainty

METHODS: dict[str, type[Balance]] = {
  "fixed": Balance,
  "grad_norm_mean": GradNormMean,
  "uncertainty": Uncertainty,
  "gradnorm": GradNorm,
  "pcgrad": PCGrad,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceConfig:
  """`config.balance`; without it, weights are fixed."""

  method: str = "grad_norm_mean"
  # Interval between gradient-norm measurements, for methods that use them.
  every: PositiveDuration | None = None
  options: Mapping[str, Any] = further_options()  # Fields of the method.


def build_balance(config: BalanceConfig | None, length: RunLength) -> Balance:
  """The balancing method of a config."""
  if config is None:
    return Balance()
  where, key = "config.balance", "method"
  method = options.look_up(METHODS, config.method, where=where, key=key)
  given = {k: v for k, v in config.options.items() if v is not None}
  if config.every is not None:
    given["every_steps"] = length.steps(config.every)
  return options.build(method, given, where=where, reserved=(key,))
