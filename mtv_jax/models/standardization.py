"""Standardisation of features: moments, PHI-S, whitening.

PHI-S (Ranzinger et al. 2024, arXiv 2410.01680, section 2.2.5) rotates features
so that all channels have the same variance, and divides by one scalar: it keeps
the errors' relative sizes, and its inverse doesn't amplify them by channel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from mtv_jax.utils.errors import InputError

Method = Literal["phi_s", "whiten", "standardize", "none"]
# Least eigenvalue (variance) to divide by, relative to the mean one.
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and covariance of a number of vectors, on the host."""

  count: float
  mean: Float64[np.ndarray, " d"]
  covariance: Float64[np.ndarray, "d d"]

  def merge(self, other: Moments) -> Moments:
    """Those of the vectors of both (Chan et al. 1983)."""
    total = self.count + other.count
    if not total:
      return self
    a, b = self.count / total, other.count / total
    shift = other.mean - self.mean
    spread = a * self.covariance + b * other.covariance
    return Moments(
      total, self.mean + b * shift, spread + a * b * np.outer(shift, shift)
    )


def batch_moments(
  x: Float[Array, "*b d"], weights: Float[Array, "*b"]
) -> tuple[Float[Array, ""], Float[Array, " d"], Float[Array, "d d"]]:
  """Count, mean and covariance of the vectors of weight 1, on the devices."""
  x, w = x.reshape(-1, x.shape[-1]).astype(jnp.float32), weights.reshape(-1, 1)
  count = jnp.sum(w)
  mean = jnp.sum(jnp.where(w > 0, x, 0.0), axis=0) / jnp.maximum(count, 1.0)
  centred = jnp.where(w > 0, x - mean, 0.0)
  scatter = jnp.einsum("nd,ne->de", centred, centred, precision="highest")
  return count, mean, scatter / jnp.maximum(count, 1.0)


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> Float64[np.ndarray, "n n"]:
  """An orthogonal matrix whose entries are all +-size^-1/2.

  Sylvester's doubling (PHI-S, Eq. 18) of a matrix of order 1, 2 or, for a prime
  q = 3 mod 4, Paley's of order q + 1. Widths of published ViTs have one.
  """
  order = size
  while order > 2 and not _is_paley(order):
    if order % 2:
      raise InputError(f"no Hadamard matrix of order {size} is known here")
    order //= 2
  matrix = _paley(order) if order > 2 else np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  matrix = matrix / np.sqrt(size)
  matrix.setflags(write=False)  # Cached.
  return matrix


def _is_paley(order: int) -> bool:
  q = order - 1
  return q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(order: int) -> np.ndarray:
  """Paley's first construction: I + S of the Jacobsthal matrix."""
  q = order - 1
  symbols = -np.ones(q)
  symbols[np.arange(1, q) ** 2 % q] = 1
  symbols[0] = 0
  rows, columns = np.indices((q, q))
  skew = np.zeros((order, order))
  skew[0, 1:], skew[1:, 0] = 1, -1
  skew[1:, 1:] = symbols[(rows - columns) % q]
  return np.eye(order) + skew


def fit_standardization(
  moments: Moments, method: Method
) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
  """The mean and the matrix of `standardize`.

  Of the covariance U L U^T, in the equations of PHI-S:
    'phi_s': H U^T / sqrt(mean(L)) of a Hadamard matrix H (Eqs. 22 to 26);
    'whiten': U L^-1/2 U^T (ZCA, Eqs. 8 and 12), whose output has the identity
      as covariance;
    'standardize': the inverse deviation of each channel (Eq. 6).

  All channels of the output have unit variance, but those of no variance in the
  last two.
  """
  covariance = moments.covariance
  floor = max(_FLOOR * np.trace(covariance) / len(covariance), 1e-30)
  if method == "standardize":
    scale = np.maximum(np.diag(covariance), floor) ** -0.5
    return moments.mean, np.diag(scale)
  values, vectors = np.linalg.eigh(covariance)
  # The sign of an eigenvector is arbitrary. The paper makes diagonals positive.
  largest = np.argmax(np.abs(vectors), axis=0)
  vectors = vectors * np.sign(vectors[largest, np.arange(len(vectors))])
  if method == "whiten":
    scale = np.maximum(values, floor) ** -0.5
    return moments.mean, (vectors * scale) @ vectors.T
  scalar = max(values.mean(), floor) ** -0.5
  return moments.mean, scalar * hadamard(len(values)) @ vectors.T


def standardize(
  x: Float[Array, "*b d"], mean: Float[Array, " d"], matrix: Float[Array, "d d"]
) -> Float[Array, "*b d"]:
  """The matrix times x - mean, in float32."""
  centred = x.astype(jnp.float32) - mean
  return jnp.einsum("...d,ed->...e", centred, matrix, precision="highest")
