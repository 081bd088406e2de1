"""Verification of a label set: relabels some records and compares."""

import dataclasses
import os

import numpy as np

from mtv_jax.data.labels import label_sets, label_values
from mtv_jax.data.labels.join import AlignedLabels
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import (
  BoxLabel,
  DepthLabel,
  FeatureLabel,
  Label,
)
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.run import count_threads, label_records
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass
class VerificationReport:
  """Differences between stored labels and new ones."""

  kind: str
  compared: int = 0  # Records.
  labelled: int = 0  # Records with both a stored and a new label.
  boxes: int = 0  # Stored boxes of labelled records.
  new_boxes: int = 0
  # Description of each difference, by key.
  different: dict[str, str] = dataclasses.field(default_factory=dict)
  max_difference: int = 0  # Largest difference of maps, in 16-bit steps.
  total_difference: int = 0
  pixels: int = 0
  max_error: float = 0.0  # Largest error relative to a vector's length.

  def __str__(self) -> str:
    lines = [
      f"{self.compared:,} records labelled again, {self.labelled:,} with a"
      f" label: {len(self.different):,} differ."
    ]
    if self.kind == "depth":
      mean = self.total_difference / max(self.pixels, 1)
      lines.append(
        f"16-bit maps differ by at most {self.max_difference} steps of"
        f" {label_values.UINT16_MAX}, {mean:.4g} on average."
      )
    elif self.kind == "features":
      lines.append(
        f"Vectors differ by at most {self.max_error:.3g} of their length."
      )
    else:
      lines.append(
        f"{self.boxes:,} boxes are stored, {self.new_boxes:,} were found now."
      )
    shown = list(self.different.items())[:10]
    lines += [f"  {key}: {difference}" for key, difference in shown]
    if more := len(self.different) - len(shown):
      lines.append(f"  ... and {more:,} more")
    return "\n".join(lines)

  def compare(self, old: Label | None, new: Label | None) -> str:
    """Compares two labels; returns their difference, or an empty string."""
    if old is None or new is None:
      if old is new:
        return ""
      return "no label, now one" if old is None else "a label, now none"
    self.labelled += 1
    if isinstance(old, DepthLabel):
      return self._compare_depth(old, new)
    if isinstance(old, FeatureLabel):
      return self._compare_features(old, new)
    return self._compare_boxes(old, new)

  def _compare_depth(self, old: DepthLabel, new: DepthLabel) -> str:
    if old.values.shape != new.values.shape:
      return f"a map of {old.values.shape}, now {new.values.shape}"
    steps = abs(old.values.astype(np.int64) - new.values.astype(np.int64))
    self.max_difference = max(self.max_difference, int(steps.max()))
    self.total_difference += int(steps.sum())
    self.pixels += steps.size
    if steps.any():
      return (
        f"the map differs by at most {steps.max()}, {steps.mean():.4g} on"
        " average"
      )
    ranges = [(label.low, label.high) for label in (old, new)]
    if ranges[0] != ranges[1]:
      return f"inverse depth from {ranges[0]}, now {ranges[1]}"
    return ""

  def _compare_features(self, old: FeatureLabel, new: FeatureLabel) -> str:
    shapes = [
      {n: a.codes.shape for n, a in label.arrays.items()}
      for label in (old, new)
    ]
    if shapes[0] != shapes[1]:
      return f"features of {shapes[0]}, now {shapes[1]}"
    worst = 0.0
    for name, array in old.arrays.items():
      x, y = array.values(old.format), new.arrays[name].values(new.format)
      length = np.linalg.norm(x, axis=1)
      error = np.linalg.norm(x - y, axis=1) / np.maximum(length, 1e-12)
      worst = max(worst, float(error.max(initial=0.0)))
    self.max_error = max(self.max_error, worst)
    return f"vectors differ by up to {worst:.3g} of their length" * (worst > 0)

  def _compare_boxes(self, old: BoxLabel, new: BoxLabel) -> str:
    count = len(old.boxes)
    self.boxes += count
    self.new_boxes += len(new.boxes)
    if count != len(new.boxes):
      return f"{count} boxes, now {len(new.boxes)}"
    box_error = abs(old.boxes - new.boxes).max(initial=0)
    score_error = abs(old.scores - new.scores).max(initial=0)
    renamed = sum(a != b for a, b in zip(old.phrases, new.phrases, strict=True))
    if not (box_error or score_error or renamed):
      return ""
    return (
      f"{count} boxes: {renamed} with another phrase, corners up to"
      f" {box_error:.3g} and scores up to {score_error:.3g} apart"
    )


def verify(
  expert: Expert,
  base: Source,
  out: str | os.PathLike,
  *,
  count: int,
  threads: int | None = None,
) -> VerificationReport:
  """Relabels at most `count` evenly spaced records and compares the labels.

  `base` is the set's source, or some of its shards. Raises FileNotFoundError if
  the set is not finished, FileExistsError if its settings differ from the
  expert's, LabelError if it belongs to different shards.
  """
  threads = count_threads(threads)
  if count < 1:
    raise InputError(f"{count} records to verify; expected at least 1.")
  label_set = LabelSet(out, kind=expert.kind)
  version = label_set.manifest["version"]
  settings = label_sets.describe_settings(
    expert.kind, expert.settings, base, version
  )
  del settings["base"]
  label_sets.check_manifest(label_set.folder, settings)
  aligned = AlignedLabels(label_set, base)
  numbers = np.linspace(0, len(base) - 1, min(count, len(base)))
  numbers = np.unique(numbers.round().astype(int)).tolist()
  report = VerificationReport(expert.kind, compared=len(numbers))
  entries = label_records(expert, base, numbers, threads=threads)
  for number, entry in zip(numbers, entries, strict=True):
    key = entry.key
    # Encodes and decodes the label, as the label set does.
    encoded = label_values.encode(key, entry.outcome.label)
    new = label_values.decode(encoded, kind=expert.kind, where=key).label
    try:
      old = aligned.get(number, {"key": key})
    except BadRecord as error:
      report.different[key] = error.reason
      continue
    if difference := report.compare(old, new):
      report.different[key] = difference
  return report
