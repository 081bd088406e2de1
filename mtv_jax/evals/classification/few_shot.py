"""Few-shot classification by regularised least squares (big_vision).

In closed form, with standardised features z = (x - mean) / (std + 1e-5), to
which a constant of 100 is appended, and targets Y = 2 onehot - 1,

    W = (z' z + l2 I)^-1 z' Y,   prediction = argmax z W

The bias is regularised too, but little, since its feature is large.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mtv_jax.config.options import NonNegativeFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import FeatureProbe
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.datasets.registry import Splits

SHOTS = (1, 5, 10, 25)
_CONSTANT = 100.0


@dataclasses.dataclass(frozen=True)
class FewShot(FeatureProbe):
  """Few-shot least squares: top-1 accuracy for each number of shots.

  The default view is big_vision's, `squash_center`.

  Attributes:
    shots: training images per class; by default 1, 5, 10 and 25, as far as
      every class has so many.
    seeds: seeds of the samples of shots, over which accuracies are averaged.
    l2: strength of the regularisation.
  """

  published_view: ClassVar[str] = "squash_center"

  shots: tuple[PositiveInt, ...] | None = None
  seeds: tuple[int, ...] = (0, 1, 2)
  l2: NonNegativeFloat = 1024.0

  def _evaluate(
    self, encoder: Encoder, data: Splits
  ) -> tuple[Estimate, dict[str, Any]]:
    labels = data.train.labels
    shots = self._shots(data)
    samples = {
      s: sample_shots(labels, shots=max(shots), seed=s) for s in self.seeds
    }
    used = np.unique(np.stack([*samples.values()]))
    row = np.arange(len(labels))  # row of each training image in x
    if 2 * len(used) >= len(labels):
      # All images, whose features the other probes share.
      x = self._features(encoder, data.train)
    else:
      x = self._features(encoder, data.train.select(used))
      row[used] = np.arange(len(used))
    test = self._features(encoder, data.test)
    hits = {f"top1_{k}shot": [] for k in shots}
    for seed in self.seeds:
      for k in shots:
        items = samples[seed][:, :k].ravel()
        model = fit(
          x[row[items]], labels[items], classes=data.classes, l2=self.l2
        )
        predicted = np.argmax(model.scores(test), axis=1)
        hits[f"top1_{k}shot"].append(predicted == data.test.labels)
    # The share of seeds with a hit, for each test image.
    shares = {name: np.mean(x, axis=0) for name, x in hits.items()}
    return bootstrap.means(shares), {
      "feature": self.feature,
      "head": "least squares, features standardised by the shots, constant 100",
      "l2": self.l2,
      "shots": list(shots),
      "seeds": list(self.seeds),
      "draw": "numpy default_rng(seed), a permutation of each class in turn",
      "averaging": "mean over seeds",
      "top1_of_seeds": {
        name: np.mean(x, axis=1).tolist() for name, x in hits.items()
      },
      "ties": "the lowest class of equal ones",
    }

  def _shots(self, data: Splits) -> tuple[int, ...]:
    counts = np.bincount(data.train.labels)
    least = int(counts[counts > 0].min())
    if self.shots is None:
      return tuple(k for k in SHOTS if k <= least)
    if max(self.shots) > least:
      raise NotApplicable(
        f"shots={self.shots}, and class {int(np.argmax(counts == least))} of "
        f"{data.train.name} has {least} training images"
      )
    return tuple(sorted(self.shots))


def sample_shots(
  labels: Int[np.ndarray, " n"], *, shots: int, seed: int
) -> Int[np.ndarray, "c shots"]:
  """Indices of `shots` random images of each class that has images.

  The first k columns are the sample of k shots.
  """
  rng = np.random.default_rng(seed)
  present = np.unique(labels)
  return np.stack(
    [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in present]
  )


class LeastSquares(NamedTuple):
  """Weights, and the mean and (biased) deviation of the training features.

  The last row of the weights belongs to the constant.
  """

  mean: Float[np.ndarray, " d"]
  std: Float[np.ndarray, " d"]
  weights: Float[np.ndarray, "e c"]

  def scores(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
    """Scores of each class."""
    return _standardize(x, self.mean, self.std) @ self.weights


def fit(
  x: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  *,
  classes: int,
  l2: float = 1024.0,
) -> LeastSquares:
  """Solves the normal equations, in double precision on the host."""
  mean = x.mean(axis=0, dtype=np.float64)
  std = x.std(axis=0, dtype=np.float64)
  z = _standardize(x, mean, std)
  target = np.full((len(x), classes), -1.0)
  target[np.arange(len(x)), labels] = 1
  if len(z) < z.shape[1]:
    # (z'z + l2 I)^-1 z' = z' (zz' + l2 I)^-1, the smaller system.
    weights = z.T @ np.linalg.solve(z @ z.T + l2 * np.eye(len(z)), target)
  else:
    gram = z.T @ z + l2 * np.eye(z.shape[1])
    weights = np.linalg.solve(gram, z.T @ target)
  return LeastSquares(mean, std, weights)


def _standardize(x, mean, std):
  z = (x.astype(np.float64) - mean) / (std + 1e-5)
  return np.pad(z, ((0, 0), (0, 1)), constant_values=_CONSTANT)
