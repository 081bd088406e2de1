"""Images with depth and camera pose: views, pairs, and pair lists.

Cameras use the OpenCV convention (x right, y down, z forward); poses map world
to camera coordinates; lengths are metres. A view follows NAVI's protocol in
Probe3D (El Banani et al. 2024): a square crop around the pixels with depth, and
a 3D point for every fourth pixel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Float32, Float64, UInt8

from mtv_jax.config import foreign
from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.examples import hash_rows, open_items, subsample
from mtv_jax.evals.datasets.files import LabelledFile, file_sizes
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError, did_you_mean

CELL_SIZE = 4  # pixels of a view per cell of its point grid
Pose = Float64[np.ndarray, "4 4"]  # world to camera


@dataclasses.dataclass(frozen=True)
class Frame:
  """An RGB image at its stored size, with depth and camera.

  Depth is in metres along the optical axis; 0 marks pixels to ignore.
  """

  image: UInt8[np.ndarray, "h w 3"]
  depth: Float32[np.ndarray, "h w"]
  focal: float  # in pixels of this image
  pose: Pose
  # Principal point (x, y) relative to the image centre, in pixels.
  centre: tuple[float | int, float | int] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class PosedView:
  """The encoded square, and the 3D points of its cells.

  Points are in camera coordinates, at the upper left pixel of each 4 x 4 cell;
  z = 0 marks cells to ignore.
  """

  image: UInt8[np.ndarray, "s s 3"]
  points: Float32[np.ndarray, "c c 3"]
  focal: float  # in pixels of this image
  pose: Pose

  @property
  def valid(self) -> Bool[np.ndarray, "c c"]:
    """Mask of cells with a point."""
    return self.points[..., 2] > 0


@dataclasses.dataclass(frozen=True)
class PosedFrames:
  """A data set of frames, grouped by object."""

  name: str  # for the protocol
  layout: str  # `navi`, `rgbd` or `scenes`
  names: tuple[str, ...]  # path-like names of n frames, with the group
  groups: tuple[tuple[int, ...], ...]  # frames that may be paired
  poses: Float64[np.ndarray, "n 4 4"]  # world to camera
  read: Callable[[int, int], Frame]  # by index and, for scenes, view side
  # Identifies a frame's files, for example by size.
  fingerprint: Callable[[int], tuple[Any, ...]]
  # Shorter side in pixels that frames are resized to first, as in the
  # protocol's offline copies; None for no resizing.
  stored: int | None
  # Whether two frames share enough points; None if they always do.
  overlaps: Callable[[int, int], bool] | None
  metadata: Mapping[str, Any]  # further protocol entries


def open_frames(
  root: pathlib.Path,
  files: Sequence[LabelledFile],
  *,
  groups: Sequence[Sequence[int]],
  read_depth: Callable[[pathlib.Path], np.ndarray],
  camera: Callable[[int, tuple[int, int]], tuple[float, tuple]],
  **fields: Any,
) -> PosedFrames:
  """Opens image files and depth files as a data set of frames."""
  images = open_items([image for image, _ in files])

  def read(i: int, size: int) -> Frame:
    image, depth = images[i], read_depth(files[i][1])
    if depth.shape != image.shape[:2]:
      raise InputError(
        f"{files[i][0]} is {image.shape[0]}x{image.shape[1]} (rotated by its "
        f"EXIF), but its depth is {depth.shape[0]}x{depth.shape[1]}; expected "
        "equal sizes"
      )
    focal, centre = camera(i, depth.shape)
    return Frame(image, depth, focal, fields["poses"][i], centre)

  return PosedFrames(
    name=str(root),
    names=tuple(image.relative_to(root).as_posix() for image, _ in files),
    groups=tuple(map(tuple, groups)),
    read=read,
    fingerprint=lambda i: file_sizes(files[i]),
    stored=1024,
    **fields,
  )


class Pair(NamedTuple):
  """Indices of two frames, and the angle between them in degrees."""

  first: int
  second: int
  angle: float


class PairSample(NamedTuple):
  """Pairs, and the number of frames without a partner."""

  pairs: tuple[Pair, ...]
  unpaired: int


def make_view(
  frame: Frame, *, size: int, stored: int | None = None
) -> PosedView | None:
  """Square crop around the pixels with depth, `size` x `size` pixels.

  1. Resize the shorter side to `stored` (image bilinear, antialiased: Pillow's
     mode 2, as in Probe3D; depth nearest), then to `size` (both nearest), and
     center crop.
  2. Unproject depth to points.
  3. Crop the square around the pixels with depth (excluding its last row and
     column, moved inside the image) and resize to `size`, nearest. Points stay
     metric.

  Nearest resizing to `size` is PyTorch's: the pixel at floor(i * old / new).

  Returns None if the center crop has depth at fewer than two pixels. Published:
  `size` 512, `stored` 1024.
  """
  shorter_side = min(frame.depth.shape)
  image, depth = _resize_shorter_side(frame, stored)
  rows, columns = (_crop_axis(n, min(depth.shape), size) for n in depth.shape)
  image, depth = image[np.ix_(rows, columns)], depth[np.ix_(rows, columns)]
  points = np.argwhere(depth > 0)
  if not len(points):
    return None
  low, extent = points.min(axis=0).tolist(), np.ptp(points, axis=0).tolist()
  side = max(extent)
  if side < 1:
    return None
  y0, x0 = (_fit_square(*x, side, size) for x in zip(low, extent, strict=True))
  source_indices = resizing.indices(side, size)
  rows, columns = y0 + source_indices, x0 + source_indices
  cell = slice(0, size // CELL_SIZE * CELL_SIZE, CELL_SIZE)
  # Focal length and principal point scale with the image.
  focal = frame.focal * size / shorter_side
  principal_point = size / 2 + np.asarray(frame.centre) * size / shorter_side
  z = depth[np.ix_(rows[cell], columns[cell])]
  x = (columns[cell] + 0.5 - principal_point[0])[None, :] / focal * z
  y = (rows[cell] + 0.5 - principal_point[1])[:, None] / focal * z
  return PosedView(
    image=image[np.ix_(rows, columns)],
    points=np.stack([x, y, z], axis=-1).astype(np.float32),
    focal=focal * size / side,
    pose=frame.pose,
  )


def _resize_shorter_side(
  frame: Frame, size: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Resizes image and depth to a shorter side of `size` pixels."""
  height, width = frame.depth.shape
  shorter_side = min(height, width)
  if size is None or shorter_side == size:
    return frame.image, frame.depth
  tall, wide = (n * size // shorter_side for n in (height, width))
  image = PIL.Image.fromarray(frame.image)
  image = np.asarray(image.resize((wide, tall), PIL.Image.Resampling.BILINEAR))
  rows = resizing.indices(height, tall, "nearest_exact")
  columns = resizing.indices(width, wide, "nearest_exact")
  return image, frame.depth[np.ix_(rows, columns)]


def _crop_axis(length: int, shorter_side: int, size: int) -> np.ndarray:
  """Source indices along an axis, for resizing and then a center crop."""
  resized_length = length * size // shorter_side
  start = round((resized_length - size) / 2)
  return resizing.indices(length, resized_length)[start : start + size]


def _fit_square(low: int, extent: int, side: int, size: int) -> int:
  """Start of a square around `low .. low + extent`, inside the image."""
  spare = side - extent
  start = low - spare // 2
  if start < 0 or start + side > size:
    start = max(low - spare, 0)
  return start


def relative_pose(first: Pose, second: Pose) -> Pose:
  """Transform from first to second camera coordinates: `P_1 P_0^-1`."""
  return second @ np.linalg.inv(first)


def rotation_angle(rotation: Float[np.ndarray, "*n 3 3"]) -> Any:
  """`acos((tr R - 1) / 2)` in degrees, 0 to 180."""
  return _trace_angle(np.trace(rotation, axis1=-2, axis2=-1))


def _trace_angle(trace):
  return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1.0, 1.0)))


def angles_between(poses: Float64[np.ndarray, "n 4 4"]) -> np.ndarray:
  """Angle of `R_i R_j^T` for all pairs of poses, in degrees, `[n, n]`."""
  flat = poses[:, :3, :3].reshape(len(poses), 9)
  # tr(R_i R_j^T) is the dot product of their entries.
  return _trace_angle(flat @ flat.T)


def draw_pairs(
  frames: PosedFrames,
  *,
  seed: int,
  stride: int = 1,
  count: int | None = None,
  max_angle: float | int = 120.0,
) -> PairSample:
  """Pairs every `stride`-th frame with a random partner of its group.

  Partners must overlap, at an angle in (0, max_angle]. The draw depends only on
  the seed, the frame's name and its group, not on the machine or on the rest of
  the data set.
  """
  frame_indices = [i for group in frames.groups for i in group][::stride]
  frame_indices = subsample(frame_indices, count)
  first_frames, pairs = set(frame_indices), []
  for group in frames.groups:
    between = angles_between(frames.poses[list(group)])
    is_near = (between > 0) & (between <= max_angle)
    # Rounding could make a frame its own partner.
    np.fill_diagonal(is_near, False)
    if not is_near.any():
      raise InputError(_describe_unpaired(frames, group, between, max_angle))
    for i, row, degrees in zip(group, is_near, between, strict=True):
      if i in first_frames:
        angles = {group[p]: float(degrees[p]) for p in np.flatnonzero(row)}
        j = _draw_partner(frames, i, [*angles], seed)
        if j is not None:
          pairs.append(Pair(i, j, angles[j]))
  if not pairs:
    raise InputError(
      f"{frames.name}: none of {len(frame_indices)} frames overlaps with "
      "another frame of its group"
    )
  return PairSample(tuple(pairs), len(frame_indices) - len(pairs))


def _draw_partner(
  frames: PosedFrames, index: int, partners: list[int], seed: int
) -> int | None:
  """Draws partners until one overlaps."""
  for attempt in range(len(partners)):
    text = f"{seed}/{frames.names[index]}/{attempt}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    partner = partners.pop(number % len(partners))
    if frames.overlaps is None or frames.overlaps(index, partner):
      return partner
  return None


def _describe_unpaired(frames, group, between, max_angle) -> str:
  names = [frames.names[i] for i in group]
  folder = os.path.commonpath([os.path.dirname(n) for n in names]) or names[0]
  angles = between[~np.eye(len(group), dtype=bool)]
  degrees = ""
  if angles.size:
    degrees = f" {angles.min():.1f} to {angles.max():.1f} degrees apart"
  return (
    f"{frames.name}: {folder} has no usable pair of views: it has {len(group)} "
    f"frames{degrees}; expected some within (0, {max_angle:g}]. Is it unpacked "
    "in full?"
  )


def hash_pairs(frames: PosedFrames, pairs: Sequence[Pair]) -> str:
  """Hash of the pairs and their files."""
  return hash_rows(
    (frames.names[i], *frames.fingerprint(i))
    for pair in pairs
    for i in (pair.first, pair.second)
  )


def write_pairs(
  path: str | os.PathLike, frames: PosedFrames, pairs: Sequence[Pair]
) -> None:
  """Writes lines of `first second degrees`, the format of NAVI's lists."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    f"{frames.names[p.first]} {frames.names[p.second]} {p.angle:.4f}\n"
    for p in pairs
  ]
  # Another process may read it concurrently.
  atomic.write(path, "".join(lines).encode())


def read_pairs(
  path: str | os.PathLike, frames: PosedFrames
) -> tuple[Pair, ...]:
  """Reads a pair list, NAVI's or from `write_pairs`.

  Angles are computed from the poses; angles in the file are ignored.
  """
  index = {name: i for i, name in enumerate(frames.names)}
  pairs = []
  lines = foreign.read_text(pathlib.Path(path)).splitlines()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    fields, where = line.split(), f"{path}, line {number}"
    if len(fields) != 3:
      raise InputError(
        f"{where}: expected 'first second degrees', got {line!r}"
      )
    for name in fields[:2]:
      if name not in index:
        raise InputError(
          f"{where}: {frames.name} has no frame {name!r}. "
          f"{did_you_mean(name, frames.names[:1000])}"
        )
    i, j = (index[name] for name in fields[:2])
    relative = relative_pose(frames.poses[i], frames.poses[j])
    pairs.append(Pair(i, j, float(rotation_angle(relative[:3, :3]))))
  if not pairs:
    raise InputError(f"{path} has no pairs")
  return tuple(pairs)
