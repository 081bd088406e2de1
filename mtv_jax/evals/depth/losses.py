"""Losses of the depth probes: scale-invariant (SIG) and gradient loss."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EPS = 1e-3  # metres, added before the logarithm
_MEAN_WEIGHT = 0.15  # weight of the squared mean beside the variance: 1 - 0.85
_STRIDES = (1, 2, 4, 6)


def _log_error(predicted, truth, valid):
  """ln(d + 0.001) - ln(g + 0.001), 0 where invalid."""
  # Masked twice: the gradient of an invalid logarithm may not be finite.
  predicted, truth = (jnp.where(valid, x, 1.0) for x in (predicted, truth))
  error = jnp.log(predicted + _EPS) - jnp.log(truth + _EPS)
  return jnp.where(valid, error, 0.0)


def sig_loss(
  predicted: Float[Array, "b h w"],
  truth: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
  *,
  ddof: int = 1,
  variance_weight: Float[Array, ""] | float = 1.0,
) -> Float[Array, ""]:
  """Scale-invariant log error: sqrt(var g + 0.15 (mean g)^2).

  Eigen et al. 2014, with the root and the constants of AdaBins. The variance
  is unbiased in DINOv2's probes and biased in Probe3D's, where it is written
  mean g^2 - 0.85 (mean g)^2.

  Depths are in metres; without any valid pixel, the loss is 0. `ddof` is 1 for
  the unbiased variance; `variance_weight` is 0 while a probe warms up.
  """
  g = _log_error(predicted, truth, valid)
  count = valid.sum().astype(jnp.float32)
  mean = g.sum() / jnp.maximum(count, 1)
  squares = jnp.where(valid, jnp.square(g - mean), 0.0).sum()
  variance = squares / jnp.maximum(count - ddof, 1)
  inside = variance_weight * variance + _MEAN_WEIGHT * jnp.square(mean)
  # The root has no gradient at 0, the value of a perfect prediction.
  return jnp.where(count > 0, jnp.sqrt(jnp.maximum(inside, 1e-12)), 0.0)


def gradient_loss(
  predicted: Float[Array, "b h w"],
  truth: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
) -> Float[Array, ""]:
  """Differences of the log error between pixels two apart, at four strides.

      sum_k (1 / N_k) sum |g(y + 2, x) - g(y, x)| + |g(y, x + 2) - g(y, x)|

  over every 1st, 2nd, 4th and 6th pixel, N_k of which are valid; a difference
  counts if both of its pixels are (Monocular-Depth-Estimation-Toolbox).
  """
  error = _log_error(predicted, truth, valid)
  total = jnp.float32(0)
  for stride in _STRIDES:
    g, m = (x[:, ::stride, ::stride] for x in (error, valid))
    down = jnp.abs(g[:, 2:] - g[:, :-2]) * (m[:, 2:] & m[:, :-2])
    across = jnp.abs(g[:, :, 2:] - g[:, :, :-2]) * (m[:, :, 2:] & m[:, :, :-2])
    total += (down.sum() + across.sum()) / jnp.maximum(m.sum(), 1)
  return total
