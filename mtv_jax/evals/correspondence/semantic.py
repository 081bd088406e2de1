"""Semantic correspondence: is a point of a thing found in another of its kind?

For each key point of one picture, the most similar patch of the other is taken
for its counterpart (SPair-71k, Min et al. 2019, in Probe3D's protocol, El
Banani et al. 2024). Pictures are padded to squares and brought to one size, on
which there is a grid of G x G normalised patch features:

    descriptor = bilinear sample of the first grid, corners on corners
    found      = (column, row) / G of the patch with the highest dot product
    error      = |found - true| / (longer side of the thing's box)
    right      = error < 0.1

with places and sides as shares of the padded square's side. The corner of the
patch and not its middle is compared, as the published figures are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.core import base, examples
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import Data, KeyPointPair, KeyPointPairs
from mtv_jax.evals.correspondence import matching, pck
from mtv_jax.evals.datasets import registry, spair
from mtv_jax.utils import plots
from mtv_jax.utils.errors import check_choice

_REPORTS = ("means", "classes")
# Pictures whose features are held at a time: 1.3 GB of ViT-L's at 50 x 50.
_HELD = 128


@dataclasses.dataclass(frozen=True)
class SemanticCorrespondence(Evaluator):
  """Recall of key points (PCK), by class and by difference of viewpoint.

  Options of None take the published value for SPair-71k, or one that suits the
  scenes, whose grid is coarser; the protocol says which.

  Attributes:
    data: `scenes` (see `datasets/scenes.py`) or the folder `SPair-71k`.
    split: of SPair-71k: `trn`, `val` or `test`.
    size: side of the squares that are encoded; 800, or what keeps its 50 x 50
      grid where the patch does not divide it.
    layer: the block whose patch tokens are compared; -1 is the last.
    norm: `none` takes them before the final norm, `final` after it.
    threshold: of the error, a share of the longer side of the thing's box.
    aggregate: `point` or `image`, see `pck.Rule`.
    per_class: pairs of a class and a viewpoint at most.
    seed: of their choice, see `pck.choose`.
    report: `means`, or `classes` for the recall of each class too.
    count: of the scenes, how many to render.
    batch_size: images a step.
    pictures: how many pairs a sheet shows.
  """

  data: Data = "scenes"
  split: str = "test"
  size: int | None = None
  layer: int = -1
  norm: str = "none"
  threshold: float | None = None
  aggregate: str = "point"
  per_class: int = 200
  seed: int = 20
  report: str = "means"
  count: int = 120
  batch_size: int = 16
  pictures: int = 0

  def __post_init__(self):
    check_choice("semantic: split", self.split, spair.SPLITS)
    check_choice("semantic: norm", self.norm, matching.NORMS)
    check_choice("semantic: aggregate", self.aggregate, pck.AGGREGATES)
    check_choice("semantic: report", self.report, _REPORTS)
    matching.check_counts(
      "semantic",
      size=self.size,
      per_class=self.per_class,
      count=self.count,
      batch_size=self.batch_size,
    )

  @functools.cached_property
  def _set(self) -> tuple[KeyPointPairs, pck.Chosen]:
    data = registry.open_key_points(
      self.data, split=self.split, count=self.count
    )
    chosen = pck.choose(data.pairs, limit=self.per_class, seed=self.seed)
    if not any(len(data.pairs[i].first_points) for i in _used(chosen)):
      raise ValueError(
        f"{data.name}: none of its {len(data.pairs)} pairs has a key point "
        "that both pictures show"
      )
    return data, chosen

  def prepare(self) -> None:
    """Reads the annotations, and keeps them."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """Means over the classes, for all pairs and by viewpoint, and chance."""
    data, chosen = self._set
    setting = self._setting(encoder, data.layout)
    used = _used(chosen)
    shown = examples.subsample(used, self.pictures) if self.pictures else []
    right, chance, sheet = {}, {}, []
    for i, cells in self._found(encoder, data, used, setting):
      pair = data.pairs[i]
      places = cells / setting.grid
      right[i] = setting.rule.right(
        pck.errors_of(places, pair, size=setting.size)
      )
      chance[i] = pck.chances(
        pair, grid=setting.grid, size=setting.size, rule=setting.rule
      )
      if i in shown:
        sheet.append(_picture(data, pair, places, right[i], setting.size))
    average = functools.partial(
      pck.figures, chosen, rule=setting.rule, report=self.report
    )
    return Result(
      average(right),
      self._protocol(encoder, data, chosen, setting),
      average(chance),
      pictures={"matches": np.concatenate(sheet)} if sheet else {},
    )

  def _setting(self, encoder: Encoder, layout: str) -> _Setting:
    patch = encoder.spec.image.patch_size
    scenes = layout == "scenes"
    size = matching.input_size(
      encoder, self.size, published=16 * patch if scenes else 800
    )
    threshold = self.threshold
    if threshold is None:
      # A patch is 1/16 of a scene's side, and a thing about 0.4.
      threshold = 0.25 if scenes else 0.1
    return _Setting(size, size // patch, pck.Rule(self.aggregate, threshold))

  def _found(
    self,
    encoder: Encoder,
    data: KeyPointPairs,
    used: Sequence[int],
    setting: _Setting,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Each pair's number and the patches found, some classes at a time."""
    for group in _groups(data, used):
      numbers = sorted(
        {k for i in group for k in (data.pairs[i].first, data.pairs[i].second)}
      )
      images = examples.select_images(data.images, numbers)
      squares = examples.Images(
        lambda k, images=images: pck.square(images[k], setting.size),
        len(images),
      )
      maps = matching.patch_features(
        encoder,
        squares,
        layer=self.layer,
        norm=self.norm,
        batch_size=self.batch_size,
      )
      placed = jnp.asarray(normalize(maps))
      place = {number: k for k, number in enumerate(numbers)}
      for i in group:
        pair = data.pairs[i]
        points = pck.scaled(
          pair.first_points, side=pair.first_side, size=setting.size
        )
        yield (
          i,
          pck.find_in(
            placed, place[pair.first], place[pair.second], points / setting.size
          ),
        )

  def _protocol(
    self,
    encoder: Encoder,
    data: KeyPointPairs,
    chosen: pck.Chosen,
    setting: _Setting,
  ) -> dict[str, Any]:
    used = _used(chosen)
    by_view = {
      "all" if view is None else str(view): sum(
        len(members) for key, members in chosen.items() if key[1] == view
      )
      for view in (None, *pck.VIEWPOINTS)
    }
    return {
      **encoder.protocol(),
      "data": data.name,
      "data_hash": data.digest,
      "dataset": {"spair": "SPair-71k", "scenes": "scenes"}[data.layout],
      **data.about,
      "pairs": by_view,
      "classes": len({key[0] for key in chosen}),
      "points": sum(len(data.pairs[i].first_points) for i in used),
      "pairs_per_class": self.per_class,
      "pair_seed": self.seed,
      "input_size": [setting.size, setting.size],
      "preprocess": base.preprocess_protocol(
        encoder,
        resize="squash",
        size=setting.size,
        crop="none: padded with white to a square first",
        interpolation="bicubic, antialiased (Pillow)",
      ),
      "grid": [setting.grid, setting.grid],
      "layer": self.layer,
      "final_norm": self.norm == "final",
      "similarity": matching.SIMILARITY,
      "sampling": "bilinear, align_corners=True; key points rounded down to "
      "pixels of the input",
      "found_at": "the patch's upper left corner",
      "ties": "first patch in the order of rows",
      "threshold": setting.rule.threshold,
      "threshold_of": "the longer side of the second picture's box",
      "right_if": "<" if self.aggregate == "point" else "<=",
      "aggregate": self.aggregate,
      "averaging": "over key points (aggregate=point) or pairs (image) of a "
      "class, then over classes with a point",
      "chance": "a uniform patch",
    }


@dataclasses.dataclass(frozen=True)
class _Setting:
  """Side of the squares, patches along it, and what is right."""

  size: int
  grid: int
  rule: pck.Rule


def _used(chosen: pck.Chosen) -> list[int]:
  return sorted({i for members in chosen.values() for i in members})


def _groups(data: KeyPointPairs, used: Sequence[int]) -> Iterator[list[int]]:
  """The pairs of as many classes as `_HELD` pictures allow, at least one."""
  by_class: dict[str, list[int]] = {}
  for i in used:
    by_class.setdefault(data.pairs[i].category, []).append(i)
  group, held = [], set()
  for members in by_class.values():
    more = {
      k for i in members for k in (data.pairs[i].first, data.pairs[i].second)
    }
    if group and len(held | more) > _HELD:
      yield group
      group, held = [], set()
    group, held = group + members, held | more
  if group:
    yield group


def _picture(data, pair: KeyPointPair, places, right, size: int) -> np.ndarray:
  """The key points and where they were found: green if right, else red."""
  starts = pck.scaled(pair.first_points, side=pair.first_side, size=size)
  return plots.draw_scored_matches(
    pck.square(data.images[pair.first], size),
    pck.square(data.images[pair.second], size),
    starts[:, ::-1].astype(np.int64),
    np.floor(places[:, ::-1] * size).astype(np.int64),
    right > 0,
  )
