"""What stands out in the statistics, said in words.

Nothing here is wrong for certain; each is worth a look at the pictures before
a long run. The limits are our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.experts.inspection import statistics

# Shares of records, boxes, images or maps above which something is said.
WITHOUT_LABEL = 0.2
ONE_PHRASE = 0.3
HALF = 0.5
ODD_MAPS = 0.05
AT_MOST = 0.1
# Fewer than this say nothing about shares.
_FEW = 20


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something to look at.

  Attributes:
    kind: of the labels.
    name: of what was found, for programs.
    text: the same for people.
  """

  kind: str
  name: str
  text: str


def look_at(found: Mapping[str, Any]) -> list[Finding]:
  """What is worth saying of a label set.

  Args:
    found: from `statistics.gather`.
  """
  kind = found["kind"]
  of_kind = {"boxes": _of_boxes, "depth": _of_depth}[kind]
  lines = [*_of_any(found), *of_kind(found)]
  return [Finding(kind, name, text) for name, text in lines]


def percent(share: float | int | None) -> str:
  """A share for people: 0.5 % is told from none."""
  if share is None:
    return "none"
  shown = 100 * share
  return f"{shown:.2g} %" if 0 < shown < 1 else f"{shown:.1f} %"


def _of_any(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  read = found["read"]
  if read["damaged"]:
    yield (
      "damaged",
      f"{read['damaged']:,} of {read['records']:,} labels can't be read, such"
      f" as: {read['examples'][0]}. Copy the files again, or make them again.",
    )
  missing = 1 - found["labelled"] / max(found["records"], 1)
  if missing > WITHOUT_LABEL:
    # Reasons of what was changed or left out of a label are among them, too.
    why = "; ".join(
      f"{n:,} times {reason!r}"
      for reason, n in list(found["reasons"].items())[:2]
    )
    because = f" The commonest reasons in the manifest: {why}." if why else ""
    yield (
      "without_label",
      f"{percent(missing)} of the records have no label.{because}",
    )


def _of_boxes(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  if not found["boxes"]:
    least = found["min_score"]
    scores = f" scores {least:g} or more" if least else " is in any label"
    yield "no_boxes", f"No box at all{scores}."
    return
  without, most = found["images_without_boxes"], found["boxes_an_image"]["max"]
  if without > HALF:
    yield (
      "images_without_boxes",
      f"{percent(without)} of the labelled images have no box. If there is"
      " something on them, the threshold is too high, or the phrases are of"
      " other things.",
    )
  many, less = found["images_with_most_boxes"], found["images_with_one_less"]
  # Where nothing was cut off, a number is about as frequent as the next.
  if 2 < most <= statistics.MANY and many > max(AT_MOST, 2 * less):
    yield (
      "at_most",
      f"{percent(many)} of the labelled images have {most:g} boxes, and none"
      " has more: boxes were left out at a limit.",
    )
  yield from _of_scores(found)
  if found["boxes"] < _FEW:
    return
  if (large := found["large_boxes"]) >= HALF:
    yield (
      "large_boxes",
      f"{percent(large)} of the boxes cover more than"
      f" {100 * statistics.LARGE:g} % of their image: they teach what is on it,"
      " not where.",
    )
  if (small := found["small_boxes"]) >= HALF:
    yield (
      "small_boxes",
      f"{percent(small)} of the boxes have a side below"
      f" {100 * statistics.SMALL:.1f} % of the image's: a patch of 16 pixels at"
      " 384.",
    )
  yield from _of_phrases(found)


def _of_scores(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  scores = found["scores"]
  if found["scores_of_1"] == 1:
    yield (
      "scores_of_1",
      "All scores are 1: annotations by people, or scores that were lost. No"
      " threshold on them makes a difference.",
    )
  if scores["min"] < 0 or scores["max"] > 1:
    yield (
      "scores_beyond",
      f"Scores are from {scores['min']:.3g} to {scores['max']:.3g}: expected 0"
      " to 1. Are they logits?",
    )


def _of_phrases(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  phrase, count = found["phrases"]["most_frequent"][0]
  if (share := count / found["boxes"]) > ONE_PHRASE:
    yield (
      "one_phrase",
      f"{percent(share)} of the boxes have the phrase {phrase!r}.",
    )
  if (share := found["boxes_with_repeated_phrase"]) > HALF:
    yield (
      "repeated_phrases",
      f"{percent(share)} of the boxes share their phrase with another box of"
      " their image: a phrase does not tell which of them is meant.",
    )


def _of_depth(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  labelled = found["labelled_pixels"]
  if not labelled["count"]:
    yield "no_maps", "No map was read."
    return
  if labelled["mean"] < HALF:
    yield (
      "sparse_maps",
      f"{percent(labelled['mean'])} of the pixels of a map have a label, in the"
      " mean.",
    )
  if (share := found["constant_maps"]) > ODD_MAPS:
    yield (
      "constant_maps",
      f"{percent(share)} of the maps are nearly constant: their least value is"
      f" within {100 * statistics.CONSTANT:g} % of their greatest.",
    )
  if (share := found["narrow_maps"]) > ODD_MAPS:
    yield (
      "narrow_maps",
      f"{percent(share)} of the maps have 90 % of their pixels within"
      f" {100 * statistics.NARROW:g} % of their range: a few pixels, perhaps"
      " wrong ones, set the scale.",
    )
  if len(found["sides"]) > 1:
    sides = ", ".join(f"{n:,} of {side}" for side, n in found["sides"].items())
    yield "sides", f"The maps have different sides: {sides} pixels."
