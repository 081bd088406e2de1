"""Statistics of a label set, and findings: unusual ones, as sentences.

Statistics take one pass over 10^8 labels in bounded memory. A finding is not an
error, but suggests looking at the images before a long run; its thresholds are
heuristics.
"""

from __future__ import annotations

import collections
import functools
import heapq
import itertools
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Mapping,
  Sequence,
)
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Real, UInt64

from mtv_jax.config.options import PositiveInt, check_value
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelSet, hash_key
from mtv_jax.data.labels.label_values import UINT16_MAX, BoxLabel, DepthLabel
from mtv_jax.data.records import BadRecord
from mtv_jax.utils.text import format_percent
from mtv_jax.utils.threads import map_ahead

_CHUNK = 512  # labels read ahead and added at a time
_EXAMPLES = 3  # messages about corrupt labels
_MIN_EXACT = 200_000  # minimum number of phrases that are counted exactly
# Hashes to estimate the number of distinct phrases, with an error of 3 %.
_SKETCH_SIZE = 1024
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_COUNT = 256  # largest number of boxes or words with a separate bin

# Thresholds for the counts of properties.
LARGE_AREA = 0.9  # a large box's area, as a fraction of the image
SMALL_SIDE = 16 / 384  # a small box's side: one patch of 16 pixels at 384
CONSTANT_RANGE = 0.05  # a constant map's range, as a fraction of its maximum
NARROW_RANGE = 0.05  # 5th to 95th percentile, as a fraction of the whole range

_phrase_id = functools.lru_cache(maxsize=1 << 16)(label_values.phrase_id)


def gather(
  labels: LabelSet,
  *,
  shards: Collection[str] | None = None,
  records: int | None = None,
  min_score: float | int = 0.0,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Computes the statistics of a label set.

  Reads at most `records` labels, evenly spaced, from the named `shards` (None:
  all). As in training, drops boxes that score below `min_score`.
  """
  check_value(records, PositiveInt | None, "records")
  shard_indices = [
    i for i, name in enumerate(labels.names) if shards is None or name in shards
  ]
  manifest = [labels.manifest["shards"][i] for i in shard_indices]
  total = sum(shard["records"] for shard in manifest)
  reasons = collections.Counter()
  for shard in manifest:
    reasons.update(shard["reasons"])
  step = 1 if records is None else max(-(-total // records), 1)
  positions = (
    (shard, i) for shard in shard_indices for i in range(labels.counts[shard])
  )
  positions = itertools.islice(positions, 0, None, step)
  statistics = (
    BoxStatistics(min_score) if labels.kind == "boxes" else DepthStatistics()
  )

  def measure(
    position: tuple[int, int],
  ) -> LabelMeasurements | BadRecord | None:
    try:
      label = labels.read(*position).label
    except BadRecord as error:
      return error
    return None if label is None else statistics.measure(label)

  read = {"every": step, "records": 0, "labelled": 0, "damaged": 0}
  examples: list[str] = []
  outcomes = map_ahead(measure, positions, ahead=_CHUNK)
  while results := list(itertools.islice(outcomes, _CHUNK)):
    measurements = [m for m in results if isinstance(m, LabelMeasurements)]
    errors = [str(e) for e in results if isinstance(e, BadRecord)]
    statistics.add(measurements)
    read["records"] += len(results)
    read["labelled"] += len(measurements)
    read["damaged"] += len(errors)
    examples += errors[: _EXAMPLES - len(examples)]
    progress(read["records"], len(range(0, total, step)))
  return {
    "kind": labels.kind,
    "folder": labels.folder.name,
    "settings": labels.manifest.get("settings", {}),
    "shards": len(shard_indices),
    "records": total,
    "labelled": sum(shard["labelled"] for shard in manifest),
    "reasons": dict(reasons.most_common()),
    "read": {**read, "examples": examples},
    **statistics.to_dict(),
  }


class LabelMeasurements(NamedTuple):
  """One label's values by histogram, counts of properties, and phrases."""

  values: Mapping[str, Any]
  counts: Mapping[str, int]
  phrases: Sequence[str] = ()


class _Statistics:
  """Accumulates measurements in histograms and counts."""

  def __init__(self, **histograms: Histogram):
    self._histograms = histograms
    self._counts: collections.Counter[str] = collections.Counter()
    self._phrases = PhraseCounts()

  def add(self, labels: Sequence[LabelMeasurements]) -> None:
    """Adds measurements of labels."""
    for label in labels:
      self._counts.update(label.counts)
      self._phrases.add(label.phrases)
    for name, histogram in self._histograms.items() if labels else ():
      histogram.add(np.concatenate([label.values[name] for label in labels]))

  def fractions(self, total: int, *names: str) -> dict[str, float | None]:
    """Counts as fractions; None if the total is 0."""
    return {n: int(self._counts[n]) / total if total else None for n in names}


class BoxStatistics(_Statistics):
  """Statistics of box labels; ignores boxes that score below `min_score`."""

  def __init__(self, min_score: float | int = 0.0):
    super().__init__(
      boxes_an_image=Histogram.of_integers(MAX_COUNT),
      scores=Histogram.of_fractions(),
      # Square roots of areas, which resolve small boxes (a stored key).
      sides=Histogram.of_fractions(),
      shorter_sides=Histogram.of_fractions(),
      longer_sides=Histogram.of_fractions(),
      words=Histogram.of_integers(MAX_COUNT),
    )
    self._min_score = min_score

  def measure(self, label: BoxLabel) -> LabelMeasurements:
    """Measures one label; called by several threads."""
    count = len(label.boxes)
    label = filter_boxes(label, self._min_score)
    sides = label.boxes[:, 2:].astype(np.float64) - label.boxes[:, :2]
    areas, shorter_sides = sides.prod(axis=1), sides.min(axis=1)
    ids = collections.Counter(map(_phrase_id, label.phrases))
    num_repeated = sum(n for n in ids.values() if n > 1)
    return LabelMeasurements(
      values={
        "boxes_an_image": [len(label.boxes)],
        "scores": label.scores,
        "sides": np.sqrt(areas),
        "shorter_sides": shorter_sides,
        "longer_sides": sides.max(axis=1),
        "words": np.array([len(p.split()) for p in label.phrases], int),
      },
      counts={
        "below_min_score": count - len(label.boxes),
        "scores_of_1": (label.scores == 1).sum(),
        "large_boxes": (areas > LARGE_AREA).sum(),
        "small_boxes": (shorter_sides < SMALL_SIDE).sum(),
        "boxes_with_repeated_phrase": num_repeated,
        "images_with_repeated_phrase": int(num_repeated > 0),
      },
      phrases=label.phrases,
    )

  def to_dict(self) -> dict[str, Any]:
    """JSON fields; fractions are of the boxes or of the labelled images."""
    histograms = {name: h.to_dict() for name, h in self._histograms.items()}
    per_image = self._histograms["boxes_an_image"]
    boxes, images = self._histograms["scores"].count, per_image.count
    sqrt_areas = histograms["sides"].get("quantiles", {})
    words = histograms.pop("words")
    return {
      "boxes": boxes,
      "min_score": self._min_score,
      "below_min_score": int(self._counts["below_min_score"]),
      **histograms,
      "areas": {"quantiles": {q: s**2 for q, s in sqrt_areas.items()}},
      "images_without_boxes": per_image.fraction(0),
      "images_with_most_boxes": per_image.fraction(per_image.max),
      "images_with_one_less": per_image.fraction(per_image.max - 1),
      "phrases": {
        "different": self._phrases.distinct,
        "counts_short_by": self._phrases.short_by,
        "most_frequent": self._phrases.most_common(50),
        "words": words,
      },
      **self.fractions(boxes, "scores_of_1", "large_boxes", "small_boxes"),
      **self.fractions(boxes, "boxes_with_repeated_phrase"),
      **self.fractions(images, "images_with_repeated_phrase"),
    }


def filter_boxes(label: BoxLabel, min_score: float | int) -> BoxLabel:
  """Drops a label's boxes that score below `min_score`."""
  rows = np.flatnonzero(label.scores >= min_score)
  phrases = tuple(label.phrases[i] for i in rows)
  return BoxLabel(label.boxes[rows], phrases, label.scores[rows])


class DepthStatistics(_Statistics):
  """Statistics of depth labels."""

  def __init__(self):
    super().__init__(
      labelled_pixels=Histogram.of_fractions(),
      low=Histogram.of_magnitudes(),
      high=Histogram.of_magnitudes(),
      range=Histogram.of_fractions(),
      middle=Histogram.of_fractions(),
    )

  def measure(self, label: DepthLabel) -> LabelMeasurements:
    """Measures one label; called by several threads."""
    valid = label.values[label.values > 0]
    low, high = np.percentile(valid, (5, 95)) if valid.size else (0, 0)
    middle = float(high - low) / (UINT16_MAX - 1)
    largest = max(abs(label.low), abs(label.high), 1e-30)
    relative_range = (label.high - label.low) / largest
    return LabelMeasurements(
      values={
        "labelled_pixels": [valid.size / label.values.size],
        "low": [label.low],
        "high": [label.high],
        "range": [relative_range],
        "middle": [middle],
      },
      counts={
        "constant_maps": int(relative_range < CONSTANT_RANGE),
        "narrow_maps": int(middle < NARROW_RANGE),
        f"side {len(label.values)}": 1,
      },
    )

  def to_dict(self) -> dict[str, Any]:
    """JSON fields; fractions are of the maps."""
    maps = self._histograms["labelled_pixels"].count
    sides = {
      int(name.removeprefix("side ")): count
      for name, count in self._counts.most_common()
      if name.startswith("side ")
    }
    return {
      "sides": dict(itertools.islice(sides.items(), 8)),
      **{name: h.to_dict() for name, h in self._histograms.items()},
      **self.fractions(maps, "constant_maps", "narrow_maps"),
    }


class Histogram:
  """Counts in fixed bins; quantiles are exact to the width of a bin.

  Count, mean, minimum and maximum are exact. Values outside the edges also
  count. `values` is "whole" if each bin is centred on one integer.
  """

  def __init__(
    self,
    edges: Float64[np.ndarray, " n"],
    *,
    values: Literal["real", "whole"] = "real",
  ):
    self.edges = edges
    self.values = values
    self.count, self.total = 0, 0.0
    self.min, self.max = np.inf, -np.inf
    # The first bin counts values below the edges, the last values above them.
    self._counts = np.zeros(len(edges) + 1, np.int64)

  @classmethod
  def of_fractions(cls) -> Histogram:
    """Bins of 0.001 from 0 to 1."""
    return cls(np.linspace(0, 1, 1001))

  @classmethod
  def of_integers(cls, top: int) -> Histogram:
    """One bin per integer from 0 to `top`."""
    return cls(np.arange(top + 2) - 0.5, values="whole")

  @classmethod
  def of_magnitudes(cls) -> Histogram:
    """Bins of 1.2 % from 1e-9 to 1e9, of either sign."""
    sizes = np.geomspace(1e-9, 1e9, 18 * 200 + 1)
    return cls(np.concatenate([-sizes[::-1], sizes]))

  def add(self, values: Real[np.ndarray, "..."]) -> None:
    """Counts the finite values."""
    values = values.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    bins = np.searchsorted(self.edges, values, side="right")
    # The last bin is closed at both ends.
    bins -= values == self.edges[-1]
    self._counts += np.bincount(bins, minlength=len(self._counts))
    self.count += values.size
    self.total += float(values.sum())
    self.min = float(values.min(initial=self.min))
    self.max = float(values.max(initial=self.max))

  def fraction(self, value: float | int) -> float | None:
    """Fraction of values in the bin of `value`; None without values."""
    index = int(np.searchsorted(self.edges, value, side="right"))
    return int(self._counts[index]) / self.count if self.count else None

  def quantile(self, q: float | int) -> float | None:
    """The q-quantile, interpolated within its bin; None without values."""
    if not self.count:
      return None
    rank, ends = q * self.count, np.cumsum(self._counts)
    index = int(np.searchsorted(ends, max(rank, 1e-9), side="left"))
    low = self.edges[index - 1] if index else self.min
    high = self.edges[index] if index < len(self.edges) else self.max
    if self.values == "whole" and 0 < index < len(self.edges):
      return float(round((low + high) / 2))
    start = ends[index] - self._counts[index]
    value = np.interp(rank, (start, ends[index]), (low, high))
    return float(np.clip(value, self.min, self.max))

  def bars(self) -> dict[str, list]:
    """About 20 bars for a chart, as `edges` and `counts`.

    Merges neighbouring bins from the first non-empty bin to the last (all bins
    for fractions). Values outside the edges get separate bars.
    """
    inner, edges = self._counts[1:-1], self.edges
    filled = np.flatnonzero(inner)
    first, stop = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    max_bars = 20
    if self.values == "whole":
      first, max_bars = 0, 32
    elif (edges[0], edges[-1]) == (0, 1) and filled.size:
      first, stop = 0, len(inner)
    starts = np.arange(first, stop, max(-(-(stop - first) // max_bars), 1))
    counts, bar_edges = [], []
    if starts.size:
      counts = np.add.reduceat(inner[:stop], starts).tolist()
      bar_edges = edges[[*starts, stop]].tolist()
    if below := int(self._counts[0]):
      bar_edges = [self.min, *(bar_edges or [float(edges[0])])]
      counts = [below, *counts]
    if above := int(self._counts[-1]):
      bar_edges = [*(bar_edges or [float(edges[-1])]), self.max]
      counts = [*counts, above]
    return {"edges": bar_edges, "counts": counts}

  def to_dict(self) -> dict[str, Any]:
    """JSON fields of the histogram."""
    if not self.count:
      return {"count": 0}
    return {
      "count": self.count,
      "mean": self.total / self.count,
      "min": self.min,
      "max": self.max,
      "quantiles": {f"{q:g}": self.quantile(q) for q in _QUANTILES},
      "values": self.values,
      "bars": self.bars(),
    }


class PhraseCounts:
  """Counts any number of distinct phrases in bounded memory.

  Exact up to `2 * limit` distinct phrases. Beyond, drops rare phrases and
  lowers the remaining counts (Misra and Gries 1982, merged as in Agarwal et al.
  2012, Mergeable Summaries): counts are too low by at most `short_by`, and
  dropped phrases occurred at most `short_by` times. The number of distinct
  phrases is then estimated from their smallest hashes (Bar-Yossef et al. 2002,
  Counting Distinct Elements in a Data Stream).
  """

  def __init__(self, *, limit: int = _MIN_EXACT):
    self.short_by = 0
    self._limit = limit
    self._counts: collections.Counter[str] = collections.Counter()
    self._hashes = np.zeros(0, np.uint64)

  def add(self, phrases: Iterable[str]) -> None:
    """Counts phrases."""
    self._counts.update(phrases)
    if len(self._counts) > 2 * self._limit:
      self._hashes = self._find_smallest_hashes()
      floor = heapq.nlargest(self._limit + 1, self._counts.values())[-1]
      self._counts = collections.Counter(
        {p: n - floor for p, n in self._counts.items() if n > floor}
      )
      self.short_by += floor

  def _find_smallest_hashes(self) -> UInt64[np.ndarray, " n"]:
    hashes = np.fromiter(map(hash_key, self._counts), np.uint64)
    return np.unique(np.concatenate([self._hashes, hashes]))[:_SKETCH_SIZE]

  @property
  def distinct(self) -> int:
    """Number of distinct phrases; an estimate unless `short_by` is 0."""
    if not self.short_by:
      return len(self._counts)
    hashes = self._find_smallest_hashes()
    if len(hashes) < _SKETCH_SIZE:
      return len(hashes)
    return round((_SKETCH_SIZE - 1) / (float(hashes[-1]) / 2**64))

  def most_common(self, n: int) -> list[tuple[str, int]]:
    """The n most frequent phrases; ties in alphabetical order."""
    items = self._counts.items()
    return heapq.nsmallest(n, items, key=lambda item: (-item[1], item[0]))


# Fractions of records, boxes, images or maps at which a finding is reported.
_UNLABELLED, _HALF = 0.2, 0.5
_ONE_PHRASE, _AT_LIMIT, _ODD_MAPS = 0.3, 0.1, 0.05
# Fractions of fewer boxes are not meaningful.
_MIN_BOXES = 20

_TEXTS = {
  "damaged": "{:,} of {:,} labels can't be read, such as: {}. Copy the files"
  " again, or relabel.",
  "without_label": "{} of the records have no label.{}",
  "no_boxes": "No box{}.",
  "images_without_boxes": "{} of the labelled images have no box: the score"
  " threshold is too high, or the phrases don't fit the images.",
  "at_most": "{} of the labelled images have {:g} boxes, but none has more:"
  " boxes were dropped at a limit.",
  "scores_of_1": "All scores are 1: human annotations, or scores that were"
  " lost. A score threshold has no effect.",
  "scores_beyond": "Scores are from {:.3g} to {:.3g}: expected 0 to 1. Are they"
  " logits?",
  "large_boxes": "{} of the boxes cover more than"
  f" {100 * LARGE_AREA:g} % of their image, and localize nothing.",
  "small_boxes": "{} of the boxes have a side below"
  f" {100 * SMALL_SIDE:.1f} % of the image's: a patch of 16 pixels"
  " at 384.",
  "one_phrase": "{} of the boxes have the phrase {!r}.",
  "repeated_phrases": "{} of the boxes share their phrase with another box of"
  " their image: the phrase is ambiguous.",
  "no_maps": "No map was read.",
  "sparse_maps": "On average {} of the pixels of a map have a label.",
  "constant_maps": "{} of the maps are nearly constant: their minimum is within"
  f" {100 * CONSTANT_RANGE:g} % of their maximum.",
  "narrow_maps": "{} of the maps have 90 % of their pixels within"
  f" {100 * NARROW_RANGE:g} % of their range: a few pixels, perhaps"
  " outliers, set the scale.",
  "sides": "The maps have different sides: {} pixels.",
}

# Maps a finding's name to (whether it applies, *values of its text).
_Rules = dict[str, tuple[Any, ...]]


def find(stats: Mapping[str, Any]) -> list[dict[str, str]]:
  """Returns kind, name and text of each finding in `gather`'s"""
  kind = stats["kind"]
  rules = _common_rules(stats)
  rules |= _box_rules(stats) if kind == "boxes" else _depth_rules(stats)
  return [
    {"kind": kind, "name": name, "text": _TEXTS[name].format(*values)}
    for name, (applies, *values) in rules.items()
    if applies
  ]


def _common_rules(stats: Mapping[str, Any]) -> _Rules:
  read = stats["read"]
  example = next(iter(read["examples"]), None)
  missing = 1 - stats["labelled"] / max(stats["records"], 1)
  # `reasons` also counts changed labels.
  reasons = list(stats["reasons"].items())[:2]
  note = "; ".join(f"{n:,} times {reason!r}" for reason, n in reasons)
  note = note and f" The most frequent reasons in the manifest: {note}."
  return {
    "damaged": (read["damaged"], read["damaged"], read["records"], example),
    "without_label": (missing > _UNLABELLED, format_percent(missing), note),
  }


def _box_rules(stats: Mapping[str, Any]) -> _Rules:
  if not stats["boxes"]:
    score = stats["min_score"]
    scores = f" scores {score:g} or more" if score else " is in any label"
    return {"no_boxes": (True, scores)}
  top, below = stats["images_with_most_boxes"], stats["images_with_one_less"]
  most = stats["boxes_an_image"]["max"]
  # Without a limit, neighbouring counts are about equally frequent.
  is_limited = top > max(_AT_LIMIT, 2 * below) and most <= MAX_COUNT
  low, high = stats["scores"]["min"], stats["scores"]["max"]
  phrase, count = stats["phrases"]["most_frequent"][0]
  share = count / stats["boxes"]
  repeated = stats["boxes_with_repeated_phrase"]
  empty, large = stats["images_without_boxes"], stats["large_boxes"]
  small, enough = stats["small_boxes"], stats["boxes"] >= _MIN_BOXES
  return {
    "images_without_boxes": (empty > _HALF, format_percent(empty)),
    "at_most": (most > 2 and is_limited, format_percent(top), most),
    "scores_of_1": (stats["scores_of_1"] == 1,),
    "scores_beyond": (low < 0 or high > 1, low, high),
    "large_boxes": (enough and large >= _HALF, format_percent(large)),
    "small_boxes": (enough and small >= _HALF, format_percent(small)),
    "one_phrase": (
      enough and share > _ONE_PHRASE,
      format_percent(share),
      phrase,
    ),
    "repeated_phrases": (enough and repeated > _HALF, format_percent(repeated)),
  }


def _depth_rules(stats: Mapping[str, Any]) -> _Rules:
  labelled = stats["labelled_pixels"]
  if not labelled["count"]:
    return {"no_maps": (True,)}
  mean, sides = labelled["mean"], stats["sides"]
  constant, narrow = stats["constant_maps"], stats["narrow_maps"]
  side_text = ", ".join(f"{count:,} of {side}" for side, count in sides.items())
  return {
    "sparse_maps": (mean < _HALF, format_percent(mean)),
    "constant_maps": (constant > _ODD_MAPS, format_percent(constant)),
    "narrow_maps": (narrow > _ODD_MAPS, format_percent(narrow)),
    "sides": (len(sides) > 1, side_text),
  }
