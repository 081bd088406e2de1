"""Key points found again: the share of correct ones (PCK), and its averages."""

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

from mtv_jax.encoder.encoder import normalize
from mtv_jax.evals.core.examples import KeyPointPair

AGGREGATES = ("point", "image")
VIEWPOINTS = (0, 1, 2)
_WHITE = 255

# Pairs by category and viewpoint; a viewpoint of None holds all of them.
Chosen = Mapping[tuple[str, int | None], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """What counts as found, and how it is averaged over a category.

  Attributes:
    aggregate: `point`: an error below the threshold; mean over all key points.
      `image`: up to the threshold, mean over pairs of the mean over their
      points, as SPair-71k's own figures are.
    threshold: of the error, which is relative to the thing's box.
  """

  aggregate: str
  threshold: float

  def right(self, errors: Float[np.ndarray, "*k"]) -> Float64[np.ndarray, "*k"]:
    """1 where the error is small enough, else 0."""
    if self.aggregate == "point":
      return (errors < self.threshold).astype(np.float64)
    return (errors <= self.threshold).astype(np.float64)

  def mean(self, pairs: Sequence[np.ndarray]) -> float | None:
    """The average of what `right` gave; None without any point."""
    pairs = [p for p in pairs if len(p)]
    if not pairs:
      return None
    if self.aggregate == "point":
      return float(np.concatenate(pairs).mean())
    return float(np.mean([p.mean() for p in pairs]))


def square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Padded with white at the right or below to a square, resized (bicubic)."""
  height, width = image.shape[:2]
  side = max(height, width)
  padding = ((0, side - height), (0, side - width), (0, 0))
  picture = PIL.Image.fromarray(np.pad(image, padding, constant_values=_WHITE))
  method = PIL.Image.Resampling.BICUBIC
  return np.asarray(picture.resize((size, size), method))


def scaled(
  points: Float64[np.ndarray, "k 2"], *, side: int, size: int
) -> Float64[np.ndarray, "k 2"]:
  """Points of a picture as whole pixels (rounded down) of its square.

  Args:
    points: (x, y) in pixels of the picture.
    side: the picture's longer side.
    size: the square's side.
  """
  # The product first: it is exact, and so is its quotient where it is whole.
  return np.floor(points * size / side)


def find(
  source: Float32[np.ndarray, "g g d"] | Float32[Array, "g g d"],
  target: Float32[np.ndarray, "g g d"] | Float32[Array, "g g d"],
  points: Float64[np.ndarray, "k 2"],
) -> Int[np.ndarray, "k 2"]:
  """For each point, the target's patch (column, row) that is most similar.

  Features are normalised here. Similarities are float32 dot products at the
  highest matmul precision; the first patch wins a tie.

  Args:
    source: features of the picture that the points are of.
    target: features of the other picture.
    points: (x, y), as shares of the square's side.
  """
  maps = jnp.stack([normalize(source), normalize(target)])
  return find_in(maps, 0, 1, points)


def find_in(
  maps: Float32[Array, "n g g d"],
  first: int,
  second: int,
  points: Float64[np.ndarray, "k 2"],
) -> Int[np.ndarray, "k 2"]:
  """`find` among normalised maps that are on the device.

  Args:
    maps: of n pictures.
    first: the one that the points are of.
    second: the one to search.
    points: (x, y), as shares of the square's side.
  """
  count, grid = len(points), maps.shape[2]
  # SPair's pairs have up to 30 points: one compilation for most of them.
  padded = np.zeros((max(32, 1 << (count - 1).bit_length()), 2), np.float32)
  padded[:count] = points * (grid - 1)
  cells = np.asarray(_find(maps, first, second, padded))[:count]
  return np.stack([cells % grid, cells // grid], axis=-1)


@jax.jit
def _find(maps, first, second, places):
  source, target = maps[first], maps[second]
  height, width, _ = source.shape
  x, y = places[:, 0], places[:, 1]
  # Corners on corners: 0 is the first patch's middle and 1 the last one's.
  x0 = jnp.clip(jnp.floor(x), 0, width - 1).astype(jnp.int32)
  y0 = jnp.clip(jnp.floor(y), 0, height - 1).astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  right, below = (x - x0)[:, None], (y - y0)[:, None]
  above = source[y0, x0] * (1 - right) + source[y0, x1] * right
  under = source[y1, x0] * (1 - right) + source[y1, x1] * right
  descriptors = above * (1 - below) + under * below
  scores = jnp.matmul(
    descriptors,
    target.reshape(height * width, -1).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.argmax(scores, axis=1)


def errors_of(
  found: Float[np.ndarray, "*k 2"], pair: KeyPointPair, *, size: int
) -> Float64[np.ndarray, "*k"]:
  """Distances to the true points, relative to the longer side of the box.

  Args:
    found: (x, y) in the second picture, as shares of its square's side; the
      last axis but one is the pair's points.
    pair: what is true.
    size: side of the square that key points are whole pixels of.
  """
  true = scaled(pair.second_points, side=pair.second_side, size=size) / size
  box = np.max(pair.second_box[2:] - pair.second_box[:2]) / pair.second_side
  return np.linalg.norm(found - true, axis=-1) / box


def chances(
  pair: KeyPointPair, *, grid: int, size: int, rule: Rule
) -> Float64[np.ndarray, " k"]:
  """The share of all patches that would be right, by point."""
  cells = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1)
  cells = cells.reshape(-1, 1, 2) / grid
  count = len(pair.second_points)
  errors = errors_of(np.repeat(cells, count, axis=1), pair, size=size)
  return rule.right(errors).mean(axis=0)


def choose(
  pairs: Sequence[KeyPointPair], *, limit: int, seed: int
) -> dict[tuple[str, int | None], tuple[int, ...]]:
  """Which pairs stand for a category and a viewpoint.

  Those of the category, for each viewpoint and once for all of them, shuffled
  by Python's `random` seeded anew each time, the first `limit` of them. What no
  pair stands for is left out.

  Args:
    pairs: in a fixed order.
    limit: 200 in the published protocol.
    seed: 20 in the published protocol.
  """
  members = collections.defaultdict(list)
  for i, pair in enumerate(pairs):
    members[pair.category, None].append(i)
    if pair.viewpoint is not None:
      members[pair.category, pair.viewpoint].append(i)
  chosen = {}
  for key in sorted(members, key=str):
    random.Random(seed).shuffle(members[key])
    chosen[key] = tuple(members[key][:limit])
  return chosen


def figures(
  chosen: Chosen,
  right: Mapping[int, np.ndarray],
  *,
  rule: Rule,
  report: str = "means",
) -> dict[str, float]:
  """Means over categories, of all pairs and by viewpoint.

  Args:
    chosen: of `choose`.
    right: for each pair, what `Rule.right` or `chances` gave.
    rule: how to average.
    report: `classes` adds the recall of each category.
  """
  means = {
    key: rule.mean([right[i] for i in members])
    for key, members in chosen.items()
  }
  means = {key: value for key, value in means.items() if value is not None}
  made = {}
  for view in (None, *VIEWPOINTS):
    values = [value for key, value in means.items() if key[1] == view]
    if values:
      name = "recall" if view is None else f"recall_view{view}"
      made[name] = float(np.mean(values))
  if len(made) > 1:
    views = [value for name, value in made.items() if name != "recall"]
    made["avg_recall_views"] = float(np.mean(views))
  if report == "classes":
    for (category, view), value in means.items():
      if view is None:
        made[f"recall_{category}"] = value
  return made
