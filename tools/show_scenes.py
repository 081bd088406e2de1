"""Draws built-in scenes with their labels into a PNG file.

python tools/show_scenes.py --out=scenes.png --first=0 --count=6
python tools/show_scenes.py --out=tiles.png --count=64 --view=images --size=96
"""

import argparse
import pathlib
from collections.abc import Sequence

from PIL import Image

from mtv_jax import plots


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
  draw = plots.scene_sheet if args.view == "labels" else plots.scene_tiles
  Image.fromarray(draw(indices, size=args.size, seed=args.seed)).save(args.out)
  print(f"{args.count} scenes from {args.first} in {args.out}")


if __name__ == "__main__":
  main()
