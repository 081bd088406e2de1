"""Reader of NAVI: images of objects with depth and pose (Jampani et al. 2023).

    ROOT/OBJECT/wild_set/{annotations.json, images/000.jpg, depth/000.png}
    ROOT/OBJECT/multiview_00_MODEL/...   (v1.0)
    ROOT/OBJECT/multiview-00-MODEL/...   (v1.5)

Annotations give the pose (a quaternion w, x, y, z and millimetres, world to
camera) and the focal length in pixels. Depth is a 16-bit PNG of inverse depth.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from mtv_jax.data import canvas
from mtv_jax.evals.datasets.files import (
  read_png_values,
  require_files,
  require_layout,
)
from mtv_jax.evals.datasets.posed import Frame, PosedFrames
from mtv_jax.utils.errors import InputError, MissingFileError, did_you_mean

SUBSETS = ("wild_set", "multiview")
# The offline copies that the protocol reads have this shorter side.
STORED = 1024
# Inverse depth 65535 is 10 / mm; in metres, depth is this over the value.
_SCALE = 65535 * 10 / 1000
_MULTIVIEW = re.compile(r"multiview[_-]")


def matches(root: pathlib.Path) -> bool:
  """Whether a folder holds objects in NAVI's layout."""
  return any(root.glob("*/wild_set")) or any(root.glob("*/multiview*"))


def open_posed(root: str | pathlib.Path, *, subset: str) -> PosedFrames:
  """The images of one kind of all objects, sorted by name.

  Objects without a multiview folder are left out, as in the published protocol,
  unless none has one. Images are turned as their EXIF says.

  Args:
    root: the folder of objects.
    subset: `wild_set` (the published figures: an object before many
      backgrounds) or `multiview` (each capture is a group).

  Raises:
    MissingFileError: for a part that is missing.
    InputError: for annotations of another form.
  """
  if subset not in SUBSETS:
    raise InputError(
      f"NAVI: subset={subset!r}. {did_you_mean(subset, SUBSETS)}"
    )
  pattern = "wild_set" if subset == "wild_set" else "multiview*"
  root = require_layout(
    root,
    [
      f"*/{pattern}/{name}"
      for name in ("annotations.json", "images/*.jpg", "depth/*.png")
    ],
    what="NAVI (github.com/google/navi, v1.0 or v1.5)",
  )
  objects = sorted(p for p in root.iterdir() if p.is_dir())
  whole = [p for p in objects if _captures(p)] or objects
  folders = [
    folder
    for p in whole
    for folder in ([p / "wild_set"] if subset == "wild_set" else _captures(p))
    # One of the 36 objects has no wild set.
    if folder.is_dir()
  ]
  frames, groups = [], []
  for folder in folders:
    rows = _annotated_images(folder)
    groups.append(tuple(range(len(frames), len(frames) + len(rows))))
    frames += rows
  left_out = [p.name for p in objects if p not in whole]
  images = [folder / "images" / row["filename"] for folder, row in frames]
  return PosedFrames(
    name=str(root),
    layout="navi",
    names=tuple(str(p.relative_to(root).as_posix()) for p in images),
    groups=tuple(groups),
    poses=np.stack([_pose(row, folder) for folder, row in frames]),
    read=lambda i, size: _read(*frames[i]),
    fingerprint=lambda i: (
      images[i].stat().st_size,
      _depth_file(*frames[i]).stat().st_size,
    ),
    stored=STORED,
    overlaps=None,
    about={
      "subset": subset,
      "objects": len({folder.parent for folder in folders}),
      "objects_left_out": [n for n in left_out if n != "custom_splits"],
    },
  )


def _captures(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.iterdir() if _MULTIVIEW.match(p.name))


def _annotated_images(
  folder: pathlib.Path,
) -> list[tuple[pathlib.Path, dict[str, Any]]]:
  """The annotations of a folder whose files are there, sorted by file name."""
  path = folder / "annotations.json"
  if not path.is_file():
    raise MissingFileError(
      f"{folder} has no annotations.json. Is the object unpacked in full?"
    )
  try:
    rows = sorted(json.loads(path.read_bytes()), key=lambda r: r["filename"])
    for row in rows:
      camera = row["camera"]
      _ = camera["q"], camera["t"], camera["focal_length"]
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path}: expected a list of {{filename, camera: {{q, t, focal_length}}}}"
      f"; {type(error).__name__}: {error}"
    ) from None
  files = [folder / "images" / row["filename"] for row in rows]
  files += [_depth_file(folder, row) for row in rows]
  require_files(files, folder)
  if not rows:
    raise InputError(f"{path} names no image: this object has no usable view")
  return [(folder, row) for row in rows]


def _depth_file(folder: pathlib.Path, row: dict[str, Any]) -> pathlib.Path:
  return folder / "depth" / f"{pathlib.PurePath(row['filename']).stem}.png"


def _read(folder: pathlib.Path, row: dict[str, Any]) -> Frame:
  path = folder / "images" / row["filename"]
  image = canvas.decode(path.read_bytes(), key=str(path))
  depth = read_depth(_depth_file(folder, row))
  if depth.shape != image.shape[:2]:
    raise InputError(
      f"{path} is {image.shape[0]}x{image.shape[1]} (rotated as its EXIF says) "
      f"and its depth {depth.shape[0]}x{depth.shape[1]}; they must be equal"
    )
  return Frame(
    image=image,
    depth=depth,
    focal=float(row["camera"]["focal_length"]),
    pose=_pose(row, folder),
  )


def read_depth(path: pathlib.Path) -> Float32[np.ndarray, "h w"]:
  """Metres of a depth PNG, 0 for the background.

  Raises:
    InputError: for a file that is not 16-bit grey.
  """
  value = read_png_values(path, np.uint16)
  metres = np.float32(_SCALE) / np.maximum(value, 1)
  return np.where(value > 0, metres, 0).astype(np.float32)


def _pose(
  row: dict[str, Any], folder: pathlib.Path
) -> Float64[np.ndarray, "4 4"]:
  q, t = (np.asarray(row["camera"][key], np.float64) for key in ("q", "t"))
  if q.shape != (4,) or t.shape != (3,) or not np.linalg.norm(q) > 0:
    raise InputError(
      f"{folder}: the camera of {row['filename']} has q={q.tolist()} and "
      f"t={t.tolist()}; expected a quaternion and a translation"
    )
  pose = np.eye(4)
  pose[:3, :3] = rotation_of(q)
  pose[:3, 3] = t / 1000
  return pose


def rotation_of(q: Float[np.ndarray, "4"]) -> Float64[np.ndarray, "3 3"]:
  """The rotation of a quaternion (w, x, y, z) of any length."""
  w, x, y, z = np.asarray(q, np.float64) / np.linalg.norm(q)
  return np.array(
    [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
  )
