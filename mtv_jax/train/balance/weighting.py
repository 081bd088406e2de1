"""Balancing methods that weight the losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  PositiveFloat,
  PositiveInt,
  Range,
)
from mtv_jax.objectives.base import WeightedMean
from mtv_jax.train.balance.base import Balance, Scalars

MaxFactor = Annotated[float, Range(min=1)]


def _unweighted_norms(
  norms: Scalars, weights: Scalars, factors: Scalars
) -> dict[str, Float[Array, ""]]:
  """The norms of the losses' gradients; 0 for those that are unknown."""
  raw = {}
  for name, norm in norms.items():
    scale = weights[name] * factors[name]
    norm = jnp.where(scale > 0, norm / jnp.where(scale > 0, scale, 1.0), 0.0)
    raw[name] = jnp.where(jnp.isfinite(norm), norm, 0.0)
  return raw


def _learn(
  lr: float, entry: PyTree, key: str, gradient: Array, valid: Array
) -> PyTree:
  """One step of Adam on `entry[key]`, where the gradient is valid."""
  step, opt_state = optax.adam(lr).update(gradient, entry["opt_state"])
  new = {**entry, key: entry[key] + step, "opt_state": opt_state}
  return jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, dict(entry))


@dataclasses.dataclass(frozen=True)
class GradNormMean(Balance):
  """Losses divided by running means of their gradient norms.

    sum_i w_i (m / m_i) L_i,   m = (prod_i m_i)^(1 / T)

  m_i is the running geometric mean of L_i's gradient norm on the image encoder,
  so that a weight is the objective's share of the encoder's gradient. Our
  choice; MTV publishes no weights. Its state is m_i by objective, 0 for those
  not yet measured, which have the factor 1 and no part in m.
  """

  every_steps: PositiveInt = 100
  decay: Fraction = 0.8  # Of the geometric running mean.
  max_factor: MaxFactor = 100.0  # Factors are in [1 / max_factor, max_factor].

  def init(self, names: Iterable[str]) -> PyTree:
    """As in the base class."""
    return {name: jnp.zeros(()) for name in names}

  def factors(self, state: Scalars) -> dict[str, Float[Array, ""]]:
    """m / m_i."""
    values = jnp.stack(list(state.values()))
    known = values > 0
    logs = jnp.log(jnp.where(known, values, 1.0))
    mean = jnp.sum(logs) / jnp.maximum(jnp.sum(known), 1)
    factors = jnp.exp(jnp.where(known, mean - logs, 0.0))
    factors = jnp.clip(factors, 1 / self.max_factor, self.max_factor)
    return dict(zip(state, factors, strict=True))

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    """As in the base class."""
    factors = self.factors(state)
    return {name: factors[name] * weight for name, weight in weights.items()}

  def observe(
    self,
    state: PyTree,
    norms: Scalars,
    weights: Scalars,
    step: Int[Array, ""] | int,
  ) -> PyTree:
    """As in the base class.

    After n measurements the decay is at most (1 + n) / (10 + n), as the norms
    at the start are far from later ones.
    """
    count = step // self.every_steps
    decay = jnp.minimum(self.decay, (1.0 + count) / (10.0 + count))
    raw, new = _unweighted_norms(norms, weights, self.factors(state)), {}
    for name, value in raw.items():
      old, valid = state[name], value > 0
      mean = old**decay * jnp.where(valid, value, 1.0) ** (1.0 - decay)
      new[name] = jnp.where(valid, jnp.where(old > 0, mean, value), old)
    return {**state, **new}


@dataclasses.dataclass(frozen=True)
class Uncertainty(Balance):
  """Uncertainty weighting (Kendall, Gal and Cipolla 2018, arXiv 1705.07115).

    sum_i w_i (exp(-s_i) L_i + s_i / 2),   s_i = log sigma_i^2

  This is equation 10 for classification, 1 / sigma^2 L + log sigma: contrastive
  losses, DINO's and iBOT's are cross-entropies. Its form for regression, which
  halves the first term, is the same but for a constant with s_i - log 2 for
  s_i: with one form for all, a regression starts at twice the weight. s_i
  starts at 0, for which the total is that of fixed weights; at the minimum
  exp(-s_i) L_i is 1 / 2.

  Our choices: w_i multiplies both terms, as s_i would cancel it otherwise; s_i
  stays where a batch has no labels of L_i, and within log(max_factor), as a
  loss near 0 or below, such as KoLeo's, has no minimum. s_i has its own Adam,
  at the rate with which Chen et al. (2018) train it for comparison.
  """

  lr: PositiveFloat = 0.025
  max_factor: MaxFactor = 100.0  # exp(-s_i) is in [1 / max_factor, max_factor].

  def init(self, names: Iterable[str]) -> PyTree:
    """As in the base class."""
    zero = jnp.zeros(())
    entry = {"log_variance": zero, "opt_state": optax.adam(self.lr).init(zero)}
    return {name: jax.tree.map(jnp.copy, entry) for name in names}

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    """As in the base class."""
    return {
      name: weight * jnp.exp(-state[name]["log_variance"])
      for name, weight in weights.items()
    }

  def penalty(self, weights: Scalars, state: PyTree) -> Float[Array, ""]:
    """As in the base class: sum_i w_i s_i / 2."""
    return sum(w * state[n]["log_variance"] / 2 for n, w in weights.items())

  def update(
    self, state: PyTree, losses: Mapping[str, WeightedMean], weights: Scalars
  ) -> PyTree:
    """As in the base class; d/ds_i is w_i (1 / 2 - exp(-s_i) L_i)."""
    new, bound = {}, math.log(self.max_factor)
    for name, loss in losses.items():
      value, entry = loss.value(), state[name]
      valid = (loss.count > 0) & jnp.isfinite(value) & (weights[name] > 0)
      scaled = jnp.exp(-entry["log_variance"]) * value
      entry = _learn(
        self.lr, entry, "log_variance", weights[name] * (0.5 - scaled), valid
      )
      s = jnp.clip(entry["log_variance"], -bound, bound)
      new[name] = {**entry, "log_variance": s}
    return {**state, **new}


@dataclasses.dataclass(frozen=True)
class GradNorm(Balance):
  """GradNorm (Chen et al. 2018, arXiv 1711.02257): learned factors f_i.

    G_i = f_i |grad L_i|,   r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
    L_grad = sum_i |G_i - mean_j(G_j) r_i^alpha|            (equation 2)

  The total is sum_i w_i f_i L_i. A step of Adam on L_grad, in which
  mean_j(G_j) r_i^alpha is constant, moves f_i, whose sum over the T objectives
  is then scaled back to T. Rate and alpha are those of the paper on NYUv2.

  Our choices: the gradient is on the whole image encoder and not on one layer,
  as objectives tap several; steps are every `every_steps` updates, and not in
  each, as each takes a backward pass by objective; L_i(0) is that of the first
  step in which L_i has labels, be it the start of the run or later; objectives
  without labels in a batch have no part in its step; the others keep their sum.
  """

  every_steps: PositiveInt = 10
  alpha: NonNegativeFloat = 1.5
  lr: PositiveFloat = 0.025
  # Adam's f_i are clipped to [1 / max_factor, max_factor]; their sum is scaled
  # after that, so that they may leave it by as much as the sum has changed.
  max_factor: MaxFactor = 100.0

  def init(self, names: Iterable[str]) -> PyTree:
    """As in the base class.

    `norm` is |grad L_i| from its measurement to the update that follows, and
    0 otherwise; `initial_loss` 0 before the first.
    """
    one, zero = jnp.ones(()), jnp.zeros(())
    entry = {
      "factor": one,
      "initial_loss": zero,
      "norm": zero,
      "opt_state": optax.adam(self.lr).init(one),
    }
    return {name: jax.tree.map(jnp.copy, entry) for name in names}

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    """As in the base class."""
    return {name: w * state[name]["factor"] for name, w in weights.items()}

  def observe(
    self,
    state: PyTree,
    norms: Scalars,
    weights: Scalars,
    step: Int[Array, ""] | int,
  ) -> PyTree:
    """As in the base class."""
    factors = {name: state[name]["factor"] for name in norms}
    raw = _unweighted_norms(norms, weights, factors)
    return {**state, **{n: {**state[n], "norm": raw[n]} for n in norms}}

  def update(
    self, state: PyTree, losses: Mapping[str, WeightedMean], weights: Scalars
  ) -> PyTree:
    """As in the base class; nothing without a measurement before it."""

    def stack(key):
      return jnp.stack([state[name][key] for name in losses])  # [T]

    factor, norm, first = map(stack, ("factor", "norm", "initial_loss"))
    loss = jnp.stack([loss.value() for loss in losses.values()])
    valid = (norm > 0) & jnp.isfinite(loss) & (loss > 0)
    count = jnp.sum(valid)

    def mean(values):  # Of the valid ones; 1 where none is, as it divides.
      total = jnp.sum(jnp.where(valid, values, 0.0))
      return jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)

    first = jnp.where(valid & (first == 0), loss, first)
    ratio = jnp.where(valid, loss / jnp.where(valid, first, 1.0), 1.0)
    target = mean(factor * norm) * (ratio / mean(ratio)) ** self.alpha
    gradient = jnp.sign(factor * norm - target) * norm
    new = {}
    for i, name in enumerate(losses):
      entry = {**state[name], "initial_loss": first[i], "norm": jnp.zeros(())}
      new[name] = _learn(self.lr, entry, "factor", gradient[i], valid[i])
    learned = jnp.stack([new[name]["factor"] for name in losses])
    learned = jnp.clip(learned, 1 / self.max_factor, self.max_factor)
    scaled = learned * mean(factor) / mean(learned)
    for i, name in enumerate(losses):
      new[name]["factor"] = jnp.where(valid[i], scaled[i], factor[i])
    return {**state, **new}
