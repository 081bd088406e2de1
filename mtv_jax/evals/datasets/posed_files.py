"""Readers of images with depth and pose: NAVI and RGB-D sequences.

NAVI, images of objects (Jampani et al. 2023):

    ROOT/OBJECT/wild_set/{annotations.json, images/000.jpg, depth/000.png}
    ROOT/OBJECT/multiview_00_MODEL/...   (v1.0)
    ROOT/OBJECT/multiview-00-MODEL/...   (v1.5)

Annotations have the world-to-camera pose (quaternion w, x, y, z; translation in
millimetres) and the focal length in pixels. Depth is a 16-bit PNG of inverse
depth.

RGB-D sequences, in the 7-Scenes layout:

    ROOT/**/frame-000000.{color.png|color.jpg, depth.png, pose.txt}
    ROOT/**/camera-intrinsics.txt    (optional: 3 x 3, in pixels)

Depth is a 16-bit PNG in millimetres; 0 and 65535 mean unknown. Poses are 4 x 4,
camera to world, in metres. Default intrinsics are 7-Scenes': focal length 585
pixels, principal point (320, 240) (Shotton et al. 2013). Every folder is a
sequence; frames are paired within it.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from mtv_jax.config import foreign
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.evals.datasets import files
from mtv_jax.evals.datasets.class_folders import list_folders
from mtv_jax.evals.datasets.posed import PosedFrames, open_frames, relative_pose
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice

SUBSETS = ("wild_set", "multiview")
# Inverse depth 65535 is 10 / mm, so metres are _INVERSE_DEPTH_SCALE / value.
_INVERSE_DEPTH_SCALE = 65535 * 10 / 1000
_MULTIVIEW = re.compile(r"multiview[_-]")

# Minimum fraction of a frame's points inside its partner's image. NAVI needs no
# minimum, as all its images show the object.
MIN_OVERLAP = 0.3
POSES = "frame-*.pose.txt"
_KINECT_INTRINSICS = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
_STRIDE = 16  # pixels between the points that measure overlap


def matches_navi(root: pathlib.Path) -> bool:
  """Whether a folder contains objects in NAVI's layout."""
  return any(root.glob("*/wild_set")) or any(root.glob("*/multiview*"))


def open_navi(root: pathlib.Path, *, subset: str) -> PosedFrames:
  """All objects' images of one subset, sorted by name.

  Drops objects without a multiview folder, as published, unless all lack one.
  Images are rotated by their EXIF. `subset` is `wild_set` (published: objects
  in front of many backgrounds) or `multiview` (each capture is a group).
  """
  check_choice("NAVI: subset", subset, SUBSETS)
  pattern = "wild_set" if subset == "wild_set" else "multiview*"
  parts = ("annotations.json", "images/*.jpg", "depth/*.png")
  what = "NAVI (github.com/google/navi, v1.0 or v1.5)"
  files.require_layout(root, [f"*/{pattern}/{p}" for p in parts], what=what)
  objects = sorted(p for p in root.iterdir() if p.is_dir())
  captured_objects = [p for p in objects if _captures(p)] or objects
  folders = [
    folder
    for p in captured_objects
    for folder in ([p / "wild_set"] if subset == "wild_set" else _captures(p))
    # One of the 36 objects lacks a wild set.
    if folder.is_dir()
  ]
  pairs, cameras, poses, groups = [], [], [], []
  for folder in folders:
    rows = _read_annotations(folder)
    groups.append(range(len(pairs), len(pairs) + len(rows)))
    pairs += [_navi_paths(folder, row) for row in rows]
    cameras += [(float(row["camera"]["focal_length"]), (0, 0)) for row in rows]
    poses += [_parse_navi_pose(row, folder) for row in rows]
  left_out = {p.name for p in objects if p not in captured_objects} - {
    "custom_splits"
  }
  return open_frames(
    root,
    pairs,
    layout="navi",
    groups=groups,
    poses=np.stack(poses),
    read_depth=_read_inverse_depth,
    camera=lambda i, shape: cameras[i],
    overlaps=None,
    metadata={
      "dataset": "NAVI",
      "subset": subset,
      "objects": len({folder.parent for folder in folders}),
      "objects_left_out": sorted(left_out),
    },
  )


def _captures(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.iterdir() if _MULTIVIEW.match(p.name))


def _navi_paths(
  folder: pathlib.Path, row: dict[str, Any]
) -> files.LabelledFile:
  image = folder / "images" / row["filename"]
  return image, folder / "depth" / f"{image.stem}.png"


def _read_annotations(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Annotations of a folder, sorted by file name; checks that files exist."""
  path = folder / "annotations.json"
  if not path.is_file():
    raise MissingFileError(
      f"{folder} has no annotations.json. Is the object unpacked in full?"
    )
  content = foreign.read_untrusted_json(path)
  try:
    rows = sorted(content, key=lambda r: r["filename"])
    for row in rows:
      foreign.resolve_name(folder / "images", row["filename"], where=path)
      camera = row["camera"]
      for name in ("q", "t", "focal_length"):
        if not np.isfinite(np.asarray(camera[name], np.float64)).all():
          raise ValueError(f"{name} is {camera[name]}")
      float(camera["focal_length"])
  except InputError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{path}: expected a list of {{filename, camera: {{q, t, focal_length}}}}"
      f"; {type(error).__name__}: {error}"
    ) from None
  pairs = [_navi_paths(folder, row) for row in rows]
  files.require_files([path for pair in pairs for path in pair], folder)
  if not rows:
    raise InputError(f"{path} lists no image: this object has no usable view")
  return rows


def _read_inverse_depth(path: pathlib.Path) -> np.ndarray:
  """Depth in metres from inverse depth; background is 0."""
  value = files.read_channel(path, "I;16")
  metres = np.float32(_INVERSE_DEPTH_SCALE) / np.maximum(value, 1)
  return np.where(value > 0, metres, 0).astype(np.float32)


def _parse_navi_pose(row: dict[str, Any], folder: pathlib.Path) -> np.ndarray:
  q, t = (np.asarray(row["camera"][key], np.float64) for key in ("q", "t"))
  if q.shape != (4,) or t.shape != (3,) or not np.linalg.norm(q) > 0:
    raise InputError(
      f"{folder}: the camera of {row['filename']} has q={q.tolist()} and "
      f"t={t.tolist()}; expected a quaternion and a translation"
    )
  pose = np.eye(4)
  pose[:3, :3] = rotation_matrix(q)
  pose[:3, 3] = t / 1000
  return pose


def rotation_matrix(q: Float[np.ndarray, "4"]) -> Float64[np.ndarray, "3 3"]:
  """Rotation matrix of a quaternion (w, x, y, z) of any norm."""
  w, x, y, z = np.asarray(q, np.float64) / np.linalg.norm(q)
  return np.array(
    [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
  )


def matches_rgbd(root: pathlib.Path) -> bool:
  """Whether a folder, or its first subfolder, contains frames with poses."""
  # Not recursive: ImageNet's folders contain 1.28 million files.
  folders = [root, *(root / name for name in list_folders(root)[:1])]
  return any(any(folder.glob(POSES)) for folder in folders)


def open_rgbd(root: pathlib.Path) -> PosedFrames:
  """All frames with a finite pose under a folder, sorted by name."""
  files.require_layout(
    root,
    [f"**/frame-*.{part}" for part in ("pose.txt", "color.*", "depth.png")],
    what="a set of RGB-D sequences in the layout of 7-Scenes",
  )
  frames, intrinsics, poses, groups, num_untracked = [], [], [], [], 0
  for folder in sorted({path.parent for path in root.rglob(POSES)}):
    start = len(frames)
    k = _read_intrinsics(folder, root)
    # Listed once: a sequence of 7-Scenes has 3,000 files.
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.glob(POSES)):
      camera_to_world = _read_matrix(path, (4, 4))
      # 7-Scenes and ScanNet mark lost tracking like this.
      if not np.isfinite(camera_to_world).all():
        num_untracked += 1
        continue
      rotation = camera_to_world[:3, :3]
      if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01:
        raise InputError(f"{path}: its upper left 3 x 3 is not a rotation")
      frames.append(_find_rgbd_files(path, names))
      intrinsics.append(k)
      poses.append(np.linalg.inv(camera_to_world))
    if len(frames) > start:
      groups.append(range(start, len(frames)))
  if not frames:
    raise InputError(f"{root}: none of its {num_untracked} poses is finite")

  def camera(i: int, shape: tuple[int, int]):
    k, (height, width) = intrinsics[i], shape
    centre = (float(k[0, 2]) - width / 2, float(k[1, 2]) - height / 2)
    return float(k[0, 0] + k[1, 1]) / 2, centre

  return open_frames(
    root,
    frames,
    layout="rgbd",
    groups=groups,
    poses=np.stack(poses),
    read_depth=_read_depth_in_metres,
    camera=camera,
    overlaps=_make_overlap_fn(frames, intrinsics, poses),
    metadata={
      "dataset": "RGB-D",
      "sequences": len(groups),
      "frames_without_pose": num_untracked,
      "min_overlap": MIN_OVERLAP,
      "depth": "as stored, not registered to the image",
    },
  )


def _find_rgbd_files(path: pathlib.Path, names: set[str]) -> files.LabelledFile:
  stem = path.name.removesuffix("pose.txt")
  suffixes = dict.fromkeys((".png", *IMAGE_SUFFIXES))
  colors = [f"{stem}color{suffix}" for suffix in suffixes]
  colors = [name for name in colors if name in names]
  depth = f"{stem}depth.png"
  if not colors or depth not in names:
    raise MissingFileError(
      f"{path} has no {stem}color.png or .jpg, or no {depth}, beside it"
    )
  return path.with_name(colors[0]), path.with_name(depth)


def _make_overlap_fn(
  frames: Sequence[files.LabelledFile],
  intrinsics: Sequence[np.ndarray],
  poses: Sequence[np.ndarray],
) -> Callable[[int, int], bool]:
  """Returns a function that tests if two frames overlap enough."""

  @functools.lru_cache(maxsize=64)
  def read_points(index: int) -> tuple[np.ndarray, tuple[int, int]]:
    depth, k = _read_depth_in_metres(frames[index][1]), intrinsics[index]
    v, u = np.mgrid[: depth.shape[0] : _STRIDE, : depth.shape[1] : _STRIDE]
    z = depth[v, u]
    x = (u + 0.5 - k[0, 2]) / k[0, 0] * z
    y = (v + 0.5 - k[1, 2]) / k[1, 1] * z
    return np.stack([x, y, z])[:, z > 0], depth.shape

  def overlaps(first: int, second: int) -> bool:
    pose = relative_pose(poses[first], poses[second])
    x, y, z = pose[:3, :3] @ read_points(first)[0] + pose[:3, 3:]
    k, (height, width) = intrinsics[second], read_points(second)[1]
    depth = np.maximum(z, 1e-9)
    u, v = k[0, 0] * x / depth + k[0, 2], k[1, 1] * y / depth + k[1, 2]
    is_inside = (z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return bool(is_inside.size and is_inside.mean() >= MIN_OVERLAP)

  return overlaps


def _read_depth_in_metres(path: pathlib.Path) -> np.ndarray:
  """Depth in metres from millimetres; unknown depth is 0."""
  value = files.read_channel(path, "I;16")
  return np.where(value < 65535, value, 0).astype(np.float32) / 1000


def _read_intrinsics(folder: pathlib.Path, root: pathlib.Path) -> np.ndarray:
  """Reads intrinsics from the folder, or its nearest parent up to the root."""
  for parent in (folder, *folder.parents):
    path = parent / "camera-intrinsics.txt"
    if path.is_file():
      k = _read_matrix(path, (3, 3))
      if not 0.98 * k[0, 0] <= k[1, 1] <= 1.02 * k[0, 0]:
        raise InputError(
          f"{path}: focal lengths of {k[0, 0]:g} and {k[1, 1]:g} pixels; "
          "expected square pixels, as a view has one focal length"
        )
      return k
    if parent == root:
      break
  return _KINECT_INTRINSICS


def _read_matrix(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
  try:
    values = np.array(foreign.read_text(path).split(), np.float64)
  except ValueError as error:
    raise InputError(f"{path}: {error}") from None
  if values.size != shape[0] * shape[1]:
    raise InputError(
      f"{path}: {values.size} numbers; expected {shape[0]} rows of {shape[1]}"
    )
  return values.reshape(shape)
