"""Opens the depth data that an evaluation names.

scenes      the built-in scenes
FOLDER      NYUv2 (see `nyu.py`) or KITTI (see `kitti.py`)
*.mat       NYUv2 as released
{type: "tfds", name: "nyu_depth_v2"}
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

from mtv_jax.evals import datasets, depth_data, kitti, nyu
from mtv_jax.evals.depth_data import DepthSet

# How many scenes stand for each split.
_SCENES = {"train": 192, "test": 64}


def open_set(
  data: datasets.Data,
  *,
  split: str,
  size: int,
  count: int | None = None,
  truth: str | None = None,
  subset: str = "all",
) -> DepthSet:
  """Opens one split of a data set with depth.

  Args:
    data: see the top of the file.
    split: `train` or `test`.
    size: pixels a side of the scenes.
    count: how many images, evenly spaced; all by default (scenes: 192 to train
      on and 64 to test on).
    truth: of NYUv2, see `nyu.read`.
    subset: of KITTI, see `kitti.read`.

  Raises:
    FileNotFoundError: nothing there, or only a part.
    ValueError: something there that has no depth.
  """
  if split not in depth_data.SPLITS:
    raise ValueError(f"split={split!r}; expected one of {depth_data.SPLITS}")
  if isinstance(data, Mapping):
    if data.get("type") == "tfds" and str(data.get("name")).startswith("nyu"):
      return nyu.read_tfds(data, split=split, count=count)
    raise ValueError(
      f"data={dict(data)}: of the sources only TFDS's nyu_depth_v2 gives "
      'metric depth: {type: "tfds", name: "nyu_depth_v2"}. The built-in scenes '
      "are data='scenes'."
    )
  if os.fspath(data) == "scenes":
    count = count or _SCENES[split]
    return depth_data.of_scenes(split, size=size, count=count)
  root = pathlib.Path(data)
  if root.exists() and nyu.is_here(root):
    return nyu.read(root, split=split, count=count, truth=truth)
  if root.is_dir() and kitti.is_here(root):
    return kitti.read(root, split=split, count=count, subset=subset)
  raise FileNotFoundError(_nothing(root))


def _nothing(root: pathlib.Path) -> str:
  if root.is_dir():
    there = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())[:8]
    found = f"the folder holds {', '.join(there) or 'nothing'}"
  else:
    found = "a file of another kind" if root.exists() else "nothing there"
  return (
    f"data={str(root)!r}: {found}. Expected 'scenes', or one of\n"
    "  NYUv2: nyudepthv2_{train,test}_files_with_gt.txt with its files\n"
    "  NYUv2: {train,test}/SCENE/{rgb,depth,filled}_NNNN.png\n"
    "  NYUv2: nyu_images/ID.jpg, nyu_depths/ID.png, {train,test}.txt\n"
    "  NYUv2: nyu_depth_v2_labeled.mat with splits.mat\n"
    "  KITTI: kitti_eigen_test_files_with_gt.txt, raw_data/, "
    "data_depth_annotated/\n"
    "  KITTI: training/{image_2,velodyne,calib}"
  )
