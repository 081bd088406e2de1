"""Registry of data sets: opens `data` for each evaluation.

`data` is one of

  scenes              built-in scenes, at indices reserved for evaluation
  {type=..., ...}     any source of `mtv_jax.data`, as in `config.data.train`
  tfds:NAME[:SPLIT]   a source: a set that TFDS prepared in its default folder
  *.parquet, hf://    a source, from its path alone
  *.tar               WebDataset shards: brace ranges, globs
  *.json              captions or boxes, see `coco.py`
  FOLDER              a layout in `LAYOUTS`, ImageNet's validation images or
                      ObjectNet (`imagenet.py`), CLIP_benchmark's tars or class
                      folders (`class_folders.py`)

Annotations are read when a data set is opened; images are loaded lazily, in
their original size, and copied from a bucket by the hosts that read them. All
hosts of a pod must open identical data. Common arguments:

  split   `train` or `test`
  count   number of images, evenly spaced; default: all, or a fixed number of
          scenes

All functions raise MissingFileError if `data` doesn't exist or lacks files,
NotApplicable if it lacks the labels, and InputError for invalid options or
annotations that don't match the images.

To add a data set, write a module with a function that recognizes its folder and
an `open_*` function per kind of example; register the former in `LAYOUTS` and
both in the functions below.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mtv_jax.data import registry as sources
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.sources import block_table
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Data
from mtv_jax.evals.datasets import (
  class_folders,
  coco,
  imagenet,
  kitti,
  masks,
  normals,
  nyu,
  posed_files,
  questions,
  referring,
  scenes,
  selection,
  source_records,
  spair,
)
from mtv_jax.evals.datasets.files import unknown_layout
from mtv_jax.evals.datasets.posed import PosedFrames
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.datasets.source_records import source_config
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice

# Functions that recognize a folder, by its name in errors; tried in order.
LAYOUTS: dict[str, Callable[[pathlib.Path], Any]] = {
  "NYU depth": nyu.matches,
  "KITTI": kitti.matches,
  "SPair-71k": spair.matches,
  "NAVI": posed_files.matches_navi,
  "ADE20K": masks.find_ade20k,
  "DAVIS": masks.find_davis,
  "RGB-D sequences (7-Scenes)": posed_files.matches_rgbd,
  "a data set with annotations/, such as COCO": coco.matches,
}

SPLITS = ("train", "test")
Count = int | None
OptionalPath = str | os.PathLike | None

# Files that are read by `path.fetch` or `path.origin`.
_LAZY_SUFFIXES = (*IMAGE_SUFFIXES, ".bin", ".tar")

# Default numbers of scenes; see also `scenes`.
_CLASSIFICATION_SCENES = 1000
_BOX_SCENES = 128


def open_classification(
  data: Data,
  *,
  split: str = "test",
  count: Count = None,
  real: OptionalPath = None,
) -> examples.ClassificationSet:
  """Labelled images: scenes, a folder, or a source with labels.

  `split` applies to folders with splits, scenes (training starts at
  `scenes.PROBE_SCENES`) and TFDS sets. `real` is ReaL's label file for
  ImageNet's validation images.
  """
  check_choice("split", split, SPLITS)
  options: dict[str, Any] = {"split": split, "count": count}
  config = source_config(data, length=count or _CLASSIFICATION_SCENES)
  path = None
  # Tars in a bucket are a source.
  if config is None or not (_is_source(data) or path_lib.is_remote(data)):
    path = _open_path(data)
    imagenet.reject_train_tar(path)
    # Checked before sources, as the validation set may be a tar.
    if split == "test" and imagenet.find_validation(path):
      return imagenet.open_validation(path, count=count, real_labels=real)
  if real is not None and not (path and path.is_dir()):
    raise InputError(
      f"real={os.fspath(real)!r} relabels the files of ImageNet's validation "
      f"set, but data={data!r} is not a folder with them"
    )
  if config is not None:
    return source_records.open_labelled(config, **options)
  if path.is_dir():
    _reject_other_layouts(path)
    if class_folders.has_tars(path, *SPLITS):
      return class_folders.open_labelled_tars(path, **options)
    if imagenet.find_objectnet(path):
      return imagenet.open_objectnet(path, count=count)
    return class_folders.open_folder(path, real_labels=real, **options)
  if path.suffix == ".json" and path.is_file():
    raise NotApplicable(
      f"{data} is JSON, which has captions but no classes; expected scenes, a "
      "folder of classes or a source with labels"
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
  count: Count = None,
  train_count: Count = None,
  keep: str | None = None,
) -> examples.Splits:
  """A training and a test set for a probe.

  `data` has both splits (a folder, scenes, a TFDS set); or `data` is the test
  set and `train` the training set. `keep` is `classes` of `ZeroShot`.
  """
  shown_data, path = (data := sources.parse_tfds(data)), pathlib.Path()
  if isinstance(data, Mapping):
    has_both = data.get("type") in ("scenes", "tfds")
  else:
    shown_data, has_both = repr(os.fspath(data)), is_scenes(data)
    is_source = source_config(data, length=1) is not None
    path = path if is_source else _open_path(data)
    if not is_source and path.is_dir():
      # Checked first, as these layouts may have a training folder too.
      _reject_other_layouts(path)
      has_tars = class_folders.has_tars(path, "train")
      has_both = has_tars or class_folders.has_splits(path)
    elif not (is_source or path.exists()):
      raise MissingFileError(f"data={shown_data} does not exist")
  if train is None and not has_both:
    imagenet.reject_train_tar(path / imagenet.TRAIN_TAR)
    raise NotApplicable(
      f"data={shown_data} has no training images for a probe; expected "
      "train/CLASS/*.jpg and val/CLASS/*.jpg, scenes or a TFDS set, or train="
    )
  if train is None:
    is_tfds = isinstance(data, Mapping) and data.get("type") == "tfds"
    if is_tfds and re.search(r"\b(train|all)\b", data.get("split") or ""):
      raise InputError(
        f"data={dict(data)}: a probe would be tested on its training images; "
        "expected another split, or train= with a disjoint one"
      )
    train = {**data, "split": "train"} if is_tfds else data
  return class_folders.match_splits(
    open_classification(train, split="train", count=train_count),
    open_classification(data, split="test", count=count),
    keep,
  )


def open_captions(
  data: Data,
  *,
  images: OptionalPath = None,
  split: str = "test",
  count: Count = None,
  max_captions: int | None = None,
) -> examples.CaptionSet:
  """Captioned images: scenes, COCO, Flickr30k, or tars.

  `images` is the image folder, if not beside the JSON; `split` is Karpathy's or
  CLIP_benchmark's; `max_captions` limits captions per image.
  """
  options = {"count": count, "max_captions": max_captions}
  config = source_config(data, length=count or _CLASSIFICATION_SCENES)
  if config is not None:
    return source_records.open_captions(config, **options)
  options |= {"split": split}
  path = _open_path(data)
  if path.is_dir() and class_folders.is_retrieval(path):
    return class_folders.open_captioned_tars(path, **options)
  if file := coco.find_captions(path):
    images = images and _open_path(images)
    return coco.open_captions(file, images=images, **options)
  reason = ""
  if path.is_dir() or path.suffix == ".tsv":
    del options["split"]
    # Shards in a bucket are read there, but tars without a table from a copy.
    if path_lib.is_remote(data):
      has_table = (path / block_table.NAME).exists()
      is_copied = any(path.glob("*.tar")) and not has_table
      path = path_lib.local_copy(data) if is_copied else data
    source = {"path": str(path)}
    try:
      return source_records.open_captions(source, **options)
    except NotApplicable as error:
      reason = f"{error} "
  raise unknown_layout(
    data,
    f"{reason}Retrieval reads scenes, COCO's folder or captions_*.json, "
    "Karpathy's dataset_*.json beside val2014/ or flickr30k-images/, "
    "Flickr30k's results (.token, .csv), CLIP_benchmark's tars with "
    "dataset_type.txt, shards, tables (.csv, .tsv), or a folder of shards or "
    "of images with captions.",
  )


def open_selection(
  data: Data, *, images: OptionalPath = None, count: Count = None
) -> examples.SelectionSet:
  """Images with captions to choose from: SugarCrepe, Winoground."""
  options = {"images": images and _open_path(images), "count": count}
  reader = functools.partial(selection.open_selection, **options)
  return _open_layout(data, selection.EXPECTED, (selection.matches, reader))


def open_images(data: Data, *, count: int) -> examples.ImageSet:
  """Images of any data set, source or folder."""
  errors = []
  for opener in (open_classification, open_captions):
    try:
      return opener(data, count=count)
    except ValueError as error:
      errors.append(str(error))
  config = source_config(data, length=count)
  if config is not None:
    return source_records.open_images(config, count=count)
  root = _open_path(data)
  # JPEGs first: beside JPEGs, PNGs tend to be label maps.
  files = []
  for suffixes in ((".jpg", ".jpeg"), IMAGE_SUFFIXES):
    files = files or sorted(
      file for file in root.rglob("*") if file.suffix.lower() in suffixes
    )
  if not files:
    raise NotApplicable(f"there are no images in {data}: {'; '.join(errors)}")
  return examples.ImageSet.from_records(
    examples.subsample(files, count),
    read=examples.read_image,
    hash_key=lambda file: (file.relative_to(root), file.stat().st_size),
    name=str(data),
  )


def open_segmentation(
  data: Data, *, split: str, count: Count = None
) -> examples.SegmentationSet:
  """Images with class maps: scenes, ADE20K or NYUv2."""
  check_choice("split", split, SPLITS)
  options = {"split": split, "count": count}
  if _is_source(data):
    return scenes.open_segmentation(data, **options)
  return _open_layout(
    data,
    "Segmentation reads 'scenes', ADE20K (ADEChallengeData2016 with images/ "
    "and annotations/) and NYUv2 with nyu_images/, nyu_labels40/, train.txt "
    "and test.txt.",
    (nyu.matches_segmentation, lambda p: nyu.open_segmentation(p, **options)),
    (masks.find_ade20k, lambda p: masks.open_ade20k(p, **options)),
  )


def depth_kind(data: Data) -> str:
  """Kind of depth data: `scenes`, `nyu` or `kitti`; does not open `data`."""
  data = sources.parse_tfds(data)
  if is_scenes(data):
    return "scenes"
  if isinstance(data, Mapping):
    if data.get("type") == "tfds" and str(data.get("name")).startswith("nyu"):
      return "nyu"
    raise NotApplicable(
      f"data={dict(data)}: the only sources with metric depth are scenes and "
      "tfds:nyu_depth_v2"
    )
  return _open_layout(
    data,
    "Depth reads 'scenes', NYUv2 (its lists of files, Marigold's folders, "
    "nyu_images/ with nyu_depths/, nyu_depth_v2_labeled.mat) and KITTI (Eigen "
    "et al.'s list with its files, or training/{image_2,velodyne,calib}).",
    (lambda p: nyu.matches_depth(p) or normals.find_pickle(p), lambda p: "nyu"),
    (kitti.matches_depth, lambda path: "kitti"),
  )


def open_depth(
  data: Data,
  *,
  split: str,
  size: int,
  count: Count = None,
  truth: str | None = None,
  subset: str = "all",
) -> examples.DepthSet:
  """Images with metric depth.

  Args:
    data: scenes; a folder of NYUv2 (see `nyu.py`) or KITTI (see `kitti.py`);
      NYUv2's .mat file; or `tfds:nyu_depth_v2`.
    split, count: see the module docstring.
    size: pixels per side of scenes, unless `data` sets it.
    truth, subset: see `nyu.open_depth` and `kitti.open_depth`.
  """
  check_choice("split", split, SPLITS)
  data = sources.parse_tfds(data)
  kind, options = depth_kind(data), {"split": split, "count": count}
  if kind == "scenes":
    return scenes.open_depth(data, size=size, **options)
  if isinstance(data, Mapping):
    return nyu.open_tfds(data, **options)
  root = _open_path(data)
  if kind == "nyu":
    if not nyu.matches_depth(root):
      raise NotApplicable(f"{root} has surface normals but no depth to read")
    return nyu.open_depth(root, truth=truth, **options)
  return kitti.open_depth(root, subset=subset, **options)


def open_normals(
  data: Data, *, split: str, size: int, count: Count = None, truth=None
) -> examples.NormalSet:
  """Images with surface normals: Probe3D's, or computed from depth."""
  options = {"split": split, "count": count}
  data = sources.parse_tfds(data)
  if depth_kind(data) == "scenes":
    return scenes.open_normals(data, size=size, **options)
  if not isinstance(data, Mapping):
    root = _open_path(data)
    if normals.find_pickle(root):
      return normals.open_probe3d(root, **options)
  depth = open_depth(data, size=size, truth=truth, **options)
  return normals.from_depth_set(depth)


def open_boxes(
  data: Data,
  *,
  images: OptionalPath = None,
  split: str = "val",
  count: Count = None,
) -> examples.BoxSet:
  """Images with named boxes: scenes, COCO, RefCOCO, a source with boxes.

  A COCO folder opens val2017; `split` applies to RefCOCO; `images` is the image
  folder, if not beside the JSON.
  """
  if _is_source(data):
    config = source_config(data, length=count or _BOX_SCENES)
    boxes = source_records.open_boxes(config, count=count)
  else:
    options = {"images": images and _open_path(images), "count": count}
    boxes = _open_layout(
      data,
      "Grounding reads scenes, COCO's folder or its annotations/"
      "instances_*.json, RefCOCO's folder or its refs(unc).p, or a source with "
      "named boxes.",
      (
        referring.find_refs,
        lambda p: referring.open_boxes(p, split=split, **options),
      ),
      (
        lambda p: coco.matches(p) or (p.is_file() and p.suffix == ".json"),
        lambda p: coco.open_boxes(p, **options),
      ),
    )
  if not len(boxes.images):
    raise NotApplicable(f"{boxes.name} has no named boxes")
  return boxes


def open_questions(
  data: Data, *, images: OptionalPath = None, split: str, count: Count = None
) -> questions.QuestionSet:
  """Questions about scenes, a benchmark's images or named boxes.

  `count` limits a benchmark's questions, else images; `split` is ScienceQA's.
  """
  if is_scenes(data):
    return questions.open_scenes(data, count=count)
  if source_config(data, length=1) is not None:
    return questions.from_boxes(open_boxes(data, count=count))
  options = {"images": images and _open_path(images), "count": count}
  reader = functools.partial(questions.open_questions, split=split, **options)
  return _open_layout(data, questions.EXPECTED, (questions.matches, reader))


def open_posed(data: Data, *, subset: str, count: int) -> PosedFrames:
  """Images with depth and camera pose: scenes, NAVI, or RGB-D sequences.

  `subset` applies to NAVI, see `open_navi`; `count` applies to scenes.
  """
  if _is_source(data):
    return scenes.open_posed(data, count=count)
  return _open_layout(
    data,
    "Geometric correspondence reads scenes, NAVI (OBJECT/wild_set/...) or "
    "RGB-D sequences (frame-000000.{color.png,depth.png,pose.txt}).",
    (
      posed_files.matches_navi,
      lambda p: posed_files.open_navi(p, subset=subset),
    ),
    (lambda p: any(p.rglob(posed_files.POSES)), posed_files.open_rgbd),
  )


def open_key_points(
  data: Data, *, split: str, count: int
) -> examples.KeyPointPairs:
  """Pairs of images with keypoints: scenes, or SPair-71k.

  `split` applies to SPair-71k (`trn`, `val`, `test`), `count` to scenes.
  """
  if _is_source(data):
    return scenes.open_key_points(data, count=count)
  return _open_layout(
    data,
    "Semantic correspondence reads scenes or SPair-71k "
    f"(PairAnnotation/{split}/*.json, JPEGImages/).",
    (spair.matches, lambda p: spair.open_key_points(p, split=split)),
  )


def open_videos(data: Data, *, count: Count = None) -> examples.VideoSet:
  """Videos with object masks: scenes with a moving camera, or DAVIS 2017."""
  if _is_source(data):
    return scenes.open_videos(data, count=count)
  return _open_layout(
    data,
    "Video segmentation reads scenes or DAVIS 2017 (JPEGImages/480p/, "
    "Annotations/480p/, ImageSets/2017/val.txt).",
    (masks.find_davis, lambda p: masks.open_davis(p, count=count)),
  )


def _open_path(data: str | os.PathLike) -> pathlib.Path:
  """Local path of `data`; hosts copy images in a bucket as they read them."""

  def is_lazy(name: str) -> bool:
    return name.lower().endswith(_LAZY_SUFFIXES)

  return path_lib.lazy_copy(data, is_lazy, share=1 / jax.process_count())


def _open_layout(
  data: str | os.PathLike,
  expected: str,
  *readers: tuple[Callable[..., Any], Callable[..., Any]],
) -> Any:
  """Opens a path with the first (matches, open) reader that matches."""
  if source_config(data, length=1) is not None:  # Checked before copying.
    raise NotApplicable(f"data={data!r} names shards or a source. {expected}")
  path = _open_path(data)
  for matches, open_path in readers:
    if matches(path):
      return open_path(path)
  raise unknown_layout(data, expected)


def _is_source(data: Data) -> bool:
  return isinstance(data, Mapping) or is_scenes(data)


def _reject_other_layouts(root: pathlib.Path) -> None:
  """Raises NotApplicable for a layout whose folders aren't classes."""
  for name, matches in LAYOUTS.items():
    if matches(root):
      raise NotApplicable(
        f"{root} is laid out as {name}, whose folders are not classes; "
        "expected CLASS/*.jpg, wnid_name.JPEG or {train,val}/CLASS/*.jpg"
      )
