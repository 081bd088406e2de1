"""Pictures of data for people: what a model is shown, beside its labels."""

import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG = (40, 200, 90), (235, 60, 60)  # of matches
_INK = (24, 24, 28)


def palette(n: int) -> UInt8[np.ndarray, "n 3"]:
  """Colours for n classes: hues a golden ratio apart, the first one grey."""
  hue = (np.arange(n) * 0.618034 % 1 * 180).astype(np.uint8)
  value = np.where(np.arange(n) % 2, 235, 175).astype(np.uint8)
  hsv = np.stack([hue, np.full(n, 190, np.uint8), value], -1)
  colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
  colours[0] = 70
  return colours


def depth_picture(
  inverse_depth: Float32[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
  """Inverse depth from its least (blue) to its greatest (red)."""
  low, high = float(inverse_depth.min()), float(inverse_depth.max())
  unit = (inverse_depth - low) / max(high - low, 1e-9)
  grey = np.round(255 * unit).astype(np.uint8)
  return cv2.applyColorMap(grey, cv2.COLORMAP_TURBO)[..., ::-1]


def boxes_picture(
  image: UInt8[np.ndarray, "h w 3"],
  boxes: Float32[np.ndarray, "n 4"],
  phrases: Sequence[str],
) -> UInt8[np.ndarray, "h w 3"]:
  """The image with its boxes (y0, x0, y1, x1 in the unit square), named."""
  height, width = image.shape[:2]
  picture = Image.fromarray(image)
  draw = ImageDraw.Draw(picture)
  font = ImageFont.load_default(10)
  colours = palette(len(phrases) + 1)[1:]
  scale = np.array([height, width, height, width])
  for box, phrase, colour in zip(boxes, phrases, colours, strict=True):
    y0, x0, y1, x1 = (float(v) for v in box * scale)
    colour = tuple(int(c) for c in colour)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
    name = "\n".join(textwrap.wrap(phrase, 24))
    corner = draw.multiline_textbbox((0, 0), name, font=font, spacing=0)
    x = min(x0, width - corner[2] - 2)
    y = y0 - corner[3] - 2 if y0 > corner[3] + 2 else y0 + 2
    frame = (x, y, x + corner[2] + 2, y + corner[3] + 2)
    draw.rectangle(frame, fill=_INK)
    draw.multiline_text((x + 1, y), name, colour, font, spacing=0)
  return np.asarray(picture)


def lines_picture(
  first: UInt8[np.ndarray, "h w 3"],
  second: UInt8[np.ndarray, "h w2 3"],
  starts: Int[np.ndarray, "n 2"],
  ends: Int[np.ndarray, "n 2"],
  *,
  colours: UInt8[np.ndarray, "n 3"],
) -> UInt8[np.ndarray, "h w1 3"]:
  """Two pictures side by side, lines joining points (y, x) of them."""
  picture = np.concatenate([first, second], axis=1)
  width = max(1, len(first) // 256)
  for (y, x), (y2, x2), colour in zip(starts, ends, colours, strict=True):
    start, end = (int(x), int(y)), (int(x2) + first.shape[1], int(y2))
    colour = tuple(int(c) for c in colour)
    cv2.line(picture, start, end, colour, width, cv2.LINE_AA)
    for point in (start, end):
      cv2.circle(picture, point, 2 * width, colour, -1, cv2.LINE_AA)
  return picture
