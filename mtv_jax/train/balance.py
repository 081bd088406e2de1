"""Balance of the objectives' gradients on the image encoder.

MTV sums its losses, whose gradients on the encoder differ by more than ten
times. Here each loss is divided by a running mean of its gradient norm,
measured every few steps, so that a weight is the objective's share of the
encoder's gradient. Our choice; MTV publishes no weights. GradNorm (Chen et al.
2018) learns such factors instead.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Balance:
  """How the gradient norms are measured and averaged."""

  every: int = 100  # Updates from one measurement to the next.
  decay: float = 0.8  # Of the geometric running mean.
  max_factor: float = 100.0  # Factors are in [1 / max_factor, max_factor].

  def factors(
    self, norms: Mapping[str, Float[Array, ""]]
  ) -> dict[str, Float[Array, ""]]:
    """Factors of the losses, `geometric mean of the norms / norm`.

    `norms` are the running means by objective, 0 for those not yet measured,
    which have the factor 1 and no part in the mean.
    """
    values = jnp.stack(list(norms.values()))
    known = values > 0
    logs = jnp.log(jnp.where(known, values, 1.0))
    mean = jnp.sum(logs) / jnp.maximum(jnp.sum(known), 1)
    factors = jnp.exp(jnp.where(known, mean - logs, 0.0))
    factors = jnp.clip(factors, 1 / self.max_factor, self.max_factor)
    return dict(zip(norms, factors, strict=True))

  def update(
    self,
    norms: Mapping[str, Float[Array, ""]],
    measured: Mapping[str, Float[Array, ""]],
    weights: Mapping[str, Float[Array, ""]],
    count: Int[Array, ""] | int,
  ) -> dict[str, Float[Array, ""]]:
    """The running means after a measurement.

    Args:
      norms: the running means before it.
      measured: the gradient norms of some objectives, times weight and factor.
        One of 0, as of a batch without its labels, or one that is not finite
        changes nothing.
      weights: the weights of these objectives.
      count: the number of earlier measurements. The decay is at most
        (1 + count) / (10 + count), as the norms at the start are far from
        later ones.
    """
    decay = jnp.minimum(self.decay, (1.0 + count) / (10.0 + count))
    factors, new = self.factors(norms), dict(norms)
    for name, value in measured.items():
      scale = weights[name] * factors[name]
      value = jnp.where(
        scale > 0, value / jnp.where(scale > 0, scale, 1.0), 0.0
      )
      valid = jnp.isfinite(value) & (value > 0)
      value = jnp.where(valid, value, 1.0)
      old = norms[name]
      mean = old**decay * value ** (1.0 - decay)
      new[name] = jnp.where(valid, jnp.where(old > 0, mean, value), old)
    return new
