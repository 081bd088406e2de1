"""RGB-D sequences with poses, in the 7-Scenes layout.

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
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from mtv_jax.config import foreign
from mtv_jax.evals.datasets.class_folders import list_folders
from mtv_jax.evals.datasets.files import (
  LabelledFile,
  read_channel,
  require_layout,
)
from mtv_jax.evals.datasets.posed import PosedFrames, motion, open_frames
from mtv_jax.utils.errors import InputError, MissingFileError

# Minimum fraction of a frame's points inside its partner's image. NAVI needs no
# minimum, as all its images show the object.
MIN_OVERLAP = 0.3
_POSES = "frame-*.pose.txt"
_KINECT = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
_STEP = 16  # pixels between the points that measure overlap


def matches(root: pathlib.Path) -> bool:
  """Whether a folder, or its first subfolder, contains frames with poses."""
  # Not recursive: ImageNet's folders contain 1.28 million files.
  folders = [root, *(root / name for name in list_folders(root)[:1])]
  return any(any(folder.glob(_POSES)) for folder in folders)


def has_frames(root: pathlib.Path) -> bool:
  """Whether a folder contains frames with poses, at any depth."""
  return next(root.rglob(_POSES), None) is not None


def open_posed(root: str | pathlib.Path) -> PosedFrames:
  """All frames under a folder with a finite pose, sorted by name."""
  root = require_layout(
    root,
    [f"**/frame-*.{part}" for part in ("pose.txt", "color.*", "depth.png")],
    what="a set of RGB-D sequences in the layout of 7-Scenes",
  )
  frames, intrinsics, poses, groups, untracked = [], [], [], [], 0
  for folder in sorted({path.parent for path in root.rglob(_POSES)}):
    start = len(frames)
    k = _read_intrinsics(folder, root)
    # Listed once: a sequence of 7-Scenes has 3,000 files.
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.glob(_POSES)):
      camera_to_world = _read_matrix(path, (4, 4))
      # 7-Scenes and ScanNet mark lost tracking like this.
      if not np.isfinite(camera_to_world).all():
        untracked += 1
        continue
      frames.append(_files(path, names))
      intrinsics.append(k)
      poses.append(_invert(camera_to_world, path))
    if len(frames) > start:
      groups.append(range(start, len(frames)))
  if not frames:
    raise InputError(f"{root}: none of its {untracked} poses is finite")

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
    read_depth=read_depth,
    camera=camera,
    overlaps=_overlap_fn(frames, intrinsics, poses),
    metadata={
      "dataset": "RGB-D",
      "sequences": len(groups),
      "frames_without_pose": untracked,
      "min_overlap": MIN_OVERLAP,
      "depth": "as stored, not registered to the image",
    },
  )


def _files(path: pathlib.Path, names: set[str]) -> LabelledFile:
  stem = path.name.removesuffix("pose.txt")
  colors = [f"{stem}color{suffix}" for suffix in (".png", ".jpg", ".jpeg")]
  colors = [name for name in colors if name in names]
  depth = f"{stem}depth.png"
  if not colors or depth not in names:
    raise MissingFileError(
      f"{path} has no {stem}color.png or .jpg, or no {depth}, beside it"
    )
  return LabelledFile(path.with_name(colors[0]), path.with_name(depth))


def _overlap_fn(
  frames: Sequence[LabelledFile],
  intrinsics: Sequence[np.ndarray],
  poses: Sequence[np.ndarray],
) -> Callable[[int, int], bool]:
  """Returns a function that tests if two frames overlap enough."""

  @functools.lru_cache(maxsize=64)
  def read_points(index: int) -> tuple[np.ndarray, tuple[int, int]]:
    depth, k = read_depth(frames[index].label), intrinsics[index]
    v, u = np.mgrid[: depth.shape[0] : _STEP, : depth.shape[1] : _STEP]
    z = depth[v, u]
    x = (u + 0.5 - k[0, 2]) / k[0, 0] * z
    y = (v + 0.5 - k[1, 2]) / k[1, 1] * z
    return np.stack([x, y, z])[:, z > 0], depth.shape

  def overlaps(first: int, second: int) -> bool:
    moved = motion(poses[first], poses[second])
    x, y, z = moved[:3, :3] @ read_points(first)[0] + moved[:3, 3:]
    k, (height, width) = intrinsics[second], read_points(second)[1]
    depth = np.maximum(z, 1e-9)
    u, v = k[0, 0] * x / depth + k[0, 2], k[1, 1] * y / depth + k[1, 2]
    inside = (z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return bool(inside.size and inside.mean() >= MIN_OVERLAP)

  return overlaps


def read_depth(path: pathlib.Path) -> Float32[np.ndarray, "h w"]:
  """Reads a 16-bit depth PNG in metres; unknown depth is 0."""
  value = read_channel(path, "I;16")
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
  return _KINECT


def _read_matrix(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
  try:
    values = np.array(foreign.read_text(path).split(), np.float64)
  except ValueError as error:
    raise InputError(f"{path}: {error}") from None
  if values.size != shape[0] * shape[1]:
    raise InputError(
      f"{path} has {values.size} numbers; expected {shape[0]} rows of "
      f"{shape[1]}"
    )
  return values.reshape(shape)


def _invert(
  camera_to_world: np.ndarray, path: pathlib.Path
) -> Float64[np.ndarray, "4 4"]:
  rotation = camera_to_world[:3, :3]
  if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01:
    raise InputError(f"{path}: its upper left 3 x 3 is not a rotation")
  return np.linalg.inv(camera_to_world)
