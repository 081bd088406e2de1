"""What a label set holds, read through once, however large it is."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import (
  TOP,
  BoxLabel,
  DepthLabel,
  phrase_id,
)
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.inspection.counts import Histogram, PhraseCounts

# Labels that are in the hands of threads at a time.
_CHUNK = 512
# Boxes an image, and words a phrase, that are counted one by one.
MANY = 256
# Damaged labels that are told of.
_EXAMPLES = 3

# A box that covers more than this share of the image says little of where.
LARGE = 0.9
# A box whose shorter side is below this share: a patch of 16 at 384 pixels.
SMALL = 16 / 384
# Of a map in which nothing is near or far: its range, to its greatest value.
CONSTANT = 0.05
# Of a map whose range is that of a few pixels: from 5 % to 95 % of all.
NARROW = 0.05


def gather(
  labels: LabelSet,
  *,
  shards: Collection[str] | None = None,
  records: int | None = None,
  min_score: float | int = 0.0,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Statistics of a label set.

  Args:
    labels: the set.
    shards: names of those to look at; None for all.
    records: at most so many labels are read, evenly spaced; None for all.
    min_score: boxes below are left out, as a threshold in training would.
    progress: is called with the labels read, and how many there are to read.

  Returns:
    For JSON. `records`, `labelled` and `reasons` are what the manifest says;
    the rest is of the labels that were `read`.

  Raises:
    ValueError: `records` is not positive.
  """
  if records is not None and records < 1:
    raise ValueError(f"records={records}: expected at least 1.")
  chosen = [
    i for i, name in enumerate(labels.names) if shards is None or name in shards
  ]
  found, reasons = _of_manifest(labels, chosen)
  step = 1 if records is None else max(-(-found["records"] // records), 1)
  kind = Boxes(min_score) if labels.kind == "boxes" else Depth()
  read = _Read()
  todo = len(range(0, found["records"], step))
  places = itertools.islice(_places(labels, chosen), 0, None, step)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while chunk := list(itertools.islice(places, _CHUNK)):
      measured = pool.map(
        functools.partial(_measure, labels, kind.measure), chunk
      )
      kind.add(read.good(measured))
      progress(read.records, todo)
  return {
    "kind": labels.kind,
    "folder": labels.folder.name,
    "settings": labels.manifest.get("settings", {}),
    "shards": len(chosen),
    **found,
    "reasons": dict(reasons.most_common()),
    "read": {"every": step, **dataclasses.asdict(read)},
    **kind.to_dict(),
  }


def _of_manifest(
  labels: LabelSet, chosen: Sequence[int]
) -> tuple[dict[str, int], collections.Counter[str]]:
  """Records and how many have a label, and what was left out and why."""
  found, reasons = {"records": 0, "labelled": 0}, collections.Counter()
  for i in chosen:
    shard = labels.manifest["shards"][i]
    for name in found:
      found[name] += shard[name]
    reasons.update(shard["reasons"])
  return found, reasons


def _places(
  labels: LabelSet, chosen: Sequence[int]
) -> Iterator[tuple[int, int]]:
  for shard in chosen:
    for at in range(labels.shards[shard].records):
      yield shard, at


@dataclasses.dataclass
class _Read:
  """How many labels were read.

  Attributes:
    records: all of them, those that say that there is none too.
    labelled: those that hold a label.
    damaged: those that can't be read.
    examples: what is wrong with the first of these.
  """

  records: int = 0
  labelled: int = 0
  damaged: int = 0
  examples: list[str] = dataclasses.field(default_factory=list)

  def good(self, measured: Iterator[Any]) -> list[Any]:
    """Counts what was measured; returns what is of a label."""
    kept = []
    for one in measured:
      self.records += 1
      if isinstance(one, BadRecord):
        self.damaged += 1
        if len(self.examples) < _EXAMPLES:
          self.examples.append(str(one))
      elif one is not None:
        self.labelled += 1
        kept.append(one)
    return kept


def _measure(
  labels: LabelSet, measure: Callable[[Any], Any], place: tuple[int, int]
) -> Any:
  try:
    label = labels.read(*place).label
  except BadRecord as error:
    return error
  return None if label is None else measure(label)


@dataclasses.dataclass(frozen=True)
class _BoxesOfImage:
  label: BoxLabel
  left_out: int
  repeated: int  # boxes whose phrase another box of the image has too


class Boxes:
  """Statistics of box labels.

  Args:
    min_score: boxes below are left out.
  """

  def __init__(self, min_score: float | int = 0.0):
    self._min_score = min_score
    self._left_out = 0
    self._an_image = Histogram.of_whole_numbers(MANY)
    self._scores = Histogram.of_shares()
    # Sides of squares: the smallest boxes, too, are told apart by them.
    self._sides = Histogram.of_shares()
    self._shorter = Histogram.of_shares()
    self._longer = Histogram.of_shares()
    self._large = self._small = self._of_score_1 = 0
    self._phrases = PhraseCounts()
    self._words = Histogram.of_whole_numbers(MANY)
    self._repeated_boxes = self._repeated_images = 0

  def measure(self, label: BoxLabel) -> _BoxesOfImage:
    """One label, by several threads."""
    kept = at_least(label, self._min_score)
    ids = collections.Counter(map(_phrase_id, kept.phrases))
    repeated = sum(n for n in ids.values() if n > 1)
    return _BoxesOfImage(kept, len(label.boxes) - len(kept.boxes), repeated)

  def add(self, images: Sequence[_BoxesOfImage]) -> None:
    """Counts labels."""
    if not images:
      return
    labels = [image.label for image in images]
    boxes = np.concatenate([label.boxes for label in labels])
    scores = np.concatenate([label.scores for label in labels])
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    self._left_out += sum(image.left_out for image in images)
    self._an_image.add(np.array([len(label.boxes) for label in labels]))
    self._scores.add(scores)
    self._of_score_1 += int((scores == 1).sum())
    self._sides.add(np.sqrt(sides.prod(axis=1)))
    self._shorter.add(sides.min(axis=1))
    self._longer.add(sides.max(axis=1))
    self._large += int((sides.prod(axis=1) > LARGE).sum())
    self._small += int((sides.min(axis=1) < SMALL).sum())
    for label in labels:
      self._phrases.add(label.phrases)
      self._words.add(np.array([len(p.split()) for p in label.phrases], int))
    self._repeated_boxes += sum(image.repeated for image in images)
    self._repeated_images += sum(image.repeated > 0 for image in images)

  def to_dict(self) -> dict[str, Any]:
    """For JSON; shares are of the boxes, or of the labelled images."""
    boxes, images = self._scores.count, self._an_image.count
    without = self._an_image.share_of(0)
    most = self._an_image.greatest
    return {
      "boxes": boxes,
      "min_score": self._min_score,
      "below_min_score": self._left_out,
      "boxes_an_image": self._an_image.to_dict(),
      "images_without_boxes": without,
      "images_with_most_boxes": self._an_image.share_of(most),
      "images_with_one_less": self._an_image.share_of(most - 1),
      "scores": self._scores.to_dict(),
      "scores_of_1": _share(self._of_score_1, boxes),
      "sides": self._sides.to_dict(),
      "areas": _squares(self._sides),
      "shorter_sides": self._shorter.to_dict(),
      "longer_sides": self._longer.to_dict(),
      "large_boxes": _share(self._large, boxes),
      "small_boxes": _share(self._small, boxes),
      "phrases": {
        "different": self._phrases.distinct,
        "counts_short_by": self._phrases.short_by,
        "most_frequent": self._phrases.most_common(50),
        "words": self._words.to_dict(),
      },
      "boxes_with_repeated_phrase": _share(self._repeated_boxes, boxes),
      "images_with_repeated_phrase": _share(self._repeated_images, images),
    }


def at_least(label: BoxLabel, min_score: float | int) -> BoxLabel:
  """The boxes of a label that are not below a score."""
  keep = np.flatnonzero(label.scores >= min_score)
  return BoxLabel(
    label.boxes[keep],
    tuple(label.phrases[i] for i in keep),
    label.scores[keep],
  )


@functools.lru_cache(maxsize=1 << 16)
def _phrase_id(phrase: str) -> int:
  return phrase_id(phrase)


def _squares(sides: Histogram) -> dict[str, Any]:
  """Quantiles of areas: a square's side grows with its area."""
  quantiles = sides.to_dict().get("quantiles", {})
  return {"quantiles": {share: side**2 for share, side in quantiles.items()}}


def _share(part: int, whole: int) -> float | None:
  return part / whole if whole else None


@dataclasses.dataclass(frozen=True)
class _DepthOfImage:
  side: int
  labelled: float
  low: float
  high: float
  middle: float


class Depth:
  """Statistics of depth labels."""

  def __init__(self):
    self._labelled = Histogram.of_shares()
    self._low = Histogram.of_magnitudes()
    self._high = Histogram.of_magnitudes()
    self._range = Histogram.of_shares()
    self._middle = Histogram.of_shares()
    self._constant = self._narrow = 0
    self._sides: collections.Counter[int] = collections.Counter()

  def measure(self, label: DepthLabel) -> _DepthOfImage:
    """One label, by several threads."""
    found = label.values[label.values > 0]
    ends = np.percentile(found, (5, 95)) if found.size else (0, 0)
    return _DepthOfImage(
      side=len(label.values),
      labelled=found.size / label.values.size,
      low=label.low,
      high=label.high,
      middle=float(ends[1] - ends[0]) / (TOP - 1),
    )

  def add(self, maps: Sequence[_DepthOfImage]) -> None:
    """Counts labels."""
    if not maps:
      return
    rows = np.array([(m.labelled, m.low, m.high, m.middle) for m in maps])
    labelled, low, high, middle = rows.T
    largest = np.maximum(np.maximum(abs(low), abs(high)), 1e-30)
    ratio = (high - low) / largest
    self._labelled.add(labelled)
    self._low.add(low)
    self._high.add(high)
    self._range.add(ratio)
    self._middle.add(middle)
    self._constant += int((ratio < CONSTANT).sum())
    self._narrow += int((middle < NARROW).sum())
    self._sides.update(m.side for m in maps)

  def to_dict(self) -> dict[str, Any]:
    """For JSON; shares are of the maps."""
    maps = self._labelled.count
    return {
      "sides": dict(self._sides.most_common(8)),
      "labelled_pixels": self._labelled.to_dict(),
      "low": self._low.to_dict(),
      "high": self._high.to_dict(),
      "range": self._range.to_dict(),
      "middle": self._middle.to_dict(),
      "constant_maps": _share(self._constant, maps),
      "narrow_maps": _share(self._narrow, maps),
    }
