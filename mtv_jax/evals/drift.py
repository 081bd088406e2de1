"""Feature drift of an encoder from a reference encoder.

Continued pretraining can forget long before a loss shows it. This evaluation
compares both encoders' features on shared images, without labels; equal
features score 1. `config.evals.NAME.bound` stops a run, or rolls it back to a
checkpoint, when a metric falls below a bound (see docs/continue.md).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import mean_patches
from mtv_jax.evals.core import bootstrap, ranking
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.examples import Data, ImageSet, select_images
from mtv_jax.evals.datasets import registry
from mtv_jax.utils.errors import InputError


class DriftFeatures(NamedTuple):
  """Features of n images."""

  pooled: Float32[np.ndarray, "n e"]
  patches: Float32[np.ndarray, "n *grid d"]  # After the final norm.
  layers: tuple[Float32[np.ndarray, "n d"], ...]  # Mean patch of each block.
  grids: Int32[np.ndarray, "n 2"] | None  # See `ImageFeatures`.


@dataclasses.dataclass(frozen=True)
class Drift(Evaluator):
  """Feature agreement with a reference encoder.

  `neighbours` is the fraction of k nearest neighbours that both encoders share,
  `cka` the linear CKA and `cosine` the mean cosine of the pooled embeddings,
  `cosine_patches` the mean cosine of the patches, `cosine_layer_i` the mean
  cosine of the mean patch after block i. Cosines are omitted if widths or patch
  grids differ. Chance permutes the images of one encoder; chance `cka` is far
  above 0 with fewer images than channels.

  Attributes:
    reference: folder of the reference, as for `mtv_jax.load`.
    reference_weights: weights of a run; defaults to the choice in its config.
    reference_step: step of a run; defaults to the last.
    k: neighbours.
  """

  metric_pattern = r"neighbours|cka|cosine(_patches|_layer_\d+)?"

  reference: str | None = None
  reference_weights: Literal["student", "teacher", "ema"] | None = None
  reference_step: int | None = None
  data: Data = "scenes"
  count: PositiveInt = 256
  k: PositiveInt = 10
  batch_size: PositiveInt = 32

  @functools.cached_property
  def _set(self) -> ImageSet:
    if self.reference is None:
      raise NotApplicable(
        "drift compares with another encoder: pass its folder as reference"
      )
    loading.is_run(self.reference)  # Raises if it isn't a model.
    data = registry.open_images(self.data, count=self.count)
    if len(data.images) <= self.k:
      raise InputError(
        f"{data.name} has {len(data.images)} images; k={self.k} neighbours "
        "need more"
      )
    return data

  @functools.cached_property
  def _references(self) -> dict[str, DriftFeatures]:
    """Cached reference features, by compute dtype."""
    return {}

  def run(self, encoder: Encoder) -> Result:
    """Compares an encoder with the reference, in the encoder's dtype."""
    data = self._set
    ours = encode(encoder, data, batch_size=self.batch_size)
    if encoder.dtype not in self._references:
      reference = loading.load(
        self.reference,
        weights=self.reference_weights,
        step=self.reference_step,
        dtype=encoder.dtype,
        mesh=encoder.mesh,
      )
      theirs = encode(reference, data, batch_size=self.batch_size)
      self._references[encoder.dtype] = theirs
    theirs = self._references[encoder.dtype]
    ranking.check_finite(pooled=ours.pooled, patches=ours.patches)
    estimate = bootstrap.means(self._score_images(ours, theirs))
    cka = linear_cka(ours.pooled, theirs.pooled)
    estimate |= bootstrap.Estimate({"cka": cka}, {})
    permutation = np.random.default_rng(0).permutation(len(data.images))
    chance = {
      "neighbours": self.k / (len(data.images) - 1),
      "cka": linear_cka(ours.pooled, theirs.pooled[permutation]),
    }
    protocol = {
      **encoder.protocol(),
      **data.protocol(),
      "reference": self.reference,
      "reference_weights": self.reference_weights or "as published",
      "k": self.k,
      "similarity": "cosine, float64; of equals the lower index first",
    }
    return Result.from_estimate(estimate, protocol, chance)

  def _score_images(
    self, ours: DriftFeatures, theirs: DriftFeatures
  ) -> dict[str, np.ndarray]:
    """Per-image values of the averaged metrics."""
    neighbours = neighbour_agreement(ours.pooled, theirs.pooled, self.k)
    values = {"neighbours": neighbours}
    if ours.pooled.shape == theirs.pooled.shape:
      values["cosine"] = cosines(ours.pooled, theirs.pooled)
    # Both None, or equal.
    has_equal_grids = np.array_equal(ours.grids, theirs.grids)
    if ours.patches.shape == theirs.patches.shape and has_equal_grids:
      patches = cosines(ours.patches, theirs.patches)
      means = mean_patches(patches[..., None], ours.grids)
      values["cosine_patches"] = means[:, 0]
    if len(ours.layers) == len(theirs.layers):
      pairs = zip(ours.layers, theirs.layers, strict=True)
      for i, (a, b) in enumerate(pairs):
        if a.shape == b.shape:
          values[f"cosine_layer_{i}"] = cosines(a, b)
    return values


def encode(
  encoder: Encoder, data: ImageSet, *, batch_size: int
) -> DriftFeatures:
  """Encodes images; layers are reduced to mean patches batch by batch."""
  depth = encoder.spec.image.depth
  parts = []
  for start in range(0, len(data.images), batch_size):
    indices = range(start, min(start + batch_size, len(data.images)))
    out = encoder.image(
      select_images(data.images, indices),
      layers=tuple(range(depth)),
      outputs=("pooled", "patches"),
      batch_size=batch_size,
    )
    layers = [mean_patches(out.layers[i], out.grids) for i in range(depth)]
    grids = [] if out.grids is None else [out.grids]
    parts.append([out.pooled, out.patches, *layers, *grids])
  arrays = [*map(np.concatenate, zip(*parts, strict=True))]
  pooled, patches, *layers = arrays[: 2 + depth]
  grids = next(iter(arrays[2 + depth :]), None)
  return DriftFeatures(pooled, patches, tuple(layers), grids)


_TINY = np.finfo(np.float64).tiny


def cosines(
  x: Float[np.ndarray, "*n d"], y: Float[np.ndarray, "*n d"]
) -> Float64[np.ndarray, "*n"]:
  """Cosine of each pair of vectors; 0 if either is zero."""
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
  return np.sum(x * y, axis=-1) / np.maximum(norms, _TINY)


def neighbour_agreement(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n e"], k: int
) -> Float64[np.ndarray, " n"]:
  """Mutual k-nearest-neighbour overlap (Huh et al. 2024, appendix A).

  Neighbours are ranked by cosine, the example itself excluded; ties go to the
  lower index.
  """
  first, second = (_find_nearest(a, k) for a in (x, y))
  return np.array(
    [len(np.intersect1d(a, b)) / k for a, b in zip(first, second, strict=True)]
  )


def _find_nearest(x: Float[np.ndarray, "n d"], k: int) -> np.ndarray:
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

  1 for representations that differ by a rotation and a scale; 0 if either is
  constant. Biased upwards for few examples: independent normal features of d
  channels score about d / (n + d).
  """
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  x, y = (a - a.mean(axis=0) for a in (x, y))
  between = np.linalg.norm(y.T @ x) ** 2
  within = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
  return float(between / max(within, _TINY))
