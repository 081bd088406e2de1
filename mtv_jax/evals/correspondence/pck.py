"""Percentage of correct keypoints (PCK) of keypoint transfer."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, Float64, Int, UInt8

from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import KeyPointPair

VIEWPOINTS = (0, 1, 2)

# Indices of pairs by category and viewpoint; all of them at viewpoint None.
Sample = Mapping[tuple[str, int | None], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """The definition of a correct keypoint, and of the mean over a category.

  `point`: an error below the threshold; mean over all keypoints. `image`: up to
  the threshold, mean over pairs of the mean over their keypoints, as in
  SPair-71k's own results.
  """

  aggregate: str
  threshold: float  # largest error, as a fraction of the box's longer side

  def correct(
    self, errors: Float[np.ndarray, "*k"]
  ) -> Float64[np.ndarray, "*k"]:
    """1 if the error is small enough, else 0."""
    compare = np.less if self.aggregate == "point" else np.less_equal
    return compare(errors, self.threshold).astype(np.float64)

  def terms(self, correct: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """A pair's terms of the numerator and the denominator of the mean."""
    if self.aggregate == "point" or not len(correct):
      return float(correct.sum()), float(len(correct))
    return float(correct.mean()), 1.0


def pad_to_square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Pads with white at the right or the bottom, then resizes (bicubic)."""
  height, width = image.shape[:2]
  side = max(height, width)
  padding = ((0, side - height), (0, side - width), (0, 0))
  padded = PIL.Image.fromarray(np.pad(image, padding, constant_values=255))
  return np.asarray(padded.resize((size, size), PIL.Image.Resampling.BICUBIC))


def points_in_square(
  points: Float64[np.ndarray, "k 2"], *, side: int, size: int
) -> Float64[np.ndarray, "k 2"]:
  """Points (x, y) of an image as pixels of its square, rounded down.

  `side` is the image's longer side, `size` that of the square.
  """
  # The product first: it is exact, and so are whole quotients.
  return np.floor(points * size / side)


def source_points(
  pair: KeyPointPair, *, size: int
) -> Float64[np.ndarray, "k 2"]:
  """The first image's keypoints as pixels of its square."""
  return points_in_square(pair.first_points, side=pair.first_side, size=size)


def transfer_points(
  maps: Float32[Array, "n g g d"],
  first: int,
  second: int,
  points: Float64[np.ndarray, "k 2"],
) -> Int[np.ndarray, "k 2"]:
  """The most similar patch (column, row) of another image for each point.

  Similarities are float32 dot products at the highest matmul precision; the
  first patch wins a tie. `maps` are normalised and on the device, `first` and
  `second` indices of the image of the points, (x, y) as fractions of the
  square's side, and of the other one.
  """
  count, grid = len(points), maps.shape[2]
  # Padded to few shapes: SPair's pairs have up to 30 points.
  padded = np.zeros((max(32, 1 << (count - 1).bit_length()), 2), np.float32)
  padded[:count] = points * (grid - 1)
  cells = np.asarray(_most_similar(maps, first, second, padded))[:count]
  return np.stack([cells % grid, cells // grid], axis=-1)


@jax.jit
def _most_similar(maps, first, second, positions):
  source, target = maps[first], maps[second]  # [H, W, D]
  height, width, _ = source.shape
  x, y = positions[:, 0], positions[:, 1]
  # Corners aligned: 0 is the centre of the first patch, W - 1 of the last.
  x0 = jnp.clip(jnp.floor(x), 0, width - 1).astype(jnp.int32)
  y0 = jnp.clip(jnp.floor(y), 0, height - 1).astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  right, below = (x - x0)[:, None], (y - y0)[:, None]
  upper = source[y0, x0] * (1 - right) + source[y0, x1] * right
  lower = source[y1, x0] * (1 - right) + source[y1, x1] * right
  descriptors = upper * (1 - below) + lower * below  # [K, D]
  scores = jnp.matmul(
    descriptors,
    target.reshape(height * width, -1).T,
    precision=jax.lax.Precision.HIGHEST,
  )  # [K, H W]
  return jnp.argmax(scores, axis=1)


def transfer_errors(
  predicted: Float[np.ndarray, "*k 2"], pair: KeyPointPair, *, size: int
) -> Float64[np.ndarray, "*k"]:
  """Distances to the true keypoints over the longer side of the box.

  `predicted` are (x, y) in the second image, as fractions of the side of its
  square, `size` pixels, to which the true keypoints are rounded.
  """
  true = points_in_square(pair.second_points, side=pair.second_side, size=size)
  box = np.max(pair.second_box[2:] - pair.second_box[:2]) / pair.second_side
  return np.linalg.norm(predicted - true / size, axis=-1) / box


def uniform_pck(
  pair: KeyPointPair, *, grid: int, size: int, rule: Rule
) -> Float64[np.ndarray, " k"]:
  """The fraction of all patches that would be correct, for each keypoint."""
  cells = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1)
  cells = cells.reshape(-1, 1, 2) / grid
  count = len(pair.second_points)
  errors = transfer_errors(np.repeat(cells, count, axis=1), pair, size=size)
  return rule.correct(errors).mean(axis=0)


def sample_pairs(
  pairs: Sequence[KeyPointPair], *, limit: int, seed: int
) -> dict[tuple[str, int | None], tuple[int, ...]]:
  """Samples pairs of each category, and of each of its viewpoints.

  The pairs are shuffled by Python's `random`, reseeded each time, and the
  first `limit` taken (200, with seed 20, in the published protocol). Viewpoints
  without a pair are left out.
  """
  members = collections.defaultdict(list)
  for i, pair in enumerate(pairs):
    members[pair.category, None].append(i)
    if pair.viewpoint is not None:
      members[pair.category, pair.viewpoint].append(i)
  sample = {}
  for key in sorted(members, key=str):
    random.Random(seed).shuffle(members[key])
    sample[key] = tuple(members[key][:limit])
  return sample


def average(
  sample: Sample,
  correct: Mapping[int, np.ndarray],
  *,
  rule: Rule,
  report: str = "means",
) -> Estimate:
  """Means over categories, of all pairs and by viewpoint; pairs are resampled.

  `correct` is for each pair, from `Rule.correct` or `uniform_pck`; `report` of
  `classes` adds the recall of each category.
  """
  pairs = sorted(set().union(*sample.values()))
  terms = np.array([rule.terms(correct[i]) for i in pairs])
  rows = {key: np.searchsorted(pairs, m) for key, m in sample.items()}

  def metrics(weights):
    sums = {key: weights[row] @ terms[row] for key, row in rows.items()}
    means = {key: s / count for key, (s, count) in sums.items() if count}
    return _average_categories(means, report)

  return bootstrap.estimate(metrics, len(pairs))


def _average_categories(
  means: Mapping[tuple[str, int | None], float], report: str
) -> dict[str, float]:
  metrics = {}
  for view in (None, *VIEWPOINTS):
    values = [value for key, value in means.items() if key[1] == view]
    if values:
      name = "recall" if view is None else f"recall_view{view}"
      metrics[name] = float(np.mean(values))
  if len(metrics) > 1:
    views = [value for name, value in metrics.items() if name != "recall"]
    metrics["avg_recall_views"] = float(np.mean(views))
  if report == "classes":
    for (category, view), value in means.items():
      if view is None:
        metrics[f"recall_{category}"] = value
  return metrics
