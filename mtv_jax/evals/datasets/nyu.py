"""NYU Depth V2 (Silberman et al. 2012): depth and 40 classes.

  LISTS     nyudepthv2_{train,test}_files_with_gt.txt or nyu_{train,test}.txt,
            lines "rgb depth focal", with the listed files; the layout of BTS,
            AdaBins, DINOv2 and DINOv3. 16-bit raw depth in mm
  MARIGOLD  {train,test}/SCENE/{rgb,depth,filled}_NNNN.png, 16 bits, in mm
  IDS       nyu_images/ID.jpg, nyu_depths/ID.png, {train,test}.txt: 8-bit
            filled depth, value / 25.5 in metres; nyu_labels40/ID.png: classes
  MAT       nyu_depth_v2_labeled.mat and splits.mat, as released
  TFDS      nyu_depth_v2: filled depth rounded to float16 (7.8 mm at 8 m)

Raw depth is the sensor's measurement; filled depth is inpainted. Results on
raw and filled depth are not comparable.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, import_extra

_LISTS = ("nyudepthv2_{split}_files_with_gt.txt", "nyu_{split}.txt")
# Roots of the lists' paths in the folders that BTS's scripts write.
_PREFIXES = ("", "sync", "official_splits/{split}")
_MAT = "nyu_depth_v2_labeled.mat"

# The 40 classes of Gupta et al. 2013 without the last, "otherprop": these files
# use its number for unlabelled pixels too.
_CLASSES = (
  "wall,floor,cabinet,bed,chair,sofa,table,door,window,bookshelf,picture,"
  "counter,blinds,desk,shelves,curtain,dresser,pillow,mirror,floor mat,clothes,"
  "ceiling,books,refrigerator,television,paper,towel,shower curtain,box,"
  "whiteboard,person,night stand,toilet,sink,lamp,bathtub,bag,other structure,"
  "other furniture"
)
CLASSES = tuple(_CLASSES.split(","))


def matches_depth(root: pathlib.Path) -> bool:
  """Whether a path looks like a layout with depth, complete or not."""
  if root.is_file():
    return root.suffix == ".mat"
  names = (_MAT, "nyu_images", "nyu_depths")
  return any((root / name).exists() for name in names) or any(
    files.find_list(root, _LISTS, split)
    or any(root.glob(f"{split}/*/rgb_*.png"))
    for split in ("train", "test")
  )


def matches_segmentation(root: pathlib.Path) -> bool:
  """Whether a folder looks like the layout with class maps."""
  return any((root / name).is_dir() for name in ("nyu_images", "nyu_labels40"))


def matches(root: pathlib.Path) -> bool:
  """Whether a path looks like NYUv2 with any labels."""
  return matches_depth(root) or matches_segmentation(root)


def open_depth(
  root: pathlib.Path, *, split: str, count: int | None, truth: str | None
) -> examples.DepthSet:
  """Opens a split, see `registry.open_depth`.

  `root` is a folder in one of the layouts, or the .mat file; `truth` is `raw`
  (default) or `filled` depth, for layouts with both.
  """
  if root.is_file() or (root / _MAT).is_file():
    return _open_mat(root, split, count, truth or "raw")
  listing = files.find_list(root, _LISTS, split)
  unit = 1e-3
  if listing is not None:
    _check_truth(truth, "raw", "lists")
    pairs, source = _list_files(listing, split), "raw, mm"
  elif (root / "nyu_images").is_dir() or (root / "nyu_depths").is_dir():
    _check_truth(truth, "filled", "nyu_depths/ID.png")
    pairs, unit = _list_numbered_files(root, split, "nyu_depths"), 1 / 25.5
    source = "filled, 8 bits: value / 25.5 m"
  else:
    pairs = _list_marigold_files(root, split, truth or "raw")
    source = f"{truth or 'raw'}, mm"
  return files.open_pairs(
    examples.DepthSet,
    pairs,
    read_label=lambda _, path: (files.read_channel(path) * unit).astype("f4"),
    count=count,
    kind="nyu",
    name=str(root),
    source=source,
  )


def _check_truth(truth: str | None, available: str, layout: str) -> None:
  if truth not in (None, available):
    raise InputError(
      f"truth={truth!r}: NYU's layout with {layout} has {available} depth "
      "only. The .mat file and Marigold's layout have both."
    )


def _list_files(path: pathlib.Path, split: str) -> list[files.LabelledFile]:
  rows = files.read_file_list(path)
  roots = [path.parent / p.format(split=split) for p in _PREFIXES]
  root = next((r for r in roots if (r / rows[0][0]).is_file()), path.parent)
  return [(root / image, root / depth) for image, depth in rows]


def _list_marigold_files(
  root: pathlib.Path, split: str, truth: str
) -> list[files.LabelledFile]:
  name = "filled" if truth == "filled" else "depth"
  files.require_layout(
    root,
    (f"{split}/*/rgb_*.png", f"{split}/*/{name}_*.png"),
    what="NYUv2's files with a list, its .mat file, or Marigold's layout",
  )
  return [
    (p, p.with_name(p.name.replace("rgb_", f"{name}_")))
    for p in sorted(root.glob(f"{split}/*/rgb_*.png"))
  ]


def _list_numbered_files(
  root: pathlib.Path, split: str, labels: str
) -> list[files.LabelledFile]:
  """The pairs of a split in the IDS layout."""
  files.require_layout(
    root,
    ("nyu_images/*.jpg", f"{labels}/*.png", f"{split}.txt"),
    what="NYUv2 by number",
  )
  return [
    (root / f"nyu_images/{i}.jpg", root / f"{labels}/{i}.png")
    for i in _read_ids(root / f"{split}.txt")
  ]


def _read_ids(path: pathlib.Path) -> list[int]:
  """0-based indices into the .mat file: the first word of each line."""
  lines = foreign.read_text(path).splitlines()
  words = [line.split()[0] for line in lines if line.strip()]
  invalid = [word for word in words if not word.isdecimal()]
  if invalid or not words:
    got = repr(invalid[0]) if invalid else "an empty file"
    raise InputError(f"{path}: expected one image number per line, got {got}")
  return [int(word) for word in words]


def _open_mat(
  path: pathlib.Path, split: str, count: int | None, truth: str
) -> examples.DepthSet:
  path = path if path.is_file() else path / _MAT
  ids = examples.subsample(_read_mat_split(path.parent, split), count)
  file = _open_hdf5(path)
  key = "depths" if truth == "filled" else "rawDepths"
  return _open_arrays(
    ids,
    # HDF5 reverses the axes of MATLAB's arrays: [n, channel, x, y].
    read_image=lambda i: np.ascontiguousarray(file["images"][i].T),
    read_depth=lambda i: np.ascontiguousarray(file[key][i].T, np.float32),
    name=str(path),
    source=f"{truth} ({key}), float32",
    hash_key=(path.name, path.stat().st_size, key),
  )


def _open_arrays(
  ids: Sequence[int], *, read_image, read_depth, hash_key: tuple, **fields: str
) -> examples.DepthSet:
  return examples.DepthSet(
    kind="nyu",
    images=examples.open_items(ids, read_image),
    maps=examples.open_items(ids, read_depth),
    digest=examples.hash_rows([(*hash_key, *ids)]),
    **fields,
  )


@functools.lru_cache(maxsize=4)
def _open_hdf5(path: pathlib.Path) -> Any:
  try:
    import h5py
  except ImportError as error:
    raise ImportError(
      f"{path} is a MATLAB v7.3 (HDF5) file, which h5py reads: pip install "
      "h5py. NYUv2's image files don't need it."
    ) from error
  return h5py.File(path, "r")


def _read_mat_split(root: pathlib.Path, split: str) -> list[int]:
  """0-based indices of a split's images."""
  if (root / "splits.mat").is_file():
    import scipy.io

    path, name = root / "splits.mat", f"{split}Ndxs"
    try:
      return [int(i) - 1 for i in np.ravel(scipy.io.loadmat(path)[name])]
    # SciPy's reader raises many error types for a corrupt file.
    except Exception as error:
      raise InputError(
        f"{path}: {type(error).__name__}: {error}; expected the array {name}"
      ) from None
  files.require_layout(
    root, (f"{split}.txt",), what="a folder with splits.mat or a list of ids"
  )
  return _read_ids(root / f"{split}.txt")


def open_tfds(
  config: Mapping[str, Any], *, split: str, count: int | None
) -> examples.DepthSet:
  """Opens `{type: "tfds", name: "nyu_depth_v2", data_dir: ...}`.

  It must be prepared as ArrayRecord, which is read without TensorFlow.
  """
  tfds = import_extra("tensorflow_datasets", "tfds")
  name, folder = config["name"], config.get("data_dir")
  fix = "Copy the prepared set to a folder, or use NYUv2's image files."
  path_lib.refuse_remote(folder or "", "data_dir", fix)
  records = tfds.data_source(
    name,
    split={"train": "train", "test": "validation"}[split],
    data_dir=folder,
  )
  ids = examples.subsample(range(len(records)), count)
  return _open_arrays(
    ids,
    read_image=lambda i: records[i]["image"],
    read_depth=lambda i: np.asarray(records[i]["depth"], np.float32),
    name=f"tfds {name}",
    source="filled, float16",
    hash_key=(name, split, len(records)),
  )


def open_segmentation(
  root: pathlib.Path, *, split: str, count: int | None
) -> examples.SegmentationSet:
  """Opens one split with class maps, see `CLASSES`."""
  return files.open_pairs(
    examples.SegmentationSet,
    _list_numbered_files(root, split, "nyu_labels40"),
    read_label=_read_classes,
    count=count,
    kind="nyu40",
    name=f"{root} {split}",
    classes=CLASSES,
    class_count=len(CLASSES),
  )


def _read_classes(_, path: pathlib.Path) -> np.ndarray:
  other, hint = len(CLASSES), "Classes are numbered from 0."
  values = files.read_class_map(path, largest=other, hint=hint)
  return np.where(values == other, examples.IGNORE, values).astype(np.uint8)
