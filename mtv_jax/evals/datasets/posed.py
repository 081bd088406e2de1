"""Images with depth and camera pose: views, pairs, and lists of pairs.

Cameras are those of computer vision (x right, y down, z forward), poses take
world coordinates to the camera's, lengths are metres. A view is what NAVI's
protocol computes from an image (El Banani et al. 2024, Probe3D): a square
around the pixels with depth, and the 3D point of every fourth of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8

from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.examples import Digest, subsample
from mtv_jax.utils.errors import InputError, did_you_mean

CELL = 4  # pixels of a view to a cell of its grid of points


@dataclasses.dataclass(frozen=True)
class Frame:
  """An image as it is stored.

  Attributes:
    image: RGB.
    depth: metres along the optical axis, 0 where there is nothing to match.
    focal: in pixels of this image.
    centre: the principal point (x, y) from the image's middle, in pixels.
    pose: world to camera.
  """

  image: UInt8[np.ndarray, "h w 3"]
  depth: Float32[np.ndarray, "h w"]
  focal: float
  pose: Float64[np.ndarray, "4 4"]
  centre: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class View:
  """The square that is encoded, and the points behind its cells.

  Attributes:
    image: RGB.
    points: in the camera's frame, one for each cell of 4 x 4 pixels, behind
      the cell's upper left pixel; z is 0 where there is nothing to match.
    focal: in pixels of this image.
    pose: world to camera.
  """

  image: UInt8[np.ndarray, "s s 3"]
  points: Float32[np.ndarray, "c c 3"]
  focal: float
  pose: Float64[np.ndarray, "4 4"]

  @property
  def valid(self) -> Bool[np.ndarray, "c c"]:
    """Which cells have a point."""
    return self.points[..., 2] > 0


@dataclasses.dataclass(frozen=True)
class PosedFrames:
  """A data set of frames, in groups that see the same object.

  Attributes:
    name: what it is, for the protocol.
    layout: `navi`, `rgbd` or `scenes`.
    names: of the n frames; with their group, as paths are.
    groups: indices of the frames that may be paired with each other.
    poses: `[n, 4, 4]`, world to camera.
    read: a frame by its index; `size` is the side of its view, by which
      scenes are rendered.
    fingerprint: what tells a frame's files from others, such as their sizes.
    stored: length in pixels to which the shorter side is brought first, as the
      protocol's offline copy is; None for as it is.
    overlaps: whether two frames see enough of the same; None for always.
    about: what else the figures depend on.
  """

  name: str
  layout: str
  names: tuple[str, ...]
  groups: tuple[tuple[int, ...], ...]
  poses: Float64[np.ndarray, "n 4 4"]
  read: Callable[[int, int], Frame]
  fingerprint: Callable[[int], tuple[Any, ...]]
  stored: int | None
  overlaps: Callable[[int, int], bool] | None
  about: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two frames by their indices, and the angle between them in degrees."""

  first: int
  second: int
  angle: float


@dataclasses.dataclass(frozen=True)
class PairSample:
  """Pairs, and how many frames lack a partner."""

  pairs: tuple[Pair, ...]
  unpaired: int


def make_view(
  frame: Frame, *, size: int, stored: int | None = None
) -> View | None:
  """The square around what has depth, `size` x `size` pixels.

  1. The shorter side is brought to `stored` (image bicubic, antialiased; depth
     nearest), then to `size` (both nearest), and the middle square is cut out.
  2. Depth becomes points.
  3. The square around the pixels with depth is cut out (its last row and column
     excluded, moved inside where it would leave the image) and brought to
     `size`, nearest. Points are carried along, so they stay metric.

  "Nearest" in the last two is PyTorch's: the pixel at floor(i * old / new). It
  makes no new depths, so there is none below the least one to remove.

  Args:
    frame: what to look at.
    size: side of the view; 512 in the protocol.
    stored: 1024 in the protocol.

  Returns:
    None where no square holds two rows of depth.
  """
  short = min(frame.depth.shape)
  image, depth = _bring(frame, stored)
  rows, columns = (_middle(n, min(depth.shape), size) for n in depth.shape)
  image, depth = image[np.ix_(rows, columns)], depth[np.ix_(rows, columns)]
  points = np.argwhere(depth > 0)
  if not len(points):
    return None
  low, extent = points.min(axis=0).tolist(), np.ptp(points, axis=0).tolist()
  side = max(extent)
  if side < 1:
    return None
  y0, x0 = (_corner(*x, side, size) for x in zip(low, extent, strict=True))
  take = resizing.indices(side, size)
  rows, columns = y0 + take, x0 + take
  cell = slice(0, size // CELL * CELL, CELL)
  # Focal length and principal point follow the image's size.
  focal = frame.focal * size / short
  middle = size / 2 + np.asarray(frame.centre) * size / short
  z = depth[np.ix_(rows[cell], columns[cell])]
  x = (columns[cell] + 0.5 - middle[0])[None, :] / focal * z
  y = (rows[cell] + 0.5 - middle[1])[:, None] / focal * z
  return View(
    image=image[np.ix_(rows, columns)],
    points=np.stack([x, y, z], axis=-1).astype(np.float32),
    focal=focal * size / side,
    pose=frame.pose,
  )


def _bring(frame: Frame, stored: int | None):
  """Image and depth with a shorter side of `stored` pixels."""
  height, width = frame.depth.shape
  if stored is None or min(height, width) == stored:
    return frame.image, frame.depth
  tall, wide = (_scaled(n, min(height, width), stored) for n in (height, width))
  image = PIL.Image.fromarray(frame.image)
  image = np.asarray(image.resize((wide, tall), PIL.Image.Resampling.BICUBIC))
  rows = resizing.indices(height, tall, "nearest_exact")
  columns = resizing.indices(width, wide, "nearest_exact")
  return image, frame.depth[np.ix_(rows, columns)]


def _scaled(length: int, short: int, target: int) -> int:
  """A side's length when the shorter one becomes `target`."""
  return length * target // short


def _middle(length: int, short: int, size: int) -> Int[np.ndarray, " s"]:
  """Pixels of a side that the middle `size` of the resized image show."""
  long = _scaled(length, short, size)
  top = round((long - size) / 2)
  return resizing.indices(length, long)[top : top + size]


def _corner(low: int, extent: int, side: int, size: int) -> int:
  """Start of a square around `low .. low + extent`, inside the image."""
  spare = side - extent
  start = low - spare // 2
  if start < 0 or start + side > size:
    start = max(low - spare, 0)
  return start


def motion(
  first: Float64[np.ndarray, "4 4"], second: Float64[np.ndarray, "4 4"]
) -> Float64[np.ndarray, "4 4"]:
  """From the first camera's frame to the second's: `P_1 P_0^-1`."""
  return second @ np.linalg.inv(first)


def rotation_angle(
  rotation: Float[np.ndarray, "*n 3 3"],
) -> Float[np.ndarray, "*n"] | float:
  """`acos((tr R - 1) / 2)` in degrees, 0 to 180."""
  cosine = (np.trace(rotation, axis1=-2, axis2=-1) - 1) / 2
  return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def angles_between(
  poses: Float64[np.ndarray, "n 4 4"],
) -> Float64[np.ndarray, "n n"]:
  """The angle of `R_i R_j^T` for each two poses, in degrees."""
  flat = poses[:, :3, :3].reshape(len(poses), 9)
  # tr(R_i R_j^T) is the sum of the products of their entries.
  cosine = (flat @ flat.T - 1) / 2
  return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def draw_pairs(
  frames: PosedFrames,
  *,
  seed: int,
  stride: int = 1,
  count: int | None = None,
  max_angle: float | int = 120.0,
) -> PairSample:
  """Every `stride`-th frame with one other of its group.

  The other is drawn from those at an angle in (0, max_angle] that overlap. It
  depends on the seed, the frame's name and its group alone: neither the machine
  nor the rest of the data set changes it.

  Args:
    frames: the data set.
    seed: another seed gives other partners.
    stride: of the frames, group after group.
    count: how many frames, evenly spaced among those; all by default.
    max_angle: in degrees.

  Raises:
    InputError: for a group in which no frame has a partner.
  """
  chosen = [i for group in frames.groups for i in group][::stride]
  chosen = subsample(chosen, count)
  wanted, pairs = set(chosen), []
  for group in frames.groups:
    between = angles_between(frames.poses[list(group)])
    near = (between > 0) & (between <= max_angle)
    # Rounding must not make a frame its own partner.
    np.fill_diagonal(near, False)
    if not near.any():
      raise InputError(_no_pair(frames, group, between, max_angle))
    for i, row, degrees in zip(group, near, between, strict=True):
      if i in wanted:
        partners = np.flatnonzero(row)
        k = _partner(frames, i, [group[p] for p in partners], seed)
        if k is not None:
          j = partners[k]
          pairs.append(Pair(i, group[j], float(degrees[j])))
  if not pairs:
    raise InputError(
      f"{frames.name}: none of {len(chosen)} frames overlaps with another of "
      "its group"
    )
  return PairSample(tuple(pairs), len(chosen) - len(pairs))


def _partner(
  frames: PosedFrames, index: int, partners: Sequence[int], seed: int
) -> int | None:
  """Index of a random partner, drawn until one overlaps."""
  left = list(range(len(partners)))
  for attempt in range(len(partners)):
    text = f"{seed}/{frames.names[index]}/{attempt}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    k = left.pop(number % len(left))
    if frames.overlaps is None or frames.overlaps(index, partners[k]):
      return k
  return None


def _no_pair(frames, group, between, max_angle) -> str:
  names = [frames.names[i] for i in group]
  where = os.path.commonpath([os.path.dirname(n) for n in names])
  if len(group) < 2:
    why = f"it has {len(group)} frame"
  else:
    others = between[~np.eye(len(group), dtype=bool)]
    why = (
      f"its {len(group)} frames are {others.min():.1f} to {others.max():.1f} "
      "degrees apart"
    )
  return (
    f"{frames.name}: {where or names[0]} has no usable pair of views: {why}, "
    f"and a partner must be within (0, {max_angle:g}]. Is it unpacked in full?"
  )


def digest_of(frames: PosedFrames, pairs: Sequence[Pair]) -> str:
  """A hash of the pairs and of their files."""
  digest = Digest()
  for pair in pairs:
    for index in (pair.first, pair.second):
      digest.add(frames.names[index], *frames.fingerprint(index))
  return digest.hex()


def write_pairs(
  path: str | os.PathLike, frames: PosedFrames, pairs: Sequence[Pair]
) -> None:
  """Writes one `first second degrees` a line, as NAVI's own lists are."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    f"{frames.names[p.first]} {frames.names[p.second]} {p.angle:.4f}\n"
    for p in pairs
  ]
  # Atomically, as another process may read it at the same time.
  part = path.with_name(f"{path.name}.{os.getpid()}.part")
  part.write_text("".join(lines))
  part.replace(path)


def read_pairs(
  path: str | os.PathLike, frames: PosedFrames
) -> tuple[Pair, ...]:
  """Reads what `write_pairs` wrote, or a list of NAVI's.

  The angle is computed from the poses; the file's is for people.

  Raises:
    InputError: for a line of another form, or a frame that is not in the data.
  """
  index = {name: i for i, name in enumerate(frames.names)}
  pairs = []
  for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
    if not line.strip():
      continue
    fields = line.split()
    if len(fields) != 3:
      raise InputError(
        f"{path}, line {number}: expected 'first second degrees', got {line!r}"
      )
    for name in fields[:2]:
      if name not in index:
        raise InputError(
          f"{path}, line {number}: {frames.name} has no frame {name!r}. "
          f"{did_you_mean(name, frames.names[:1000])}"
        )
    i, j = (index[name] for name in fields[:2])
    turned = motion(frames.poses[i], frames.poses[j])
    pairs.append(Pair(i, j, float(rotation_angle(turned[:3, :3]))))
  if not pairs:
    raise InputError(f"{path} has no pairs")
  return tuple(pairs)
