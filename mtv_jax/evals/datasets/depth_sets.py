"""Opens the depth data that an evaluation names.

scenes      the built-in scenes, or `{type="scenes", ...}`, see
            `scene_options.py`
FOLDER      NYUv2 (see `nyu.py`) or KITTI (see `kitti.py`)
*.mat       NYUv2 as released
{type: "tfds", name: "nyu_depth_v2"}
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import (
  depth as depth_data,
)
from mtv_jax.evals.datasets import (
  kitti,
  layout,
  nyu,
  scene_options,
)
from mtv_jax.evals.datasets import (
  registry as datasets,
)
from mtv_jax.evals.datasets.depth import DepthSet

# How many scenes stand for each split.
_SCENES = {"train": 192, "test": 64}


def kind_of(data: datasets.Data) -> str:
  """What `data` are, without opening them: `scenes`, `nyu` or `kitti`.

  Raises:
    FileNotFoundError: nothing there.
    NotApplicable: something there that has no depth.
  """
  if datasets.is_scenes(data):
    return "scenes"
  if isinstance(data, Mapping):
    if data.get("type") == "tfds" and str(data.get("name")).startswith("nyu"):
      return "nyu"
    raise NotApplicable(
      f"data={dict(data)}: of the sources only the scenes and TFDS's "
      'nyu_depth_v2 give metric depth: {type: "tfds", name: "nyu_depth_v2"}'
    )
  root = pathlib.Path(data)
  if root.exists() and nyu.is_here(root):
    return "nyu"
  if root.is_dir() and kitti.is_here(root):
    return "kitti"
  raise layout.unknown(data, _EXPECTED)


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
    size: pixels a side of the scenes, where `data` does not say.
    count: how many images, evenly spaced; all by default (scenes: 192 to train
      on and 64 to test on).
    truth: of NYUv2, see `nyu.read`.
    subset: of KITTI, see `kitti.read`.

  Raises:
    FileNotFoundError: nothing there, or only a part.
    NotApplicable: something there that has no depth.
    ValueError: for an unknown split or option.
  """
  if split not in depth_data.SPLITS:
    raise ValueError(f"split={split!r}; expected one of {depth_data.SPLITS}")
  kind = kind_of(data)
  if kind == "scenes":
    return depth_data.of_scenes(
      scene_options.series(
        data,
        split=split,
        count=count,
        default=_SCENES[split],
        size=size,
        needs="metric depth",
      )
    )
  if isinstance(data, Mapping):
    return nyu.read_tfds(data, split=split, count=count)
  root = pathlib.Path(data)
  if kind == "nyu":
    return nyu.read(root, split=split, count=count, truth=truth)
  return kitti.read(root, split=split, count=count, subset=subset)


_EXPECTED = """Expected 'scenes', or one of
  NYUv2: nyudepthv2_{train,test}_files_with_gt.txt with its files
  NYUv2: {train,test}/SCENE/{rgb,depth,filled}_NNNN.png
  NYUv2: nyu_images/ID.jpg, nyu_depths/ID.png, {train,test}.txt
  NYUv2: nyu_depth_v2_labeled.mat with splits.mat
  KITTI: kitti_eigen_test_files_with_gt.txt, raw_data/, data_depth_annotated/
  KITTI: training/{image_2,velodyne,calib}"""
