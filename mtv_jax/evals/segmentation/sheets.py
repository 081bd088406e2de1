"""Sheets of segmentations for people: image, truth, prediction, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.utils import plots

_TEXT_SIZE, _LINE_HEIGHT = 10, 14
_HEIGHT = 192  # of an image


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
  return plots.vstack([_row(example, count, names) for example in examples])


def _row(
  example: Example, count: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  maps = [paint(labels, count) for labels in (example.truth, example.predicted)]
  strip = plots.image_with_maps(example.image, maps, height=_HEIGHT)
  present = np.union1d(example.truth, example.predicted)
  present = [int(i) for i in present if i != IGNORE]
  return np.concatenate([strip, _names(present, strip.shape[1], count, names)])


def _names(
  present: Sequence[int], width: int, count: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """The names of some classes, each beside a square of its colour."""
  font, colours = plots.font(_TEXT_SIZE), plots.palette(count)
  places, x, y = [], 0, 2
  for i in present:
    length = int(font.getlength(names[i])) + 20
    if x and x + length > width:
      x, y = 0, y + _LINE_HEIGHT
    places.append((i, x, y))
    x += length
  page = Image.new("RGB", (width, y + _LINE_HEIGHT), plots.PAPER)
  draw = ImageDraw.Draw(page)
  for i, x, y in places:
    colour = tuple(int(c) for c in colours[i])
    draw.rectangle((x, y + 2, x + 9, y + 11), fill=colour)
    draw.text((x + 12, y), names[i], plots.INK, font)
  return np.asarray(page)
