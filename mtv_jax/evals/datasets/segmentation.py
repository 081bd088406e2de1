"""Images with a class for every pixel, in the layouts they come in.

What `data` may be:

  scenes       the built-in scenes, or `{type="scenes", ...}`, see
               `scene_options.py`
  FOLDER       ADE20K's ADEChallengeData2016, or the folder it lies in
  FOLDER       NYUv2 with nyu_images/, nyu_labels40/, train.txt and test.txt
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.data.scenes import scenes
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.segmentation_metrics import IGNORE
from mtv_jax.evals.datasets import (
  ade20k,
  layout,
  scene_options,
)
from mtv_jax.evals.datasets import (
  registry as datasets,
)
from mtv_jax.utils.errors import did_you_mean

SPLITS = ("train", "test")
_SCENES = {"train": 256, "test": 100}

# The 40 classes of Gupta et al. 2013 without the last, "otherprop", which in
# these files is one number with unlabelled pixels.
NYU_CLASSES = (
  "wall",
  "floor",
  "cabinet",
  "bed",
  "chair",
  "sofa",
  "table",
  "door",
  "window",
  "bookshelf",
  "picture",
  "counter",
  "blinds",
  "desk",
  "shelves",
  "curtain",
  "dresser",
  "pillow",
  "mirror",
  "floor mat",
  "clothes",
  "ceiling",
  "books",
  "refrigerator",
  "television",
  "paper",
  "towel",
  "shower curtain",
  "box",
  "whiteboard",
  "person",
  "night stand",
  "toilet",
  "sink",
  "lamp",
  "bathtub",
  "bag",
  "other structure",
  "other furniture",
)


class Maps(examples.Late):
  """Maps of classes, uint8 `[h, w]`, each of its image's size."""

  what = "map"


@dataclasses.dataclass(frozen=True)
class Segmented:
  """Images and the classes of their pixels.

  Attributes:
    kind: `scenes`, `ade20k` or `nyu40`.
    name: what it is, for the protocol.
    images: n of them.
    maps: n of them, of their images' sizes: a class, or 255 to ignore.
    classes: readable names; None where the data has none.
    class_count: how many classes there are.
    digest: hash of names and file sizes.
  """

  kind: str
  name: str
  images: examples.Images
  maps: Maps
  classes: tuple[str, ...] | None
  class_count: int
  digest: str


def segmented(
  data: datasets.Data, *, split: str, count: int | None = None
) -> Segmented:
  """Opens images with maps.

  Args:
    data: see the top of the file.
    split: `train` or `test`.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 256 and 100).

  Raises:
    FileNotFoundError: nothing there, or a part missing.
    NotApplicable: something there that has no classes of pixels.
    ValueError: for an unknown split or option.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}. {did_you_mean(split, SPLITS)}")
  if isinstance(data, Mapping) or datasets.is_scenes(data):
    return _scenes(
      scene_options.series(
        data,
        split=split,
        count=count,
        default=_SCENES[split],
        size=96,
        needs="classes of pixels",
      )
    )
  path = pathlib.Path(data)
  if (path / "nyu_images").is_dir() or (path / "nyu_labels40").is_dir():
    return _nyu40(path, split, count)
  root = ade20k.root_of(path)
  if root is not None:
    return _of_files(
      ade20k.files(root, split),
      read_map=ade20k.read_map,
      count=count,
      kind="ade20k",
      name=f"{data} {ade20k.FOLDERS[split]}",
      classes=ade20k.class_names(root),
      class_count=ade20k.CLASSES,
    )
  raise layout.unknown(
    data,
    "Segmentation reads 'scenes', ADE20K (ADEChallengeData2016 with images/ "
    "and annotations/) and NYUv2 with nyu_images/, nyu_labels40/, train.txt "
    "and test.txt.",
  )


def things(data: Segmented) -> Segmented:
  """Scenes whose background and ground are ignored, with things alone named."""
  stuff = len(scenes.SEGMENT_NAMES) - len(scenes.CLASS_NAMES)

  def read(i: int) -> np.ndarray:
    labels = data.maps[i]
    return np.where(labels < stuff, IGNORE, labels - stuff).astype(np.uint8)

  return dataclasses.replace(
    data,
    name=f"{data.name}, things only",
    maps=Maps(read, len(data.maps)),
    classes=tuple(scenes.CLASS_NAMES),
    class_count=len(scenes.CLASS_NAMES),
  )


def _scenes(series: scene_options.Series) -> Segmented:
  numbers, count = series.numbers, len(series.numbers)

  # An image and its map are asked for one after the other.
  @functools.lru_cache(maxsize=64)
  def render(i: int) -> scenes.Scene:
    return scenes.render(numbers[i], size=series.size, seed=series.seed)

  return Segmented(
    kind="scenes",
    name="scenes",
    images=examples.Images(lambda i: render(i).image, count),
    maps=Maps(lambda i: render(i).segmentation, count),
    classes=tuple(scenes.SEGMENT_NAMES),
    class_count=len(scenes.SEGMENT_NAMES),
    digest=series.digest(),
  )


def _nyu40(root: pathlib.Path, split: str, count: int | None) -> Segmented:
  layout.require(
    root,
    [f"{split}.txt", "nyu_images/*.jpg", "nyu_labels40/*.png"],
    what="NYUv2 with maps of 40 classes",
  )
  lines = (root / f"{split}.txt").read_text(encoding="utf-8").splitlines()
  ids = [line.split()[0] for line in lines if line.strip()]
  return _of_files(
    [
      ade20k.Files(
        root / "nyu_images" / f"{i}.jpg", root / "nyu_labels40" / f"{i}.png"
      )
      for i in ids
    ],
    read_map=_read_nyu40,
    count=count,
    kind="nyu40",
    name=f"{root} {split}",
    classes=NYU_CLASSES,
    class_count=len(NYU_CLASSES),
  )


def _read_nyu40(path: pathlib.Path) -> np.ndarray:
  values = ade20k.read_values(path)
  other = len(NYU_CLASSES)
  known = (values <= other) | (values == IGNORE)
  if not known.all():
    raise ValueError(
      f"{path} has a class {values[~known].max()}; expected 0 to {other}, "
      f"the number of one of 40 classes less one, or {IGNORE}"
    )
  return np.where(values == other, IGNORE, values).astype(np.uint8)


def _of_files(
  files: Sequence[ade20k.Files],
  *,
  read_map: Callable[[pathlib.Path], np.ndarray],
  count: int | None,
  **fields: Any,
) -> Segmented:
  files = examples.spaced(files, count)
  lost = [p for f in files for p in (f.image, f.labels) if not p.is_file()]
  if lost:
    raise FileNotFoundError(
      f"{fields['name']}: {len(lost)} of {2 * len(files)} files are missing, "
      f"such as {lost[0]}. Is the data set unpacked in full?"
    )
  digest = examples.Digest()
  for f in files:
    sizes = f.image.stat().st_size, f.labels.stat().st_size
    digest.add(f.image.name, f.labels.name, *sizes)

  return Segmented(
    images=examples.files([f.image for f in files]),
    maps=Maps(lambda i: read_map(files[i].labels), len(files)),
    digest=digest.hex(),
    **fields,
  )
