"""Cards of records side by side on one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mtv_jax.experts.inspection.cards import Card, counted
from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK, MUTED, PAPER

_WIDTH = 1264
_MARGIN = 12
_SMALL, _STEP = 12, 15
_BAR = (160, 12)


def draw(
  cards: Sequence[Card], *, title: str, size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """A sheet of cards.

  Args:
    cards: with pictures of the same kinds.
    title: of the sheet, on a line.
    size: longer side of their pictures.

  Raises:
    ValueError: there is no card.
  """
  if not cards:
    raise ValueError("no cards: expected at least one.")
  wide = max(len(card.pictures) for card in cards) * (size + GAP) - GAP
  columns = max(1, (_WIDTH + 2 * GAP) // (wide + 2 * GAP))
  columns = min(columns, len(cards))
  drawn = [_card(card, wide, size) for card in cards]
  rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
  heights = [max(card.height for card in row) + 2 * GAP for row in rows]
  head = _head(
    title,
    columns * (wide + 2 * GAP) - 2 * GAP,
    depth=any("depth" in card.pictures for card in cards),
  )
  shape = (head.width + 2 * _MARGIN, sum(heights) + head.height + 2 * _MARGIN)
  sheet = Image.new("RGB", shape, PAPER)
  sheet.paste(head, (_MARGIN, _MARGIN))
  y = _MARGIN + head.height
  for row, height in zip(rows, heights, strict=True):
    for k, card in enumerate(row):
      sheet.paste(card, (_MARGIN + k * (wide + 2 * GAP), y))
    y += height
  return np.asarray(sheet)


def _card(card: Card, wide: int, size: int) -> Image.Image:
  """Pictures in a line, and lines of words under them."""
  lines = [(plots.shorten(_name(card), wide), INK)]
  if card.captions:
    caption = plots.wrap(card.captions[0], wide, lines=2, size=_SMALL)
    lines += [(line, INK) for line in caption]
  notes = list(card.notes)
  if card.unnamed:
    notes.append("no room for: " + ", ".join(counted(card.unnamed)))
  for note in notes:
    words = plots.wrap(note, wide, lines=2, size=_SMALL)
    lines += [(line, MUTED) for line in words]
  top = max(picture.shape[0] for picture in card.pictures.values())
  image = Image.new("RGB", (wide, top + 5 + _STEP * len(lines) + 3), PAPER)
  for k, picture in enumerate(card.pictures.values()):
    x = k * (size + GAP) + (size - picture.shape[1]) // 2
    image.paste(Image.fromarray(picture), (x, 0))
  draw = ImageDraw.Draw(image)
  for k, (words, ink) in enumerate(lines):
    draw.text((1, top + 5 + k * _STEP), words, ink, plots.font(_SMALL))
  return image


def _name(card: Card) -> str:
  return f"{card.key}   {card.size}".rstrip()


def _head(title: str, width: int, *, depth: bool) -> Image.Image:
  """The title, and what the colours of depth mean."""
  head = Image.new("RGB", (width, 48 if depth else 26), PAPER)
  draw = ImageDraw.Draw(head)
  draw.text((1, 0), plots.shorten(title, width, 15), INK, plots.font(15))
  if not depth:
    return head
  x, y = 1, 24
  for part in ("far", _colours(), "near", None, _stripes(), "no label"):
    if isinstance(part, str):
      draw.text((x, y), part, MUTED, plots.font(_SMALL))
      x += round(plots.text_width(part, _SMALL)) + 6
    elif part is None:
      x += 24
    else:
      head.paste(Image.fromarray(part), (x, y + 2))
      x += part.shape[1] + 6
  return head


def _colours() -> UInt8[np.ndarray, "h w 3"]:
  ramp = np.linspace(0, 1, _BAR[0], dtype=np.float32)
  return np.ascontiguousarray(plots.colour_depth(np.tile(ramp, (_BAR[1], 1))))


def _stripes() -> UInt8[np.ndarray, "h w 3"]:
  there = np.ones((_BAR[1], 28), np.bool_)
  return plots.hatch(np.zeros((*there.shape, 3), np.uint8), there)
