"""Surface normals: Probe3D's files of NYUv2, or plane fits to depth.

  PROBE3D   nyuv2_snorm_all.pkl (also in nyuv2/), which Probe3D's
            create_nyu_pkl.py writes: images, raw depth and the normals of
            Ladicky et al. 2014. Training images come from GeoNet's
            nyuv2_geonet/*.mat (or nyu_geonet/; Qi et al. 2018) beside it or
            beside its folder; without them, from the pickle's 795

All else has normals computed from depth, see `from_depth`. Figures of published
and of computed normals are not comparable.
"""

from __future__ import annotations

import functools
import pathlib
import pickle
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError

_PICKLES = ("nyuv2_snorm_all.pkl", "nyuv2/nyuv2_snorm_all.pkl")
_GEONET = ("nyuv2_geonet", "nyu_geonet")
# Positions of GeoNet's sorted files that Probe3D leaves out.
_BAD_GEONET = (6919, 21181)
# Added to GeoNet's images, which are stored minus twice the mean.
_GEONET_MEAN = 2 * np.float32([122.175, 116.169, 103.508])
_MAX_DEPTH = 10.0  # metres; farther pixels are not evaluated

# fx, fy, cx, cy of NYUv2's colour camera, in pixels of 640 x 480.
_NYU_CAMERA = (518.857901, 519.469611, 325.582449, 253.736166)
# Side of the fitted windows, for depth with a sensor's noise.
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
  folders = [p / name for p in path.parents[:2] for name in _GEONET]
  found = [folder for folder in folders if folder.is_dir()]
  if split == "train" and found:
    return _open_geonet(found[0], count)
  stored = _read_pickle(path)
  images, depths, normals = (stored[k] for k in ("images", "depths", "snorms"))
  return _make_set(
    examples.subsample([int(i) for i in stored[f"{split}_indices"]], count),
    image=lambda i: np.ascontiguousarray(images[i].transpose(1, 2, 0)),
    normal=lambda i: _mask(normals[i].transpose(1, 2, 0), depths[i]),
    hashed=(path.name, path.stat().st_size),
    name=str(path),
    source="Ladicky et al. 2014",
  )


def _open_geonet(root: pathlib.Path, count: int | None) -> examples.NormalSet:
  found = [
    path
    for i, path in enumerate(sorted(root.glob("*.mat")))
    if i not in _BAD_GEONET
  ]
  if not found:
    raise InputError(f"{root} has no *.mat files; expected GeoNet's")

  def image(path: pathlib.Path) -> np.ndarray:
    pixels = _read_mat(path)["img"][:480, :640] + _GEONET_MEAN
    return pixels.astype(np.uint8)

  def normal(path: pathlib.Path) -> np.ndarray:
    fields = _read_mat(path)
    return _mask(*(fields[k][:480, :640] for k in ("norm", "depth")))

  return _make_set(
    examples.subsample(found, count),
    image=image,
    normal=normal,
    hashed=("geonet", *files.file_sizes(found[:1])),
    name=str(root),
    source="Qi et al. 2018 (GeoNet)",
  )


def _make_set(items, *, image, normal, hashed, **fields) -> examples.NormalSet:
  return examples.NormalSet(
    kind="nyu",
    images=examples.open_items(items, image),
    maps=examples.open_items(items, normal),
    digest=examples.hash_rows([(*hashed, *items)]),
    **fields,
  )


def _mask(normals: np.ndarray, depth: np.ndarray) -> np.ndarray:
  """Normals of pixels with a depth of at most 10 m; NaN elsewhere."""
  valid = (depth > 0) & (depth <= _MAX_DEPTH)
  return np.where(valid[..., None], normals, np.nan).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _read_mat(path: pathlib.Path) -> dict[str, np.ndarray]:
  import scipy.io

  return scipy.io.loadmat(path)


class _ArrayUnpickler(pickle.Unpickler):
  """Reads arrays, numbers and text; refuses code."""

  def find_class(self, module: str, name: str) -> Any:
    is_numpy = module.partition(".")[0] == "numpy" and name in (
      "ndarray",
      "dtype",
      "scalar",
      "_reconstruct",
      "_frombuffer",
    )
    if is_numpy or (module, name) == ("_codecs", "encode"):
      return super().find_class(module, name)
    raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")


@functools.lru_cache(maxsize=1)
def _read_pickle(path: pathlib.Path) -> dict[str, Any]:
  try:
    with path.open("rb") as file:
      stored = _ArrayUnpickler(file).load()
    names = ("images", "depths", "snorms", "train_indices", "test_indices")
    return {name: stored[name] for name in names}
  # Unpickling raises many error types for a damaged file.
  except Exception as error:
    raise InputError(
      f"{path}: {type(error).__name__}: {error}; expected the file that "
      "Probe3D's create_nyu_pkl.py writes"
    ) from None


def from_depth_set(data: examples.DepthSet) -> examples.NormalSet:
  """Normals computed from NYUv2's depth."""

  def read(i: int) -> np.ndarray:
    depth = data.maps[i]
    scale = depth.shape[1] / 640
    camera = tuple(scale * value for value in _NYU_CAMERA)
    return from_depth(depth, camera, window=_NYU_WINDOW)

  return examples.NormalSet(
    kind=data.kind,
    name=data.name,
    images=data.images,
    maps=examples.open_items(range(len(data.maps)), read),
    digest=data.digest,
    source=f"planes of {_NYU_WINDOW} x {_NYU_WINDOW} pixels of depth "
    f"({data.source})",
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
  y, x = (np.mgrid[: depth.shape[0], : depth.shape[1]].T - (cx, cy)[::-1]).T
  x, y = x / fx, y / fy
  weight = valid.astype(np.float64)

  def mean(values: np.ndarray) -> np.ndarray:
    kwargs = dict(normalize=False, borderType=cv2.BORDER_CONSTANT)
    total = cv2.boxFilter(weight * values, -1, (window, window), **kwargs)
    return total / count

  count = 1.0
  count = np.maximum(mean(np.ones_like(w)), 1)
  mx, my, mw = mean(x), mean(y), mean(w)

  def covariance(u, v, mean_u, mean_v):
    return mean(u * v) - mean_u * mean_v

  xx, xy = covariance(x, x, mx, mx), covariance(x, y, mx, my)
  yy, ww = covariance(y, y, my, my), covariance(w, w, mw, mw)
  xw, yw = covariance(x, w, mx, mw), covariance(y, w, my, mw)
  det = xx * yy - xy**2
  # Three pixels on a line don't define a plane.
  valid &= (count >= 3) & (det > 1e-3 * (xx + yy) ** 2)
  det = np.where(valid, det, 1)
  a, b = (yy * xw - xy * yw) / det, (xx * yw - xy * xw) / det
  residual = ww - a * xw - b * yw
  valid &= residual < (_MAX_RESIDUAL * mw) ** 2
  plane = np.stack([a, b, mw - a * mx - b * my], axis=-1)
  length = np.linalg.norm(plane, axis=-1, keepdims=True)
  normals = -plane / np.where(valid[..., None], length, 1)
  return np.where(valid[..., None], normals, np.nan).astype(np.float32)
