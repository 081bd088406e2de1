"""Semantic correspondence: keypoint transfer between objects of a category.

Each keypoint of one image is transferred to the most similar patch of the other
(SPair-71k, Min et al. 2019, in Probe3D's protocol, El Banani et al. 2024).
Images are padded to squares and resized; on them is a grid of G x G normalised
patch features:

    descriptor = bilinear sample of the first grid, corners aligned
    predicted  = (column, row) / G of the patch with the highest dot product
    error      = |predicted - true| / (longer side of the object's box)
    correct    = error < 0.1

with positions and sides as fractions of the padded square's side. As in the
published protocol, the corner of the patch is compared, not its centre.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import KeyPointPair, KeyPointPairs
from mtv_jax.evals.correspondence import pck
from mtv_jax.evals.correspondence.base import CorrespondenceEvaluator
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

# Images with features in memory at a time: 1.3 GB of ViT-L's at 50 x 50.
_MAX_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class SemanticCorrespondence(CorrespondenceEvaluator):
  """Recall of keypoints (PCK), by class and by difference of viewpoint.

  `data` is `scenes` or the folder `SPair-71k`; the published `size` is 800.
  None means the published value for SPair-71k, and for scenes, whose grid is
  coarser, one that the result's protocol lists.

  Attributes:
    split: split of SPair-71k.
    threshold: largest error, as a fraction of the longer side of the box.
    aggregate: see `pck.Rule`.
    per_class: the most pairs of a class and a viewpoint.
    seed: seed of their sample, see `pck.sample_pairs`.
    report: `means`, or `classes` for the recall of each class too.
    count: number of scenes to render.
  """

  split: Literal["trn", "val", "test"] = "test"
  threshold: float | None = None
  aggregate: Literal["point", "image"] = "point"
  per_class: PositiveInt = 200
  seed: int = 20
  report: Literal["means", "classes"] = "means"
  count: PositiveInt = 120

  @functools.cached_property
  def _set(self) -> tuple[KeyPointPairs, pck.Sample]:
    data = registry.open_key_points(
      self.data, split=self.split, count=self.count
    )
    sample = pck.sample_pairs(data.pairs, limit=self.per_class, seed=self.seed)
    if not any(len(data.pairs[i].first_points) for i in _pairs_in(sample)):
      raise InputError(
        f"{data.name}: none of its {len(data.pairs)} pairs has a keypoint "
        "that both images show"
      )
    return data, sample

  def run(self, encoder: Encoder) -> Result:
    """Means over the classes, of all pairs and by viewpoint, and chance."""
    data, sample = self._set
    encoder = self._with_mean(encoder)
    grid = self._grid(encoder, data.layout)
    pairs = _pairs_in(sample)
    chosen = examples.subsample(pairs, self.pictures) if self.pictures else []
    correct, chance, rows = {}, {}, []
    for i, predicted in self._transfer(encoder, data, pairs, grid):
      pair = data.pairs[i]
      errors = pck.transfer_errors(predicted, pair, size=grid.size)
      correct[i] = grid.rule.correct(errors)
      chance[i] = pck.uniform_pck(
        pair, grid=grid.patches, size=grid.size, rule=grid.rule
      )
      if i in chosen:
        rows.append(_draw_pair(data, pair, predicted, correct[i], grid.size))
    average = functools.partial(
      pck.average, sample, rule=grid.rule, report=self.report
    )
    estimate = average(correct)
    return Result(
      estimate.metrics,
      self._protocol(encoder, data, sample, grid),
      average(chance).metrics,
      errors=estimate.errors,
      resamples=estimate.resamples,
      sheets=self._draw_sheets(rows),
    )

  def _grid(self, encoder: Encoder, layout: str) -> _Grid:
    patch, scenes = encoder.spec.image.patch_size, layout == "scenes"
    size = self._input_size(encoder, 16 * patch if scenes else 800)
    threshold = self.threshold
    if threshold is None:
      # A patch is 1/16 of a scene's side, and an object about 0.4.
      threshold = 0.25 if scenes else 0.1
    return _Grid(size, -(-size // patch), pck.Rule(self.aggregate, threshold))

  def _transfer(
    self,
    encoder: Encoder,
    data: KeyPointPairs,
    pairs: Sequence[int],
    grid: _Grid,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Index and predicted points of each pair, some classes at a time.

    Points are fractions of the square's side.
    """
    for group in _group_by_class(data, pairs):
      indices = _images_of(data, group)
      squares = examples.Images(
        lambda k, indices=indices: pck.pad_to_square(
          data.images[indices[k]], grid.size
        ),
        len(indices),
      )
      maps = jnp.asarray(normalize(self._features(encoder, squares)))
      for i in group:
        pair = data.pairs[i]
        points = pck.source_points(pair, size=grid.size) / grid.size
        first, second = map(indices.index, (pair.first, pair.second))
        cells = pck.transfer_points(maps, first, second, points)
        yield i, cells / grid.patches

  def _protocol(
    self,
    encoder: Encoder,
    data: KeyPointPairs,
    sample: pck.Sample,
    grid: _Grid,
  ) -> dict[str, Any]:
    counts = {"all": 0} | {str(view): 0 for view in pck.VIEWPOINTS}
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
      "pairs_per_class": self.per_class,
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


@dataclasses.dataclass(frozen=True)
class _Grid:
  """Side of the square, patches along it, and the rule of a correct match."""

  size: int
  patches: int
  rule: pck.Rule


def _pairs_in(sample: pck.Sample) -> list[int]:
  return sorted(set().union(*sample.values()))


def _images_of(data: KeyPointPairs, pairs: Sequence[int]) -> list[int]:
  pairs = [data.pairs[i] for i in pairs]
  return sorted({p.first for p in pairs} | {p.second for p in pairs})


def _group_by_class(
  data: KeyPointPairs, pairs: Sequence[int]
) -> Iterator[list[int]]:
  """Groups of whole classes with up to `_MAX_IMAGES` images if possible."""
  by_class: dict[str, list[int]] = {}
  for i in pairs:
    by_class.setdefault(data.pairs[i].category, []).append(i)
  group, images = [], set()
  for members in by_class.values():
    more = set(_images_of(data, members))
    if group and len(images | more) > _MAX_IMAGES:
      yield group
      group, images = [], set()
    group, images = group + members, images | more
  if group:
    yield group


def _draw_pair(
  data: KeyPointPairs,
  pair: KeyPointPair,
  predicted: np.ndarray,
  correct: np.ndarray,
  size: int,
) -> np.ndarray:
  """Keypoints joined to their predictions, coloured by correctness."""
  return plots.draw_matches(
    pck.pad_to_square(data.images[pair.first], size),
    pck.pad_to_square(data.images[pair.second], size),
    pck.source_points(pair, size=size)[:, ::-1].astype(np.int64),
    np.floor(predicted[:, ::-1] * size).astype(np.int64),
    correct=correct > 0,
  )
