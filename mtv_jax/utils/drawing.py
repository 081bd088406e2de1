"""Words, boxes and pictures drawn for people: what every sheet is made of."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (24, 24, 28), (255, 255, 255), (96, 96, 104)
GAP, LINE, TEXT = 8, 17, 13
_DOTS = "…"
# Of the pattern that stands where there is nothing to show.
_STRIPES = ((214, 214, 218), (160, 160, 166))
_STRIPE = 5


@functools.cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont:
  """DejaVu Sans: Pillow's own font has no letters but those of English."""
  fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  # The basic layout, as the other one depends on what is installed.
  return ImageFont.truetype(
    str(fonts / "DejaVuSans.ttf"),
    size,
    layout_engine=ImageFont.Layout.BASIC,
  )


def length(words: str, size: int = TEXT) -> float:
  """Pixels that a line of words is wide."""
  return font(size).getlength(words)


def one_line(words: str) -> str:
  """Words without line breaks, runs of spaces, and what can't be printed."""
  words = " ".join(words.split())
  if words.isprintable():
    return words
  return "".join(c if c.isprintable() else "\ufffd" for c in words)


def shorten(words: str, width: float | int, size: int = TEXT) -> str:
  """On one line, cut where it does not fit."""
  words = one_line(words)
  # Nobody reads more, and measuring takes time.
  start = words[:1000]
  if len(words) == len(start) and length(words, size) <= width:
    return words
  kept = bisect.bisect_right(
    range(len(start)),
    width,
    key=lambda n: length(start[:n].rstrip() + _DOTS, size),
  )
  return start[: max(kept - 1, 0)].rstrip() + _DOTS


def wrap(
  words: str, width: float | int, *, lines: int, size: int = TEXT
) -> list[str]:
  """On at most `lines` lines, the last of them cut where there is more."""
  rest, done = one_line(words).split(), []
  while rest and len(done) < lines - 1:
    n = 1
    while n < len(rest) and length(" ".join(rest[: n + 1]), size) <= width:
      n += 1
    done.append(shorten(" ".join(rest[:n]), width, size))
    rest = rest[n:]
  if rest:
    done.append(shorten(" ".join(rest), width, size))
  return done


def fit(picture: UInt8[np.ndarray, "h w 3"], size: int) -> Image.Image:
  """The picture at its own shape, its longer side `size`.

  Small ones are enlarged to whole multiples in squares, so that the patches
  of a feature map stay to be seen.
  """
  image = Image.fromarray(picture)
  scale = size / max(image.size)
  smooth = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
  shape = [max(1, round(side * scale)) for side in image.size]
  return image.resize(shape, smooth)


def hatched(
  picture: UInt8[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
  """The picture with grey stripes where there is nothing to show."""
  rows, columns = np.indices(where.shape)
  odd = (rows + columns) // _STRIPE % 2
  stripes = np.array(_STRIPES, np.uint8)[odd]
  return np.where(where[..., None], stripes, picture)


@dataclasses.dataclass(frozen=True)
class Named:
  """A picture with boxes on it.

  Attributes:
    picture: of the image's size.
    unnamed: places of the boxes whose name found no room.
  """

  picture: UInt8[np.ndarray, "h w 3"]
  unnamed: tuple[int, ...]


def named_boxes(
  image: UInt8[np.ndarray, "h w 3"],
  boxes: Float32[np.ndarray, "n 4"],
  names: Sequence[str],
  colours: UInt8[np.ndarray, "n 3"],
  *,
  tails: Sequence[str] = (),
  size: int = 11,
) -> Named:
  """The image with its boxes, each named on a plate of its own colour.

  Plates stay within the image and off each other; those of the first boxes
  are placed first.

  Args:
    image: as large as it will be shown.
    boxes: (y0, x0, y1, x1) in the unit square.
    names: one a box, cut where they are wider than the image.
    colours: one a box.
    tails: what follows each name and is not cut, such as its score.
    size: of the letters, in pixels.
  """
  height, width = image.shape[:2]
  picture = Image.fromarray(image)
  draw = ImageDraw.Draw(picture)
  scale = np.array([height, width, height, width])
  corners = np.rint(boxes * scale).astype(int)
  inks = [tuple(int(c) for c in colour) for colour in colours]
  # The larger first, so that a small one is not painted over.
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
  for i in np.argsort(-areas, kind="stable"):
    y0, x0, y1, x1 = (int(v) for v in corners[i])
    x0, y0 = min(x0, width - 3), min(y0, height - 3)
    frame = (x0, y0, max(x1 - 1, x0 + 2), max(y1 - 1, y0 + 2))
    # A dark rim: any colour is that of some picture.
    draw.rectangle(_grown(frame, 1), outline=INK, width=4)
    draw.rectangle(frame, outline=inks[i], width=2)
  taken: list[tuple[int, int, int, int]] = []
  unnamed = []
  for i, name in enumerate(names):
    tail = tails[i] if tails else ""
    words = shorten(name, width - 8 - length(tail, size), size) + tail
    plate = (int(np.ceil(length(words, size))) + 5, size + 4)
    place = _free_place(corners[i], plate, (width, height), taken)
    if place is None:
      unnamed.append(i)
      continue
    taken.append(place)
    draw.rectangle(place, fill=inks[i])
    ink = INK if _is_light(inks[i]) else PAPER
    draw.text((place[0] + 3, place[1] + 1), words, ink, font(size))
  return Named(np.asarray(picture), tuple(unnamed))


def tag(
  picture: UInt8[np.ndarray, "h w 3"], words: str, *, size: int = TEXT
) -> UInt8[np.ndarray, "h w 3"]:
  """The picture with words on a dark bar along its upper edge."""
  image = Image.fromarray(picture)
  draw = ImageDraw.Draw(image)
  draw.rectangle((0, 0, image.width, size + 8), fill=INK)
  draw.text((5, 3), shorten(words, image.width - 10, size), PAPER, font(size))
  return np.asarray(image)


def _free_place(
  corners: np.ndarray,
  plate: tuple[int, int],
  image: tuple[int, int],
  taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
  """Where a plate goes: at a corner of its box, off the others."""
  y0, x0, y1, x1 = (int(v) for v in corners)
  wide, high = plate
  right = x1 - wide
  for x, y in (
    (x0, y0 - high),
    (x0, y0),
    (x0, y1),
    (right, y0 - high),
    (right, y0),
    (x0, y1 - high),
    (right, y1 - high),
    (right, y1),
    (x0 - wide, y0),
    (x1, y0),
    (x0, (y0 + y1 - high) // 2),
  ):
    x = min(max(x, 0), max(image[0] - wide, 0))
    y = min(max(y, 0), max(image[1] - high, 0))
    place = (x, y, x + wide - 1, y + high - 1)
    if not any(_overlap(place, other) for other in taken):
      return place
  return None


def _overlap(a: Sequence[int], b: Sequence[int]) -> bool:
  return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _grown(frame: Sequence[int], by: int) -> tuple[int, int, int, int]:
  return (frame[0] - by, frame[1] - by, frame[2] + by, frame[3] + by)


def _is_light(colour: Sequence[int]) -> bool:
  """Whether dark letters can be read on it better than white ones."""
  red, green, blue = colour
  return 0.299 * red + 0.587 * green + 0.114 * blue > 128
