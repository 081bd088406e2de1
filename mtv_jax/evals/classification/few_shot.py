"""Few-shot classification by regularised least squares (big_vision).

In closed form, with standardised features z = (x - mean) / (std + 1e-5) and an
appended constant 100, and targets Y = 2 onehot - 1,

    W = (z' z + l2 I)^-1 z' Y,   prediction = argmax z W

The bias is regularised too, but weakly, since its feature is large.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mtv_jax.config.options import NonNegativeFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import (
  Evaluation,
  FeatureProbe,
)
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Splits

SHOTS = (1, 5, 10, 25)
_CONSTANT = 100.0


@dataclasses.dataclass(frozen=True)
class FewShot(FeatureProbe):
  """Few-shot least squares: top-1 accuracy for each number of shots.

  The default view is big_vision's, `squash_center`.

  Attributes:
    shots: training images per class; by default 1, 5, 10 and 25, up to the
      size of the smallest class.
    seeds: seeds of the shot samples; accuracies are averaged over seeds.
    l2: L2 regularisation strength.
  """

  title = "Few-shot classification"

  published_view: ClassVar[str] = "squash_center"
  # Training classes are equally frequent.
  knows_frequencies: ClassVar[bool] = False

  shots: tuple[PositiveInt, ...] | None = None
  seeds: tuple[int, ...] = (0, 1, 2)
  l2: NonNegativeFloat = 1024.0

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    labels = data.train.labels
    shots = self._resolve_shots(data)
    samples, shot_indices = self._sample(data)
    rows = np.arange(len(labels))  # row of each training image in x
    if 2 * len(shot_indices) >= len(labels):
      # Encodes all images, so that other probes reuse the cached features.
      x = self._features(encoder, data.train)
    else:
      x = self._features(encoder, data.train.select(shot_indices))
      rows[shot_indices] = np.arange(len(shot_indices))
    test = self._features(encoder, data.test)
    hits = {f"top1_{k}shot": [] for k in shots}
    options = {"classes": data.classes, "l2": self.l2}
    for seed in self.seeds:
      for k in shots:
        items = samples[seed][:, :k].ravel()
        model = fit(x[rows[items]], labels[items], **options)
        predicted = np.argmax(model.scores(test) + data.penalty, axis=1)
        hits[f"top1_{k}shot"].append(predicted == data.test.labels)
    # Per test image: fraction of seeds with a hit.
    hit_rates = {name: np.mean(x, axis=0) for name, x in hits.items()}
    return bootstrap.means(hit_rates), {
      "feature": self.feature,
      "head": "least squares, features standardised by the shots, constant 100",
      "l2": self.l2,
      "shots": list(shots),
      "seeds": list(self.seeds),
      "draw": "numpy default_rng(seed), a permutation of each class in turn",
      "averaging": "mean over seeds",
      "top1_of_seeds": {
        k: np.mean(x, axis=1).tolist() for k, x in hits.items()
      },
      "ties": "the lowest class of equal ones",
    }

  def needed_features(self, encoder: Encoder) -> list[tuple]:
    """The feature of test images, and of training images if most are shots."""
    _, shot_indices = self._sample(self._set)
    needs_train = 2 * len(shot_indices) >= len(self._set.train.labels)
    return self._list_features(encoder, [self.feature], train=needs_train)

  def _sample(
    self, data: Splits
  ) -> tuple[dict[int, np.ndarray], Int[np.ndarray, " u"]]:
    """Indices of the shots by seed, see `sample_shots`, and all of them."""
    labels, most = data.train.labels, max(self._resolve_shots(data))
    samples = {s: sample_shots(labels, shots=most, seed=s) for s in self.seeds}
    return samples, np.unique(np.stack([*samples.values()]))

  def _resolve_shots(self, data: Splits) -> tuple[int, ...]:
    counts = np.bincount(data.train.labels)
    min_count = int(counts[counts > 0].min())
    if self.shots is None:
      return tuple(k for k in SHOTS if k <= min_count)
    if max(self.shots) > min_count:
      raise NotApplicable(
        f"shots={self.shots}, but class {int(np.argmax(counts == min_count))} "
        f"of {data.train.name} has {min_count} training images"
      )
    return tuple(sorted(self.shots))


def sample_shots(
  labels: Int[np.ndarray, " n"], *, shots: int, seed: int
) -> Int[np.ndarray, "c shots"]:
  """Indices of `shots` random images per non-empty class.

  The first k columns are the k-shot sample.
  """
  rng = np.random.default_rng(seed)
  classes = np.unique(labels)
  return np.stack(
    [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in classes]
  )


class LeastSquares(NamedTuple):
  """Linear classifier of standardised features.

  `std` is the biased estimate; the last row of `weights` is the bias.
  """

  mean: Float[np.ndarray, " d"]
  std: Float[np.ndarray, " d"]
  weights: Float[np.ndarray, "e c"]

  def scores(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
    """Class scores."""
    return _standardize(x, self.mean, self.std) @ self.weights


def fit(
  x: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  *,
  classes: int,
  l2: float = 1024.0,
) -> LeastSquares:
  """Solves the normal equations in float64 on the host."""
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
