"""Errors of matches in space and in the picture, and recall of them.

    error_3d = |R x_0 + t - x_1|,  in metres
    error_2d = |pi(R x_0 + t) - pi(x_1)|,  in pixels of a view of 512

Recall at t is the share of matches whose error is below t (El Banani et al.
2024, Probe3D; NAVI's protocol).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64

from mtv_jax.evals.core import examples
from mtv_jax.evals.correspondence import matching
from mtv_jax.evals.datasets import posed

PIXELS_OF = 512  # the view that pixel errors are measured in
CHANCE_POINTS = 256  # of a pair, by which chance is computed


@dataclasses.dataclass(frozen=True)
class Options:
  """The options that a figure depends on, resolved.

  Attributes:
    size: side of a view.
    keep: matches a pair.
    metres: thresholds of the 3D error.
    pixels: thresholds of the 2D error.
    angles: edges of the bins.
  """

  size: int
  keep: int
  metres: tuple[float | int, ...]
  pixels: tuple[float | int, ...]
  angles: tuple[float | int, ...]


@dataclasses.dataclass(frozen=True)
class Scored:
  """The matches of one pair.

  Attributes:
    matches: cells of the two views.
    metres: 3D error of each.
    pixels: 2D error of each.
    chance: share of uniform matches below each threshold, those in metres
      first.
    angle: between the cameras.
  """

  matches: matching.Matches
  metres: Float64[np.ndarray, " k"]
  pixels: Float64[np.ndarray, " k"]
  chance: Float64[np.ndarray, " t"]
  angle: float = 0.0


def score(
  maps: Float32[np.ndarray, "2 h w d"],
  views: Sequence[posed.View],
  *,
  options: Options,
) -> Scored:
  """Matches the first view to the second and measures the errors.

  Args:
    maps: patch features of the two views.
    views: with at least two points each.
    options: `size`, `keep` and the thresholds.
  """
  first, second = views
  matches = matching.match(
    *maps,
    first_valid=first.valid,
    second_valid=second.valid,
    keep=options.keep,
  )
  move = posed.motion(first.pose, second.pose)
  moved = first.points.astype(np.float64) @ move[:3, :3].T + move[:3, 3]
  still = second.points.astype(np.float64)
  focal = second.focal * PIXELS_OF / options.size
  pairs = [
    (moved, still, options.metres),
    (project(moved, focal=focal), project(still, focal=focal), options.pixels),
  ]
  errors, chance = [], []
  start, end = (tuple(cells.T) for cells in (matches.first, matches.second))
  for a, b, thresholds in pairs:
    errors.append(np.linalg.norm(a[start] - b[end], axis=-1))
    some = a[first.valid]
    some = some[examples.subsample(range(len(some)), CHANCE_POINTS)]
    chance += _shares(some, b[second.valid], thresholds)
  return Scored(matches, *errors, chance=np.array(chance))


def project(
  points: Float64[np.ndarray, "*n 3"], *, focal: float
) -> Float64[np.ndarray, "*n 2"]:
  """`focal (x, y) / max(z, 1e-9)`; differences need no principal point."""
  return focal * points[..., :2] / np.maximum(points[..., 2:], 1e-9)


def _shares(points, candidates, thresholds) -> list[float]:
  """The mean share of the candidates that are near a point, by threshold."""
  square = (
    (points**2).sum(axis=1)[:, None]
    + (candidates**2).sum(axis=1)
    - 2 * points @ candidates.T
  )
  return [float((square < t * t).mean()) for t in thresholds]


@dataclasses.dataclass(frozen=True)
class Names:
  """Names of the metrics: by threshold, and by bin of angle."""

  metres: tuple[str, ...]
  pixels: tuple[str, ...]
  angles: tuple[str, ...]
  middle: str


def names_of(options: Options) -> Names:
  """How the metrics of these thresholds are called."""
  metres = tuple(f"recall_{100 * t:g}cm" for t in options.metres)
  middle = metres[len(metres) // 2]
  return Names(
    metres=metres,
    pixels=tuple(f"recall_{t:g}px" for t in options.pixels),
    angles=tuple(
      f"{middle}_{low:g}_{high:g}deg"
      for low, high in itertools.pairwise(options.angles)
    ),
    middle=middle,
  )


def summarise(
  scored: Sequence[Scored], *, options: Options
) -> tuple[dict[str, float], dict[str, float]]:
  """Metrics of the pairs, and their chance.

  A bin of angle, `[low, high)`, without pairs is left out.
  """
  count = len(options.metres)
  rates = [
    [*_below(s.metres, options.metres), *_below(s.pixels, options.pixels)]
    for s in scored
  ]
  made = []
  kept = np.array([len(s.metres) for s in scored])
  angle = np.array([s.angle for s in scored])
  for table in (np.array(rates), np.array([s.chance for s in scored])):
    pooled = kept @ table / kept.sum()
    by_pair = table[:, count // 2]
    made.append(_figures(pooled, by_pair, angle, options))
  return made[0], made[1]


def _below(errors, thresholds) -> list[float]:
  return [float((errors < t).mean()) for t in thresholds]


def _figures(
  pooled: Float[np.ndarray, " t"],
  by_pair: Float[np.ndarray, " n"],
  angle: Float[np.ndarray, " n"],
  options: Options,
) -> dict[str, float]:
  names, count = names_of(options), len(options.metres)
  bins = {}
  for name, (low, high) in zip(
    names.angles, itertools.pairwise(options.angles), strict=True
  ):
    inside = (angle >= low) & (angle < high)
    if inside.any():
      bins[name] = by_pair[inside].mean()
  figures = {
    "avg_recall": pooled[:count].mean(),
    "avg_recall_pixel": pooled[count:].mean(),
    "avg_recall_all": pooled.mean(),
    **({"avg_recall_angle": np.mean(list(bins.values()))} if bins else {}),
    **dict(zip(names.metres + names.pixels, pooled, strict=True)),
    f"{names.middle}_per_pair": by_pair.mean(),
    **bins,
  }
  return {name: float(value) for name, value in figures.items()}
