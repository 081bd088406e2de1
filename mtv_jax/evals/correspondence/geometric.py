"""Geometric correspondence: feature matches between posed views.

Patch features of two views are matched. A match is correct if the 3D points of
its cells, from depth and camera pose, are close. The protocol is NAVI's in
Probe3D (El Banani et al. 2024), on NAVI, RGB-D sequences and the built-in
scenes:

    error_3d = |R x_0 + t - x_1|,  in metres
    error_2d = |pi(R x_0 + t) - pi(x_1)|,  in pixels of a 512 x 512 view
    recall at t = fraction of matches with error < t, among the 1,000 matches
                  of highest weight per pair

With d1 and d2 the cosine distances to the two nearest descriptors of the second
view, the weight of a match is 1 - d1 / d2 (Lowe 2004).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import bootstrap, examples, ranking, resizing
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.correspondence.correspondence_evaluator import (
  CorrespondenceEvaluator,
)
from mtv_jax.evals.datasets import posed, registry
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils import plots
from mtv_jax.utils.errors import ConfigError, InputError

TIE_RULE = "nearest: lowest index; matches: highest weight, then lowest index"
MIN_DISTANCE = 1e-9
_MAX_QUERIES = 1024  # on the device at a time


class PatchMatches(NamedTuple):
  """k matches of cells (row, column), by decreasing weight."""

  first: Int[np.ndarray, "k 2"]
  second: Int[np.ndarray, "k 2"]
  weight: Float[np.ndarray, " k"]  # 0 (equal distances) to 1


def match(
  first: Float32[np.ndarray, "h w d"],
  second: Float32[np.ndarray, "h2 w2 d"],
  *,
  first_valid: Bool[np.ndarray, "s t"],
  second_valid: Bool[np.ndarray, "s2 t2"],
  keep: int,
) -> PatchMatches:
  """The `keep` highest-weight matches between two token maps.

  Features are upsampled to the cells (bicubic, a = -0.75, half-pixel centres,
  as in torch) and normalised. Every valid cell of the first map has one match;
  a cell of the second may have many.
  """
  queries = np.asarray(_upsample(first, first_valid.shape))[first_valid]
  index, distance = two_nearest(queries, second, valid=second_valid)
  weight = ratio_weights(distance)
  # Stable: ties go to the lowest index.
  order = np.argsort(-weight, kind="stable")[:keep]
  cells = np.unravel_index(index[order, 0], second_valid.shape)
  first_cells = np.argwhere(first_valid)[order]
  return PatchMatches(first_cells, np.column_stack(cells), weight[order])


def two_nearest(
  queries: Float32[np.ndarray, "n d"],
  candidates: Float32[np.ndarray, "h w d"],
  *,
  valid: Bool[np.ndarray, "s t"],
  block_bytes: int = 2**22,
) -> tuple[Int[np.ndarray, "n 2"], Float32[np.ndarray, "n 2"]]:
  """The two valid cells with the highest cosine in an upsampled map.

  Returns row-major indices and cosine distances (0 to 2), nearest first. Ties
  go to the lowest index. A zero vector has distance 1 to every vector. Inputs
  need not be normalised. `block_bytes` limits a block of similarities.
  """
  ranking.check_finite(queries=queries, candidates=candidates)
  if (count := valid.sum()) < 2:
    raise InputError(f"{count} candidates; a ratio of distances needs two")
  # Batches of one size, so that few shapes are compiled.
  batch_size = min(_MAX_QUERIES, max(128, 1 << (len(queries) - 1).bit_length()))
  block = max(1, min(batch_size, block_bytes // (4 * valid.size)))
  block = 1 << (block.bit_length() - 1)  # divides the batch
  fine_map = _upsample(candidates, valid.shape)
  candidates, unit = jnp.asarray(candidates), normalize(queries)
  blocks = []
  for start in range(0, len(queries), batch_size):
    batch = unit[start : start + batch_size]
    batch = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
    blocks.append(_find_two_nearest(batch, candidates, fine_map, valid, block))
  return tuple(
    np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
    for parts in zip(*blocks, strict=True)
  )


@functools.partial(jax.jit, static_argnums=1)
def _upsample(features, size):
  return resizing.resize(features, size, method="bicubic")


@functools.partial(jax.jit, static_argnums=4)
def _find_two_nearest(queries, candidates, fine_map, valid, block):
  norm = jnp.maximum(jnp.linalg.norm(fine_map, axis=-1), 1e-12)  # [S, T]

  def nearest_two(query):
    # Upsampling similarities instead of descriptors reorders the sums and needs
    # a tenth of the products.
    scores = jnp.einsum(
      "d,hwd->hw", query, candidates, precision=jax.lax.Precision.HIGHEST
    )
    scores = resizing.resize_maps(scores, valid.shape, method="bicubic")
    scores = jnp.where(valid, scores / norm, -jnp.inf).reshape(-1)
    nearest = _argmax(scores)
    others = jnp.where(jnp.arange(scores.size) == nearest, -jnp.inf, scores)
    return jnp.stack([nearest, _argmax(others)])

  index = jax.lax.map(nearest_two, queries, batch_size=block)
  distance = _cosine_distances(queries, fine_map.reshape(valid.size, -1)[index])
  # Exact distances decide the order, then the index.
  return jax.lax.sort((distance, index), dimension=1, num_keys=2)[::-1]


def _argmax(scores):
  # Two reductions are three times faster than argmax on a CPU.
  index = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores == scores.max(), index, scores.size - 1))


def _cosine_distances(queries, nearest):
  """Cosine distances of unit `[q, d]` to their two nearest `[q, 2, d]`.

  For unit vectors, 1 - cos is half the squared norm of their difference, which
  avoids cancellation and gives equal candidates exactly equal distances.
  """
  length = jnp.linalg.norm(nearest, axis=-1, keepdims=True)
  unit = nearest / jnp.maximum(length, 1e-12)
  square = jnp.sum(jnp.square(queries[:, None] - unit), axis=-1)
  is_zero = ~queries.any(axis=-1)[:, None] | (length[..., 0] == 0)
  return jnp.where(is_zero, 1.0, square / 2)


def ratio_weights(
  distance: Float[np.ndarray, "n 2"],
) -> Float64[np.ndarray, " n"]:
  """`1 - d1 / d2`, with distances clamped to at least 1e-9."""
  distance = np.maximum(np.asarray(distance, np.float64), MIN_DISTANCE)
  return 1 - distance[:, 0] / distance[:, 1]


REFERENCE_SIZE = 512  # side of the view for pixel errors
CHANCE_POINTS = 256  # points per pair for chance


@dataclasses.dataclass(frozen=True)
class MatchOptions:
  """Resolved options of `GeometricCorrespondence`; defaults are Probe3D's."""

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


class PairErrors(NamedTuple):
  """3D and 2D errors of the matches of one pair."""

  matches: PatchMatches
  metres: Float64[np.ndarray, " k"]
  pixels: Float64[np.ndarray, " k"]
  # Recall of uniform matches at each threshold, metres first, then pixels.
  chance: Float64[np.ndarray, " t"]
  angle: float = 0.0  # between the cameras, in degrees


def match_pair(
  maps: Float32[np.ndarray, "2 h w d"],
  views: Sequence[posed.PosedView],
  *,
  options: MatchOptions,
  angle: float = 0.0,
) -> PairErrors:
  """Matches the patch features of two views and computes the matches' errors.

  Each view needs at least two points.
  """
  first, second = views
  valid = {"first_valid": first.valid, "second_valid": second.valid}
  matches = match(*maps, **valid, keep=options.keep)
  pose = posed.relative_pose(first.pose, second.pose)
  moved = first.points.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
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
    sample = examples.subsample(range(len(points)), CHANCE_POINTS)
    chance += _uniform_recall(points[sample], b[second.valid], thresholds)
  return PairErrors(matches, *errors, chance=np.array(chance), angle=angle)


def project(
  points: Float64[np.ndarray, "*n 3"], *, focal: float
) -> Float64[np.ndarray, "*n 2"]:
  """`focal (x, y) / max(z, 1e-9)`; the principal point cancels in errors."""
  return focal * points[..., :2] / np.maximum(points[..., 2:], 1e-9)


def _uniform_recall(points, candidates, thresholds) -> list[float]:
  """Mean fraction of candidates near a point, per threshold."""
  squared_distance = (
    (points**2).sum(axis=1)[:, None]
    + (candidates**2).sum(axis=1)
    - 2 * points @ candidates.T
  )
  return [float((squared_distance < t * t).mean()) for t in thresholds]


def average_recalls(
  pairs: Sequence[PairErrors], *, options: MatchOptions
) -> tuple[Estimate, dict[str, float]]:
  """Metrics with standard errors over pairs, and chance.

  Empty angle bins `[low, high)` are omitted.
  """
  recalls = [
    [float((p.metres < t).mean()) for t in options.metres]
    + [float((p.pixels < t).mean()) for t in options.pixels]
    for p in pairs
  ]
  counts = np.array([len(p.metres) for p in pairs])
  angles = np.array([p.angle for p in pairs])
  num_metres = len(options.metres)
  middle_name = options.metre_names[num_metres // 2]

  def metrics(recalls, weights):
    """Means over pairs of `recalls` `[n, t]`, weighted by `weights`."""
    pooled = weights * counts @ recalls / (weights * counts).sum()
    # Recall by angle and per pair use the middle threshold.
    by_pair, bins = recalls[:, num_metres // 2], {}
    for low, high in itertools.pairwise(options.angles):
      bin_weights = weights * ((angles >= low) & (angles < high))
      if bin_weights.any():
        name = f"{middle_name}_{low:g}_{high:g}deg"
        bins[name] = bin_weights @ by_pair / bin_weights.sum()
    names = options.metre_names + options.pixel_names
    values = {
      "avg_recall": pooled[:num_metres].mean(),
      "avg_recall_pixel": pooled[num_metres:].mean(),
      "avg_recall_all": pooled.mean(),
      **({"avg_recall_angle": np.mean(list(bins.values()))} if bins else {}),
      **dict(zip(names, pooled, strict=True)),
      f"{middle_name}_per_pair": weights @ by_pair / weights.sum(),
      **bins,
    }
    return {name: float(value) for name, value in values.items()}

  estimate = bootstrap.estimate(
    functools.partial(metrics, np.array(recalls)), len(pairs)
  )
  chance = np.array([p.chance for p in pairs])
  return estimate, metrics(chance, np.ones(len(pairs)))


_CHUNK = 32  # pairs in memory at a time
_SHEET_MATCHES = 24  # matches drawn per pair


class _Defaults(NamedTuple):
  """Defaults of options that are None."""

  reason: str
  options: MatchOptions = MatchOptions()
  patches: int | None = None  # patches per side, instead of a size in pixels
  stride: int = 1
  count: int | None = None


_DEFAULTS = {
  "navi": _Defaults("Probe3D's", stride=4),
  "rgbd": _Defaults(
    "NAVI's; a cell of the grid is about 1 cm wide at 2 m", count=1000
  ),
  # Objects are 0.5 to 1.3 m tall, NAVI's 0.1 to 0.3 m, so thresholds are five
  # times larger. A view has 32 x 32 cells with about a hundred points; NAVI's
  # views have 128 x 128 cells.
  "scenes": _Defaults(
    "five times NAVI's, as the objects are about five times as large",
    MatchOptions(keep=100, metres=(0.05, 0.1, 0.25), angles=(0, 15, 30, 45)),
    patches=16,
    stride=2,
    count=48,
  ),
}


class _PairSet(NamedTuple):
  """Frames and their pairs, drawn or read from a file."""

  frames: posed.PosedFrames
  sample: posed.PairSample
  is_drawn: bool
  digest: str


@dataclasses.dataclass(frozen=True)
class GeometricCorrespondence(CorrespondenceEvaluator):
  """Recall of matches between views of one scene, by distance and by angle.

  `data` is `scenes`, a folder in NAVI's layout or a folder of RGB-D sequences;
  the published `size` is 512. None means the published value for NAVI, else the
  value in the result's protocol.

  Attributes:
    pairs: pair list file, read if it exists (also NAVI's lists), else written
      with the drawn pairs.
    keep: number of matches per pair, by highest weight.
    metres: thresholds of the 3D error; recall by angle uses the middle one.
    pixels: thresholds of the 2D error, in pixels of a 512 x 512 view.
    angles: bin edges of the angle between the cameras, in degrees.
    max_angle: largest angle between the cameras of a pair.
    stride: step between first frames of pairs.
    count: pairs to use, evenly spaced; for scenes, the number to render.
  """

  main = ("avg_recall",)

  pairs: str | None = None
  subset: Literal["wild_set", "multiview"] = "wild_set"
  keep: PositiveInt | None = None
  metres: tuple[float | int, ...] | None = None
  pixels: tuple[float | int, ...] = (5, 25, 50)
  angles: tuple[float | int, ...] | None = None
  max_angle: float | int = 120.0
  stride: PositiveInt | None = None
  count: PositiveInt | None = None
  seed: int = 8

  def __post_init__(self):
    super().__post_init__()
    for name in ("metres", "pixels", "angles"):
      values = getattr(self, name)
      is_increasing = values is None or list(values) == sorted(set(values))
      if not is_increasing or values == ():
        raise ConfigError(f"{name} is {values}; expected increasing numbers")

  @functools.cached_property
  def _set(self) -> _PairSet:
    scenes = self.count or _DEFAULTS["scenes"].count
    frames = registry.open_posed(self.data, subset=self.subset, count=scenes)
    default = _DEFAULTS[frames.layout]
    is_drawn = not (self.pairs and pathlib.Path(self.pairs).is_file())
    if is_drawn:
      sample = posed.draw_pairs(
        frames,
        seed=self.seed,
        stride=self.stride or default.stride,
        count=self.count or default.count,
        max_angle=self.max_angle,
      )
      if self.pairs and jax.process_index() == 0:
        posed.write_pairs(self.pairs, frames, sample.pairs)
    else:
      pairs = posed.read_pairs(self.pairs, frames)
      sample = posed.PairSample(tuple(examples.subsample(pairs, self.count)), 0)
    digest = posed.hash_pairs(frames, sample.pairs)
    return _PairSet(frames, sample, is_drawn, digest)

  def run(self, encoder: Encoder) -> Result:
    """Returns recalls, pooled over pairs and by angle, and chance."""
    frames, pairs = self._set.frames, self._set.sample.pairs
    encoder = self._with_image_mean(encoder)
    options = self._resolve_options(encoder, frames.layout)
    sheet_indices = examples.subsample(range(len(pairs)), self.pictures or 1)
    pair_errors, rows = [], []
    for i, views, maps in self._encode_pairs(encoder, options.size):
      errors = match_pair(maps, views, options=options, angle=pairs[i].angle)
      pair_errors.append(errors)
      if self.pictures and i in sheet_indices:
        correct = errors.metres < options.metres[len(options.metres) // 2]
        rows.append(_draw_pair(views, errors.matches, correct))
    if not pair_errors:
      raise InputError(
        f"{frames.name}: none of {len(pairs)} pairs has depth in both views"
      )
    estimate, chance = average_recalls(pair_errors, options=options)
    protocol = self._protocol(encoder, options, pair_errors)
    sheets = self._draw_sheets(rows)
    return Result.from_estimate(estimate, protocol, chance, sheets=sheets)

  def _resolve_options(self, encoder: Encoder, layout: str) -> MatchOptions:
    default = _DEFAULTS[layout]
    published = default.options.size
    if default.patches:
      published = default.patches * encoder.spec.image.patch_size
    names = ("keep", "metres", "pixels", "angles")
    overrides = {name: v for name in names if (v := getattr(self, name))}
    size = self._input_size(encoder, published)
    return dataclasses.replace(default.options, size=size, **overrides)

  def _encode_pairs(
    self, encoder: Encoder, size: int
  ) -> Iterator[tuple[int, tuple[posed.PosedView, ...], np.ndarray]]:
    """Yields index, views and features of each pair with enough points."""
    frames, pairs = self._set.frames, self._set.sample.pairs

    def read_views(pair: posed.Pair) -> tuple[posed.PosedView | None, ...]:
      return tuple(
        posed.make_view(frames.read(i, size), size=size, stored=frames.stored)
        for i in (pair.first, pair.second)
      )

    # The ratio test needs two points.
    usable_pairs = (
      (i, views)
      for i, views in enumerate(shared_map(read_views, pairs))
      if all(v is not None and v.valid.sum() >= 2 for v in views)
    )
    while chunk := list(itertools.islice(usable_pairs, _CHUNK)):
      images = [view.image for _, views in chunk for view in views]
      maps = self._encode(encoder, images)
      for k, (i, views) in enumerate(chunk):
        yield i, views, maps[2 * k : 2 * k + 2]

  def _protocol(
    self, encoder: Encoder, options: MatchOptions, errors: Sequence[PairErrors]
  ) -> dict[str, Any]:
    frames, sample = self._set.frames, self._set.sample
    default = _DEFAULTS[frames.layout]
    angles = np.array([s.angle for s in errors])
    # The sampling of pairs read from a file is unknown.
    pairs = {"pairs_are": "read from the list"}
    if self._set.is_drawn:
      pairs = {
        "pairs_are": "drawn",
        "frames_without_partner": sample.unpaired,
        "pair_seed": self.seed,
        "max_angle": self.max_angle,
        "stride": self.stride or default.stride,
      }
    return {
      **self._common_protocol(
        encoder,
        options.size,
        crop="square around the depth",
        interpolation="nearest",
      ),
      "data": frames.name,
      "data_hash": self._set.digest,
      **frames.metadata,
      "pairs": len(errors),
      # A view has fewer than two points.
      "pairs_without_points": len(sample.pairs) - len(errors),
      "pairs_by_angle": {
        f"{low:g}-{high:g}": int(((angles >= low) & (angles < high)).sum())
        for low, high in itertools.pairwise(options.angles)
      },
      **pairs,
      "pair_list": self.pairs and pathlib.PurePath(self.pairs).name,
      "stored_size": frames.stored,
      "upsampling": "bicubic a=-0.75 to "
      f"{options.size // posed.CELL_SIZE} cells",
      "matches": options.keep,
      "matches_kept": int(sum(len(s.metres) for s in errors)),
      "weight": "1 - d1 / d2, distances at least 1e-9",
      "ties": TIE_RULE,
      "metres": list(options.metres),
      "metres_are": default.reason if self.metres is None else "given",
      "pixels": list(options.pixels),
      "pixels_of": REFERENCE_SIZE,
      "averaging": "over all matches of all pairs; by angle and per pair over "
      "pairs",
      "avg_recall": f"mean of {', '.join(options.metre_names)}",
      "avg_recall_pixel": f"mean of {', '.join(options.pixel_names)}",
      "avg_recall_all": "mean of the thresholds in metres and in pixels",
      "avg_recall_angle": "mean of the bins of angle that have pairs",
      "chance": "a uniform match, averaged over "
      f"{CHANCE_POINTS} points per pair",
    }


def _draw_pair(views, matches, correct: np.ndarray) -> np.ndarray:
  """Draws matches over the range of weights, coloured by correctness."""
  sample = examples.subsample(range(len(correct)), _SHEET_MATCHES)
  cells = (x[sample] * posed.CELL_SIZE for x in (matches.first, matches.second))
  images = (view.image for view in views)
  return plots.draw_matches(*images, *cells, correct=correct[sample])
