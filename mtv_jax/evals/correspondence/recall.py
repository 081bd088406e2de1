"""Recall of geometric matches by their errors in 3D and in the image.

    error_3d = |R x_0 + t - x_1|,  in metres
    error_2d = |pi(R x_0 + t) - pi(x_1)|,  in pixels of a view of 512

Recall at t is the fraction of matches with an error below t (El Banani et al.
2024, Probe3D; NAVI's protocol).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from mtv_jax.evals.core import bootstrap, examples
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.correspondence import matching
from mtv_jax.evals.datasets import posed

REFERENCE_SIZE = 512  # side of the view that pixel errors refer to
CHANCE_POINTS = 256  # points of a pair that chance is computed from


@dataclasses.dataclass(frozen=True)
class Options:
  """Resolved options of `GeometricCorrespondence`; NAVI's in Probe3D."""

  size: int = 512
  keep: int = 1000
  metres: tuple[float | int, ...] = (0.01, 0.02, 0.05)
  pixels: tuple[float | int, ...] = (5, 25, 50)
  angles: tuple[float | int, ...] = (0, 30, 60, 90, 120)

  @property
  def metre_names(self) -> list[str]:
    """Names of the recalls by 3D error."""
    return [f"recall_{100 * t:g}cm" for t in self.metres]

  @property
  def pixel_names(self) -> list[str]:
    """Names of the recalls by 2D error."""
    return [f"recall_{t:g}px" for t in self.pixels]


@dataclasses.dataclass(frozen=True)
class PairErrors:
  """The 3D and 2D errors of the matches of one pair."""

  matches: matching.Matches
  metres: Float64[np.ndarray, " k"]
  pixels: Float64[np.ndarray, " k"]
  # Recall of uniform matches at each threshold, those in metres first.
  chance: Float64[np.ndarray, " t"]
  angle: float = 0.0  # between the cameras, in degrees


def match_pair(
  maps: Float32[np.ndarray, "2 h w d"],
  views: Sequence[posed.View],
  *,
  options: Options,
  angle: float = 0.0,
) -> PairErrors:
  """Matches the first view to the second and computes the errors.

  `maps` are the patch features of the views, which have two points or more.
  """
  first, second = views
  matches = matching.match(
    *maps,
    first_valid=first.valid,
    second_valid=second.valid,
    keep=options.keep,
  )
  motion = posed.motion(first.pose, second.pose)
  moved = first.points.astype(np.float64) @ motion[:3, :3].T + motion[:3, 3]
  target = second.points.astype(np.float64)
  focal = second.focal * REFERENCE_SIZE / options.size
  errors, chance = [], []
  first_cells, second_cells = tuple(matches.first.T), tuple(matches.second.T)
  for a, b, thresholds in (
    (moved, target, options.metres),
    (project(moved, focal=focal), project(target, focal=focal), options.pixels),
  ):
    errors.append(np.linalg.norm(a[first_cells] - b[second_cells], axis=-1))
    points = a[first.valid]
    chosen = examples.subsample(range(len(points)), CHANCE_POINTS)
    chance += _uniform_recall(points[chosen], b[second.valid], thresholds)
  return PairErrors(matches, *errors, chance=np.array(chance), angle=angle)


def project(
  points: Float64[np.ndarray, "*n 3"], *, focal: float
) -> Float64[np.ndarray, "*n 2"]:
  """`focal (x, y) / max(z, 1e-9)`, without a principal point: it cancels."""
  return focal * points[..., :2] / np.maximum(points[..., 2:], 1e-9)


def _uniform_recall(points, candidates, thresholds) -> list[float]:
  """The mean fraction of candidates near a point, for each threshold."""
  squared_distance = (
    (points**2).sum(axis=1)[:, None]
    + (candidates**2).sum(axis=1)
    - 2 * points @ candidates.T
  )
  return [float((squared_distance < t * t).mean()) for t in thresholds]


def average(
  pairs: Sequence[PairErrors], *, options: Options
) -> tuple[Estimate, dict[str, float]]:
  """Metrics of the pairs with their errors over the pairs, and chance.

  Bins of angles, `[low, high)`, without pairs are left out.
  """
  recalls = [
    [float((p.metres < t).mean()) for t in options.metres]
    + [float((p.pixels < t).mean()) for t in options.pixels]
    for p in pairs
  ]
  counts = np.array([len(p.metres) for p in pairs])
  angles = np.array([p.angle for p in pairs])
  metrics, chance = (
    functools.partial(_metrics, x, counts, angles, options)
    for x in (np.array(recalls), np.array([p.chance for p in pairs]))
  )
  return bootstrap.estimate(metrics, len(pairs)), chance(np.ones(len(pairs)))


def _metrics(
  recalls: Float64[np.ndarray, "n t"],
  counts: Int64[np.ndarray, " n"],
  angles: Float64[np.ndarray, " n"],
  options: Options,
  weights: Float64[np.ndarray, " n"],
) -> dict[str, float]:
  """Means over n pairs, of which each occurs `weights` times."""
  counts = weights * counts
  pooled = counts @ recalls / counts.sum()
  split = len(options.metres)
  # By angle and per pair at the middle threshold.
  middle, by_pair = options.metre_names[split // 2], recalls[:, split // 2]
  bins = {}
  for low, high in itertools.pairwise(options.angles):
    inside = weights * ((angles >= low) & (angles < high))
    if inside.any():
      name = f"{middle}_{low:g}_{high:g}deg"
      bins[name] = inside @ by_pair / inside.sum()
  names = options.metre_names + options.pixel_names
  metrics = {
    "avg_recall": pooled[:split].mean(),
    "avg_recall_pixel": pooled[split:].mean(),
    "avg_recall_all": pooled.mean(),
    **({"avg_recall_angle": np.mean(list(bins.values()))} if bins else {}),
    **dict(zip(names, pooled, strict=True)),
    f"{middle}_per_pair": weights @ by_pair / weights.sum(),
    **bins,
  }
  return {name: float(value) for name, value in metrics.items()}
