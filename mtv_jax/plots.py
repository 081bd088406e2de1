"""Pictures of data for people: what a model is shown, beside its labels."""

import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mtv_jax.data import scenes

RIGHT, WRONG = (40, 200, 90), (235, 60, 60)  # of matches
_INK, _PAPER = (24, 24, 28), (250, 250, 248)
_GAP = 6
_LINE = 13  # pixels a line of text
_CAPTION_LINES = 7


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


def matches_picture(
  pair: scenes.ScenePair, *, count: int = 16
) -> UInt8[np.ndarray, "h w 3"]:
  """Both views side by side, lines joining `count` visible points."""
  size = pair.first.image.shape[0]
  shown = np.argwhere(pair.visible & (pair.first.instances >= 2))
  rng = np.random.default_rng(0)
  chosen = shown[rng.permutation(len(shown))[:count]]
  ends = pair.correspondence[chosen[:, 0], chosen[:, 1]] * size - 0.5
  return lines_picture(
    pair.first.image,
    pair.second.image,
    chosen,
    np.round(ends).astype(np.int64),
    colours=palette(count + 1)[1 : len(chosen) + 1],
  )


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


def scene_row(
  index: int, *, size: int = 192, seed: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
  """One built-in scene with everything known about it.

  Image, inverse depth, segmentation, named boxes, and the two views with
  matches, above the captions.
  """
  pair = scenes.render_pair(index, size=size, seed=seed)
  scene = pair.first
  panels = [
    scene.image,
    depth_picture(scene.inverse_depth),
    palette(len(scenes.SEGMENT_NAMES))[scene.segmentation],
    boxes_picture(scene.image, scene.boxes, scene.phrases),
    matches_picture(pair),
  ]
  width = sum(p.shape[1] for p in panels) + _GAP * (len(panels) - 1)
  row = Image.new("RGB", (width, size + _LINE * _CAPTION_LINES), _PAPER)
  x = 0
  for panel in panels:
    row.paste(Image.fromarray(panel), (x, 0))
    x += panel.shape[1] + _GAP
  draw, font = ImageDraw.Draw(row), ImageFont.load_default(11)
  lines = [f"{index}: {scenes.CLASS_NAMES[scene.label]}"]
  for caption in scene.captions:
    lines += textwrap.wrap(caption, max(width // 6, 20))
  for k, line in enumerate(lines[:_CAPTION_LINES]):
    draw.text((4, size + _LINE * k), line, _INK, font)
  return np.asarray(row)


def scene_sheet(
  indices: Sequence[int], *, size: int = 192, seed: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
  """Rows of `scene_row`, one below the other."""
  if not indices:
    raise ValueError("indices is empty; name at least one scene.")
  return np.concatenate([scene_row(i, size=size, seed=seed) for i in indices])


def scene_tiles(
  indices: Sequence[int], *, columns: int = 8, size: int = 96, seed: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
  """Only the images, in a grid, each under the name of its class."""
  rows = -(-len(indices) // columns)
  side = size + _LINE + _GAP
  sheet = Image.new("RGB", (columns * (size + _GAP), rows * side), _PAPER)
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
  for k, index in enumerate(indices):
    scene = scenes.render(index, size=size, seed=seed)
    x, y = k % columns * (size + _GAP), k // columns * side
    draw.text((x, y), scenes.CLASS_NAMES[scene.label], _INK, font)
    sheet.paste(Image.fromarray(scene.image), (x, y + _LINE))
  return np.asarray(sheet)
