"""Measures the error that the storage of depth labels adds to the target.

  python tools/label_size.py --nyu=FOLDER --seven_scenes=FOLDER

Compares, after the training step's crop and resampling, a stored label with the
map at full resolution, as the expert predicts it. AbsRel is in depth, as
published for experts; the gradient column is the error of the target's
gradients, relative to the gradients themselves (`objectives.depth`). Bytes are
those of the PNG. NYU's maps are 8-bit here, so they tell of sides only.
"""

import argparse
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from mtv_jax.augment import geometry
from mtv_jax.data.labels import label_values
from mtv_jax.models.heads.dpt import MAX_SIDE
from mtv_jax.objectives import depth as depth_lib

FORMATS = [
  *((side, 16) for side in (192, 128, 96, 64, 48, 32)),
  *((side, bits) for side in (128, 96, 64) for bits in (12, 10, 8)),
]
CROPS = 4
# Side of the head's map, for views of 224 pixels and more at patch size 16.
HEAD = MAX_SIDE


def read_nyu(folder: pathlib.Path) -> list[np.ndarray]:
  """Returns metres; 0 is unlabelled."""
  files = sorted((folder / "nyu_depths").glob("*.png"))
  return [cv2.imread(str(f), cv2.IMREAD_UNCHANGED) / 25.5 for f in files]


def read_seven_scenes(folder: pathlib.Path) -> list[np.ndarray]:
  """Returns metres; 0 is unlabelled."""
  files = sorted(folder.rglob("*.depth.png"))
  maps = [cv2.imread(str(f), cv2.IMREAD_UNCHANGED) / 1000.0 for f in files]
  return [np.where(m < 60, m, 0) for m in maps]


def store(metres: np.ndarray, side: int, bits: int):
  """Returns the inverse depth of a label of this format, and its bytes."""
  valid = metres > 0
  inverse = np.where(valid, 1 / np.maximum(metres, 1e-3), 0)
  label = label_values.make_depth(inverse, side=side, valid=valid).label
  top = 2**bits - 1
  levels = (label.values - 1.0) / (label_values.TOP - 1) * (top - 1)
  levels = np.where(label.values > 0, 1 + np.rint(levels), 0).astype(np.uint16)
  pixels = levels if bits > 8 else levels.astype(np.uint8)
  size = len(cv2.imencode(".png", pixels)[1])
  fraction = (levels - 1.0) / (top - 1)
  values = label.low + fraction * (label.high - label.low)
  return np.where(levels > 0, values, np.nan).astype(np.float32), size


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
  """Crops of a third of the area or more, (y0, x0, y1, x1)."""
  area = rng.uniform(1 / 3, 1, count)
  aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), count))
  sides = np.sqrt(np.stack([area / aspect, area * aspect], 1)).clip(max=1)
  start = rng.uniform(0, 1, (count, 2)) * (1 - sides)
  return np.concatenate([start, start + sides], 1).astype(np.float32)


@jax.jit
def compare(stored, whole, boxes):
  """AbsRel and relative gradient error of the targets."""
  flipped = jnp.zeros(boxes.shape[:1], bool)
  targets, masks = [], []
  for values in (stored, whole):
    target, valid = geometry.crop_maps(
      values[None], jnp.isfinite(values)[None], boxes[None], flipped[None],
      size=HEAD,
    )  # fmt: skip
    targets.append(target[0])
    masks.append(valid[0])
  valid = masks[0] & masks[1]
  ours, true = targets
  relative = jnp.abs(true / jnp.maximum(ours, 1e-3) - 1)
  absrel = jnp.sum(jnp.where(valid, relative, 0)) / jnp.sum(valid)
  ours, true = (depth_lib.standardise(target, valid)[0] for target in targets)
  added = depth_lib.gradient_error(ours - true, valid)
  own = depth_lib.gradient_error(true, valid)
  return jnp.stack([absrel, jnp.sum(added) / jnp.sum(own)])


def main() -> None:
  """Prints a table for each data set."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--nyu", type=pathlib.Path)
  parser.add_argument("--seven_scenes", type=pathlib.Path)
  args = parser.parse_args()
  sets = {}
  if args.nyu:
    sets["NYU"] = read_nyu(args.nyu)
  if args.seven_scenes:
    sets["7-Scenes"] = read_seven_scenes(args.seven_scenes)
  for name, maps in sets.items():
    print(f"\n{name}, {len(maps)} maps of {maps[0].shape}, {CROPS} crops each")
    print("| side | bits | bytes | AbsRel | gradients |")
    print("|---|---|---|---|---|")
    whole = [store(m, max(m.shape), 16)[0] for m in maps]
    for side, bits in FORMATS:
      rng = np.random.default_rng(0)
      rows, sizes = [], []
      for metres, full in zip(maps, whole, strict=True):
        stored, size = store(metres, side, bits)
        rows.append(compare(stored, full, random_boxes(rng, CROPS)))
        sizes.append(size)
      means = np.mean(rows, axis=0)
      cells = " | ".join(f"{value:.4f}" for value in means)
      print(f"| {side} | {bits} | {np.mean(sizes):,.0f} | {cells} |")


if __name__ == "__main__":
  main()
