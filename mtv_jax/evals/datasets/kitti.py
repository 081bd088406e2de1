"""KITTI depth (Geiger et al. 2013; Uhrig et al. 2017).

  LISTS   kitti_eigen_{train,test}_files_with_gt.txt or
          kitti_eigen_{train,test}.txt, lines "rgb depth focal";
          raw_data/DATE/DRIVE/image_02/data/N.{png,jpg} and
          data_depth_annotated/{train,val}/DRIVE/proj_depth/groundtruth/...:
          16-bit depth from several sweeps, value / 256 in metres
  OBJECT  training/{image_2,velodyne,calib}: depth of one sweep, projected here

652 of the 697 test images of Eigen et al. (2014) have a depth map.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32

from mtv_jax.config import foreign
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice
from mtv_jax.utils.path import fetch

SUBSETS = ("all", "train", "val")
_LISTS = (
  "kitti_eigen_{split}_files_with_gt.txt",
  "eigen_{split}_files_with_gt.txt",
  "kitti_eigen_{split}.txt",
)


def matches(root: pathlib.Path) -> bool:
  """Whether a folder looks like KITTI, with or without depth."""
  return matches_depth(root) or (root / "training" / "image_2").is_dir()


def matches_depth(root: pathlib.Path) -> bool:
  """Whether a folder looks like a layout with depth, complete or not."""
  names = ["data_depth_annotated", "raw_data", "training/velodyne"]
  return any((root / name).exists() for name in names) or any(
    files.find_list(root, _LISTS, split) for split in ("train", "test")
  )


def open_depth(
  root: pathlib.Path, *, split: str, count: int | None, subset: str
) -> examples.DepthSet:
  """Opens a split, see `registry.open_depth`.

  `subset` selects listed images: `all`, or those with a map in `train` or `val`
  of the annotated depth. MiDaS tests on `val` (161 images).
  """
  fields = {"count": count, "kind": "kitti", "name": str(root)}
  listing = files.find_list(root, _LISTS, split)
  if listing is not None:
    return files.open_pairs(
      examples.DepthSet,
      _list_files(listing, subset),
      read_label=lambda _, path: files.read_channel(path).astype("f4") / 256,
      source="annotated (several sweeps), 16 bits: value / 256 m",
      **fields,
    )
  name = _LISTS[0].format(split=split)
  parts = [
    f"training/{p}" for p in ("image_2/*.png", "velodyne/*.bin", "calib/*.txt")
  ]
  what = "KITTI's object benchmark"
  if not (root / "training").is_dir():
    parts = (
      name,
      "raw_data/*/*/image_02/data/*",
      "data_depth_annotated/*/*/proj_depth/groundtruth/image_02/*.png",
    )
    what = "KITTI's raw images and annotated depth with Eigen et al.'s list"
  elif split != "test":
    raise InputError(
      f"{root}: the object benchmark lacks depth for the {split} split; "
      f"expected {name}"
    )
  files.require_layout(root, parts, what=what)
  folder = root / "training"
  images = sorted((folder / "image_2").glob("*.png"))
  return files.open_pairs(
    examples.DepthSet,
    [(p, folder / "velodyne" / f"{p.stem}.bin") for p in images],
    read_label=_read_sweep,
    source="one velodyne sweep projected by P2 R0_rect Tr_velo_to_cam, nearest "
    "point of a pixel",
    **fields,
  )


def _list_files(path: pathlib.Path, subset: str) -> list[files.LabelledFile]:
  check_choice("subset", subset, SUBSETS)
  root, pairs, missing = path.parent, [], []
  for image, depth in files.read_file_list(path):
    if depth != "None":
      # The lists omit the part that contains the map.
      parts = ("data_depth_annotated/train", "data_depth_annotated/val")
      maps = [root / p / depth for p in (*parts, "train", "val")]
      label = next((p for p in maps if p.is_file()), None)
      if label is None:
        missing.append(depth)
      pairs.append((_find_image(root, image), label))
  if missing:
    raise MissingFileError(
      f"{root}: {len(missing)} of {len(pairs)} depth maps are missing, such as "
      f"{missing[0]}, under data_depth_annotated/train and .../val"
    )
  if subset != "all":
    pairs = [pair for pair in pairs if pair[1].parts[-6] == subset]
  if not pairs:
    raise InputError(f"{path}: no image has a map in the subset {subset!r}")
  return pairs


def _find_image(root: pathlib.Path, name: str) -> pathlib.Path:
  """Path of a listed image, which may be stored in another format."""
  paths = [
    (root / folder / name).with_suffix(suffix)
    for folder in ("raw_data", "")
    for suffix in dict.fromkeys((".png", *IMAGE_SUFFIXES))
  ]
  return next((p for p in paths if p.is_file()), paths[0])


def _read_sweep(image: pathlib.Path, sweep: pathlib.Path) -> np.ndarray:
  with PIL.Image.open(fetch(image)) as header:
    width, height = header.size
  values = np.fromfile(fetch(sweep), np.float32)
  if values.size % 4:
    raise InputError(
      f"{sweep} has {values.size} numbers; expected 4 for each point"
    )
  path = sweep.parents[1] / "calib" / f"{sweep.stem}.txt"
  points = values.reshape(-1, 4)[:, :3]
  return project_points(points, _read_calibration(path), size=(height, width))


def _read_calibration(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The `[3, 3]` and `[3, 4]` matrices of a calibration file, by name."""
  if not path.is_file():
    raise MissingFileError(f"{path}: this frame has no calibration")
  matrices = {}
  for line in foreign.read_text(path).splitlines():
    name, _, numbers = line.partition(":")
    try:
      values = np.array(numbers.split(), np.float64)
    except ValueError as error:
      raise InputError(f"{path}: {name}: {error}") from None
    if values.size in (9, 12):
      matrices[name] = values.reshape(3, -1)
  missing = {"P2", "R0_rect", "Tr_velo_to_cam"} - matrices.keys()
  if missing:
    raise InputError(
      f"{path} lacks {sorted(missing)}; it has {sorted(matrices)}"
    )
  return matrices


def project_points(
  points: Float[np.ndarray, "n 3"],
  calibration: Mapping[str, Float[np.ndarray, "3 k"]],
  *,
  size: tuple[int, int],
) -> Float32[np.ndarray, "{size[0]} {size[1]}"]:
  """Projects a laser sweep to a depth map of the left colour camera.

      z (u, v, 1) = P2 [R0_rect (Tr_velo_to_cam [X; 1]); 1]

  (the object benchmark's devkit). Pixels are centred at integers; a pixel
  takes the nearest of its points, which may occlude the others.

  Points are in the laser's frame and depth is along the optical axis, both in
  metres; pixels without points are 0. `size` is the image size.
  """
  ones = np.ones((len(points), 1))
  homogeneous = np.concatenate([np.asarray(points, np.float64), ones], axis=1)
  camera = homogeneous @ calibration["Tr_velo_to_cam"].T
  camera = np.concatenate([camera @ calibration["R0_rect"].T, ones], axis=1)
  u, v, z = (camera @ calibration["P2"].T).T
  in_front = z > 0
  u, v, z = u[in_front] / z[in_front], v[in_front] / z[in_front], z[in_front]
  column, row = np.rint(u), np.rint(v)
  is_inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
  pixels = (row[is_inside].astype(int), column[is_inside].astype(int))
  depth = np.full(size, np.inf)
  np.minimum.at(depth, pixels, z[is_inside])
  return np.where(np.isfinite(depth), depth, 0).astype(np.float32)
