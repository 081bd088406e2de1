"""Reader of KITTI's depth (Geiger et al. 2013; Uhrig et al. 2017).

  LISTS   kitti_eigen_{train,test}_files_with_gt.txt or
          kitti_eigen_{train,test}.txt, lines "rgb depth focal";
          raw_data/DATE/DRIVE/image_02/data/N.{png,jpg} and
          data_depth_annotated/{train,val}/DRIVE/proj_depth/groundtruth/...:
          depth of several sweeps, 16 bits, value / 256 in metres
  OBJECT  training/{image_2,velodyne,calib}: depth of one sweep, projected here

Of the 697 images that Eigen et al. (2014) test on, 652 have a map.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, Float64

from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.datasets.files import (
  LabelledFile,
  open_depth_files,
  read_file_list,
  read_png_values,
  require_layout,
)
from mtv_jax.utils.errors import InputError, MissingFileError

SUBSETS = ("all", "train", "val")
_LISTS = (
  "kitti_eigen_{split}_files_with_gt.txt",
  "eigen_{split}_files_with_gt.txt",
  "kitti_eigen_{split}.txt",
)
_SUFFIXES = (".png", ".jpg", ".jpeg")


def matches(root: pathlib.Path) -> bool:
  """Whether a folder looks like KITTI, with depth or without."""
  return has_depth(root) or (root / "training" / "image_2").is_dir()


def has_depth(root: pathlib.Path) -> bool:
  """Whether a folder looks like one of the layouts, complete or not."""
  names = [p.format(split=s) for p in _LISTS for s in ("train", "test")]
  names += ["data_depth_annotated", "raw_data", "training/velodyne"]
  return any((root / name).exists() for name in names)


def open_depth(
  root: pathlib.Path,
  *,
  split: str = "test",
  count: int | None = None,
  subset: str = "all",
) -> DepthSet:
  """Opens one split.

  Args:
    root: a folder of one of the layouts.
    split: `train` or `test`, the list that is read.
    count: how many images to use, evenly spaced; all by default.
    subset: of a list, all images, or those whose map is in the `train` or the
      `val` part of the annotated depth. MiDaS tests on `val`: 161 images.

  Raises:
    MissingFileError: for a layout with parts missing.
    InputError: for an unknown subset, or one without images.
  """
  listed = [root / name.format(split=split) for name in _LISTS]
  listed = [path for path in listed if path.is_file()]
  if listed:
    return _open_list(listed[0], count, subset)
  if not (root / "training").is_dir():
    require_layout(
      root,
      (
        _LISTS[0].format(split=split),
        "raw_data/*/*/image_02/data/*",
        "data_depth_annotated/*/*/proj_depth/groundtruth/image_02/*.png",
      ),
      what="KITTI's raw images and annotated depth with Eigen et al.'s list",
    )
  if split != "test":
    raise InputError(
      f"{root}: the object benchmark's frames have no {split} split of depth; "
      f"to train on KITTI give it {_LISTS[0].format(split=split)}"
    )
  return _open_object(root, count)


def _open_list(path: pathlib.Path, count: int | None, subset: str) -> DepthSet:
  if subset not in SUBSETS:
    raise InputError(f"subset={subset!r}; expected one of {SUBSETS}")
  rows = [row for row in read_file_list(path) if row[1] != "None"]
  root = path.parent
  maps = {row[1]: _map_path(root, row[1]) for row in rows}
  lost = [name for name, file in maps.items() if file is None]
  if lost:
    raise MissingFileError(
      f"{root}: {len(lost)} of {len(rows)} depth maps are missing, such as "
      f"{lost[0]}, under data_depth_annotated/train and .../val"
    )
  files = [
    LabelledFile(_image_path(root, row[0]), maps[row[1]]) for row in rows
  ]
  if subset != "all":
    files = [f for f in files if f.label.parts[-6] == subset]
  if not files:
    raise InputError(f"{path}: no image has a map in the subset {subset!r}")
  return open_depth_files(
    files,
    read_depth=lambda f: read_png_values(f.label).astype(np.float32) / 256,
    count=count,
    kind="kitti",
    name=str(root),
    source="annotated (several sweeps), 16 bits: value / 256 m",
  )


def _image_path(root: pathlib.Path, name: str) -> pathlib.Path:
  """The image of a line, which often is stored as JPEG."""
  paths = [
    (root / folder / name).with_suffix(suffix)
    for folder in ("raw_data", "")
    for suffix in _SUFFIXES
  ]
  return next((p for p in paths if p.is_file()), paths[0])


def _map_path(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The map of a line; the lists leave out which part it is in."""
  parts = ("train", "val")
  folders = [f"data_depth_annotated/{p}" for p in parts] + list(parts)
  paths = [root / folder / name for folder in folders]
  return next((p for p in paths if p.is_file()), None)


def _open_object(root: pathlib.Path, count: int | None) -> DepthSet:
  require_layout(
    root,
    (
      "training/image_2/*.png",
      "training/velodyne/*.bin",
      "training/calib/*.txt",
    ),
    what="KITTI's object benchmark",
  )
  folder = root / "training"
  return open_depth_files(
    [
      LabelledFile(p, folder / "velodyne" / f"{p.stem}.bin")
      for p in sorted((folder / "image_2").glob("*.png"))
    ],
    read_depth=_read_sweep,
    count=count,
    kind="kitti",
    name=str(root),
    source=(
      "one velodyne sweep projected by P2 R0_rect Tr_velo_to_cam, nearest "
      "point of a pixel"
    ),
  )


def _read_sweep(files: LabelledFile) -> np.ndarray:
  # Only the header is read for the size.
  with PIL.Image.open(files.image) as image:
    width, height = image.size
  points = np.fromfile(files.label, np.float32).reshape(-1, 4)[:, :3]
  folder = files.label.parents[1] / "calib"
  calibration = read_calibration(folder / f"{files.label.stem}.txt")
  return project_points(points, calibration, size=(height, width))


def read_calibration(
  path: pathlib.Path,
) -> dict[str, Float64[np.ndarray, "3 n"]]:
  """Matrices `[3, 3]` and `[3, 4]` of a calibration file, by name.

  Raises:
    MissingFileError: there is none.
    InputError: one that is needed is missing.
  """
  if not path.is_file():
    raise MissingFileError(f"{path}: no calibration of this frame")
  matrices = {}
  for line in path.read_text().splitlines():
    name, _, numbers = line.partition(":")
    values = np.array(numbers.split(), np.float64)
    if values.size in (9, 12):
      matrices[name] = values.reshape(3, -1)
  lost = {"P2", "R0_rect", "Tr_velo_to_cam"} - matrices.keys()
  if lost:
    raise InputError(f"{path} lacks {sorted(lost)}; it has {sorted(matrices)}")
  return matrices


def project_points(
  points: Float[np.ndarray, "n 3"],
  calibration: Mapping[str, Float[np.ndarray, "3 k"]],
  *,
  size: tuple[int, int],
) -> Float32[np.ndarray, "{size[0]} {size[1]}"]:
  """The depth map of a laser sweep in the left colour camera.

      z (u, v, 1) = P2 [R0_rect (Tr_velo_to_cam [X; 1]); 1]

  (the object benchmark's devkit). Pixels are centred at integers; of several
  points in one, the nearest counts, as the others may be hidden behind it.

  Args:
    points: metres, in the laser's frame.
    calibration: of `read_calibration`.
    size: rows and columns of the image.

  Returns:
    Metres along the optical axis, 0 where no point falls.
  """
  ones = np.ones((len(points), 1))
  homogeneous = np.concatenate([np.asarray(points, np.float64), ones], axis=1)
  camera = homogeneous @ calibration["Tr_velo_to_cam"].T
  camera = np.concatenate([camera @ calibration["R0_rect"].T, ones], axis=1)
  u, v, z = (camera @ calibration["P2"].T).T
  front = z > 0
  u, v, z = u[front] / z[front], v[front] / z[front], z[front]
  column, row = np.rint(u), np.rint(v)
  inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
  pixels = (row[inside].astype(int), column[inside].astype(int))
  depth = np.full(size, np.inf)
  np.minimum.at(depth, pixels, z[inside])
  return np.where(np.isfinite(depth), depth, 0).astype(np.float32)
