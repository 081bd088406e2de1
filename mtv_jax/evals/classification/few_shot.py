"""Few-shot classification by least squares in closed form (big_vision).

With the features of the shots standardised, z = (x - mean) / (std + 1e-5), and
a constant of 100 appended, and targets Y = 2 onehot - 1,

    W = (z' z + l2 I)^-1 z' Y,   prediction = argmax z W

The bias is regularised like everything else, hardly, as its feature is large.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, Int

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.common import OneVector
from mtv_jax.evals.core.base import NotApplicable, Result

SHOTS = (1, 5, 10, 25)
_CONSTANT = 100.0


@dataclasses.dataclass(frozen=True)
class FewShot(OneVector):
  """Few-shot least squares.

  Attributes:
    shots: training images a class; 1, 5, 10 and 25 by default, of which those
      are left out that some class has not.
    seeds: draws of the shots; figures are means over them.
    l2: strength of the regularisation.

  The view is big_vision's by default, `squash_center`; of scenes `encoder`.
  """

  published_view: ClassVar[str] = "squash_center"

  shots: tuple[int, ...] | None = None
  seeds: tuple[int, ...] = (0, 1, 2)
  l2: float = 1024.0

  def __post_init__(self):
    super().__post_init__()
    if not self.seeds or (self.shots is not None and min(self.shots) < 1):
      raise ValueError(
        f"FewShot: shots={self.shots}, seeds={self.seeds}; expected one seed "
        "at least, and numbers of images"
      )

  def run(self, encoder: Encoder) -> Result:
    """Top-1 accuracy for each number of shots."""
    data, encoder = self._set, self._view(encoder)
    labels = data.train.labels
    shots = self._shots(labels)
    drawn = {s: draw(labels, shots=max(shots), seed=s) for s in self.seeds}
    x, place = self._train_features(encoder, np.stack([*drawn.values()]))
    tested = self._embed(encoder, data.test)
    each = {f"top1_{k}shot": [] for k in shots}
    for seed in self.seeds:
      for k in shots:
        items = drawn[seed][:, :k].ravel()
        model = fit(
          x[place[items]], labels[items], classes=data.classes, l2=self.l2
        )
        hits = np.argmax(model.scores(tested), axis=1) == data.test.labels
        each[f"top1_{k}shot"].append(float(np.mean(hits)))
    metrics = {name: float(np.mean(values)) for name, values in each.items()}
    protocol = {
      **self._common(encoder),
      "head": "least squares, features standardised by the shots, constant 100",
      "l2": self.l2,
      "shots": list(shots),
      "seeds": list(self.seeds),
      "draw": "numpy default_rng(seed), a permutation of each class in turn",
      "averaging": "mean over seeds",
      "top1_of_seeds": each,
      "ties": "the lowest class of equal ones",
    }
    return Result(metrics, protocol, dict.fromkeys(metrics, 1 / data.classes))

  def _shots(self, labels: np.ndarray) -> tuple[int, ...]:
    counts = np.bincount(labels)
    least = int(counts[counts > 0].min())
    if self.shots is None:
      shots = tuple(k for k in SHOTS if k <= least)
    elif max(self.shots) > least:
      raise NotApplicable(
        f"shots={self.shots}, and class {int(np.argmax(counts == least))} of "
        f"{self._set.train.name} has {least} training images"
      )
    else:
      shots = tuple(sorted(self.shots))
    return shots

  def _train_features(
    self, encoder: Encoder, items: np.ndarray
  ) -> tuple[Float32[np.ndarray, "m d"], Int[np.ndarray, " n"]]:
    """Features, and by training image which row of them is its own."""
    train = self._set.train
    place = np.arange(len(train.labels))
    used = np.unique(items)
    if 2 * len(used) >= len(place):
      # All of them, which the other probes ask for too.
      return self._embed(encoder, train), place
    place[used] = np.arange(len(used))
    return self._embed(encoder, train.select(used)), place


def draw(
  labels: Int[np.ndarray, " n"], *, shots: int, seed: int
) -> Int[np.ndarray, "c shots"]:
  """Indices of the first `shots` of each class, in a random order.

  Classes without images have no row. Fewer shots are the first columns.
  """
  rng = np.random.default_rng(seed)
  present = np.unique(labels)
  return np.stack(
    [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in present]
  )


@dataclasses.dataclass(frozen=True)
class LeastSquares:
  """A classifier.

  Attributes:
    mean: of the training features.
    std: of the training features, biased.
    weights: `[d + 1, c]`; the last row belongs to the constant.
  """

  mean: Float[np.ndarray, " d"]
  std: Float[np.ndarray, " d"]
  weights: Float[np.ndarray, "e c"]

  def scores(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
    """Of each class."""
    return _standardised(x, self.mean, self.std) @ self.weights


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
  z = _standardised(x, mean, std)
  target = np.full((len(x), classes), -1.0)
  target[np.arange(len(x)), labels] = 1
  if len(z) < z.shape[1]:
    # (z'z + l2 I)^-1 z' = z' (zz' + l2 I)^-1, the smaller system.
    weights = z.T @ np.linalg.solve(z @ z.T + l2 * np.eye(len(z)), target)
  else:
    gram = z.T @ z + l2 * np.eye(z.shape[1])
    weights = np.linalg.solve(gram, z.T @ target)
  return LeastSquares(mean, std, weights)


def _standardised(x, mean, std):
  z = (x.astype(np.float64) - mean) / (std + 1e-5)
  return np.pad(z, ((0, 0), (0, 1)), constant_values=_CONSTANT)
