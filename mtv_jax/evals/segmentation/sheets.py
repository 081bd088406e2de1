"""Sheets of segmentations for people: image, truth, prediction, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mtv_jax.evals.core.segmentation_metrics import IGNORE
from mtv_jax.utils import plots

_INK, _PAPER = (24, 24, 28), (250, 250, 248)
_GAP = 6
_LINE = 14  # pixels a line of names
_HEIGHT = 192  # of a picture


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with what is true and what was predicted."""

  image: UInt8[np.ndarray, "h w 3"]
  truth: UInt8[np.ndarray, "h w"]
  predicted: UInt8[np.ndarray, "h w"]


def paint(
  labels: UInt8[np.ndarray, "h w"], count: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Classes in the colours of `plots.palette`; what is ignored in white."""
  colours = np.full((256, 3), 255, np.uint8)
  colours[:count] = plots.palette(count)
  colours[IGNORE] = 255
  return colours[labels]


def sheet(
  examples: Sequence[Example],
  *,
  count: int,
  names: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """Rows of image, truth and prediction above the names of their classes.

  Args:
    examples: at least one.
    count: number of classes.
    names: of the classes; their numbers by default.
  """
  names = names or [str(i) for i in range(count)]
  rows = [_row(example, count, names) for example in examples]
  width = max(row.shape[1] for row in rows)
  page = np.full((sum(len(row) for row in rows), width, 3), 255, np.uint8)
  page[:] = _PAPER
  top = 0
  for row in rows:
    page[top : top + len(row), : row.shape[1]] = row
    top += len(row)
  return page


def _row(
  example: Example, count: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  height, width = example.truth.shape
  size = (max(1, round(width * _HEIGHT / height)), _HEIGHT)
  maps = [
    cv2.resize(
      paint(labels, count), size, interpolation=cv2.INTER_NEAREST_EXACT
    )
    for labels in (example.truth, example.predicted)
  ]
  image = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA)
  gap = np.full((_HEIGHT, _GAP, 3), _PAPER, np.uint8)
  strip = np.concatenate([image, gap, maps[0], gap, maps[1]], axis=1)
  present = np.union1d(example.truth, example.predicted)
  present = [int(i) for i in present if i != IGNORE]
  return np.concatenate([strip, _names(present, strip.shape[1], count, names)])


def _names(
  present: Sequence[int], width: int, count: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """The names of some classes, each beside a square of its colour."""
  font, colours = ImageFont.load_default(10), plots.palette(count)
  places, x, y = [], 0, 2
  for i in present:
    length = int(font.getlength(names[i])) + 20
    if x and x + length > width:
      x, y = 0, y + _LINE
    places.append((i, x, y))
    x += length
  page = Image.new("RGB", (width, y + _LINE + _GAP), _PAPER)
  draw = ImageDraw.Draw(page)
  for i, x, y in places:
    colour = tuple(int(c) for c in colours[i])
    draw.rectangle((x, y + 2, x + 9, y + 11), fill=colour)
    draw.text((x + 12, y), names[i], _INK, font)
  return np.asarray(page)
