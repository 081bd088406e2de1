"""Cards: records drawn with their labels, and sheets of cards."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mtv_jax.data import canvas
from mtv_jax.data.labels.join import JoinedLabels
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel, phrase_id
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.inspection.statistics import filter_boxes
from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK, MUTED, PAPER

_BLANK = (232, 232, 236)  # colour of an image that can't be decoded
_COLOURS = plots.palette(49)[1:]
_SHEET_WIDTH, _MARGIN, _LEGEND = 1264, 12, (160, 12)
_TEXT_SIZE = 12


@dataclasses.dataclass(frozen=True)
class Card:
  """A record and its labels."""

  key: str
  # By kind ("image", "boxes", "depth"), of equal shapes.
  images: Mapping[str, UInt8[np.ndarray, "h w 3"]]
  notes: tuple[str, ...]  # errors and ranges, which the images don't show
  size: str = ""  # such as "640 x 480"; empty if the image can't be decoded
  captions: tuple[str, ...] = ()
  # Number of boxes by phrase with score (unless 1), best first; `unnamed`
  # counts boxes whose names don't fit into the image.
  names: Mapping[str, int] = dataclasses.field(default_factory=dict)
  unnamed: Mapping[str, int] = dataclasses.field(default_factory=dict)


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
  images, names, unnamed = {"image": image}, (), ()
  if "boxes" in labels:
    label = _read_label(labels["boxes"], i, record, notes)
    boxes, names, unnamed = _draw_boxes(image, label, min_score)
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
    unnamed=collections.Counter(names[k] for k in unnamed),
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
) -> tuple[np.ndarray, list[str], tuple[int, ...]]:
  """Returns the image with boxes, the names, and indices of unnamed boxes."""
  if isinstance(label, str):
    return plots.add_title_bar(image, label), [], ()
  count = len(label.boxes)
  label = filter_boxes(label, min_score)
  if not len(label.boxes):
    below = f", {count} below the score" if count else ""
    return plots.add_title_bar(image, f"labelled: no box{below}"), [], ()
  order = np.argsort(-label.scores, kind="stable")
  phrases = [label.phrases[i] for i in order]
  scores = [_format_score(s) for s in label.scores[order].tolist()]
  # Equal phrases have equal colours in all images.
  colours = _COLOURS[[phrase_id(phrase) % len(_COLOURS) for phrase in phrases]]
  drawing, unnamed = plots.draw_boxes(
    image, label.boxes[order], phrases, colours=colours, suffixes=scores
  )
  return drawing, [p + s for p, s in zip(phrases, scores, strict=True)], unnamed


def _format_score(score: float) -> str:
  """Formats the text after a phrase; empty for a score of 1."""
  if score == 1:
    return ""
  return f" {score:.2f}" if score >= 0.095 else f" {score:.1g}"


def _draw_depth(
  image: np.ndarray, label: DepthLabel | str, notes: list[str]
) -> np.ndarray:
  """Draws a depth map in colours, resized to the image."""
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


def draw_sheet(
  cards: Sequence[Card], *, title: str, size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws cards on one sheet; `size` is the longer side of their images."""
  width = max(len(card.images) for card in cards) * (size + GAP) - GAP
  pitch = width + 2 * GAP
  columns = min(max(1, (_SHEET_WIDTH + 2 * GAP) // pitch), len(cards))
  drawings = [_draw_card(card, width, size) for card in cards]
  rows = [
    plots.hstack(drawings[i : i + columns], gap=2 * GAP)
    for i in range(0, len(drawings), columns)
  ]
  width = columns * pitch - 2 * GAP
  title = plots.shorten(title, width, 15)
  header = [plots.draw_lines([(title, INK)], width, size=15)]
  if any("depth" in card.images for card in cards):
    header.append(_draw_legend())
  sheet = plots.vstack([plots.vstack(header), *rows], gap=2 * GAP)
  margin = (_MARGIN, _MARGIN)
  return np.pad(sheet, (margin, margin, (0, 0)), constant_values=PAPER[0])


def _draw_card(card: Card, width: int, size: int) -> np.ndarray:
  """Draws a card: its images in a row above lines of text."""
  notes = [*card.notes]
  if card.unnamed:
    notes.append("no room for: " + ", ".join(format_names(card.unnamed)))
  texts = [(caption, INK) for caption in card.captions[:1]]
  texts += [(note, MUTED) for note in notes]
  lines = [(plots.shorten(f"{card.key}   {card.size}", width), INK)]
  for text, ink in texts:
    wrapped = plots.wrap(text, width, lines=2, size=_TEXT_SIZE)
    lines += [(line, ink) for line in wrapped]
  images = []
  for image in card.images.values():
    left, remainder = divmod(size - image.shape[1], 2)
    sides = ((0, 0), (left, left + remainder), (0, 0))
    images.append(np.pad(image, sides, constant_values=PAPER[0]))
  text = plots.draw_lines(lines, width, size=_TEXT_SIZE)
  return plots.vstack([plots.hstack(images), text], gap=5)


def _draw_legend() -> np.ndarray:
  """Draws the colour scale of depth."""
  length, height = _LEGEND
  ramp = np.tile(np.linspace(0, 1, length, dtype=np.float32), (height, 1))
  mask = np.ones((height, 28), bool)
  stripes = plots.hatch(np.zeros((*mask.shape, 3), np.uint8), mask)
  far, near, unlabelled = (
    plots.draw_lines([(text, MUTED)], 10 + 7 * len(text), size=_TEXT_SIZE)
    for text in ("far", "near", "no label")
  )
  ramp = plots.colour_depth(ramp)
  return plots.hstack([far, ramp, near, stripes, unlabelled])
