"""NAVI: images of objects with depth and pose (Jampani et al. 2023).

    ROOT/OBJECT/wild_set/{annotations.json, images/000.jpg, depth/000.png}
    ROOT/OBJECT/multiview_00_MODEL/...   (v1.0)
    ROOT/OBJECT/multiview-00-MODEL/...   (v1.5)

Annotations have the world-to-camera pose (quaternion w, x, y, z; translation in
millimetres) and the focal length in pixels. Depth is a 16-bit PNG of inverse
depth.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from mtv_jax.config import foreign
from mtv_jax.evals.datasets import files
from mtv_jax.evals.datasets.files import LabelledFile
from mtv_jax.evals.datasets.posed import PosedFrames, open_frames
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice

SUBSETS = ("wild_set", "multiview")
# Inverse depth 65535 is 10 / mm, so depth in metres is _SCALE / value.
_SCALE = 65535 * 10 / 1000
_MULTIVIEW = re.compile(r"multiview[_-]")


def matches(root: pathlib.Path) -> bool:
  """Whether a folder contains objects in NAVI's layout."""
  return any(root.glob("*/wild_set")) or any(root.glob("*/multiview*"))


def open_posed(root: str | pathlib.Path, *, subset: str) -> PosedFrames:
  """All objects' images of one subset, sorted by name.

  Drops objects without a multiview folder, as published, unless all lack one.
  Images are rotated by their EXIF. `subset` is `wild_set` (published: objects
  in front of many backgrounds) or `multiview` (each capture is a group).
  """
  check_choice("NAVI: subset", subset, SUBSETS)
  pattern = "wild_set" if subset == "wild_set" else "multiview*"
  root = files.require_layout(
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
    # One of the 36 objects lacks a wild set.
    if folder.is_dir()
  ]
  pairs, cameras, poses, groups = [], [], [], []
  for folder in folders:
    rows = _read_annotations(folder)
    groups.append(range(len(pairs), len(pairs) + len(rows)))
    pairs += [_files(folder, row) for row in rows]
    cameras += [(float(row["camera"]["focal_length"]), (0, 0)) for row in rows]
    poses += [_pose(row, folder) for row in rows]
  left_out = {p.name for p in objects if p not in whole} - {"custom_splits"}
  return open_frames(
    root,
    pairs,
    layout="navi",
    groups=groups,
    poses=np.stack(poses),
    read_depth=read_depth,
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


def _files(folder: pathlib.Path, row: dict[str, Any]) -> LabelledFile:
  image = folder / "images" / row["filename"]
  return LabelledFile(image, folder / "depth" / f"{image.stem}.png")


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
  pairs = [_files(folder, row) for row in rows]
  files.require_files([path for pair in pairs for path in pair], folder)
  if not rows:
    raise InputError(f"{path} lists no image: this object has no usable view")
  return rows


def read_depth(path: pathlib.Path) -> Float32[np.ndarray, "h w"]:
  """Reads a 16-bit depth PNG in metres; background is 0."""
  value = files.read_channel(path, "I;16")
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
  """Rotation matrix of a quaternion (w, x, y, z) of any norm."""
  w, x, y, z = np.asarray(q, np.float64) / np.linalg.norm(q)
  return np.array(
    [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
  )
