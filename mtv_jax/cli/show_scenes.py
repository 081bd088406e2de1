"""Draws built-in scenes with their labels into a PNG file.

mtv-jax show_scenes --output=scenes.png --first=0 --count=6
mtv-jax show_scenes --output=tiles.png --count=64 --view=images --size=96
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mtv_jax.data.scenes import render as scenes
from mtv_jax.data.scenes.layout import DIFFICULTIES
from mtv_jax.utils import plots

_TEXT_SIZE, _LINE_HEIGHT = 11, 13
_CAPTION_LINES = 7


def draw_pair(pair: scenes.ScenePair) -> UInt8[np.ndarray, "h w 3"]:
  """Draws two views side by side with lines between 16 visible points."""
  size = pair.first.image.shape[0]
  visible = np.argwhere(pair.visible & (pair.first.instances >= 2))
  rng = np.random.default_rng(0)
  starts = visible[rng.permutation(len(visible))[:16]]
  ends = pair.correspondence[starts[:, 0], starts[:, 1]] * size - 0.5
  return plots.draw_matches(
    pair.first.image,
    pair.second.image,
    starts,
    np.round(ends).astype(np.int64),
    colours=plots.palette(17)[1 : len(starts) + 1],
  )


def draw_row(
  index: int, *, size: int = 192, **options: Any
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws a scene with all its labels.

  Image, inverse depth, segmentation, boxes with phrases, and the two views with
  matches, above the captions. `options` are passed to `render_pair`.
  """
  pair = scenes.render_pair(index, size=size, **options)
  scene = pair.first
  images = plots.hstack(
    [
      scene.image,
      plots.colour_depth(scene.inverse_depth),
      plots.palette(len(scenes.SEGMENT_NAMES))[scene.segmentation],
      plots.draw_boxes(scene.image, scene.boxes, scene.phrases)[0],
      draw_pair(pair),
    ]
  )
  width, height = images.shape[1], size + _LINE_HEIGHT * _CAPTION_LINES
  row = Image.new("RGB", (width, height), plots.PAPER)
  row.paste(Image.fromarray(images))
  draw, font = ImageDraw.Draw(row), plots.font(_TEXT_SIZE)
  lines = [f"{index}: {scenes.CLASS_NAMES[scene.label]}"]
  limits = dict(lines=_CAPTION_LINES, size=_TEXT_SIZE)
  for caption in scene.captions:
    lines += plots.wrap(caption, width - 8, **limits)
  for k, line in enumerate(lines[:_CAPTION_LINES]):
    draw.text((4, size + _LINE_HEIGHT * k), line, plots.INK, font)
  return np.asarray(row)


def draw_tiles(
  indices: Sequence[int], *, columns: int = 8, size: int = 96, **options: Any
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws a grid of scene images, each below its class name."""
  rows = -(-len(indices) // columns)
  width, height = size + plots.GAP, size + _LINE_HEIGHT + plots.GAP
  sheet = Image.new("RGB", (columns * width, rows * height), plots.PAPER)
  draw, font = ImageDraw.Draw(sheet), plots.font(_TEXT_SIZE)
  for k, index in enumerate(indices):
    scene = scenes.render(index, size=size, **options)
    x, y = k % columns * width, k // columns * height
    draw.text((x, y), scenes.CLASS_NAMES[scene.label], plots.INK, font)
    sheet.paste(Image.fromarray(scene.image), (x, y + _LINE_HEIGHT))
  return np.asarray(sheet)


def run(
  output: str,
  *,
  first: int = 0,
  count: int = 6,
  size: int = 192,
  seed: int = 0,
  difficulty: Literal[tuple(DIFFICULTIES)] = "hard",
  view: Literal["labels", "images"] = "labels",
) -> None:
  """Writes the sheet.

  Args:
    output: PNG file to write.
    first: index of the first scene.
    count: number of scenes.
    size: side of a scene, in pixels.
    seed: seed of the scenes.
    difficulty: difficulty of the scenes.
    view: labels draws a row of labels per scene, images a grid of images.
  """
  options = {"seed": seed, "size": size, "difficulty": difficulty}
  indices = range(first, first + count)
  if view == "labels":
    sheet = np.concatenate([draw_row(i, **options) for i in indices])
  else:
    sheet = draw_tiles(indices, **options)
  plots.save_image(sheet, output)
  print(f"wrote {count} scenes, starting at {first}, to {output}")
