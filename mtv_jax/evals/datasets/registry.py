"""Registry of data sets: opens what `data` names, for each kind of example.

What `data` may be:

  scenes              the built-in scenes, at numbers no training run reaches
  {type=..., ...}     any source of `mtv_jax.data`, as in `config.data.train`
  *.tar               WebDataset shards: brace ranges, globs
  *.json              captions or boxes, see `coco.py`
  FOLDER              a layout in `LAYOUTS`, or folders of classes, see
                      `class_folders.py`

Annotations are read when a data set is opened, images one by one when used.
They are the original ones, not canvases: an evaluation chooses its own
preprocessing.

A new data set is a file with `matches(root)` and an `open_...` function for
each kind of example that it has; `LAYOUTS` and the functions here name it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  BoxSet,
  CaptionSet,
  ClassificationSet,
  Data,
  DepthSet,
  KeyPointPairs,
  SegmentationSet,
)
from mtv_jax.evals.datasets import (
  ade20k,
  class_folders,
  coco,
  kitti,
  navi,
  nyu,
  rgbd,
  scenes,
  source_records,
  spair,
)
from mtv_jax.evals.datasets.files import unknown_layout
from mtv_jax.evals.datasets.posed import PosedFrames
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.datasets.splits import Splits, match_splits
from mtv_jax.utils.errors import InputError

# By what errors call it, in the order in which folders are recognised.
LAYOUTS: dict[str, ModuleType] = {
  "NYU depth": nyu,
  "KITTI": kitti,
  "SPair-71k": spair,
  "NAVI": navi,
  "ADE20K": ade20k,
  "RGB-D sequences (7-Scenes)": rgbd,
  "a data set with annotations/, such as COCO": coco,
}

SPLITS = ("train", "test")

# How many scenes are rendered where nothing says: of the two splits.
_CLASSIFICATION_SCENES = 1000
_BOX_SCENES = 128
_DEPTH_SCENES = {"train": 192, "test": 64}
_SEGMENTATION_SCENES = {"train": 256, "test": 100}
_SEGMENTATION_SCENE_SIZE = 96


def open_classification(
  data: Data, *, split: str = "test", count: int | None = None
) -> ClassificationSet:
  """Opens labelled images: scenes, a folder, or a source with labels.

  Args:
    data: see the top of the file.
    split: `train` or `test`, where the data has both: of a folder of splits,
      of the scenes (their numbers then start at `scenes.PROBE_SCENES`), and of
      a TFDS set whose split `data` leaves open. Other data have one split.
    count: how many to use, evenly spaced; all of them by default (of the
      scenes, which never end, 1,000).

  Raises:
    MissingFileError: nothing there.
    NotApplicable: something there that has no labels, or whose folders are
      those of another kind of data set.
  """
  _check_split(split)
  config = _source_config(data, length=count or _CLASSIFICATION_SCENES)
  if config is not None:
    return source_records.open_labelled(config, split=split, count=count)
  path = pathlib.Path(data)
  if path.is_dir():
    _refuse_other_layouts(path)
    return class_folders.open_folder(path, split=split, count=count)
  if path.suffix == ".json" and path.is_file():
    raise NotApplicable(
      f"{data} is a JSON file, which gives captions and no classes. "
      "Classification reads scenes, CLASS/*.jpg, wnid_name.JPEG or a source "
      "with labels."
    )
  raise unknown_layout(
    data,
    "Expected 'scenes', a folder of classes, or tars with labels "
    "(shards/{00000..00009}.tar)",
  )


def open_splits(
  data: Data,
  *,
  train: Data | None = None,
  count: int | None = None,
  train_count: int | None = None,
) -> Splits:
  """Opens a set to train a probe on and one to test it on.

  Args:
    data: with both splits (a folder of them, the scenes, a TFDS set), or the
      images to test on.
    train: the images to train on, where `data` does not have them.
    count: how many images to test on, evenly spaced; all by default.
    train_count: how many to train on, by the same rule.

  Raises:
    MissingFileError: nothing there, or one split without the other.
    NotApplicable: data of another kind, or without a training split.
    InputError: classes that don't agree, or one set given twice.
  """
  if isinstance(data, Mapping):
    both = data.get("type") in ("scenes", "tfds")
  elif os.path.isdir(data):
    # First, as other data sets have a folder for training too.
    _refuse_other_layouts(pathlib.Path(data))
    both = class_folders.has_splits(data)
  else:
    both = is_scenes(data)
  if train is None and not both:
    raise NotApplicable(
      f"data={data if isinstance(data, Mapping) else os.fspath(data)!r} "
      "has nothing to train a probe on. Expected a folder with train/CLASS/"
      "*.jpg and val/CLASS/*.jpg, scenes or a TFDS set; or give the images to "
      "train on with train="
    )
  return match_splits(
    open_classification(
      data if train is None else train, split="train", count=train_count
    ),
    open_classification(data, split="test", count=count),
  )


def open_captions(
  data: Data,
  *,
  images: str | os.PathLike | None = None,
  split: str = "test",
  count: int | None = None,
  max_captions: int | None = None,
) -> CaptionSet:
  """Opens captioned images: scenes, COCO, Karpathy, or tars.

  Args:
    data: see the top of the file.
    images: the folder of images, where it is not beside the JSON.
    split: of Karpathy's file.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 1,000).
    max_captions: the first captions of an image to use; all by default.

  Raises:
    MissingFileError: nothing there, or images missing.
    NotApplicable: something there that has no captions.
  """
  chosen = {"count": count, "max_captions": max_captions}
  config = _source_config(data, length=count or _CLASSIFICATION_SCENES)
  if config is not None:
    return source_records.open_captions(config, **chosen)
  path = pathlib.Path(data)
  if path.suffix == ".json" and path.is_file():
    return coco.open_captions(path, images=images, split=split, **chosen)
  raise unknown_layout(
    data,
    "Retrieval reads scenes, COCO's captions_*.json, Karpathy's "
    "dataset_*.json or tars.",
  )


def open_segmentation(
  data: Data, *, split: str, count: int | None = None
) -> SegmentationSet:
  """Opens images with a class for every pixel.

  Args:
    data: scenes, ADE20K (ADEChallengeData2016, or the folder it is in), or
      NYUv2 with nyu_images/, nyu_labels40/, train.txt and test.txt.
    split: `train` or `test`.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 256 and 100).

  Raises:
    MissingFileError: nothing there, or a part missing.
    NotApplicable: something there that has no classes of pixels.
    InputError: for an unknown split or option.
  """
  _check_split(split)
  if isinstance(data, Mapping) or is_scenes(data):
    return scenes.open_segmentation(
      scenes.open_range(
        data,
        split=split,
        count=count,
        default=_SEGMENTATION_SCENES[split],
        size=_SEGMENTATION_SCENE_SIZE,
        needs="classes of pixels",
      )
    )
  path = pathlib.Path(data)
  if nyu.has_segmentation(path):
    return nyu.open_segmentation(path, split=split, count=count)
  if ade20k.find_root(path) is not None:
    return ade20k.open_segmentation(path, split=split, count=count)
  raise unknown_layout(
    data,
    "Segmentation reads 'scenes', ADE20K (ADEChallengeData2016 with images/ "
    "and annotations/) and NYUv2 with nyu_images/, nyu_labels40/, train.txt "
    "and test.txt.",
  )


def depth_kind(data: Data) -> str:
  """`scenes`, `nyu` or `kitti`, without opening `data`.

  Raises:
    MissingFileError: nothing there.
    NotApplicable: something there that has no depth.
  """
  if is_scenes(data):
    return "scenes"
  if isinstance(data, Mapping):
    if data.get("type") == "tfds" and str(data.get("name")).startswith("nyu"):
      return "nyu"
    raise NotApplicable(
      f"data={dict(data)}: of the sources only the scenes and TFDS's "
      'nyu_depth_v2 give metric depth: {type: "tfds", name: "nyu_depth_v2"}'
    )
  root = pathlib.Path(data)
  if root.exists() and nyu.has_depth(root):
    return "nyu"
  if root.is_dir() and kitti.has_depth(root):
    return "kitti"
  raise unknown_layout(data, _DEPTH_LAYOUTS)


def open_depth(
  data: Data,
  *,
  split: str,
  size: int,
  count: int | None = None,
  truth: str | None = None,
  subset: str = "all",
) -> DepthSet:
  """Opens one split of a data set with metric depth.

  Args:
    data: scenes; a folder of NYUv2 (see `nyu.py`) or KITTI (see `kitti.py`);
      NYUv2's .mat file; or `{type: "tfds", name: "nyu_depth_v2"}`.
    split: `train` or `test`.
    size: pixels a side of the scenes, where `data` does not say.
    count: how many images, evenly spaced; all by default (of the scenes 192 to
      train on and 64 to test on).
    truth: of NYUv2, see `nyu.open_depth`.
    subset: of KITTI, see `kitti.open_depth`.

  Raises:
    MissingFileError: nothing there, or only a part.
    NotApplicable: something there that has no depth.
    InputError: for an unknown split or option.
  """
  _check_split(split)
  kind = depth_kind(data)
  if kind == "scenes":
    return scenes.open_depth(
      scenes.open_range(
        data,
        split=split,
        count=count,
        default=_DEPTH_SCENES[split],
        size=size,
        needs="metric depth",
      )
    )
  if isinstance(data, Mapping):
    return nyu.open_tfds(data, split=split, count=count)
  root = pathlib.Path(data)
  if kind == "nyu":
    return nyu.open_depth(root, split=split, count=count, truth=truth)
  return kitti.open_depth(root, split=split, count=count, subset=subset)


_DEPTH_LAYOUTS = """Expected 'scenes', or one of
  NYUv2: nyudepthv2_{train,test}_files_with_gt.txt with its files
  NYUv2: {train,test}/SCENE/{rgb,depth,filled}_NNNN.png
  NYUv2: nyu_images/ID.jpg, nyu_depths/ID.png, {train,test}.txt
  NYUv2: nyu_depth_v2_labeled.mat with splits.mat
  KITTI: kitti_eigen_test_files_with_gt.txt, raw_data/, data_depth_annotated/
  KITTI: training/{image_2,velodyne,calib}"""


def open_boxes(
  data: Data,
  *,
  images: str | os.PathLike | None = None,
  count: int | None = None,
) -> BoxSet:
  """Opens images with named boxes.

  Args:
    data: scenes; COCO's instances_*.json or its folder, of which val2017 is
      read; or a source with labels of boxes.
    images: the folder of COCO's images, where it is not beside the JSON.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 128).

  Raises:
    MissingFileError: nothing there, or images missing.
    NotApplicable: something there that has no boxes.
    InputError: boxes that don't fit their images.
  """
  if isinstance(data, Mapping) or is_scenes(data):
    config = _source_config(data, length=count or _BOX_SCENES)
    boxes = source_records.open_boxes(config, count=count)
  else:
    path = pathlib.Path(data)
    is_json = path.is_file() and path.suffix == ".json"
    if not is_json and not (path / "annotations").is_dir():
      raise unknown_layout(
        data,
        "Grounding reads scenes, COCO's folder or its annotations/"
        "instances_*.json, or a source with labels of boxes.",
      )
    boxes = coco.open_boxes(path, images=images, count=count)
  if not len(boxes.images):
    raise NotApplicable(f"{boxes.name} has no named boxes")
  return boxes


def open_posed(data: Data, *, subset: str, count: int) -> PosedFrames:
  """Opens images with depth and camera pose.

  Args:
    data: scenes, a folder in NAVI's layout, or RGB-D sequences.
    subset: of NAVI, see `navi.open_posed`.
    count: of the scenes, how many to render.

  Raises:
    MissingFileError: nothing there, or only a part.
    NotApplicable: something there without poses.
  """
  if isinstance(data, Mapping) or is_scenes(data):
    return scenes.open_posed(_scene_range(data, count, "posed views"))
  root = pathlib.Path(data)
  if navi.matches(root):
    return navi.open_posed(root, subset=subset)
  if rgbd.has_frames(root):
    return rgbd.open_posed(root)
  raise unknown_layout(
    data,
    "Geometric correspondence reads scenes, NAVI (OBJECT/wild_set/...) or "
    "RGB-D sequences (frame-000000.{color.png,depth.png,pose.txt}).",
  )


def open_key_points(data: Data, *, split: str, count: int) -> KeyPointPairs:
  """Opens pairs of images with key points.

  Args:
    data: scenes or the folder `SPair-71k`.
    split: of SPair-71k: `trn`, `val` or `test`.
    count: of the scenes, how many to render.

  Raises:
    MissingFileError: nothing there, or only a part.
    NotApplicable: something there without key points.
  """
  if isinstance(data, Mapping) or is_scenes(data):
    return scenes.open_key_points(_scene_range(data, count, "key points"))
  root = pathlib.Path(data)
  if spair.matches(root):
    return spair.open_key_points(root, split=split)
  raise unknown_layout(
    data,
    "Semantic correspondence reads scenes or SPair-71k "
    f"(PairAnnotation/{split}/*.json, JPEGImages/).",
  )


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise InputError(f"split={split!r}; expected 'train' or 'test'")


def _scene_range(data: Data, count: int, needs: str) -> scenes.SceneRange:
  return scenes.open_range(data, default=count, count=count, needs=needs)


def _source_config(data: Data, *, length: int) -> dict[str, Any] | None:
  """The config of a source; None for files and folders."""
  if isinstance(data, Mapping):
    return dict(data)
  text = os.fspath(data)
  if text == "scenes":
    return {"type": "scenes", "length": length}
  if ".tar" in text:
    return {"type": "webdataset", "path": text}
  return None


def _refuse_other_layouts(root: pathlib.Path) -> None:
  """Raises NotApplicable for a data set whose folders are not classes."""
  for name, layout in LAYOUTS.items():
    if layout.matches(root):
      raise NotApplicable(
        f"{root} is laid out as {name}, whose folders are not classes. "
        "Classification reads CLASS/*.jpg, wnid_name.JPEG or train/CLASS/*.jpg "
        "beside val/CLASS/*.jpg"
      )
