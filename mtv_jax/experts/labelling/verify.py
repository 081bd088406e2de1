"""Verification of a label set: labels some records again and compares."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent import futures

import numpy as np

from mtv_jax.data.labels import (
  join as labels,
)
from mtv_jax.data.labels import (
  label_values,
)
from mtv_jax.data.labels import (
  settings as label_settings,
)
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel, Label
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling import batching
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass
class Report:
  """Result of a comparison.

  Attributes:
    kind: of the labels.
    compared: records.
    labelled: those with a label on both sides.
    boxes, found: stored and new boxes, of sets of boxes.
    different: by key, how a label differs.
    max_difference, total_difference, pixels: of the stored maps, in steps of
      their 16 bits.
  """

  kind: str
  compared: int = 0
  labelled: int = 0
  boxes: int = 0
  found: int = 0
  different: dict[str, str] = dataclasses.field(default_factory=dict)
  max_difference: int = 0
  total_difference: int = 0
  pixels: int = 0

  def __str__(self) -> str:
    lines = [
      f"{self.compared:,} records labelled again, {self.labelled:,} with a"
      f" label: {len(self.different):,} differ."
    ]
    if self.kind == "depth":
      mean = self.total_difference / max(self.pixels, 1)
      lines.append(
        f"16-bit maps differ by at most {self.max_difference} steps of"
        f" {label_values.TOP}, {mean:.4g} on average."
      )
    else:
      lines.append(f"{self.boxes:,} boxes are stored, {self.found:,} made now.")
    shown = list(self.different.items())[:10]
    lines += [f"  {key}: {how}" for key, how in shown]
    if more := len(self.different) - len(shown):
      lines.append(f"  ... and {more:,} more")
    return "\n".join(lines)


def verify(
  expert: Expert,
  base: Source,
  out: str | os.PathLike,
  *,
  count: int,
  threads: int | None = None,
) -> Report:
  """Compares the labels of evenly spaced records with new ones.

  Args:
    expert: with the settings of the set.
    base: the source of the set, or some of its shards.
    out: the folder of the set.
    count: of records; all, if there are fewer.
    threads: one per core by default.

  Raises:
    FileNotFoundError: there is no finished set.
    FileExistsError: the set has other settings.
    LabelError: the set is of other shards.
    InputError: a count, or threads, below one.
  """
  if threads is not None and threads < 1:
    raise InputError(f"threads={threads}; expected at least 1.")
  if count < 1:
    raise InputError(f"{count} records to verify; expected at least 1.")
  stored = LabelSet(out, kind=expert.kind)
  described = label_settings.describe(expert.kind, expert.settings, base)
  label_settings.check_manifest(
    stored.folder, {k: v for k, v in described.items() if k != "base"}
  )
  aligned = labels.AlignedLabels(stored, base)
  numbers = np.linspace(0, len(base) - 1, min(count, len(base)))
  numbers = np.unique(numbers.round().astype(int)).tolist()
  report = Report(expert.kind)
  for number, key, made in _made(expert, base, numbers, threads):
    report.compared += 1
    try:
      there = aligned.get(number, {"key": key})
    except BadRecord as error:
      report.different[key] = error.reason
      continue
    if how := _compare(there, made, report):
      report.different[key] = how
  return report


def _made(
  expert: Expert, base: Source, numbers: list[int], threads: int | None
) -> Iterator[tuple[int, str, Label | None]]:
  """Number, key and label of each record, as a set would hold it."""
  threads = threads or os.cpu_count() or 1
  with futures.ThreadPoolExecutor(threads) as pool:
    entries = batching.label(
      expert,
      base.read_with_metadata,
      numbers,
      pool=pool,
      threads=threads,
    )
    for number, entry in zip(numbers, entries, strict=True):
      packed = label_values.encode(entry.key, entry.outcome.label)
      made = label_values.decode(packed, kind=expert.kind, where="now")
      yield number, entry.key, made.label


def _compare(there: Label | None, here: Label | None, report: Report) -> str:
  """How two labels of a record differ; empty where they don't."""
  if there is None or here is None:
    if there is here:
      return ""
    return "no label, now one" if there is None else "a label, now none"
  report.labelled += 1
  if isinstance(there, DepthLabel):
    return _compare_depth(there, here, report)
  report.boxes += len(there.boxes)
  report.found += len(here.boxes)
  return _compare_boxes(there, here)


def _compare_depth(there: DepthLabel, here: DepthLabel, report: Report) -> str:
  if there.values.shape != here.values.shape:
    return f"a map of {there.values.shape}, now {here.values.shape}"
  apart = abs(there.values.astype(np.int64) - here.values.astype(np.int64))
  report.max_difference = max(report.max_difference, int(apart.max()))
  report.total_difference += int(apart.sum())
  report.pixels += apart.size
  if apart.any():
    return (
      f"the map differs by at most {apart.max()}, {apart.mean():.4g} on average"
    )
  ranges = [(label.low, label.high) for label in (there, here)]
  if ranges[0] != ranges[1]:
    return f"inverse depth from {ranges[0]}, now {ranges[1]}"
  return ""


def _compare_boxes(there: BoxLabel, here: BoxLabel) -> str:
  if len(there.boxes) != len(here.boxes):
    return f"{len(there.boxes)} boxes, now {len(here.boxes)}"
  boxes = abs(there.boxes - here.boxes).max(initial=0)
  scores = abs(there.scores - here.scores).max(initial=0)
  names = sum(a != b for a, b in zip(there.phrases, here.phrases, strict=True))
  if not (boxes or scores or names):
    return ""
  return (
    f"{len(there.boxes)} boxes: {names} with another phrase, corners up to"
    f" {boxes:.3g} and scores up to {scores:.3g} apart"
  )
