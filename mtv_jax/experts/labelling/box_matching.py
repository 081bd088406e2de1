"""Agreement of two box label sets: recall, precision and IoU of matches.

Boxes of an image are matched in order of decreasing score, each to the
unmatched true box of equal phrase with the largest intersection over union, if
this IoU is at least `iou`. With m matches over all images with true boxes,

    recall = m / true boxes        precision = m / boxes

at the label set's score threshold, one point of the curve that COCO's AP
integrates. True boxes may be human annotations (mtv-jax make_labels).
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import BoxLabel
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.evals import grounding
from mtv_jax.utils.errors import InputError


def match(
  label: BoxLabel, truth: BoxLabel, *, iou: float | int = 0.5
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Returns the index of each box's true box, or -1, and their IoU, or 0."""
  overlaps = grounding.ious(label.boxes, truth.boxes)
  is_same = np.array([[p == q for q in truth.phrases] for p in label.phrases])
  overlaps = np.where(is_same.reshape(overlaps.shape), overlaps, 0)
  matches = np.full(len(label.boxes), -1)
  ious = np.zeros(len(label.boxes))
  if truth.phrases:
    for i in np.argsort(-label.scores, kind="stable"):
      best = int(overlaps[i].argmax())
      if overlaps[i, best] >= iou:
        matches[i], ious[i] = best, overlaps[i, best]
        overlaps[:, best] = -1
  return matches, ious


@dataclasses.dataclass
class Tally:
  """Numbers of boxes, true boxes and matches, and the sum of matches' IoU."""

  boxes: int = 0
  truth: int = 0
  matched: int = 0
  overlap: float = 0.0

  def to_dict(self) -> dict[str, float | int | None]:
    """Counts and fractions; fractions of zero boxes are None."""
    return {
      "boxes": self.boxes,
      "truth": self.truth,
      "matched": self.matched,
      "recall": self.matched / self.truth if self.truth else None,
      "precision": self.matched / self.boxes if self.boxes else None,
      "mean_iou": self.overlap / self.matched if self.matched else None,
    }


@dataclasses.dataclass
class Agreement:
  """Agreement of a label set with true boxes, in total and by phrase."""

  iou: float | int  # Minimum IoU of a match.
  images: int = 0  # Images with true boxes.
  unlabelled: int = 0  # Images with true boxes but without a label.
  total: Tally = dataclasses.field(default_factory=Tally)
  phrases: dict[str, Tally] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Tally)
  )

  def add(self, label: BoxLabel | None, truth: BoxLabel) -> None:
    """Adds an image; phrases match if they are equal."""
    self.images += 1
    for phrase in truth.phrases:
      self.total.truth += 1
      self.phrases[phrase].truth += 1
    if label is None:
      self.unlabelled += 1
      return
    matches = match(label, truth, iou=self.iou)
    for phrase, index, iou in zip(label.phrases, *matches, strict=True):
      for tally in (self.total, self.phrases[phrase]):
        tally.boxes += 1
        tally.matched += int(index >= 0)
        tally.overlap += float(iou)

  @property
  def never_true(self) -> list[str]:
    """Phrases of the label set that no true box has."""
    return sorted(p for p, tally in self.phrases.items() if not tally.truth)

  def to_dict(self) -> dict[str, Any]:
    """JSON fields, with the most frequent phrase first."""
    items = sorted(self.phrases.items(), key=lambda item: -item[1].truth)
    return {
      "iou": self.iou,
      "images": self.images,
      "unlabelled": self.unlabelled,
      **self.total.to_dict(),
      "phrases": {phrase: tally.to_dict() for phrase, tally in items},
    }

  def table(self, *, phrases: int = 0) -> str:
    """Markdown table of all boxes and the `phrases` most frequent phrases."""
    total = self.to_dict()
    rows = {"all": total, **total["phrases"]}
    lines = [
      "| phrase | true boxes | boxes | matched | recall | precision | IoU |",
      "|---|---|---|---|---|---|---|",
    ]
    for name, row in list(rows.items())[: phrases + 1]:
      cells = [f"{row[key]:,}" for key in ("truth", "boxes", "matched")]
      for key in ("recall", "precision", "mean_iou"):
        cells.append("-" if row[key] is None else f"{100 * row[key]:.1f} %")
      lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def compare(
  labels: LabelSet,
  truth: LabelSet,
  *,
  iou: float | int = 0.5,
  renamed: Mapping[str, str] | None = None,
) -> Agreement:
  """Compares a label set's boxes with true boxes.

  Skips images without a label in `truth`. `iou`, in (0, 1], is the minimum IoU
  of a match. `renamed` maps phrases of `labels` to names in `truth`, ignoring
  case and punctuation. Raises LabelError if the sets label different records or
  `truth` labels no image.
  """
  if not 0 < iou <= 1:
    raise InputError(f"iou={iou}; expected more than 0 and at most 1.")
  renames = dict(map(canonicalize, pair) for pair in (renamed or {}).items())
  agreement = Agreement(iou)
  for label, target in _read_pairs(labels, truth):
    if target is not None:
      label = label and _canonicalize(label, renames)
      agreement.add(label, _canonicalize(target, {}))
  if not agreement.images:
    raise LabelError(f"No image has a label in {truth}: nothing to compare.")
  return agreement


def _read_pairs(
  labels: LabelSet, truth: LabelSet
) -> Iterator[tuple[BoxLabel | None, BoxLabel | None]]:
  if (labels.names, labels.counts) != (truth.names, truth.counts):
    raise LabelError(
      f"{labels} and {truth} label different shards: {labels.names[:3]} and"
      f" {truth.names[:3]}. Label the same shards."
    )
  for shard, count in enumerate(labels.counts):
    for index in range(count):
      label, target = labels.read(shard, index), truth.read(shard, index)
      if label.key != target.key:
        raise LabelError(
          f"Record {index} of {labels.names[shard]} is {label.key!r} in"
          f" {labels} and {target.key!r} in {truth}: label the same shards."
        )
      yield label.label, target.label


def _canonicalize(label: BoxLabel, renames: Mapping[str, str]) -> BoxLabel:
  phrases = [canonicalize(phrase) for phrase in label.phrases]
  return dataclasses.replace(
    label, phrases=tuple(renames.get(phrase, phrase) for phrase in phrases)
  )


def parse_renamed(pairs: Sequence[str]) -> dict[str, str]:
  """Parses strings `LABEL=TRUTH`; raises InputError if malformed."""
  renamed = {}
  for pair in pairs:
    old, _, new = pair.partition("=")
    if not canonicalize(old) or not canonicalize(new):
      raise InputError(f"{pair!r}: expected LABEL=TRUTH, such as sofa=couch.")
    renamed[old] = new
  return renamed
