"""Unusual values in the statistics of a label set, as sentences.

A finding is not an error; it is worth a look at the images before a long run.
The thresholds are this project's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.experts.inspection import statistics

# Fractions of records, boxes, images or maps that are reported.
_UNLABELLED, _HALF = 0.2, 0.5
_ONE_PHRASE, _AT_LIMIT, _ODD_MAPS = 0.3, 0.1, 0.05
# Fewer boxes say nothing about fractions.
_MIN_BOXES = 20


@dataclasses.dataclass(frozen=True)
class Finding:
  """An unusual value.

  Attributes:
    kind: of the labels.
    name: of the finding, for programs.
    text: a sentence.
  """

  kind: str
  name: str
  text: str


def find(stats: Mapping[str, Any]) -> list[Finding]:
  """The findings in the statistics of `statistics.gather`."""
  of_kind = {"boxes": _box_findings, "depth": _depth_findings}[stats["kind"]]
  findings = [*_read_findings(stats), *of_kind(stats)]
  return [Finding(stats["kind"], name, text) for name, text in findings]


def percent(fraction: float | int | None) -> str:
  """A fraction as text; small ones keep two digits."""
  if fraction is None:
    return "none"
  value = 100 * fraction
  return f"{value:.2g} %" if 0 < value < 1 else f"{value:.1f} %"


def _read_findings(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  read = stats["read"]
  if read["damaged"]:
    yield (
      "damaged",
      f"{read['damaged']:,} of {read['records']:,} labels can't be read, such"
      f" as: {read['examples'][0]}. Copy the files again, or relabel.",
    )
  missing = 1 - stats["labelled"] / max(stats["records"], 1)
  if missing > _UNLABELLED:
    # The reasons include those of changed labels.
    reasons = list(stats["reasons"].items())[:2]
    why = "; ".join(f"{n:,} times {reason!r}" for reason, n in reasons)
    why = why and f" The most frequent reasons in the manifest: {why}."
    yield (
      "without_label",
      f"{percent(missing)} of the records have no label.{why}",
    )


def _box_findings(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  if not stats["boxes"]:
    least = stats["min_score"]
    scores = f" scores {least:g} or more" if least else " is in any label"
    yield "no_boxes", f"No box at all{scores}."
    return
  without, most = stats["images_without_boxes"], stats["boxes_an_image"]["max"]
  if without > _HALF:
    yield (
      "images_without_boxes",
      f"{percent(without)} of the labelled images have no box: the score"
      " threshold is too high, or the phrases don't fit the images.",
    )
  many, less = stats["images_with_most_boxes"], stats["images_with_one_less"]
  # Without a limit, a count is about as frequent as the next.
  if 2 < most <= statistics.MAX_COUNT and many > max(_AT_LIMIT, 2 * less):
    yield (
      "at_most",
      f"{percent(many)} of the labelled images have {most:g} boxes, and none"
      " has more: boxes were left out at a limit.",
    )
  scores = stats["scores"]
  if stats["scores_of_1"] == 1:
    yield (
      "scores_of_1",
      "All scores are 1: human annotations, or scores that were lost. A score"
      " threshold has no effect.",
    )
  if scores["min"] < 0 or scores["max"] > 1:
    yield (
      "scores_beyond",
      f"Scores are from {scores['min']:.3g} to {scores['max']:.3g}: expected 0"
      " to 1. Are they logits?",
    )
  if stats["boxes"] < _MIN_BOXES:
    return
  if (large := stats["large_boxes"]) >= _HALF:
    yield (
      "large_boxes",
      f"{percent(large)} of the boxes cover more than"
      f" {100 * statistics.LARGE_AREA:g} % of their image, and localize"
      " nothing.",
    )
  if (small := stats["small_boxes"]) >= _HALF:
    yield (
      "small_boxes",
      f"{percent(small)} of the boxes have a side below"
      f" {100 * statistics.SMALL_SIDE:.1f} % of the image's: a patch of 16"
      " pixels at 384.",
    )
  phrase, count = stats["phrases"]["most_frequent"][0]
  if (fraction := count / stats["boxes"]) > _ONE_PHRASE:
    yield (
      "one_phrase",
      f"{percent(fraction)} of the boxes have the phrase {phrase!r}.",
    )
  if (fraction := stats["boxes_with_repeated_phrase"]) > _HALF:
    yield (
      "repeated_phrases",
      f"{percent(fraction)} of the boxes share their phrase with another box"
      " of their image: the phrase is ambiguous.",
    )


def _depth_findings(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  labelled = stats["labelled_pixels"]
  if not labelled["count"]:
    yield "no_maps", "No map was read."
    return
  if labelled["mean"] < _HALF:
    yield (
      "sparse_maps",
      f"On average {percent(labelled['mean'])} of the pixels of a map have a"
      " label.",
    )
  if (fraction := stats["constant_maps"]) > _ODD_MAPS:
    yield (
      "constant_maps",
      f"{percent(fraction)} of the maps are nearly constant: their minimum is"
      f" within {100 * statistics.CONSTANT_RANGE:g} % of their maximum.",
    )
  if (fraction := stats["narrow_maps"]) > _ODD_MAPS:
    yield (
      "narrow_maps",
      f"{percent(fraction)} of the maps have 90 % of their pixels within"
      f" {100 * statistics.NARROW_RANGE:g} % of their range: a few pixels,"
      " perhaps outliers, set the scale.",
    )
  if len(stats["sides"]) > 1:
    sides = ", ".join(f"{n:,} of {side}" for side, n in stats["sides"].items())
    yield "sides", f"The maps have different sides: {sides} pixels."
