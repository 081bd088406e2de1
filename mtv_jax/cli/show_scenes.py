"""Draws built-in scenes with their labels into a PNG file.

python tools/show_scenes.py --out=scenes.png --first=0 --count=6
python tools/show_scenes.py --out=tiles.png --count=64 --view=images --size=96
"""

import argparse
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mtv_jax.data.scenes import scenes
from mtv_jax.utils import plots

_INK, _PAPER = (24, 24, 28), (250, 250, 248)
_GAP = 6
_LINE = 13  # pixels per line of text
_CAPTION_LINES = 7


def matches_picture(
  pair: scenes.ScenePair, *, count: int = 16
) -> UInt8[np.ndarray, "h w 3"]:
  """Both views side by side, lines joining `count` visible points."""
  size = pair.first.image.shape[0]
  shown = np.argwhere(pair.visible & (pair.first.instances >= 2))
  rng = np.random.default_rng(0)
  chosen = shown[rng.permutation(len(shown))[:count]]
  ends = pair.correspondence[chosen[:, 0], chosen[:, 1]] * size - 0.5
  return plots.lines_picture(
    pair.first.image,
    pair.second.image,
    chosen,
    np.round(ends).astype(np.int64),
    colours=plots.palette(count + 1)[1 : len(chosen) + 1],
  )


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
    plots.depth_picture(scene.inverse_depth),
    plots.palette(len(scenes.SEGMENT_NAMES))[scene.segmentation],
    plots.boxes_picture(scene.image, scene.boxes, scene.phrases),
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


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="a PNG")
  parser.add_argument("--first", type=int, default=0, help="number of a scene")
  parser.add_argument("--count", type=int, default=6, help="how many scenes")
  parser.add_argument("--size", type=int, default=192, help="pixels a side")
  parser.add_argument("--seed", type=int, default=0, help="series of scenes")
  parser.add_argument(
    "--view",
    choices=("labels", "images"),
    default="labels",
    help="a row with all labels for each scene, or the images in a grid",
  )
  args = parser.parse_args(argv)
  indices = range(args.first, args.first + args.count)
  draw = scene_sheet if args.view == "labels" else scene_tiles
  Image.fromarray(draw(indices, size=args.size, seed=args.seed)).save(args.out)
  print(f"{args.count} scenes from {args.first} in {args.out}")
