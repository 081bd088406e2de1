"""Records with their labels drawn on them, ready for a sheet or a page."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mtv_jax.data import canvas
from mtv_jax.data.labels.join import Labels
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel, phrase_id
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.inspection.statistics import at_least
from mtv_jax.utils import plots

# Of what stands for an image that can't be shown.
_SHAPE = (3, 4)
_BLANK = (232, 232, 236)
_HUES = 48


@dataclasses.dataclass(frozen=True)
class Card:
  """A record and its labels.

  Attributes:
    number: of the record in its source.
    key: of the record.
    size: of the image, such as "640 x 480"; empty where it can't be decoded.
    captions: of the record; there may be none.
    pictures: by what they show, all of one shape.
    names: phrases of the boxes with their scores, the best first, and how
      many there are of each. A score of 1 is left out.
    unnamed: those of them that found no room on the picture.
    notes: what the pictures don't tell, as lines.
  """

  number: int
  key: str
  size: str
  captions: tuple[str, ...]
  pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]]
  names: Mapping[str, int]
  unnamed: Mapping[str, int]
  notes: tuple[str, ...]


def draw(
  source: Any,
  labels: Mapping[str, Labels],
  i: int,
  *,
  size: int,
  min_score: float | int = 0.0,
) -> Card:
  """The card of record `i`.

  Args:
    source: of the records; their captions may be missing.
    labels: by kind, "depth" and "boxes" or one of them.
    i: its number.
    size: longer side of the pictures.
    min_score: boxes below are left out.

  Raises:
    LabelError: a label is of another record.
  """
  notes: list[str] = []
  try:
    record = source[i]
  except BadRecord as error:
    notes.append(str(error))
    image = plots.add_title_bar(_blank(size), "the record can't be read")
    return Card(i, error.key, "", (), {"image": image}, {}, {}, tuple(notes))
  image, shown = _image(record, size, notes)
  found = {kind: _label(of, i, record, notes) for kind, of in labels.items()}
  pictures, names, unnamed = {"image": image}, {}, {}
  if "boxes" in labels:
    drawn, every = _boxes(image, found["boxes"], min_score)
    pictures = {"boxes": drawn[0]}
    names = collections.Counter(every)
    unnamed = collections.Counter(every[k] for k in drawn[1])
  if "depth" in labels:
    pictures["depth"] = _depth(image, found["depth"], notes)
  return Card(
    number=i,
    key=record["key"],
    size=shown,
    captions=tuple(record.get("captions", ())),
    pictures=pictures,
    names=names,
    unnamed=unnamed,
    notes=tuple(notes),
  )


def _label(
  labels: Labels, i: int, record: Mapping[str, Any], notes: list[str]
) -> Any:
  try:
    return labels.get(i, record)
  except BadRecord as error:
    notes.append(str(error))
    return error


def _image(
  record: Mapping[str, Any], size: int, notes: list[str]
) -> tuple[np.ndarray, str]:
  """The picture as it is shown, and the size that it has."""
  try:
    image = canvas.decode(record["image"], key=record["key"])
  except BadRecord as error:
    notes.append(error.reason)
    return plots.add_title_bar(_blank(size), "the image can't be decoded"), ""
  height, width = image.shape[:2]
  return np.asarray(plots.fit_image(image, size)), f"{width} x {height}"


def _blank(size: int) -> np.ndarray:
  return np.full((size * _SHAPE[0] // _SHAPE[1], size, 3), _BLANK, np.uint8)


def _boxes(
  image: np.ndarray, label: BoxLabel | BadRecord | None, min_score: float | int
) -> tuple[tuple[np.ndarray, tuple[int, ...]], list[str]]:
  """The image with its boxes, and their names."""
  if not isinstance(label, BoxLabel):
    return (plots.add_title_bar(image, _missing(label, "boxes")), ()), []
  kept = at_least(label, min_score)
  if not len(kept.boxes):
    below = f", {len(label.boxes)} below the score" if len(label.boxes) else ""
    words = f"labelled: no box{below}"
    return (plots.add_title_bar(image, words), ()), []
  order = np.argsort(-kept.scores, kind="stable")
  phrases = [kept.phrases[i] for i in order]
  tails = list(map(_score, kept.scores[order].tolist()))
  # Equal phrases have equal colours, on all pictures.
  hues = [phrase_id(phrase) % _HUES for phrase in phrases]
  made = plots.draw_boxes(
    image,
    kept.boxes[order],
    phrases,
    colours=plots.palette(_HUES + 1)[1:][hues],
    suffixes=tails,
  )
  return made, [p + tail for p, tail in zip(phrases, tails, strict=True)]


def _score(score: float) -> str:
  """What stands behind a phrase: two digits; nothing for a score of 1."""
  if score == 1:
    return ""
  return f" {score:.2f}" if score >= 0.095 else f" {score:.1g}"


def _depth(
  image: np.ndarray, label: DepthLabel | BadRecord | None, notes: list[str]
) -> np.ndarray:
  """The depth in colours, at the image's shape."""
  height, width = image.shape[:2]
  if not isinstance(label, DepthLabel):
    nowhere = np.ones((height, width), np.bool_)
    return plots.add_title_bar(
      plots.hatch(np.zeros_like(image), nowhere), _missing(label, "depth")
    )
  # Each stored pixel as it is: what lies between was not labelled.
  shape = (width, height)
  values = cv2.resize(label.values, shape, interpolation=cv2.INTER_NEAREST)
  there = values > 0
  share = float((label.values > 0).mean())
  notes.append(
    f"inverse depth {label.low:.3g} to {label.high:.3g},"
    f" {100 * share:.0f} % of the pixels"
  )
  low = values[there].min() if there.any() else 0
  coloured = plots.colour_depth(np.where(there, values, low).astype(np.float32))
  return plots.hatch(np.ascontiguousarray(coloured), ~there)


def counted(names: Mapping[str, int]) -> list[str]:
  """Names with how many there are of each, where that is more than one."""
  return [name if n == 1 else f"{name} ×{n}" for name, n in names.items()]


def _missing(label: BadRecord | None, kind: str) -> str:
  if label is None:
    return f"no label of {kind}"
  return f"the label of {kind} can't be read"
