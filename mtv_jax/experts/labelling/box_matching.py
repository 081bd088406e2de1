"""Agreement of two box label sets: recall, precision and IoU of matches.

In an image, boxes are taken from the surest to the least sure; each takes, of
the true boxes of its phrase that none has taken, the one it overlaps most, if
their intersection over union is at least `iou`. With m such pairs in all images
that have true boxes,

    recall = m / true boxes        precision = m / boxes

at the threshold that the label set was made with: one point of the curve that
COCO's AP integrates. The true boxes may be people's (tools/make_labels.py).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import BoxLabel
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.evals.grounding import grounding
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What became of the boxes of an image.

  Attributes:
    truth: for each box the true box that it took, or -1.
    iou: with that one, or 0.
  """

  truth: Int[np.ndarray, " n"]
  iou: Float[np.ndarray, " n"]


def match(label: BoxLabel, truth: BoxLabel, *, iou: float | int = 0.5) -> Pairs:
  """Gives each box the true box that it is, if any; see the top of the file."""
  overlaps = grounding.ious(label.boxes, truth.boxes)
  same = np.array([[p == q for q in truth.phrases] for p in label.phrases])
  overlaps = np.where(same.reshape(overlaps.shape), overlaps, 0)
  taken = np.full(len(label.boxes), -1)
  found = np.zeros(len(label.boxes))
  if truth.phrases:
    for i in np.argsort(-label.scores, kind="stable"):
      best = int(overlaps[i].argmax())
      if overlaps[i, best] >= iou:
        taken[i], found[i] = best, overlaps[i, best]
        overlaps[:, best] = -1
  return Pairs(taken, found)


@dataclasses.dataclass
class Tally:
  """Boxes counted, of all images or of one phrase.

  Attributes:
    boxes: of the label set.
    truth: that there are.
    matched: pairs.
    overlap: sum of the pairs' intersection over union.
  """

  boxes: int = 0
  truth: int = 0
  matched: int = 0
  overlap: float = 0.0

  def to_dict(self) -> dict[str, float | int | None]:
    """Counts and shares; None for a share of nothing."""

    def share(part: float | int, whole: int) -> float | None:
      return part / whole if whole else None

    return {
      "boxes": self.boxes,
      "truth": self.truth,
      "matched": self.matched,
      "recall": share(self.matched, self.truth),
      "precision": share(self.matched, self.boxes),
      "mean_iou": share(self.overlap, self.matched),
    }


@dataclasses.dataclass
class Agreement:
  """How a label set agrees with another.

  Attributes:
    images: that have a label of true boxes.
    unlabelled: how many of them the label set has no label for: their true
      boxes count as not found.
    total: over all phrases.
    phrases: by phrase, those of the label set renamed.
    iou: that makes a pair.
  """

  iou: float | int
  images: int = 0
  unlabelled: int = 0
  total: Tally = dataclasses.field(default_factory=Tally)
  phrases: dict[str, Tally] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Tally)
  )

  def add(self, label: BoxLabel | None, truth: BoxLabel) -> None:
    """Counts an image; phrases are compared as they are."""
    self.images += 1
    self.unlabelled += label is None
    for phrase in truth.phrases:
      self.total.truth += 1
      self.phrases[phrase].truth += 1
    if label is None:
      return
    pairs = match(label, truth, iou=self.iou)
    for phrase, taken, overlap in zip(
      label.phrases, pairs.truth, pairs.iou, strict=True
    ):
      for tally in (self.total, self.phrases[phrase]):
        tally.boxes += 1
        tally.matched += int(taken >= 0)
        tally.overlap += float(overlap)

  @property
  def never_true(self) -> list[str]:
    """Phrases of the label set that no true box has."""
    return sorted(p for p, tally in self.phrases.items() if not tally.truth)

  def to_dict(self) -> dict[str, Any]:
    """For JSON, the commonest phrase first."""
    order = sorted(self.phrases.items(), key=lambda item: -item[1].truth)
    return {
      "iou": self.iou,
      "images": self.images,
      "unlabelled": self.unlabelled,
      **self.total.to_dict(),
      "phrases": {phrase: tally.to_dict() for phrase, tally in order},
    }

  def table(self, *, phrases: int = 0) -> str:
    """Markdown: all boxes, and the commonest phrases."""
    found = self.to_dict()
    rows = {"all": found, **found.pop("phrases")}
    lines = [
      "| phrase | true boxes | boxes | matched | recall | precision | IoU |",
      "|---|---|---|---|---|---|---|",
    ]
    for name, row in list(rows.items())[: phrases + 1]:
      shares = [_percent(row[k]) for k in ("recall", "precision", "mean_iou")]
      counts = [f"{row[k]:,}" for k in ("truth", "boxes", "matched")]
      lines.append(f"| {' | '.join([name, *counts, *shares])} |")
    return "\n".join(lines)


def _percent(share: float | int | None) -> str:
  return "-" if share is None else f"{100 * share:.1f} %"


def compare(
  labels: LabelSet,
  truth: LabelSet,
  *,
  iou: float | int = 0.5,
  renamed: Mapping[str, str] | None = None,
) -> Agreement:
  """How the boxes of a label set agree with the true ones.

  Images without a label in `truth` are left out: nobody said what is in them.

  Args:
    labels: of an expert.
    truth: of the same records.
    iou: that makes a pair, above 0.
    renamed: by a phrase of `labels`, what `truth` calls it. Case and
      punctuation make no difference.

  Raises:
    LabelError: the sets are of other records, or of no common image.
    InputError: an option makes no sense.
  """
  if not 0 < iou <= 1:
    raise InputError(f"iou={iou}; expected more than 0 and at most 1")
  names = {canonicalize(k): canonicalize(v) for k, v in (renamed or {}).items()}
  agreement = Agreement(iou)
  for label, true in _both(labels, truth):
    if true is not None:
      agreement.add(label and _plain(label, names), _plain(true, {}))
  if not agreement.images:
    raise LabelError(f"no image has a label in {truth}: nothing to compare")
  return agreement


def _both(
  labels: LabelSet, truth: LabelSet
) -> Iterator[tuple[BoxLabel | None, BoxLabel | None]]:
  shape = [(labels.names, [s.records for s in labels.shards])]
  shape += [(truth.names, [s.records for s in truth.shards])]
  if shape[0] != shape[1]:
    raise LabelError(
      f"{labels} and {truth} are of different shards: {_describe(labels)} and"
      f" {_describe(truth)}. Make both for the same ones."
    )
  for shard, entry in enumerate(labels.shards):
    for at in range(entry.records):
      one, other = labels.read(shard, at), truth.read(shard, at)
      if one.key != other.key:
        raise LabelError(
          f"record {at} of {labels.names[shard]} is {one.key!r} in"
          f" {labels.folder} and {other.key!r} in {truth.folder}: make both for"
          " the same shards"
        )
      yield one.label, other.label


def _describe(labels: LabelSet) -> str:
  first = ", ".join(labels.names[:3])
  return f"{len(labels.names)} ({first}, ...) of {len(labels)} records"


def _plain(label: BoxLabel, names: Mapping[str, str]) -> BoxLabel:
  plain = [canonicalize(phrase) for phrase in label.phrases]
  return dataclasses.replace(
    label, phrases=tuple(names.get(phrase, phrase) for phrase in plain)
  )


def parse_renamed(pairs: Sequence[str]) -> dict[str, str]:
  """Of `old=new` strings.

  Raises:
    InputError: for one without an equals sign or a side.
  """
  renamed = {}
  for pair in pairs:
    old, _, new = pair.partition("=")
    if not canonicalize(old) or not canonicalize(new):
      raise InputError(
        f"{pair!r} renames nothing; write it as LABEL=TRUTH, such as"
        " 'sofa=couch'"
      )
    renamed[old] = new
  return renamed
