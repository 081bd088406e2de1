"""Effective rank of features: RankMe and LiDAR, without labels.

Features that collapse into a subspace have a low rank. A high rank alone does
not make them useful: random features have a high rank, too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import numpy as np
import scipy.linalg
from jaxtyping import Float

from mtv_jax.config.options import PositiveInt, Range
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import (
  CROP_PROTOCOL,
  random_crop,
)
from mtv_jax.evals.core import global_features, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import jackknife_error
from mtv_jax.evals.core.examples import Data, ImageSet, LazySequence
from mtv_jax.evals.datasets import registry
from mtv_jax.utils.errors import InputError

# Added to variances within images, and to probabilities, as in the papers.
_RIDGE, _EPS = 1e-4, 1e-7
# Number of jackknife groups, left out one at a time. Resamples with replacement
# would have a lower rank.
_NUM_GROUPS = 20


@dataclasses.dataclass(frozen=True)
class FeatureRank(Evaluator):
  """RankMe of an encoder's image features, and LiDAR of random crops.

  Attributes:
    data: see `datasets/registry.py`; needs only images.
    count: images, evenly spaced. RankMe is at most this number, LiDAR less.
    views: crops per image for LiDAR; the paper uses 50.
    feature: see `global_features.embed`.
    seed: seed of the crops.
  """

  title = "Feature rank"
  main = ()  # neither direction is better in general

  data: Data = "scenes"
  count: PositiveInt = 1000
  views: Annotated[int, Range(min=2)] = 10
  feature: global_features.Feature = "pooled"
  seed: int = 0
  batch_size: PositiveInt = 64

  @functools.cached_property
  def _set(self) -> ImageSet:
    data = registry.open_images(self.data, count=self.count)
    if len(data.images) < 3:
      raise InputError(
        f"{data.name} has {len(data.images)} images; LiDAR and its standard "
        "error need at least 3"
      )
    return data

  def run(self, encoder: Encoder) -> Result:
    """Returns both ranks, which are at most the feature's channels."""
    data, n = self._set, len(self._set.images)
    embed = functools.partial(
      global_features.embed,
      encoder,
      feature=self.feature,
      batch_size=self.batch_size,
    )
    features = embed(data)  # [n, d]
    crops = LazySequence(self._crop_fn(encoder), n * self.views)
    views = embed(dataclasses.replace(data, images=crops), pixels="crops")
    ranking.check_finite(features=features, views=views)
    views = views.reshape(n, self.views, -1)
    metrics = {"rankme": rankme(features), "lidar": lidar(views)}
    groups = np.arange(n) % min(n, _NUM_GROUPS)
    masks = [groups != group for group in range(groups.max() + 1)]
    errors = {
      "rankme": jackknife_error(np.array([rankme(features[m]) for m in masks])),
      "lidar": jackknife_error(np.array([lidar(views[m]) for m in masks])),
    }
    protocol = {
      **encoder.protocol(),
      **data.protocol(),
      "feature": self.feature,
      "channels": features.shape[1],
      "views": f"{self.views} per image: {CROP_PROTOCOL}",
      "seed": self.seed,
    }
    units = dict.fromkeys(metrics, "")
    return Result(metrics, protocol, units=units, errors=errors)

  def _crop_fn(self, encoder: Encoder):
    """Returns a reader of crops by index; an image's crops are consecutive."""
    read = functools.lru_cache(maxsize=64)(self._set.images.__getitem__)

    def read_crop(i: int) -> np.ndarray:
      image, view = divmod(i, self.views)
      rng = np.random.default_rng((self.seed, image, view))
      return random_crop(read(image), size=encoder.preprocess.size, rng=rng)

    return read_crop


def effective_rank(values: Float[np.ndarray, " k"]) -> float:
  """exp(entropy) of non-negative values over their sum (Roy, Vetterli 2007)."""
  p = values / max(values.sum(), np.finfo(np.float64).tiny) + _EPS
  return float(np.exp(-np.sum(p * np.log(p))))


def rankme(features: Float[np.ndarray, "n d"]) -> float:
  """RankMe (Garrido et al. 2023): effective rank of features, not centred."""
  features = np.asarray(features, np.float64)
  return effective_rank(np.linalg.svd(features, compute_uv=False))


def lidar(features: Float[np.ndarray, "n q d"]) -> float:
  """LiDAR (Thilak et al. 2023): effective rank of the LDA matrix of q views.

      W^(-1/2) B W^(-1/2),  B between images, W within images plus 1e-4 I

  The classes of the linear discriminant analysis are the n images.
  """
  x = np.asarray(features, np.float64)
  n, q, d = x.shape
  means = x.mean(axis=1)
  centred = means - means.mean(axis=0)
  between = centred.T @ centred / (n - 1)
  residuals = (x - means[:, None]).reshape(-1, d)
  within = residuals.T @ residuals / (n * (q - 1)) + _RIDGE * np.eye(d)
  eigenvalues = scipy.linalg.eigh(between, within, eigvals_only=True)
  return effective_rank(np.maximum(eigenvalues, 0))
