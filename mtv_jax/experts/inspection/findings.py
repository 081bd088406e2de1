"""Findings: unusual statistics of a label set, as sentences.

A finding is not an error, but suggests looking at the images before a long run.
The thresholds are heuristics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtv_jax.experts.inspection import statistics
from mtv_jax.utils.text import format_percent

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
  f" {100 * statistics.LARGE_AREA:g} % of their image, and localize nothing.",
  "small_boxes": "{} of the boxes have a side below"
  f" {100 * statistics.SMALL_SIDE:.1f} % of the image's: a patch of 16 pixels"
  " at 384.",
  "one_phrase": "{} of the boxes have the phrase {!r}.",
  "repeated_phrases": "{} of the boxes share their phrase with another box of"
  " their image: the phrase is ambiguous.",
  "no_maps": "No map was read.",
  "sparse_maps": "On average {} of the pixels of a map have a label.",
  "constant_maps": "{} of the maps are nearly constant: their minimum is within"
  f" {100 * statistics.CONSTANT_RANGE:g} % of their maximum.",
  "narrow_maps": "{} of the maps have 90 % of their pixels within"
  f" {100 * statistics.NARROW_RANGE:g} % of their range: a few pixels, perhaps"
  " outliers, set the scale.",
  "sides": "The maps have different sides: {} pixels.",
}

# Maps a finding's name to (whether it applies, *values of its text).
_Rules = dict[str, tuple[Any, ...]]


def find(stats: Mapping[str, Any]) -> list[dict[str, str]]:
  """Returns kind, name and text of each finding in `gather`'s statistics."""
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
  is_limited = top > max(_AT_LIMIT, 2 * below) and most <= statistics.MAX_COUNT
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
