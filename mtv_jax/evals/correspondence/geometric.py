"""Geometric correspondence: do features find the same point of a thing again?

Descriptors of one view are matched to another's, and a match is right if the
two points that it joins are near each other in space, by depth and pose. The
protocol is NAVI's in Probe3D (El Banani et al. 2024), on NAVI, on RGB-D
sequences and on the built-in scenes:

    recall at t = share of matches whose error is below t, of the 1,000
                  heaviest of every pair
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import base, examples
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import Data
from mtv_jax.evals.correspondence import match_errors, matching
from mtv_jax.evals.datasets import (
  navi,
  posed,
  registry,
)
from mtv_jax.utils import plots
from mtv_jax.utils.errors import check_choice

_CHUNK = 32  # pairs whose views and features are held at a time


@dataclasses.dataclass(frozen=True)
class _Published:
  """What an option of None stands for."""

  patches: int | None
  size: int
  keep: int
  metres: tuple[float | int, ...]
  angles: tuple[float | int, ...]
  stride: int
  count: int | None
  why: str


_PUBLISHED = {
  "navi": _Published(
    patches=None,
    size=512,
    keep=1000,
    metres=(0.01, 0.02, 0.05),
    angles=(0, 30, 60, 90, 120),
    stride=4,
    count=None,
    why="Probe3D's",
  ),
  "rgbd": _Published(
    patches=None,
    size=512,
    keep=1000,
    metres=(0.01, 0.02, 0.05),
    angles=(0, 30, 60, 90, 120),
    stride=1,
    count=1000,
    why="NAVI's; a cell of the grid is about 1 cm wide at 2 m",
  ),
  # Things are 0.5 to 1.3 m tall where NAVI's are 0.1 to 0.3, so that the same
  # shares of a thing are five times as long; a view has 32 x 32 cells and some
  # hundred points where NAVI's have 128 x 128.
  "scenes": _Published(
    patches=16,
    size=0,
    keep=100,
    metres=(0.05, 0.1, 0.25),
    angles=(0, 15, 30, 45),
    stride=2,
    count=48,
    why="five times NAVI's, as the things are about five times as large",
  ),
}


@dataclasses.dataclass(frozen=True)
class _Set:
  """The frames, the pairs of them, where those came from, and their hash."""

  frames: posed.PosedFrames
  drawn: posed.Drawn
  source: str  # "drawn" or "file"
  digest: str


@dataclasses.dataclass(frozen=True)
class _Encoded:
  """A pair by its place, and its two views with their features, if any."""

  place: int
  pair: posed.Pair
  views: tuple[posed.View, posed.View] | None
  maps: Float32[np.ndarray, "2 h w d"] | None


@dataclasses.dataclass(frozen=True)
class GeometricCorrespondence(Evaluator):
  """Recall of matches between views of one thing, by distance and by angle.

  Options of None take the published value for NAVI, or one that suits the other
  data; the protocol says which.

  Attributes:
    data: `scenes` (see `datasets/scenes.py`), a folder in NAVI's layout, or one
      of RGB-D sequences.
    pairs: a file with the list of pairs: read if it exists (NAVI's own lists
      too), else written with the pairs that are drawn.
    subset: of NAVI: `wild_set` or `multiview`.
    size: side of the view that is encoded; 512, or what keeps its 32 x 32 grid
      where the patch does not divide it.
    layer: the block whose patch tokens are matched; -1 is the last.
    norm: `none` takes them before the final norm, `final` after it.
    keep: matches a pair, those with the heaviest ratio of distances.
    metres: thresholds of the 3D error. The middle one is used by angle.
    pixels: thresholds of the 2D error, in pixels of a view of 512.
    angles: edges of the bins of the angle between the cameras, in degrees.
    max_angle: of a pair.
    stride: every how many frames begin a pair.
    count: pairs to use, evenly spaced; of the scenes, how many to render.
    seed: of the pairs.
    batch_size: images a step.
    pictures: how many pairs a sheet shows.
  """

  data: Data = "scenes"
  pairs: str | None = None
  subset: str = "wild_set"
  size: int | None = None
  layer: int = -1
  norm: str = "none"
  keep: int | None = None
  metres: tuple[float | int, ...] | None = None
  pixels: tuple[float | int, ...] = (5, 25, 50)
  angles: tuple[float | int, ...] | None = None
  max_angle: float | int = 120.0
  stride: int | None = None
  count: int | None = None
  seed: int = 8
  batch_size: int = 16
  pictures: int = 0

  def __post_init__(self):
    check_choice("geometric: norm", self.norm, matching.NORMS)
    check_choice("geometric: subset", self.subset, navi.SUBSETS)
    matching.check_counts(
      "geometric",
      size=self.size,
      keep=self.keep,
      stride=self.stride,
      count=self.count,
      batch_size=self.batch_size,
    )
    for name in ("metres", "pixels", "angles"):
      values = getattr(self, name)
      if values is not None and (
        len(values) == 0 or list(values) != sorted(set(values))
      ):
        raise ValueError(
          f"geometric: {name}={values}; expected increasing numbers"
        )

  @functools.cached_property
  def _set(self) -> _Set:
    frames = registry.open_posed(
      self.data, subset=self.subset, count=self._scenes
    )
    default = _PUBLISHED[frames.layout]
    count = self.count or default.count
    if self.pairs and pathlib.Path(self.pairs).is_file():
      pairs = examples.subsample(
        posed.read_pairs(self.pairs, frames), self.count
      )
      drawn, source = posed.Drawn(tuple(pairs), 0), "file"
    else:
      source = "drawn"
      drawn = posed.draw_pairs(
        frames,
        seed=self.seed,
        stride=self.stride or default.stride,
        count=count,
        max_angle=self.max_angle,
      )
      if self.pairs and jax.process_index() == 0:
        posed.write_pairs(self.pairs, frames, drawn.pairs)
    digest = posed.digest_of(frames, drawn.pairs)
    return _Set(frames, drawn, source, digest)

  @property
  def _scenes(self) -> int:
    return self.count or _PUBLISHED["scenes"].count

  def prepare(self) -> None:
    """Reads annotations and draws the pairs, and keeps them."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """Recalls, pooled over pairs and by angle, and what chance would give.

    Raises:
      ValueError: where no pair has points in both views.
    """
    frames, drawn = self._set.frames, self._set.drawn
    options = self._resolved(encoder, frames.layout)
    shown = examples.subsample(range(len(drawn.pairs)), self.pictures or 1)
    scored, sheet = [], []
    for seen in self._encoded(encoder, options.size):
      if seen.views is None:
        continue
      found = match_errors.score(seen.maps, seen.views, options=options)
      scored.append(dataclasses.replace(found, angle=seen.pair.angle))
      if self.pictures and seen.place in shown:
        sheet.append(_picture(seen.views, found, options.metres))
    if not scored:
      raise ValueError(
        f"{frames.name}: none of {len(drawn.pairs)} pairs has depth in both "
        "views"
      )
    metrics, chance = match_errors.summarise(scored, options=options)
    return Result(
      metrics,
      self._protocol(encoder, options, scored),
      chance,
      pictures={"matches": np.concatenate(sheet)} if sheet else {},
    )

  def _resolved(self, encoder: Encoder, layout: str) -> match_errors.Options:
    default = _PUBLISHED[layout]
    published = default.size
    if default.patches:
      published = default.patches * encoder.spec.image.patch_size
    return match_errors.Options(
      size=matching.input_size(encoder, self.size, published=published),
      keep=self.keep or default.keep,
      metres=tuple(self.metres or default.metres),
      pixels=tuple(self.pixels),
      angles=tuple(self.angles or default.angles),
    )

  def _encoded(self, encoder: Encoder, size: int) -> Iterator[_Encoded]:
    """All pairs in order; without views where one has too few points."""
    frames, drawn = self._set.frames, self._set.drawn

    def views_of(pair: posed.Pair) -> tuple[posed.View, posed.View] | None:
      made = tuple(
        posed.make_view(frames.read(i, size), size=size, stored=frames.stored)
        for i in (pair.first, pair.second)
      )
      # The second nearest must exist.
      whole = all(v is not None and v.valid.sum() >= 2 for v in made)
      return made if whole else None

    place = itertools.count()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for start in range(0, len(drawn.pairs), _CHUNK):
        chunk = drawn.pairs[start : start + _CHUNK]
        views = list(pool.map(views_of, chunk))
        images = [v.image for both in views if both for v in both]
        maps = iter(())
        if images:
          found = matching.patch_features(
            encoder,
            images,
            layer=self.layer,
            norm=self.norm,
            batch_size=self.batch_size,
          )
          maps = iter(found.reshape(-1, 2, *found.shape[1:]))
        for pair, both in zip(chunk, views, strict=True):
          yield _Encoded(next(place), pair, both, next(maps) if both else None)

  def _protocol(
    self,
    encoder: Encoder,
    options: match_errors.Options,
    scored: Sequence[match_errors.Scored],
  ) -> dict[str, Any]:
    frames, drawn = self._set.frames, self._set.drawn
    default = _PUBLISHED[frames.layout]
    names = match_errors.names_of(options)
    angles = np.array([s.angle for s in scored])
    return {
      **encoder.protocol(),
      "data": frames.name,
      "data_hash": self._set.digest,
      "dataset": {"navi": "NAVI", "rgbd": "RGB-D", "scenes": "scenes"}[
        frames.layout
      ],
      **frames.about,
      "pairs": len(scored),
      "pairs_without_points": len(drawn.pairs) - len(scored),
      "pairs_by_angle": {
        f"{low:g}-{high:g}": int(((angles >= low) & (angles < high)).sum())
        for low, high in itertools.pairwise(options.angles)
      },
      **self._drawing(),
      "pair_list": self.pairs and pathlib.PurePath(self.pairs).name,
      "input_size": [options.size, options.size],
      "preprocess": base.preprocess_protocol(
        encoder,
        resize="squash",
        size=options.size,
        crop="square around the depth",
        interpolation="nearest",
      ),
      "stored_size": frames.stored,
      "layer": self.layer,
      "final_norm": self.norm == "final",
      "upsampling": f"bicubic a=-0.75 to {options.size // posed.CELL} cells",
      "similarity": matching.SIMILARITY,
      "matches": options.keep,
      "matches_kept": int(sum(len(s.metres) for s in scored)),
      "weight": "1 - d1 / d2, distances at least 1e-9",
      "ties": matching.TIE_RULE,
      "metres": list(options.metres),
      "metres_are": default.why if self.metres is None else "given",
      "pixels": list(options.pixels),
      "pixels_of": match_errors.PIXELS_OF,
      "averaging": "over all matches of all pairs; by angle and per pair over "
      "pairs",
      "avg_recall": f"mean of {', '.join(names.metres)}",
      "avg_recall_pixel": f"mean of {', '.join(names.pixels)}",
      "avg_recall_all": "mean of the thresholds in metres and in pixels",
      "avg_recall_angle": "mean of the bins of angle that have pairs",
      "chance": "a uniform match, averaged over "
      f"{match_errors.CHANCE_POINTS} points a pair",
    }

  def _drawing(self) -> dict[str, Any]:
    """How pairs were drawn; of a list that was read nobody here knows it."""
    if self._set.source == "file":
      return {"pairs_are": "read from the list"}
    default = _PUBLISHED[self._set.frames.layout]
    return {
      "pairs_are": "drawn",
      "frames_without_partner": self._set.drawn.alone,
      "pair_seed": self.seed,
      "max_angle": self.max_angle,
      "stride": self.stride or default.stride,
    }


def _picture(
  views, scored: match_errors.Scored, metres: Sequence[float]
) -> np.ndarray:
  """24 matches from the heaviest to the last: green if right, else red."""
  kept = scored.matches
  chosen = examples.subsample(range(len(kept.first)), 24)
  right = scored.metres[chosen] < metres[len(metres) // 2]
  return plots.draw_scored_matches(
    views[0].image,
    views[1].image,
    kept.first[chosen] * posed.CELL,
    kept.second[chosen] * posed.CELL,
    right,
  )
