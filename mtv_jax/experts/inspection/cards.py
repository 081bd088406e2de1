"""Records with their labels drawn: cards, and a sheet of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mtv_jax.data import canvas
from mtv_jax.data.labels.join import JoinedLabels
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel, phrase_id
from mtv_jax.data.records import BadRecord
from mtv_jax.experts.inspection.statistics import filter_boxes
from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK, MUTED, PAPER

_BLANK = (232, 232, 236)  # for an image that can't be decoded
_COLOURS = plots.palette(49)[1:]
_SHEET_WIDTH, _MARGIN, _LEGEND = 1264, 12, (160, 12)
_TEXT_SIZE, _LINE_HEIGHT = 12, 15


@dataclasses.dataclass(frozen=True)
class Card:
  """A record and its labels.

  Attributes:
    key: of the record.
    images: by kind ("image", "boxes", "depth"), all of one shape.
    notes: lines about what the images don't show.
    size: of the image, such as "640 x 480"; empty if it can't be decoded.
    captions: of the record, possibly none.
    names: phrases of the boxes with their scores (unless 1), best first, and
      the number of each.
    unnamed: those of them whose name did not fit on the image.
  """

  key: str
  images: Mapping[str, UInt8[np.ndarray, "h w 3"]]
  notes: tuple[str, ...]
  size: str = ""
  captions: tuple[str, ...] = ()
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
  """Draws record `i`.

  Args:
    source: of the records; their captions may be missing.
    labels: by kind, "depth", "boxes" or both.
    i: index of the record.
    size: longer side of the images.
    min_score: minimum score of a box.

  Raises:
    LabelError: a label is of another record.
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
  """The label of a record, or why there is none."""
  try:
    return labels.get(i, record) or f"no label of {labels.kind}"
  except BadRecord as error:
    notes.append(str(error))
    return f"the label of {labels.kind} can't be read"


def _draw_boxes(
  image: np.ndarray, label: BoxLabel | str, min_score: float | int
) -> tuple[np.ndarray, list[str], tuple[int, ...]]:
  """The image with boxes, their names, and the indices of unnamed ones."""
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
  # Equal phrases have equal colours on all images.
  colours = _COLOURS[[phrase_id(phrase) % len(_COLOURS) for phrase in phrases]]
  drawn, unnamed = plots.draw_boxes(
    image, label.boxes[order], phrases, colours=colours, suffixes=scores
  )
  return drawn, [p + s for p, s in zip(phrases, scores, strict=True)], unnamed


def _format_score(score: float) -> str:
  """Text after a phrase; empty for a score of 1."""
  if score == 1:
    return ""
  return f" {score:.2f}" if score >= 0.095 else f" {score:.1g}"


def _draw_depth(
  image: np.ndarray, label: DepthLabel | str, notes: list[str]
) -> np.ndarray:
  """The depth in colours at the shape of the image."""
  height, width = image.shape[:2]
  if isinstance(label, str):
    striped = plots.hatch(image, np.ones((height, width), bool))
    return plots.add_title_bar(striped, label)
  # Nearest, since a mean of stored pixels is not a label.
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


def count_names(names: Mapping[str, int]) -> list[str]:
  """Names, with their number where it is more than one."""
  return [name if n == 1 else f"{name} ×{n}" for name, n in names.items()]


def draw_sheet(
  cards: Sequence[Card], *, title: str, size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """A sheet of cards.

  Args:
    cards: at least one, with images of the same kinds.
    title: one line.
    size: longer side of their images.
  """
  width = max(len(card.images) for card in cards) * (size + GAP) - GAP
  pitch = width + 2 * GAP
  columns = min(max(1, (_SHEET_WIDTH + 2 * GAP) // pitch), len(cards))
  drawn = [_draw_card(card, width, size) for card in cards]
  rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
  heights = [max(card.height for card in row) + 2 * GAP for row in rows]
  has_depth = any("depth" in card.images for card in cards)
  head = _draw_head(title, columns * pitch - 2 * GAP, has_depth=has_depth)
  shape = (head.width + 2 * _MARGIN, sum(heights) + head.height + 2 * _MARGIN)
  sheet = Image.new("RGB", shape, PAPER)
  sheet.paste(head, (_MARGIN, _MARGIN))
  y = _MARGIN + head.height
  for row, height in zip(rows, heights, strict=True):
    for k, card in enumerate(row):
      sheet.paste(card, (_MARGIN + k * pitch, y))
    y += height
  return np.asarray(sheet)


def _draw_card(card: Card, width: int, size: int) -> Image.Image:
  """Images in a row above lines of text."""
  notes = [*card.notes]
  if card.unnamed:
    notes.append("no room for: " + ", ".join(count_names(card.unnamed)))
  texts = [(caption, INK) for caption in card.captions[:1]]
  texts += [(note, MUTED) for note in notes]
  lines = [(plots.shorten(f"{card.key}   {card.size}", width), INK)]
  for text, ink in texts:
    wrapped = plots.wrap(text, width, lines=2, size=_TEXT_SIZE)
    lines += [(line, ink) for line in wrapped]
  top = max(len(image) for image in card.images.values()) + 5
  drawn = Image.new("RGB", (width, top + _LINE_HEIGHT * len(lines) + 3), PAPER)
  for k, image in enumerate(card.images.values()):
    x = k * (size + GAP) + (size - image.shape[1]) // 2
    drawn.paste(Image.fromarray(image), (x, 0))
  draw = ImageDraw.Draw(drawn)
  for k, (text, ink) in enumerate(lines):
    y = top + k * _LINE_HEIGHT
    draw.text((1, y), text, ink, plots.font(_TEXT_SIZE))
  return drawn


def _draw_head(title: str, width: int, *, has_depth: bool) -> Image.Image:
  """The title, and a legend of the depth colours."""
  head = Image.new("RGB", (width, 48 if has_depth else 26), PAPER)
  draw = ImageDraw.Draw(head)
  draw.text((1, 0), plots.shorten(title, width, 15), INK, plots.font(15))
  if not has_depth:
    return head
  length, height = _LEGEND
  ramp = np.tile(np.linspace(0, 1, length, dtype=np.float32), (height, 1))
  mask = np.ones((height, 28), bool)
  stripes = plots.hatch(np.zeros((*mask.shape, 3), np.uint8), mask)
  x, y = 1, 24
  for text, image in (
    ("far", plots.colour_depth(ramp)),
    ("near         ", stripes),
    ("no label", None),
  ):
    draw.text((x, y), text, MUTED, plots.font(_TEXT_SIZE))
    x += round(plots.text_width(text, _TEXT_SIZE)) + 6
    if image is not None:
      head.paste(Image.fromarray(image), (x, y + 2))
      x += image.shape[1] + 6
  return head
