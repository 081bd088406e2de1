"""Similarity of two representations of the same examples.

Rows are examples, in the same order in both; channels may differ in number.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

_TINY = np.finfo(np.float64).tiny


def cosines(
  x: Float[np.ndarray, "*n d"], y: Float[np.ndarray, "*n d"]
) -> Float64[np.ndarray, "*n"]:
  """The cosine of each pair of vectors; 0 where one of them is 0."""
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
  return np.sum(x * y, axis=-1) / np.maximum(norms, _TINY)


def neighbour_agreement(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n e"], k: int
) -> Float64[np.ndarray, " n"]:
  """The share of each example's k nearest neighbours that both agree on.

  By cosine, among the other examples; of equal ones the lower index is nearer.
  The mutual k-nearest-neighbour metric of Huh et al. 2024, appendix A.
  """
  first, second = (_nearest(a, k) for a in (x, y))
  return np.array(
    [len(np.intersect1d(a, b)) / k for a, b in zip(first, second, strict=True)]
  )


def _nearest(x: Float[np.ndarray, "n d"], k: int) -> np.ndarray:
  x = np.asarray(x, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _TINY)
  scores = x @ x.T
  np.fill_diagonal(scores, -np.inf)
  return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def linear_cka(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n e"]
) -> float:
  """Linear centred kernel alignment (Kornblith et al. 2019, section 3).

      CKA = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),  columns centred

  1 for representations that differ by a rotation and a scale. 0 where one of
  them is constant. Of few examples it is biased upwards: independent normal
  features of d channels have about d / (n + d).
  """
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  x, y = (a - a.mean(axis=0) for a in (x, y))
  between = np.linalg.norm(y.T @ x) ** 2
  within = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
  return float(between / max(within, _TINY))
