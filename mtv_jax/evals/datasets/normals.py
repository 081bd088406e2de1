"""Surface normals: Probe3D's files of NYUv2, or plane fits to depth.

  PROBE3D   nyuv2_snorm_all.pkl (also in nyuv2/), which Probe3D's
            create_nyu_pkl.py writes: images, raw depth and the normals of
            Ladicky et al. 2014. Training images come from GeoNet's
            nyuv2_geonet/*.mat (or nyu_geonet/; Qi et al. 2018) beside it or
            beside its folder; without them, the pickle's 795 are used

For all other data, normals are computed from depth, see `from_depth`. Results
on published and computed normals are not comparable.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.config import foreign
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError

_PICKLES = ("nyuv2_snorm_all.pkl", "nyuv2/nyuv2_snorm_all.pkl")
_GEONET = ("nyuv2_geonet", "nyu_geonet")
# Positions of GeoNet's sorted files that Probe3D leaves out.
_BAD_GEONET = (6919, 21181)
# Added to GeoNet's images, which are stored with twice the mean subtracted.
_GEONET_MEAN = 2 * np.float32([122.175, 116.169, 103.508])
_MAX_DEPTH = 10.0  # metres; farther pixels are not evaluated

# fx, fy, cx, cy of NYUv2's colour camera, in pixels of 640 x 480.
_NYU_CAMERA = (518.857901, 519.469611, 325.582449, 253.736166)
# Side of the fitted windows, for depth with sensor noise.
_NYU_WINDOW = 9
# Standard deviation of inverse depth about its plane, relative to its mean,
# above which a window is taken to contain an edge.
_MAX_RESIDUAL = 0.02


def find_pickle(root: pathlib.Path) -> pathlib.Path | None:
  """Probe3D's file in a folder, or the file itself."""
  if root.is_file():
    return root if root.name == _PICKLES[0] else None
  return files.find_list(root, _PICKLES)


def open_probe3d(
  root: pathlib.Path, *, split: str, count: int | None
) -> examples.NormalSet:
  """A split of Probe3D's files; the whole pickle is read into memory."""
  path = find_pickle(root)
  geonet = [p / name for p in path.parents[:2] for name in _GEONET]
  geonet = [folder for folder in geonet if any(folder.glob("*.mat"))]
  if split == "train" and geonet:
    path, source = geonet[0], "Qi et al. 2018 (GeoNet)"
    items = [
      file
      for i, file in enumerate(sorted(path.glob("*.mat")))
      if i not in _BAD_GEONET
    ]
    read = _read_geonet
  else:
    arrays, source = _read_pickle(path), "Ladicky et al. 2014"
    items = [int(i) for i in arrays[f"{split}_indices"]]

    def read(i: int):
      image, normals = (arrays[k][i] for k in ("images", "snorms"))
      image = np.ascontiguousarray(image.transpose(1, 2, 0))
      return image, normals.transpose(1, 2, 0), arrays["depths"][i]

  def read_normals(item):
    _, normals, depth = read(item)
    valid = (depth > 0) & (depth <= _MAX_DEPTH)
    return np.where(valid[..., None], normals, np.nan).astype(np.float32)

  if not items:
    raise InputError(f"{path} has no {split} images")
  items = examples.subsample(items, count)
  return examples.NormalSet.from_records(
    items,
    read=lambda item: read(item)[0],
    hash_key=lambda item: (path.name, getattr(item, "name", item)),
    prefix=files.file_sizes(items if path.is_dir() else [path]),
    maps=examples.open_items(items, read_normals),
    kind="nyu",
    name=str(path),
    source=source,
  )


@functools.lru_cache(maxsize=8)
def _read_geonet(file: pathlib.Path) -> tuple[np.ndarray, ...]:
  """Image, normals and depth, each 480 x 640."""
  import scipy.io

  content = scipy.io.loadmat(file)
  image, *maps = (content[k][:480, :640] for k in ("img", "norm", "depth"))
  return (image + _GEONET_MEAN).astype(np.uint8), *maps


@functools.lru_cache(maxsize=1)
def _read_pickle(path: pathlib.Path) -> dict[str, Any]:
  names = ("images", "depths", "snorms", "train_indices", "test_indices")
  expected = f"the file of Probe3D's create_nyu_pkl.py with {', '.join(names)}"
  arrays = foreign.read_pickle(path, expected=expected)
  if not (isinstance(arrays, dict) and arrays.keys() >= {*names}):
    raise InputError(f"{path}: expected {expected}")
  sizes = {(len(x), *x.shape[-2:]) for x in map(arrays.get, names[:3])}
  if len(sizes) > 1:
    raise InputError(f"{path}: images and maps differ in size: {sorted(sizes)}")
  return arrays


def from_depth_set(data: examples.DepthSet) -> examples.NormalSet:
  """Normals computed from NYUv2's depth."""

  def read(i: int) -> np.ndarray:
    depth = data.maps[i]
    camera = tuple(depth.shape[1] / 640 * value for value in _NYU_CAMERA)
    return from_depth(depth, camera, window=_NYU_WINDOW)

  fields = {name: getattr(data, name) for name in ("kind", "name", "images")}
  side = _NYU_WINDOW
  return examples.NormalSet(
    **fields,
    maps=examples.open_items(range(len(data.maps)), read),
    digest=data.digest,
    source=f"planes of {side} x {side} pixels of depth ({data.source})",
  )


def from_depth(
  depth: Float[np.ndarray, "h w"],
  camera: tuple[float, float, float, float],
  *,
  window: int,
) -> Float32[np.ndarray, "h w 3"]:
  """Normals that face the camera: x right, y down, z forward.

  A plane a X + b Y + c Z = 1 has the inverse depth a x + b y + c at the
  ray (x, y, 1), which is fitted by least squares to the valid pixels (depth
  above 0) of a window. Pixels without depth or with an edge in their window
  are NaN.

  Args:
    depth: metres; 0 is unknown.
    camera: fx, fy, cx, cy in pixels, counted from the first pixel's centre.
    window: odd side of the window in pixels.
  """
  fx, fy, cx, cy = camera
  valid = (depth > 0) & np.isfinite(depth)
  w = np.divide(1, depth, where=valid, out=np.zeros(depth.shape))
  y, x = np.mgrid[: depth.shape[0], : depth.shape[1]].astype(float)
  x, y = (x - cx) / fx, (y - cy) / fy

  def window_sum(values: np.ndarray) -> np.ndarray:
    options = dict(normalize=False, borderType=cv2.BORDER_CONSTANT)
    return cv2.boxFilter(valid * values, -1, (window, window), **options)

  count = np.maximum(window_sum(np.ones_like(w)), 1)
  mx, my, mw = (window_sum(v) / count for v in (x, y, w))
  xx, xy, xw, yy, yw, ww = (
    window_sum(u * v) / count - mean_u * mean_v
    for (u, mean_u), (v, mean_v) in itertools.combinations_with_replacement(
      ((x, mx), (y, my), (w, mw)), 2
    )
  )
  det = xx * yy - xy**2
  # Pixels on a line don't define a plane.
  has_plane = det > 1e-3 * (xx + yy) ** 2
  det = np.where(has_plane, det, 1)
  a, b = (yy * xw - xy * yw) / det, (xx * yw - xy * xw) / det
  is_flat = ww - a * xw - b * yw < (_MAX_RESIDUAL * mw) ** 2
  plane = np.stack([a, b, mw - a * mx - b * my], axis=-1)
  length = np.linalg.norm(plane, axis=-1, keepdims=True)
  has_normal = (valid & has_plane & is_flat)[..., None] & (length > 0)
  normals = np.divide(
    -plane, length, where=has_normal, out=np.full_like(plane, np.nan)
  )
  return normals.astype(np.float32)
