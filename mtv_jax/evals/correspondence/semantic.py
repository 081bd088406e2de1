"""Semantic correspondence: keypoint transfer between objects of a category.

Each keypoint of the first image is transferred to the most similar patch of the
second (SPair-71k, Min et al. 2019, in Probe3D's protocol, El Banani et al.
2024). Images are padded to squares, resized, and encoded as G x G normalised
patch features:

    descriptor = bilinear sample of the first grid, corners aligned
    predicted  = (column, row) / G of the patch with the highest dot product
    error      = |predicted - true| / (longer side of the object's box)
    correct    = error < 0.1

Positions and sides are fractions of the padded square's side. As published, the
corner of the patch is compared, not its centre.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, Float64, Int, UInt8

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import bootstrap, examples
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import KeyPointPair, KeyPointPairs
from mtv_jax.evals.correspondence.correspondence_evaluator import (
  CorrespondenceEvaluator,
)
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

VIEWPOINTS = (0, 1, 2)

# Pair indices by category and viewpoint; under viewpoint None, all pairs.
Sample = Mapping[tuple[str, int | None], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class PckRule:
  """Defines a correct keypoint, and the mean over a category.

  `point`: error < threshold; mean over all keypoints. `image`: error <=
  threshold; mean over pairs of the per-pair mean, as in SPair-71k's results.
  """

  aggregate: str
  threshold: float  # largest error, as a fraction of the box's longer side

  def correct(
    self, errors: Float[np.ndarray, "*k"]
  ) -> Float64[np.ndarray, "*k"]:
    """1 for correct keypoints, else 0."""
    compare = np.less if self.aggregate == "point" else np.less_equal
    return compare(errors, self.threshold).astype(np.float64)

  def terms(self, correct: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """A pair's terms in the numerator and denominator of the mean."""
    if self.aggregate == "point" or not len(correct):
      return float(correct.sum()), float(len(correct))
    return float(correct.mean()), 1.0


def pad_to_square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Pads with white on the right or bottom, then resizes (bicubic)."""
  height, width = image.shape[:2]
  side = max(height, width)
  padding = ((0, side - height), (0, side - width), (0, 0))
  padded = PIL.Image.fromarray(np.pad(image, padding, constant_values=255))
  return np.asarray(padded.resize((size, size), PIL.Image.Resampling.BICUBIC))


def points_in_square(
  points: Float64[np.ndarray, "k 2"], side: int, size: int
) -> Float64[np.ndarray, "k 2"]:
  """Converts points (x, y) to pixels of the square, rounded down.

  `side` is the image's longer side, `size` the square's.
  """
  # Multiply first: the product is exact, and so are integer quotients.
  return np.floor(points * size / side)


def transfer_points(
  maps: Float32[Array, "n g g d"],
  first: int,
  second: int,
  points: Float64[np.ndarray, "k 2"],
) -> Int[np.ndarray, "k 2"]:
  """Most similar patch (column, row) in the second image for each point.

  Similarities are float32 dot products at the highest matmul precision; ties go
  to the first patch. `first` and `second` index the normalised `maps`. `points`
  are (x, y) in the first image as fractions of the square's side.
  """
  count, grid = len(points), maps.shape[2]
  # Padded to limit the number of shapes; SPair's pairs have up to 30 points.
  padded = np.zeros((max(32, 1 << (count - 1).bit_length()), 2), np.float32)
  padded[:count] = points * (grid - 1)
  cells = np.asarray(_find_most_similar(maps, first, second, padded))[:count]
  return np.stack([cells % grid, cells // grid], axis=-1)


@jax.jit
def _find_most_similar(maps, first, second, positions):
  source, target = maps[first], maps[second]  # [H, W, D]
  height, width, _ = source.shape
  x, y = positions[:, 0], positions[:, 1]
  # Corners aligned: 0 is the centre of the first patch, W - 1 of the last.
  x0 = jnp.clip(jnp.floor(x), 0, width - 1).astype(jnp.int32)
  y0 = jnp.clip(jnp.floor(y), 0, height - 1).astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  dx, dy = (x - x0)[:, None], (y - y0)[:, None]
  upper = source[y0, x0] * (1 - dx) + source[y0, x1] * dx
  lower = source[y1, x0] * (1 - dx) + source[y1, x1] * dx
  descriptors = upper * (1 - dy) + lower * dy  # [K, D]
  target = target.reshape(height * width, -1)
  precision = jax.lax.Precision.HIGHEST
  scores = jnp.matmul(descriptors, target.T, precision=precision)  # [K, H W]
  return jnp.argmax(scores, axis=1)


def transfer_errors(
  predicted: Float[np.ndarray, "*k 2"], pair: KeyPointPair, *, size: int
) -> Float64[np.ndarray, "*k"]:
  """Distances to the true keypoints, over the box's longer side.

  `predicted` are (x, y) in the second image as fractions of the square's side.
  True keypoints are rounded down to pixels of the square, of side `size`.
  """
  true_points = points_in_square(pair.second_points, pair.second_side, size)
  side = np.max(pair.second_box[2:] - pair.second_box[:2]) / pair.second_side
  return np.linalg.norm(predicted - true_points / size, axis=-1) / side


def uniform_pck(
  pair: KeyPointPair, *, grid: int, size: int, rule: PckRule
) -> Float64[np.ndarray, " k"]:
  """Chance: fraction of all patches that would be correct, per keypoint."""
  cells = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1)
  cells = cells.reshape(-1, 1, 2) / grid
  count = len(pair.second_points)
  errors = transfer_errors(np.repeat(cells, count, axis=1), pair, size=size)
  return rule.correct(errors).mean(axis=0)


def sample_pairs(
  pairs: Sequence[KeyPointPair], *, limit: int, seed: int
) -> dict[tuple[str, int | None], tuple[int, ...]]:
  """Samples pairs per category, and per category and viewpoint.

  Pairs are shuffled by Python's `random`, reseeded per group, and the first
  `limit` taken (published: 200, seed 20). Empty viewpoints are omitted.
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


def average_pck(
  sample: Sample,
  correct: Mapping[int, np.ndarray],
  *,
  rule: PckRule,
  report: str = "means",
) -> Estimate:
  """Category means, overall and by viewpoint; standard errors resample pairs.

  `correct` maps pairs to values of `PckRule.correct` or `uniform_pck`;
  `report="classes"` adds the recall of each category.
  """
  pairs = _pairs_in(sample)
  terms = np.array([rule.terms(correct[i]) for i in pairs])
  rows = {key: np.searchsorted(pairs, m) for key, m in sample.items()}

  def metrics(weights):
    sums = {key: weights[row] @ terms[row] for key, row in rows.items()}
    means = {key: s / count for key, (s, count) in sums.items() if count}
    by_view = {}
    for view in (None, *VIEWPOINTS):
      if values := [x for key, x in means.items() if key[1] == view]:
        by_view[view] = float(np.mean(values))
    results = {
      "recall" if view is None else f"recall_view{view}": value
      for view, value in by_view.items()
    }
    if len(by_view) > 1:
      views = [x for view, x in by_view.items() if view is not None]
      results["avg_recall_views"] = float(np.mean(views))
    if report == "classes":
      results |= {f"recall_{c}": x for (c, v), x in means.items() if v is None}
    return results

  return bootstrap.estimate(metrics, len(pairs))


# Images with features in memory: 1.3 GB for ViT-L at 50 x 50 patches.
_MAX_IMAGES = 128
_PAIRS_PER_CLASS = 200  # limit per class and viewpoint


@dataclasses.dataclass(frozen=True)
class SemanticCorrespondence(CorrespondenceEvaluator):
  """Keypoint recall (PCK), by class and by viewpoint difference.

  `data` is `scenes` or the folder `SPair-71k`; the published `size` is 800.
  None means the published value for SPair-71k, or a value for the coarser grid
  of scenes, which the result's protocol lists.

  Attributes:
    split: split of SPair-71k.
    threshold: largest error, as a fraction of the longer side of the box.
    aggregate: see `PckRule`.
    seed: seed of the sample of pairs, see `sample_pairs`.
    report: `means`, or `classes` to add the recall of each class.
    count: number of scenes to render.
  """

  split: Literal["trn", "val", "test"] = "test"
  threshold: float | None = None
  aggregate: Literal["point", "image"] = "point"
  seed: int = 20
  report: Literal["means", "classes"] = "means"
  count: PositiveInt = 120

  @functools.cached_property
  def _set(self) -> tuple[KeyPointPairs, Sample]:
    options = {"split": self.split, "count": self.count}
    data = registry.open_key_points(self.data, **options)
    sample = sample_pairs(data.pairs, limit=_PAIRS_PER_CLASS, seed=self.seed)
    if not any(len(data.pairs[i].first_points) for i in _pairs_in(sample)):
      raise InputError(
        f"{data.name}: none of its {len(data.pairs)} pairs has a keypoint "
        "that both images show"
      )
    return data, sample

  def run(self, encoder: Encoder) -> Result:
    """Returns class means, overall and by viewpoint, and chance."""
    data, sample = self._set
    encoder = self._with_image_mean(encoder)
    grid = self._resolve_grid(encoder, data.layout)
    pairs = _pairs_in(sample)
    sheet_pairs = (
      examples.subsample(pairs, self.pictures) if self.pictures else []
    )
    correct, chance, rows = {}, {}, []
    for i, predicted in self._transfer_pairs(encoder, data, pairs, grid):
      pair = data.pairs[i]
      errors = transfer_errors(predicted, pair, size=grid.size)
      correct[i] = grid.rule.correct(errors)
      chance[i] = uniform_pck(
        pair, grid=grid.patches, size=grid.size, rule=grid.rule
      )
      if i in sheet_pairs:
        rows.append(_draw_pair(data, pair, predicted, correct[i], grid.size))
    estimate, chance = (
      average_pck(sample, x, rule=grid.rule, report=self.report)
      for x in (correct, chance)
    )
    return Result.from_estimate(
      estimate,
      self._protocol(encoder, data, sample, grid),
      chance.metrics,
      sheets=self._draw_sheets(rows),
    )

  def _resolve_grid(self, encoder: Encoder, layout: str) -> _Grid:
    patch, scenes = encoder.spec.image.patch_size, layout == "scenes"
    size = self._input_size(encoder, 16 * patch if scenes else 800)
    # A patch is 1/16 of a scene's side; an object is about 0.4 of it.
    default = 0.25 if scenes else 0.1
    threshold = default if self.threshold is None else self.threshold
    return _Grid(size, -(-size // patch), PckRule(self.aggregate, threshold))

  def _transfer_pairs(
    self, encoder: Encoder, data: KeyPointPairs, pairs: list[int], grid: _Grid
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields index and predicted points of each pair, grouped by class.

    Points are fractions of the square's side.
    """
    for group in _group_by_class(data, pairs):
      indices = sorted(_list_images(data, group))

      def read(k: int, indices=indices) -> np.ndarray:
        return pad_to_square(data.images[indices[k]], grid.size)

      squares = examples.LazySequence(read, len(indices))
      maps = jnp.asarray(normalize(self._encode(encoder, squares)))
      for i in group:
        pair = data.pairs[i]
        first, second = map(indices.index, (pair.first, pair.second))
        points = points_in_square(pair.first_points, pair.first_side, grid.size)
        cells = transfer_points(maps, first, second, points / grid.size)
        yield i, cells / grid.patches

  def _protocol(
    self, encoder: Encoder, data: KeyPointPairs, sample: Sample, grid: _Grid
  ) -> dict[str, Any]:
    counts = {"all": 0} | {str(view): 0 for view in VIEWPOINTS}
    for (_, view), members in sample.items():
      counts["all" if view is None else str(view)] += len(members)
    return {
      **self._common_protocol(
        encoder,
        grid.size,
        crop="none: padded with white to a square first",
        interpolation="bicubic, antialiased (Pillow)",
      ),
      "data": data.name,
      "data_hash": data.digest,
      **data.metadata,
      "pairs": counts,
      "classes": len({key[0] for key in sample}),
      "points": sum(len(data.pairs[i].first_points) for i in _pairs_in(sample)),
      "pairs_per_class": _PAIRS_PER_CLASS,
      "pair_seed": self.seed,
      "grid": [grid.patches, grid.patches],
      "sampling": "bilinear, align_corners=True; keypoints rounded down to "
      "pixels of the input",
      "found_at": "the patch's upper left corner",
      "ties": "first patch in the order of rows",
      "threshold": grid.rule.threshold,
      "threshold_of": "the longer side of the second image's box",
      "right_if": "<" if self.aggregate == "point" else "<=",
      "aggregate": self.aggregate,
      "averaging": "over keypoints (aggregate=point) or pairs (image) of a "
      "class, then over classes with a point",
      "chance": "a uniform patch",
    }


class _Grid(NamedTuple):
  """Side of the square, patches per side, and when a keypoint is correct."""

  size: int
  patches: int
  rule: PckRule


def _pairs_in(sample: Sample) -> list[int]:
  return sorted(set().union(*sample.values()))


def _list_images(data: KeyPointPairs, pairs: Sequence[int]) -> set[int]:
  pairs = [data.pairs[i] for i in pairs]
  return {p.first for p in pairs} | {p.second for p in pairs}


def _group_by_class(data: KeyPointPairs, pairs: list[int]) -> list[list[int]]:
  """Groups pairs by whole classes, up to `_MAX_IMAGES` images if possible."""
  by_class = collections.defaultdict(list)
  for i in pairs:
    by_class[data.pairs[i].category].append(i)
  groups = [[]]
  for members in by_class.values():
    images = _list_images(data, groups[-1] + members)
    if groups[-1] and len(images) > _MAX_IMAGES:
      groups.append([])
    groups[-1] += members
  return groups


def _draw_pair(data, pair, predicted, correct, size: int) -> np.ndarray:
  """Draws keypoints and their predictions, coloured by correctness."""
  points = points_in_square(pair.first_points, pair.first_side, size)
  return plots.draw_matches(
    *(pad_to_square(data.images[i], size) for i in (pair.first, pair.second)),
    points[:, ::-1].astype(np.int64),
    np.floor(predicted[:, ::-1] * size).astype(np.int64),
    correct=correct > 0,
  )
