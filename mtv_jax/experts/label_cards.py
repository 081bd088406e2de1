"""Cards: records drawn with their labels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mtv_jax.data import canvas
from mtv_jax.data.labels.join import JoinedLabels
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel, phrase_id
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.label_statistics import filter_boxes
from mtv_jax.utils import plots

_BLANK = (232, 232, 236)  # colour of an image that can't be decoded
_COLOURS = plots.palette(49)[1:]


@dataclasses.dataclass(frozen=True)
class Card:
  """A record and its labels."""

  key: str
  # By kind ("image", "boxes", "depth"), of equal shapes.
  images: Mapping[str, UInt8[np.ndarray, "h w 3"]]
  notes: tuple[str, ...]  # errors and ranges, which the images don't show
  size: str = ""  # such as "640 x 480"; empty if the image can't be decoded
  captions: tuple[str, ...] = ()
  # Number of boxes by phrase with score (unless 1), best first.
  names: Mapping[str, int] = dataclasses.field(default_factory=dict)


def draw_card(
  source: Any,
  labels: Mapping[str, JoinedLabels],
  i: int,
  *,
  size: int,
  min_score: float | int = 0.0,
) -> Card:
  """Draws record `i` of a source with its labels (label sets by kind).

  `size` is the images' longer side in pixels; boxes need at least `min_score`.
  """
  notes: list[str] = []
  image = np.full((size * 3 // 4, size, 3), _BLANK, np.uint8)
  try:
    record = source[i]
  except BadRecord as error:
    image = plots.add_title_bar(image, "the record can't be read")
    return Card(error.key, {"image": image}, (str(error),))
  try:
    decoded = canvas.decode(record["image"], key=record["key"])
    image = np.asarray(plots.fit_image(decoded, size))
    shape = f"{decoded.shape[1]} x {decoded.shape[0]}"
  except BadRecord as error:
    notes.append(error.reason)
    image = plots.add_title_bar(image, "the image can't be decoded")
    shape = ""
  images, names = {"image": image}, ()
  if "boxes" in labels:
    label = _read_label(labels["boxes"], i, record, notes)
    boxes, names = _draw_boxes(image, label, min_score)
    images = {"boxes": boxes}
  if "depth" in labels:
    label = _read_label(labels["depth"], i, record, notes)
    images["depth"] = _draw_depth(image, label, notes)
  return Card(
    record["key"],
    images,
    tuple(notes),
    size=shape,
    captions=tuple(record.get("captions", ())),
    names=collections.Counter(names),
  )


def _read_label(
  labels: JoinedLabels, i: int, record: Mapping[str, Any], notes: list[str]
) -> BoxLabel | DepthLabel | str:
  """Returns the label of a record, or why it is missing."""
  try:
    return labels.get(i, record) or f"no {labels.kind} label"
  except BadRecord as error:
    notes.append(str(error))
    return f"the {labels.kind} label can't be read"


def _draw_boxes(
  image: np.ndarray, label: BoxLabel | str, min_score: float | int
) -> tuple[np.ndarray, list[str]]:
  """Returns the image with boxes, and their names."""
  if isinstance(label, str):
    return plots.add_title_bar(image, label), []
  count = len(label.boxes)
  label = filter_boxes(label, min_score)
  if not len(label.boxes):
    below = f", {count} below the score" if count else ""
    return plots.add_title_bar(image, f"labelled: no box{below}"), []
  order = np.argsort(-label.scores, kind="stable")
  phrases = [label.phrases[i] for i in order]
  scores = [_format_score(s) for s in label.scores[order].tolist()]
  # Equal phrases have equal colours in all images.
  colours = _COLOURS[[phrase_id(phrase) % len(_COLOURS) for phrase in phrases]]
  drawing, _ = plots.draw_boxes(
    image, label.boxes[order], phrases, colours=colours, suffixes=scores
  )
  return drawing, [p + s for p, s in zip(phrases, scores, strict=True)]


def _format_score(score: float) -> str:
  """Formats the text after a phrase; empty for a score of 1."""
  if score == 1:
    return ""
  return f" {score:.2f}" if score >= 0.095 else f" {score:.1g}"


def _draw_depth(
  image: np.ndarray, label: DepthLabel | str, notes: list[str]
) -> np.ndarray:
  height, width = image.shape[:2]
  if isinstance(label, str):
    striped = plots.hatch(image, np.ones((height, width), bool))
    return plots.add_title_bar(striped, label)
  # Nearest neighbour: interpolated values are not labels.
  values = cv2.resize(
    label.values, (width, height), interpolation=cv2.INTER_NEAREST
  )
  notes.append(
    f"inverse depth {label.low:.3g} to {label.high:.3g},"
    f" {100 * (label.values > 0).mean():.0f} % of the pixels"
  )
  valid = values > 0
  colours = plots.colour_depth(values.astype(np.float32), valid=valid)
  return plots.hatch(colours, ~valid)


def format_names(names: Mapping[str, int]) -> list[str]:
  """Formats names, with their counts if above 1."""
  return [name if n == 1 else f"{name} ×{n}" for name, n in names.items()]
