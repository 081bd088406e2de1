"""NYU Depth V2 (Silberman et al. 2012), in the layouts it is passed around in.

  LISTS     nyudepthv2_{train,test}_files_with_gt.txt or nyu_{train,test}.txt,
            lines "rgb depth focal", with the files they name: the one of BTS,
            AdaBins, DINOv2 and DINOv3. Raw depth in mm, 16 bits
  MARIGOLD  {train,test}/SCENE/{rgb,depth,filled}_NNNN.png, in mm, 16 bits
  IDS       nyu_images/ID.jpg, nyu_depths/ID.png, {train,test}.txt: filled
            depth of 8 bits, value / 25.5 in metres
  MAT       nyu_depth_v2_labeled.mat and splits.mat, as released
  TFDS      nyu_depth_v2: filled depth rounded to float16 (7.8 mm at 8 m)

Raw depth is what the sensor saw, filled depth has no holes; figures on one are
not comparable with figures on the other.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import (
  depth as depth_data,
)
from mtv_jax.evals.datasets import (
  layout,
)
from mtv_jax.evals.datasets import (
  registry as datasets,
)
from mtv_jax.evals.datasets.depth import DepthMaps, DepthSet, Files

TRUTHS = ("raw", "filled")
_LISTS = ("nyudepthv2_{split}_files_with_gt.txt", "nyu_{split}.txt")
# Where the lists' paths begin in the folders that BTS's scripts make.
_PREFIXES = ("", "sync", "official_splits/{split}")
_MAT = "nyu_depth_v2_labeled.mat"
_METRES = {"mm": 1e-3, "25.5": 1 / 25.5}


def is_here(root: pathlib.Path) -> bool:
  """Whether a path looks like one of the layouts, complete or not."""
  if root.is_file():
    return root.suffix == ".mat"
  names = [p.format(split=s) for p in _LISTS for s in depth_data.SPLITS]
  names += [_MAT, "nyu_images", "nyu_depths"]
  if any((root / name).exists() for name in names):
    return True
  return any(
    any(root.glob(f"{split}/*/rgb_*.png")) for split in depth_data.SPLITS
  )


def read(
  root: pathlib.Path,
  *,
  split: str,
  count: int | None = None,
  truth: str | None = None,
) -> DepthSet:
  """Opens one split.

  Args:
    root: a folder of one of the layouts, or the .mat file.
    split: `train` or `test`.
    count: how many images to use, evenly spaced; all by default.
    truth: `raw` or `filled` depth, where there is a choice; `raw` by default.

  Raises:
    FileNotFoundError: for a layout with parts missing.
    ValueError: for a kind of depth that the layout does not have.
  """
  if root.is_file() or (root / _MAT).is_file():
    return _read_mat(root, split, count, truth or "raw")
  listed = [root / name.format(split=split) for name in _LISTS]
  listed = [path for path in listed if path.is_file()]
  if listed:
    _only(truth, "raw", "lists")
    files, unit, source = _listed(listed[0], split), "mm", "raw, mm"
  elif (root / "nyu_images").is_dir() or (root / "nyu_depths").is_dir():
    _only(truth, "filled", "nyu_depths/ID.png")
    files, unit = _by_id(root, split), "25.5"
    source = "filled, 8 bits: value / 25.5 m"
  else:
    files, unit = _marigold(root, split, truth or "raw"), "mm"
    source = f"{truth or 'raw'}, mm"
  return depth_data.of_files(
    files,
    read_depth=lambda files: _read_depth(files.depth, unit),
    kind="nyu",
    name=str(root),
    source=source,
    count=count,
  )


def _only(asked: str | None, there: str, what: str) -> None:
  if asked not in (None, there):
    raise ValueError(
      f"truth={asked!r}: NYU's layout with {what} has {there} depth only. The "
      ".mat file and Marigold's layout have both."
    )


def _read_depth(path: pathlib.Path, unit: str) -> np.ndarray:
  return (depth_data.read_grey(path) * _METRES[unit]).astype(np.float32)


def _listed(path: pathlib.Path, split: str) -> list[Files]:
  """The pairs of a list, whose paths may begin with a slash."""
  rows = depth_data.read_list(path)
  roots = [path.parent / p.format(split=split) for p in _PREFIXES]
  there = [r for r in roots if (r / rows[0][0]).is_file()]
  root = there[0] if there else path.parent
  return [Files(root / image, root / depth) for image, depth in rows]


def _marigold(root: pathlib.Path, split: str, truth: str) -> list[Files]:
  name = "filled" if truth == "filled" else "depth"
  layout.require(
    root,
    (f"{split}/*/rgb_*.png", f"{split}/*/{name}_*.png"),
    what="NYUv2's files with a list, its .mat file, or Marigold's layout",
  )
  images = sorted(root.glob(f"{split}/*/rgb_*.png"))
  return [
    Files(p, p.with_name(p.name.replace("rgb_", f"{name}_"))) for p in images
  ]


def _by_id(root: pathlib.Path, split: str) -> list[Files]:
  layout.require(
    root,
    ("nyu_images/*.jpg", "nyu_depths/*.png", f"{split}.txt"),
    what="NYUv2 by number",
  )
  ids = _ids(root / f"{split}.txt")
  return [
    Files(root / f"nyu_images/{i}.jpg", root / f"nyu_depths/{i}.png")
    for i in ids
  ]


def _ids(path: pathlib.Path) -> list[int]:
  """0-based numbers in the .mat file: the first word of each line."""
  return [int(line.split()[0]) for line in path.read_text().splitlines()]


def _read_mat(
  path: pathlib.Path, split: str, count: int | None, truth: str
) -> DepthSet:
  path = path if path.is_file() else path / _MAT
  ids = examples.spaced(_mat_split(path.parent, split), count)
  file = _open_hdf5(path)
  key = "depths" if truth == "filled" else "rawDepths"

  # HDF5 gives MATLAB's arrays with their axes reversed: [n, channel, x, y].
  def image(i: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(file["images"][ids[i]]).T)

  def depth(i: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(file[key][ids[i]], np.float32).T)

  digest = datasets.Digest()
  digest.add(path.name, path.stat().st_size, key, *ids)
  return DepthSet(
    kind="nyu",
    name=str(path),
    images=datasets.Images(image, len(ids)),
    depths=DepthMaps(depth, len(ids)),
    source=f"{truth} ({key}), float32",
    digest=digest.hex(),
  )


@functools.lru_cache(maxsize=4)
def _open_hdf5(path: pathlib.Path) -> Any:
  try:
    import h5py
  except ImportError as error:
    raise ImportError(
      f"{path} is a MATLAB v7.3 (HDF5) file, which needs h5py to read: pip "
      "install h5py. NYUv2 as image files needs nothing."
    ) from error
  return h5py.File(path, "r")


def _mat_split(root: pathlib.Path, split: str) -> list[int]:
  """0-based numbers of a split's images."""
  if (root / "splits.mat").is_file():
    import scipy.io

    key = f"{split}Ndxs"
    found = scipy.io.loadmat(root / "splits.mat")
    return [int(i) - 1 for i in np.ravel(found[key])]
  layout.require(
    root, (f"{split}.txt",), what="the official splits.mat, or ids in a text"
  )
  return _ids(root / f"{split}.txt")


def read_tfds(
  config: Mapping[str, Any], *, split: str, count: int | None = None
) -> DepthSet:
  """`{type: "tfds", name: "nyu_depth_v2", data_dir: ...}`.

  Prepared as ArrayRecord, which is read without TensorFlow.

  Raises:
    ImportError: if tensorflow_datasets is not installed.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
      "type='tfds' needs TensorFlow Datasets: pip install 'mtv_jax[tfds]'."
    ) from error
  name = config["name"]
  source: Sequence[Any] = tfds.data_source(
    name,
    split={"train": "train", "test": "validation"}[split],
    data_dir=config.get("data_dir"),
  )
  ids = examples.spaced(range(len(source)), count)
  digest = datasets.Digest()
  digest.add(name, split, len(source), *ids)
  return DepthSet(
    kind="nyu",
    name=f"tfds {name}",
    images=datasets.Images(
      lambda i: np.asarray(source[ids[i]]["image"], np.uint8), len(ids)
    ),
    depths=DepthMaps(
      lambda i: np.asarray(source[ids[i]]["depth"], np.float32), len(ids)
    ),
    source="filled, float16",
    digest=digest.hex(),
  )
