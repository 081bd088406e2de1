"""Measures the error that the storage of depth labels adds to the target.

  python tools/label_size.py --nyu=FOLDER --seven_scenes=FOLDER

Compares, after the training step's crop and resampling, a stored label with the
map at full resolution, as the expert predicts it, at the size of the head's map
for two sizes of views. AbsRel is in depth, as published for experts; the
gradient column is the error of the target's gradients, relative to the
gradients themselves (`objectives.depth`). Bytes are those of a serialized
label. NYU's maps are 8-bit here, so they tell of sides only.
"""

import argparse
import functools
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
# Side of the head's map by the views' side, at patch size 16.
HEADS = {side: min(4 * side // 16, MAX_SIDE) for side in (224, 512)}


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
  made = label_values.make_depth(inverse, side=side, bits=bits, valid=valid)
  return made.label.inverse_depth, len(label_values.encode("", made.label))


@functools.partial(jax.jit, static_argnames="head")
def compare(stored, whole, key, *, head):
  """AbsRel and relative gradient error of the targets, for random crops."""
  crop, size = geometry.Crop(head), jnp.array(whole.shape)
  uniforms = jax.random.uniform(key, (CROPS, crop.uniforms))
  boxes = jax.vmap(lambda u: crop.box(size, u))(uniforms)[None]
  flipped = jnp.zeros(boxes.shape[:2], bool)
  (ours, kept), (true, valid) = (
    geometry.crop_maps(
      x[None], jnp.isfinite(x)[None], boxes, flipped, size=head
    )
    for x in (stored, whole)
  )  # [1, CROPS, head, head] each
  ours, true, valid = ours[0], true[0], (valid & kept)[0]
  relative = jnp.abs(true / jnp.maximum(ours, 1e-3) - 1)
  absrel = jnp.sum(jnp.where(valid, relative, 0)) / jnp.sum(valid)
  ours, true = (
    depth_lib.standardise(target, valid)[0] for target in (ours, true)
  )
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
  print("AbsRel and gradients, for views of", *HEADS, "pixels")
  for name, maps in sets.items():
    print(f"\n{name}, {len(maps)} maps of {maps[0].shape}, {CROPS} crops each")
    print("| side | bits | bytes |" + " AbsRel | gradients |" * len(HEADS))
    print("|---" * (3 + 2 * len(HEADS)) + "|")
    whole = [store(m, max(m.shape), 16)[0] for m in maps]
    for side, bits in FORMATS:
      rows, sizes = [], []
      for number, (metres, full) in enumerate(zip(maps, whole, strict=True)):
        stored, size = store(metres, side, bits)
        key = jax.random.key(number)
        heads = HEADS.values()
        rows.append([compare(stored, full, key, head=head) for head in heads])
        sizes.append(size)
      means = np.mean(rows, axis=0).ravel()
      cells = " | ".join(f"{value:.4f}" for value in means)
      print(f"| {side} | {bits} | {np.mean(sizes):,.0f} | {cells} |")


if __name__ == "__main__":
  main()
