"""Drawing primitives for figures: colours, text, boxes, lines, image grids.

Images are uint8 RGB `[H, W, 3]`; boxes are (y0, x0, y1, x1) in the unit square.
"""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import one_line

INK, PAPER, MUTED = (24, 24, 28), (255, 255, 255), (96, 96, 104)
CORRECT, WRONG = (40, 200, 90), (235, 60, 60)
GAP, LINE_HEIGHT, TEXT_SIZE = 8, 17, 13
_PLATE_SIZE = 11  # Font size of box labels.
# Example sheets: row width, font size, line height; image widths in two or
# three columns. At two thirds scale, a row fits a window of 390 pixels.
SHEET_WIDTH, SHEET_TEXT = 552, 19
SHEET_LINE = SHEET_TEXT + SHEET_TEXT // 4
HALF, THIRD = 272, 178
_ELLIPSIS = "…"
_STRIPES, _STRIPE_WIDTH = ((214, 214, 218), (160, 160, 166)), 5


def save_image(
  pixels: UInt8[np.ndarray, "h w 3"], path: str | os.PathLike
) -> None:
  """Writes an image; the suffix determines the format."""
  path = Path(path)
  formats = Image.registered_extensions()
  if path.suffix.lower() not in formats:
    raise InputError(
      f"{path} has the suffix {path.suffix!r}; expected an image suffix, "
      "such as .png or .jpg."
    )
  with atomic.replace_file(path) as temporary:
    Image.fromarray(pixels).save(temporary, format=formats[path.suffix.lower()])


def palette(n: int) -> UInt8[np.ndarray, "n 3"]:
  """Class colours: hues a golden ratio apart, the first one grey."""
  hue = (np.arange(n) * 0.618034 % 1 * 180).astype(np.uint8)
  value = np.where(np.arange(n) % 2, 235, 175).astype(np.uint8)
  hsv = np.stack([hue, np.full(n, 190, np.uint8), value], -1)
  colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
  colours[0] = 70
  return colours


def colour_depth(
  inverse_depth: Float[np.ndarray, "h w"],
  *,
  valid: Bool[np.ndarray, "h w"] | None = None,
  limits: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """Maps inverse depth to the Turbo colour map: far is blue, near is red.

  Pixels that are not `valid` are black. `limits` are the ends of the colour
  map, by default the smallest and largest valid value.
  """
  known = inverse_depth if valid is None else inverse_depth[valid]
  low, high = limits or ((known.min(), known.max()) if known.size else (0, 1))
  unit = np.clip((inverse_depth - low) / max(high - low, 1e-9), 0, 1)
  levels = np.round(255 * unit).astype(np.uint8)
  colours = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[..., ::-1]
  if valid is not None:
    colours = np.where(valid[..., None], colours, np.uint8(0))
  return np.ascontiguousarray(colours)


def hatch(
  image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws grey stripes over the masked pixels."""
  rows, columns = np.indices(mask.shape)
  stripes = np.array(_STRIPES, np.uint8)[(rows + columns) // _STRIPE_WIDTH % 2]
  return np.where(mask[..., None], stripes, image)


@functools.cache
def font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
  """DejaVu Sans; Pillow's default font lacks non-English letters."""
  file = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
  # The default layout engine, Raqm, is an optional dependency.
  return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def text_width(text: str, size: int = TEXT_SIZE) -> float:
  """Width of one line of text, in pixels."""
  return font(size).getlength(text)


def shorten(text: str, width: float | int, size: int = TEXT_SIZE) -> str:
  """One line of text, truncated with an ellipsis to `width` pixels."""
  text = one_line(text)
  # Longer text never fits, and measuring takes time.
  start = text[:1000]
  if len(text) == len(start) and text_width(text, size) <= width:
    return text
  count = bisect.bisect_right(
    range(len(start)),
    width,
    key=lambda n: text_width(start[:n].rstrip() + _ELLIPSIS, size),
  )
  return start[: max(count - 1, 0)].rstrip() + _ELLIPSIS


def wrap(
  text: str, width: float | int, *, lines: int, size: int = TEXT_SIZE
) -> list[str]:
  """Wraps text to at most `lines` lines; the last may end in an ellipsis."""
  words, wrapped = one_line(text).split(), []
  while words:
    n = len(words) if len(wrapped) == lines - 1 else 1
    while n < len(words) and (
      text_width(" ".join(words[: n + 1]), size) <= width
    ):
      n += 1
    wrapped.append(shorten(" ".join(words[:n]), width, size))
    words = words[n:]
  return wrapped


def draw_lines(
  lines: Sequence[tuple[str, tuple[int, int, int]]],
  width: int,
  *,
  size: int = TEXT_SIZE,
) -> UInt8[np.ndarray, "h {width} 3"]:
  """Draws lines of text, each in its colour, on a white background."""
  pitch = size + size // 4
  sheet = Image.new("RGB", (width, pitch * len(lines)), PAPER)
  for k, (text, ink) in enumerate(lines):
    ImageDraw.Draw(sheet).text((1, k * pitch), text, ink, font(size))
  return np.asarray(sheet)


def add_title_bar(
  image: UInt8[np.ndarray, "h w 3"], text: str
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws text on a dark bar along the image's upper edge."""
  canvas = Image.fromarray(image)
  draw = ImageDraw.Draw(canvas)
  draw.rectangle((0, 0, canvas.width, TEXT_SIZE + 8), fill=INK)
  draw.text((5, 3), shorten(text, canvas.width - 10), PAPER, font())
  return np.asarray(canvas)


def draw_boxes(
  image: UInt8[np.ndarray, "h w 3"],
  boxes: Float[np.ndarray, "n 4"],
  names: Sequence[str],
  *,
  colours: UInt8[np.ndarray, "n 3"] | None = None,
  suffixes: Sequence[str] = (),
  size: int = _PLATE_SIZE,
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, ...]]:
  """Draws boxes, each with its name on a label of its colour.

  Labels stay inside the image and don't overlap; earlier boxes have priority.
  Names are truncated to the image's width, `suffixes` (such as scores) are not;
  `size` is their font size.
  Also returns the indices of the boxes whose label didn't fit.
  """
  height, width = image.shape[:2]
  canvas = Image.fromarray(image)
  draw = ImageDraw.Draw(canvas)
  if colours is None:
    colours = palette(len(names) + 1)[1:]
  inks = [tuple(colour) for colour in colours.tolist()]
  corners = np.rint(boxes * [height, width, height, width]).astype(int)
  # Large boxes first, so that they don't cover small ones.
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
  for i in np.argsort(-areas, kind="stable"):
    y0, x0, y1, x1 = corners[i].tolist()
    x0, y0 = min(x0, width - 3), min(y0, height - 3)
    x1, y1 = max(x1 - 1, x0 + 2), max(y1 - 1, y0 + 2)
    # A dark outline, because the image may have the box's colour.
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=INK, width=4)
    draw.rectangle((x0, y0, x1, y1), outline=inks[i], width=2)
  plates: list[tuple[int, int, int, int]] = []
  unlabelled = []
  for i, name in enumerate(names):
    suffix = suffixes[i] if suffixes else ""
    text = shorten(name, width - 8 - text_width(suffix, size), size) + suffix
    plate_size = (int(np.ceil(text_width(text, size))) + 5, size + 4)
    plate = _place_plate(corners[i], plate_size, (width, height), plates)
    if plate is None:
      unlabelled.append(i)
      continue
    plates.append(plate)
    draw.rectangle(plate, fill=inks[i])
    red, green, blue = inks[i]
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    position = (plate[0] + 3, plate[1] + 1)
    draw.text(position, text, INK if is_light else PAPER, font(size))
  return np.asarray(canvas), tuple(unlabelled)


def _place_plate(
  box: np.ndarray,
  plate_size: tuple[int, int],
  image_size: tuple[int, int],
  plates: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
  """Returns a free (x0, y0, x1, y1) for a label at a corner of its box."""
  y0, x0, y1, x1 = box.tolist()
  width, height = plate_size
  right_aligned = x1 - width
  for x, y in (
    (x0, y0 - height),
    (x0, y0),
    (x0, y1),
    (right_aligned, y0 - height),
    (right_aligned, y0),
    (x0, y1 - height),
    (right_aligned, y1 - height),
    (right_aligned, y1),
    (x0 - width, y0),
    (x1, y0),
    (x0, (y0 + y1 - height) // 2),
  ):
    x = min(max(x, 0), max(image_size[0] - width, 0))
    y = min(max(y, 0), max(image_size[1] - height, 0))
    x2, y2 = x + width - 1, y + height - 1
    if not any(
      x <= c and a <= x2 and y <= d and b <= y2 for a, b, c, d in plates
    ):
      return x, y, x2, y2
  return None


def draw_matches(
  first: UInt8[np.ndarray, "h w 3"],
  second: UInt8[np.ndarray, "h w2 3"],
  starts: Int[np.ndarray, "n 2"],
  ends: Int[np.ndarray, "n 2"],
  *,
  colours: UInt8[np.ndarray, "n 3"] | None = None,
  correct: Bool[np.ndarray, " n"] | None = None,
) -> UInt8[np.ndarray, "h w1 3"]:
  """Two images side by side, with a line for each pair of points (y, x).

  Lines have `colours`, or are green if correct and red if not.
  """
  if colours is None:
    colours = np.where(correct[:, None], CORRECT, WRONG)
  canvas = np.concatenate([first, second], axis=1)
  width = max(1, len(first) // 256)
  for (y, x), (y2, x2), colour in zip(starts, ends, colours, strict=True):
    start, end = (int(x), int(y)), (int(x2) + first.shape[1], int(y2))
    colour = colour.tolist()
    cv2.line(canvas, start, end, colour, width, cv2.LINE_AA)
    for point in (start, end):
      cv2.circle(canvas, point, 2 * width, colour, -1, cv2.LINE_AA)
  return canvas


def fit_image(image: UInt8[np.ndarray, "h w 3"], size: int) -> Image.Image:
  """Resizes to a longer side of `size`, keeping the aspect ratio.

  Upscaling by four or more uses nearest neighbour, so that the patches of a
  feature map stay visible.
  """
  canvas = Image.fromarray(image)
  scale = size / max(canvas.size)
  method = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
  return canvas.resize(
    [max(1, round(side * scale)) for side in canvas.size], method
  )


def image_grid(
  rows: Sequence[Sequence[np.ndarray]],
  *,
  titles: Sequence[str] = (),
  size: int = HALF,
) -> UInt8[np.ndarray, "h w 3"]:
  """A grid of images of any size, each fitted into a square of side `size`.

  Rows are equally long; `titles` are the column titles.
  """

  def pad_to_square(image: np.ndarray) -> np.ndarray:
    fitted = fit_image(image, size)
    return np.asarray(ImageOps.pad(fitted, (size, size), color=PAPER))

  grid = vstack([hstack([*map(pad_to_square, row)]) for row in rows])
  return stack_rows([grid], titles) if titles else grid


def hstack(
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, gap: int = GAP
) -> UInt8[np.ndarray, "h w 3"]:
  """Concatenates images of any height horizontally, with gaps."""
  return vstack([x.swapaxes(0, 1) for x in images], gap=gap).swapaxes(0, 1)


def vstack(
  rows: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, gap: int = GAP
) -> UInt8[np.ndarray, "h w 3"]:
  """Concatenates images of any width vertically, with gaps."""
  shape = (sum(len(r) + gap for r in rows), max(r.shape[1] for r in rows), 3)
  sheet, top = np.full(shape, PAPER, np.uint8), 0
  for row in rows:
    sheet[top : top + len(row), : row.shape[1]] = row
    top += len(row) + gap
  return sheet[: top - gap]


def stack_rows(
  rows: Sequence[UInt8[np.ndarray, "_ _ 3"]], titles: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """Stacks rows of equally wide images vertically.

  `titles` are the column titles, above the first row.
  """
  width = (rows[0].shape[1] + GAP) // len(titles) - GAP
  style = dict(size=SHEET_TEXT)
  header = hstack(
    [
      draw_lines([(shorten(title, width, **style), INK)], width, **style)
      for title in titles
    ]
  )
  return vstack([header, vstack(rows)], gap=5)


def image_with_maps(
  image: UInt8[np.ndarray, "h w 3"],
  maps: Sequence[UInt8[np.ndarray, "h w 3"]],
  *,
  height: int,
) -> UInt8[np.ndarray, "{height} w2 3"]:
  """An image and its coloured label maps (same shape), side by side.

  Maps use nearest-neighbour resizing, since averaged labels are not labels.
  """
  size = (max(1, round(image.shape[1] * height / len(image))), height)
  methods = [cv2.INTER_AREA] + [cv2.INTER_NEAREST_EXACT] * len(maps)
  return hstack(
    [
      cv2.resize(np.ascontiguousarray(x), size, interpolation=method)
      for x, method in zip((image, *maps), methods, strict=True)
    ]
  )
