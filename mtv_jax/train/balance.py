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
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from mtv_jax.config import options
from mtv_jax.config.durations import PositiveDuration, RunLength
from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  PositiveFloat,
  PositiveInt,
  Range,
)
from mtv_jax.config.sections import further_options
from mtv_jax.objectives.base import WeightedMean
from mtv_jax.utils.tree import flatten_with_names, map_with_names

MaxFactor = Annotated[float, Range(min=1)]
Scalars = Mapping[str, Float[Array, ""]]  # By objective.
Step = Int[Array, ""] | int  # Number of updates done.


@dataclasses.dataclass(frozen=True)
class Balance:
  """Fixed weights, sum_i w_i L_i; base class of the methods.

  Mappings by objective cover the active ones; `state` covers all objectives.
  """

  every_steps = None  # Updates between measurements of gradient norms.
  # Whether the method implements `combine_gradients`.
  combines_gradients: ClassVar[bool] = False

  @property
  def uses_encoder_gradients(self) -> bool:
    """Whether the method reads gradients on the image encoder."""
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
    """A term that the total loss adds to the weighted losses."""
    del weights, state
    return 0.0

  def observe(
    self, state: PyTree, norms: Scalars, weights: Scalars, step: Step
  ) -> PyTree:
    """The state after a measurement of gradient norms, before an update.

    `norms` are gradient norms on the image encoder of w_i L_i times the factor
    in `state`; zeros (batches without labels) and non-finite norms are ignored.
    `weights` are w_i.
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
    """The gradient of an update, from the gradients of each w_i L_i.

    `shared` are the modules that several objectives read: `image`, `text` or
    `heads/NAME`. `keys` are random keys by objective.
    """
    raise NotImplementedError


def _unscale_norms(
  norms: Scalars, weights: Scalars, factors: Scalars
) -> dict[str, Float[Array, ""]]:
  """Gradient norms of the unweighted losses; 0 if unknown."""
  raw = {}
  for name, norm in norms.items():
    scale = weights[name] * factors[name]
    norm = jnp.where(scale > 0, norm / jnp.where(scale > 0, scale, 1.0), 0.0)
    raw[name] = jnp.where(jnp.isfinite(norm), norm, 0.0)
  return raw


def _apply_adam(
  lr: float, entry: PyTree, key: str, gradient: Array, valid: Array
) -> PyTree:
  """Takes an Adam step on `entry[key]` if the gradient is valid."""
  step, opt_state = optax.adam(lr).update(gradient, entry["opt_state"])
  new = {**entry, key: entry[key] + step, "opt_state": opt_state}
  return jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, dict(entry))


@dataclasses.dataclass(frozen=True)
class GradNormMean(Balance):
  """Losses divided by running means of their gradient norms.

    sum_i w_i (m / m_i) L_i,   m = (prod_i m_i)^(1 / T)

  m_i is the running geometric mean of L_i's gradient norm on the image encoder,
  so w_i is the objective's share of the encoder's gradient. Our choice: MTV
  does not publish its weights. The state is m_i by objective; 0 means not yet
  measured: the factor is then 1, and m excludes the objective.
  """

  every_steps: PositiveInt = 100
  decay: Fraction = 0.8  # Decay of the running geometric mean.
  max_factor: MaxFactor = 100.0  # Factors are in [1 / max_factor, max_factor].

  def init(self, names: Iterable[str]) -> PyTree:
    return {name: jnp.zeros(()) for name in names}

  def factors(self, state: Scalars) -> dict[str, Float[Array, ""]]:
    """m / m_i."""
    values = jnp.stack(list(state.values()))
    is_measured = values > 0
    logs = jnp.log(jnp.where(is_measured, values, 1.0))
    mean = jnp.sum(logs) / jnp.maximum(jnp.sum(is_measured), 1)
    factors = jnp.exp(jnp.where(is_measured, mean - logs, 0.0))
    factors = jnp.clip(factors, 1 / self.max_factor, self.max_factor)
    return dict(zip(state, factors, strict=True))

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    factors = self.factors(state)
    return {name: factors[name] * weight for name, weight in weights.items()}

  def observe(
    self, state: PyTree, norms: Scalars, weights: Scalars, step: Step
  ) -> PyTree:
    count = step // self.every_steps
    # After n measurements at most (1 + n) / (10 + n): early norms differ much.
    decay = jnp.minimum(self.decay, (1.0 + count) / (10.0 + count))
    raw, new = _unscale_norms(norms, weights, self.factors(state)), {}
    for name, value in raw.items():
      old, valid = state[name], value > 0
      mean = old**decay * jnp.where(valid, value, 1.0) ** (1.0 - decay)
      new[name] = jnp.where(valid, jnp.where(old > 0, mean, value), old)
    return {**state, **new}


@dataclasses.dataclass(frozen=True)
class Uncertainty(Balance):
  """Uncertainty weighting (Kendall, Gal and Cipolla 2018, arXiv 1705.07115).

    sum_i w_i (exp(-s_i) L_i + s_i / 2),   s_i = log sigma_i^2

  This is equation 10 for classification, 1 / sigma^2 L + log sigma: the
  contrastive, DINO and iBOT losses are cross-entropies. The regression form
  halves the first term; with s_i - log 2 for s_i it differs only by a constant,
  so a regression loss starts at twice its weight here. s_i starts at 0, which
  equals fixed weights; at the minimum exp(-s_i) L_i = 1 / 2.

  Our choices: w_i multiplies both terms, since s_i would cancel it otherwise.
  s_i does not change if a batch lacks labels for L_i. |s_i| is at most
  log(max_factor), since a loss near 0 or below (KoLeo) has no optimal s_i.
  Each s_i has its own Adam, at the learning rate of Chen et al. (2018).
  """

  lr: PositiveFloat = 0.025
  max_factor: MaxFactor = 100.0  # exp(-s_i) is in [1 / max_factor, max_factor].

  def init(self, names: Iterable[str]) -> PyTree:
    zero = jnp.zeros(())
    entry = {"log_variance": zero, "opt_state": optax.adam(self.lr).init(zero)}
    return {name: jax.tree.map(jnp.copy, entry) for name in names}

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    return {
      name: weight * jnp.exp(-state[name]["log_variance"])
      for name, weight in weights.items()
    }

  def penalty(self, weights: Scalars, state: PyTree) -> Float[Array, ""]:
    return sum(w * state[n]["log_variance"] / 2 for n, w in weights.items())

  def update(
    self, state: PyTree, losses: Mapping[str, WeightedMean], weights: Scalars
  ) -> PyTree:
    # d/ds_i is w_i (1 / 2 - exp(-s_i) L_i).
    new, bound = {}, math.log(self.max_factor)
    for name, loss in losses.items():
      value, entry = loss.value(), state[name]
      valid = (loss.count > 0) & jnp.isfinite(value) & (weights[name] > 0)
      scaled = jnp.exp(-entry["log_variance"]) * value
      entry = _apply_adam(
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

  The total is sum_i w_i f_i L_i. An Adam step on L_grad, with
  mean_j(G_j) r_i^alpha held constant, updates f_i; the f_i are then rescaled to
  sum to T, the number of objectives. lr and alpha follow the paper's NYUv2 run.

  Our choices: gradients are on the whole image encoder, since objectives read
  several layers. f_i is updated every `every_steps` updates, since a
  measurement takes one backward pass per objective. L_i(0) is from the first
  step in which L_i has labels. Objectives without labels in a batch are left
  out of its update, which preserves the sum over the rest.
  """

  every_steps: PositiveInt = 10
  alpha: NonNegativeFloat = 1.5
  lr: PositiveFloat = 0.025
  # f_i are clipped to [1 / max_factor, max_factor] after the Adam step and
  # before the rescaling, which may move them slightly out of this range.
  max_factor: MaxFactor = 100.0

  def init(self, names: Iterable[str]) -> PyTree:
    # `norm` is |grad L_i| from its measurement to the next update, 0 otherwise;
    # `initial_loss` is 0 before the first.
    one, zero = jnp.ones(()), jnp.zeros(())
    entry = {
      "factor": one,
      "initial_loss": zero,
      "norm": zero,
      "opt_state": optax.adam(self.lr).init(one),
    }
    return {name: jax.tree.map(jnp.copy, entry) for name in names}

  def loss_weights(self, weights: Scalars, state: PyTree) -> Scalars:
    return {name: w * state[name]["factor"] for name, w in weights.items()}

  def observe(
    self, state: PyTree, norms: Scalars, weights: Scalars, step: Step
  ) -> PyTree:
    factors = {name: state[name]["factor"] for name in norms}
    raw = _unscale_norms(norms, weights, factors)
    return {**state, **{n: {**state[n], "norm": raw[n]} for n in norms}}

  def update(
    self, state: PyTree, losses: Mapping[str, WeightedMean], weights: Scalars
  ) -> PyTree:
    # A no-op unless a measurement precedes it.
    def stack(key):
      return jnp.stack([state[name][key] for name in losses])  # [T]

    factor, norm, initial = map(stack, ("factor", "norm", "initial_loss"))
    loss = jnp.stack([loss.value() for loss in losses.values()])
    valid = (norm > 0) & jnp.isfinite(loss) & (loss > 0)
    count = jnp.sum(valid)

    def mean(values):  # Mean of valid values; 1 (a safe divisor) without any.
      total = jnp.sum(jnp.where(valid, values, 0.0))
      return jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)

    initial = jnp.where(valid & (initial == 0), loss, initial)
    ratio = jnp.where(valid, loss / jnp.where(valid, initial, 1.0), 1.0)
    target = mean(factor * norm) * (ratio / mean(ratio)) ** self.alpha
    gradient = jnp.sign(factor * norm - target) * norm
    new = {}
    for i, name in enumerate(losses):
      entry = {**state[name], "initial_loss": initial[i], "norm": jnp.zeros(())}
      new[name] = _apply_adam(self.lr, entry, "factor", gradient[i], valid[i])
    learned = jnp.stack([new[name]["factor"] for name in losses])
    learned = jnp.clip(learned, 1 / self.max_factor, self.max_factor)
    scaled = learned * mean(factor) / mean(learned)
    for i, name in enumerate(losses):
      new[name]["factor"] = jnp.where(valid[i], scaled[i], factor[i])
    return {**state, **new}


@dataclasses.dataclass(frozen=True)
class PCGrad(Balance):
  """PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    for each i, for each j != i in random order:
      if g_i . g_j < 0:  g_i <- g_i - (g_i . g_j / |g_j|^2) g_j
    gradient = sum_i g_i

  g_i starts as the gradient of w_i L_i; g_j is the unprojected gradient. Each
  objective draws its order from seed, step and name. Projections are linear
  combinations of the g_j, so their coefficients follow from inner products.
  Parameters outside `parameters` get the sum of gradients.

  Each objective runs its own forward and backward pass, also with
  `config.accumulate`, over the views that it reads. This costs more than a
  plain step only if objectives share a view.
  """

  combines_gradients: ClassVar[bool] = True
  # The image encoder, or all modules that several objectives read (towers and
  # heads), as one vector.
  parameters: Literal["image", "shared"] = "image"

  @property
  def uses_encoder_gradients(self) -> bool:
    return self.parameters == "image"

  def combine_gradients(
    self,
    gradients: Mapping[str, PyTree],
    shared: frozenset[str],
    keys: Mapping[str, Key[Array, ""]],
  ) -> PyTree:
    modules = {"image"} if self.parameters == "image" else shared
    prefixes = tuple(f"{module}/" for module in modules)
    trees = list(gradients.values())
    vectors = [
      [x for name, x in flatten_with_names(g) if name.startswith(prefixes)]
      for g in trees
    ]
    products = jnp.stack(
      [jnp.stack([optax.tree.vdot(a, b) for b in vectors]) for a in vectors]
    )  # [T, T]
    keys = jnp.stack([keys[name] for name in gradients])
    scales = jnp.sum(projection_coefficients(products, keys), axis=0)  # [T]

    def sum_gradients(name, *leaves):
      if name.startswith(prefixes):
        leaves = [scales[i] * leaf for i, leaf in enumerate(leaves)]
      return sum(leaves)

    return map_with_names(sum_gradients, *trees)


def projection_coefficients(
  products: Float[Array, "t t"], keys: Key[Array, " t"]
) -> Float[Array, "t t"]:
  """Row i has the coefficients of all g_j in the projected g_i.

  `products` are the inner products g_i . g_j; `keys` draw each row's order.
  """
  count = len(products)

  def project_gradient(i, key):
    def project(coefficients, j):
      product = jnp.sum(coefficients * products[:, j])
      norm = products[j, j]
      share = product / jnp.where(norm > 0, norm, 1.0)
      is_conflict = (product < 0) & (norm > 0) & (j != i)
      step = jnp.where(is_conflict, share, 0.0)
      return coefficients - step * jax.nn.one_hot(j, count), None

    order = jax.random.permutation(key, count)
    return jax.lax.scan(project, jax.nn.one_hot(i, count), order)[0]

  return jax.vmap(project_gradient)(jnp.arange(count), keys)


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
  method_options = {k: v for k, v in config.options.items() if v is not None}
  if config.every is not None:
    method_options["every_steps"] = length.steps(config.every)
  return options.build(method, method_options, where=where, reserved=(key,))
