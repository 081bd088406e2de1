"""Standardisation of features: moments, PHI-S, whitening.

PHI-S (Ranzinger et al. 2024, arXiv 2410.01680, section 2.2.5) rotates features
so that all channels have equal variance, then divides by one scalar. It
preserves the errors' relative sizes; its inverse amplifies no single channel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from mtv_jax.utils.errors import InputError

Standardization = Literal["phi_s", "whiten", "standardize", "none"]
# Floor of an eigenvalue (variance), relative to the mean eigenvalue.
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and covariance of `count` vectors, on the host."""

  count: float
  mean: Float64[np.ndarray, " d"]
  covariance: Float64[np.ndarray, "d d"]

  def merge(self, other: Moments) -> Moments:
    """Merges two sets of vectors (Chan et al. 1983)."""
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
  """Count, mean and covariance of the vectors with weight 1, on the devices."""
  x, w = x.reshape(-1, x.shape[-1]).astype(jnp.float32), weights.reshape(-1, 1)
  count = jnp.sum(w)
  mean = jnp.sum(jnp.where(w > 0, x, 0.0), axis=0) / jnp.maximum(count, 1.0)
  centred = jnp.where(w > 0, x - mean, 0.0)  # [N, D]
  scatter = jnp.einsum("nd,ne->de", centred, centred, precision="highest")
  return count, mean, scatter / jnp.maximum(count, 1.0)


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> Float64[np.ndarray, "n n"]:
  """Normalised Hadamard matrix: orthogonal, all entries +-size^-1/2.

  Sylvester's doubling (PHI-S, Eq. 18), starting from order 1, 2 or, for a prime
  q = 3 mod 4, Paley's order q + 1. Covers the widths of published ViTs.
  """
  order = size
  while order > 2 and not _is_paley(order):
    if order % 2:
      raise InputError(f"no Hadamard matrix of order {size} is available")
    order //= 2
  matrix = _build_paley(order) if order > 2 else np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  matrix = matrix / np.sqrt(size)
  matrix.setflags(write=False)  # Cached.
  return matrix


def _is_paley(order: int) -> bool:
  q = order - 1
  return q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1))


def _build_paley(order: int) -> np.ndarray:
  """Paley's first construction: I + S, from the Jacobsthal matrix."""
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
  moments: Moments, method: Standardization
) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
  """Returns the mean and the matrix for `standardize`.

  With the covariance U L U^T and the equations of PHI-S:
    'phi_s': H U^T / sqrt(mean(L)) with a Hadamard matrix H (Eqs. 22 to 26);
    'whiten': U L^-1/2 U^T (ZCA, Eqs. 8 and 12);
    'standardize': each channel's inverse standard deviation (Eq. 6).

  All output channels have unit variance, except for constant channels with the
  last two.
  """
  covariance = moments.covariance
  floor = max(_FLOOR * np.trace(covariance) / len(covariance), 1e-30)
  if method == "standardize":
    scale = np.maximum(np.diag(covariance), floor) ** -0.5
    return moments.mean, np.diag(scale)
  values, vectors = np.linalg.eigh(covariance)
  # Fixes arbitrary signs: largest entries positive; in the paper, diagonals.
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
  """Computes `matrix @ (x - mean)` in float32."""
  centred = x.astype(jnp.float32) - mean
  return jnp.einsum("...d,ed->...e", centred, matrix, precision="highest")
