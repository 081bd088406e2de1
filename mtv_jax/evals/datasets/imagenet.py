"""ImageNet's validation set, ReaL, and ObjectNet.

ROOT/ILSVRC2012_val_00000001.JPEG ...  flat images, also in ROOT/val/
ROOT/ILSVRC2012_img_val.tar            or the tar
ROOT/ILSVRC2012_devkit_t12.tar.gz      devkit, as archive or folder

ROOT/images/FOLDER/*.png               ObjectNet (Barbu et al. 2019): image
ROOT/mappings/*                        folders and four mappings

real.json                              ReaL (Beyer et al. 2020): a list of
                                       labels for each validation image

Labels are indices into the sorted 1000 WordNet ids, the order of the prompts
and of PyTorch, not the devkit's `ILSVRC2012_ID`. ImageNet-V2, -A, -R and
-Sketch are class folders, see `class_folders.py`.
"""

from __future__ import annotations

import functools
import io
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data import canvas
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.sources import tar_scan
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError

CLASS_COUNT = 1000

TRAIN_TAR = "ILSVRC2012_img_train.tar"
_TAR = "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$")
_EXPECTED = (
  f"expected ILSVRC2012_val_*.JPEG or {_TAR} beside {_DEVKIT}/data/{{meta.mat,"
  f"{_TRUTH}}} or {_DEVKIT}.tar.gz"
)


def find_validation(path: pathlib.Path) -> pathlib.Path | None:
  """The tar or the folder of flat validation images."""
  if path.is_file():
    return path if path.name == _TAR else None
  for folder in (path, path / "val"):
    if folder.is_dir() and any(folder.glob("ILSVRC2012_val_*.JPEG")):
      return folder
  return path / _TAR if (path / _TAR).is_file() else None


def reject_train_tar(path: pathlib.Path) -> None:
  """Raises InputError for the tar of training images, which contains tars."""
  if path.name == TRAIN_TAR and path.is_file():
    raise InputError(
      f"{path} contains a tar for each class, which must be unpacked: "
      f"mkdir train && tar -xf {TRAIN_TAR} -C train && cd train && "
      "for f in *.tar; do mkdir ${f%.tar} && tar -xf $f -C ${f%.tar} && rm $f; "
      "done. Then pass the folder that contains train/ and val/."
    )


def open_validation(
  path: pathlib.Path,
  *,
  count: int | None,
  real_labels: str | os.PathLike | None,
) -> examples.ClassificationSet:
  """Flat validation images with the devkit's labels."""
  source = find_validation(path)
  ids, names, truth = _read_devkit(source)
  if source.is_file():
    # One host reads the headers.
    (images,) = shared_map(_find_members, [source])
    read, size = functools.partial(files.read_span, source), lambda s: s.size
  else:
    images = {p.name: p for p in source.iterdir()}
    read, size = _read_file, lambda p: p.stat().st_size
  file_names = [f"ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(len(truth))]
  missing = [name for name in file_names if name not in images]
  if missing:
    raise MissingFileError(
      f"{source}: {len(missing)} of {len(file_names)} validation images are "
      f"missing, such as {missing[0]}. Is it unpacked in full?"
    )
  rows = examples.subsample([*zip(file_names, truth, strict=True)], count)
  file_names = [name for name, _ in rows]
  return examples.ClassificationSet.from_records(
    rows,
    read=lambda row: canvas.decode(read(images[row[0]]), key=row[0]),
    hash_key=lambda row: (row[0], size(images[row[0]]), ids[row[1]]),
    name=str(source),
    labels=np.asarray([label for _, label in rows], np.int32),
    classes=names,
    ids=ids,
    accepted=None
    if real_labels is None
    else read_real(real_labels, file_names),
  )


def _find_members(tar: pathlib.Path) -> dict[str, tar_scan.Span]:
  members = tar_scan.members(path_lib.fetch(tar))
  return {name.rpartition("/")[2]: span for name, span in members}


def _read_file(path: pathlib.Path) -> bytes:
  return path_lib.fetch(path).read_bytes()


def _read_devkit(images: pathlib.Path) -> tuple[tuple, tuple, list[int]]:
  """Sorted WordNet ids, first names, and the label of each image."""
  reader = _find_devkit(images)
  meta, truth = reader("meta.mat"), reader(_TRUTH)
  synsets = _read_synsets(meta, f"{_DEVKIT}/data/meta.mat")
  if not synsets or not truth.split():
    raise InputError(
      f"{_DEVKIT}/data: meta.mat has {len(synsets)} classes and {_TRUTH} "
      f"{len(truth.split())} numbers; expected both as released"
    )
  classes = sorted(synsets.values())
  label_of = {number: classes.index(row) for number, row in synsets.items()}
  try:
    labels = [label_of[int(line)] for line in truth.split()]
  except (KeyError, ValueError) as error:
    raise InputError(
      f"{_DEVKIT}/data/{_TRUTH}: {error} is not an ILSVRC2012_ID of meta.mat; "
      "expected one number per line"
    ) from None
  return *zip(*classes, strict=True), labels


def _find_devkit(images: pathlib.Path) -> Callable[[str], bytes]:
  """Returns a function that reads a file of the devkit's data/."""
  for folder in (images, *images.parents[:2]):
    data = folder / _DEVKIT / "data"
    if data.is_dir():
      files.require_layout(data, ["meta.mat", _TRUTH], what="ImageNet's devkit")
      return lambda name, data=data: (data / name).read_bytes()
    archive = folder / f"{_DEVKIT}.tar.gz"
    if archive.is_file():
      return lambda name, archive=archive: _read_archived(archive, name)
  raise MissingFileError(
    f"{images} has ImageNet's validation images but no devkit with their "
    f"labels; {_EXPECTED} (image-net.org)"
  )


def _read_archived(archive: pathlib.Path, name: str) -> bytes:
  try:
    with tarfile.open(archive) as tar:
      return tar.extractfile(f"{_DEVKIT}/data/{name}").read()
  # AttributeError: a folder instead of a file.
  except (
    KeyError, AttributeError, tarfile.TarError, OSError, EOFError,
  ) as error:  # fmt: skip
    raise InputError(
      f"{archive} can't be read as ImageNet's devkit: {error}"
    ) from None


def _read_synsets(meta: bytes, name: str) -> dict[int, tuple[str, str]]:
  """WordNet id and first name of leaf synsets, by ILSVRC2012_ID."""
  import scipy.io

  try:
    rows = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    leaves = np.atleast_1d(rows)
    leaves = leaves[leaves["num_children"] == 0]
    names = [str(words).partition(",")[0].strip() for words in leaves["words"]]
    rows = zip(leaves["ILSVRC2012_ID"], leaves["WNID"], names, strict=True)
    return {int(number): (str(key), name) for number, key, name in rows}
  # SciPy's reader raises many error types for a corrupt file.
  except Exception as error:
    raise InputError(
      f"{name} is not ImageNet's: {error}; expected a struct array `synsets` "
      "with ILSVRC2012_ID, WNID, words and num_children"
    ) from None


def read_real(
  path: str | os.PathLike, names: Sequence[str | os.PathLike]
) -> tuple[tuple[int, ...], ...]:
  """ReaL's labels of validation images, looked up by file name."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise MissingFileError(
      f"{path} does not exist; ReaL's labels are real.json of "
      "github.com/google-research/reassessed-imagenet"
    )
  lists = foreign.read_untrusted_json(path)
  rows = lists if isinstance(lists, list) else [None]
  labels = [
    x for row in rows for x in (row if isinstance(row, list) else [None])
  ]
  if not all(type(x) is int and 0 <= x < CLASS_COUNT for x in labels):
    raise InputError(
      f"{path}: expected ReaL's list with a list of labels (0 to "
      f"{CLASS_COUNT - 1}) for each validation image"
    )
  accepted = []
  for name in names:
    match = _IMAGE.search(os.path.basename(name))
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(lists):
      raise InputError(
        f"{name} is not one of the {len(lists)} images of {path}; ReaL "
        "relabels ImageNet's ILSVRC2012_val_*.JPEG"
      )
    accepted.append(tuple(lists[number - 1]))
  return tuple(accepted)


_FOLDERS = "folder_to_objectnet_label.json"
_OVERLAP = "objectnet_to_imagenet_1k.json"
_ORDER = "pytorch_to_imagenet_2012_id.json"
_NAMES = "imagenet_to_label_2012_v2"
_MAPPINGS = (_FOLDERS, _OVERLAP, _ORDER, _NAMES)
_BORDER = 2  # red pixels around ObjectNet's images


def find_objectnet(path: pathlib.Path) -> pathlib.Path | None:
  """The folder of images/ and mappings/: `path`, or objectnet-1.0 in it."""
  for root in (path, path / "objectnet-1.0"):
    if any((root / "mappings" / name).is_file() for name in _MAPPINGS):
      return root
  return None


def open_objectnet(
  path: pathlib.Path, *, count: int | None
) -> examples.ClassificationSet:
  """ObjectNet's images of classes shared with ImageNet.

  Classes are ObjectNet's, in folder order; `groups` maps each to its ImageNet
  labels.
  """
  root = find_objectnet(path)
  expected = [f"mappings/{name}" for name in _MAPPINGS]
  files.require_layout(root, ["images/*/*", *expected], what="ObjectNet 1.0")
  names, groups = _read_mappings(root / "mappings")
  folders = sorted(names)
  rows = [
    (label, image)
    for label, folder in enumerate(folders)
    for image in sorted((root / "images" / folder).glob("*"))
    if image.name.lower().endswith(IMAGE_SUFFIXES)
  ]
  if not rows:
    raise InputError(
      f"{root}/images has none of the {len(folders)} folders that {_FOLDERS} "
      f"and {_OVERLAP} name, such as {folders[0]!r}"
    )
  rows = examples.subsample(rows, count)

  def read(row: tuple[int, pathlib.Path]) -> np.ndarray:
    image = examples.read_image(row[1])
    if min(image.shape[:2]) <= 2 * _BORDER:
      raise InputError(
        f"{row[1]} is {image.shape[0]}x{image.shape[1]} pixels, no "
        f"larger than its border of {_BORDER} on each side"
      )
    return image[_BORDER:-_BORDER, _BORDER:-_BORDER]

  return examples.ClassificationSet.from_records(
    rows,
    read=read,
    hash_key=lambda row: (row[1].name, row[1].stat().st_size, folders[row[0]]),
    name=str(root),
    labels=np.asarray([label for label, _ in rows], np.int32),
    classes=tuple(names[folder].lower() for folder in folders),
    ids=tuple(folders),
    groups=tuple(groups[folder] for folder in folders),
  )


def _read_mappings(root: pathlib.Path) -> tuple[dict, dict]:
  """ObjectNet name and ImageNet labels of each overlapping folder."""
  folder_names = _read_object(root / _FOLDERS, str)
  overlap = _read_object(root / _OVERLAP, str)
  order = _read_object(root / _ORDER, int)
  lines = foreign.read_text(root / _NAMES).splitlines()
  lines = [line.strip() for line in lines if line.strip()]
  labels = {number: label for label, number in order.items()}
  # Labels and line numbers are both 0 to 999.
  numbers = [*range(len(lines))]
  if sorted(labels) != numbers or sorted(order) != sorted(map(str, numbers)):
    raise InputError(
      f"{root / _ORDER} has {len(order)} labels and {_NAMES} {len(lines)} "
      f"lines; expected each label once, with its 0-based line"
    )
  label_of = {line: int(labels[i]) for i, line in enumerate(lines)}
  folder_of = {name: folder for folder, name in folder_names.items()}
  names, groups = {}, {}
  for name, classes in overlap.items():
    unknown = [c for c in classes.split("; ") if c not in label_of]
    if name not in folder_of or unknown:
      where = f"{unknown[0]!r} is not in {_NAMES}" if unknown else ""
      raise InputError(
        f"{root / _OVERLAP}: {name!r}: {classes!r}, but "
        f"{where or f'{_FOLDERS} has no folder of that name'}"
      )
    names[folder_of[name]] = name
    groups[folder_of[name]] = tuple(label_of[c] for c in classes.split("; "))
  return names, groups


def _read_object(path: pathlib.Path, kind: type) -> Mapping[str, Any]:
  """Reads a JSON object with values of type `kind`."""
  content = foreign.read_untrusted_json(path)
  values = content.values() if isinstance(content, dict) else []
  if not values or not all(type(value) is kind for value in values):
    raise InputError(
      f"{path}: expected an object of {kind.__name__} values, as in ObjectNet"
    )
  return content
