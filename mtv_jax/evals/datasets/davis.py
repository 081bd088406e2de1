"""DAVIS 2017 (Pont-Tuset et al. 2017), semi-supervised, 480p.

ROOT/ImageSets/2017/val.txt              video names
ROOT/JPEGImages/480p/NAME/00000.jpg
ROOT/Annotations/480p/NAME/00000.png     palette: 0 background, 1.. objects

ROOT is the archive's folder DAVIS, or its parent. The value 255 is background,
as in the official evaluation.
"""

from __future__ import annotations

import pathlib

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import files
from mtv_jax.utils.errors import InputError

_IMAGES, _MASKS = "JPEGImages/480p", "Annotations/480p"
_LIST = "ImageSets/2017/val.txt"
# Scored frames exclude the first, whose masks are given, and the last.
MIN_FRAMES = 3


def find_root(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with JPEGImages/480p: `path`, or DAVIS in it."""
  roots = (path, path / "DAVIS")
  return next((root for root in roots if (root / _IMAGES).is_dir()), None)


def matches(root: pathlib.Path) -> bool:
  """Whether a folder is or contains DAVIS."""
  return find_root(root) is not None


def open_videos(
  root: pathlib.Path, *, count: int | None = None
) -> examples.VideoSet:
  """Validation videos with masks, see `registry.open_videos`."""
  folder = find_root(root)
  files.require_layout(
    folder,
    [_LIST, f"{_IMAGES}/*/*.jpg", f"{_MASKS}/*/*.png"],
    what="DAVIS 2017's TrainVal at 480p (davischallenge.org)",
  )
  names = foreign.read_text(folder / _LIST).split()
  if not names:
    raise InputError(f"{folder / _LIST} names no video; expected one a line")
  rows, videos = [], []
  for name in examples.subsample(names, count):
    foreign.resolve_name(folder / _IMAGES, name, where=folder / _LIST)
    frames = sorted((folder / _IMAGES / name).glob("*.jpg"))
    masks = [folder / _MASKS / name / f"{f.stem}.png" for f in frames]
    if len(frames) < MIN_FRAMES:
      raise InputError(
        f"{folder / _IMAGES / name} has {len(frames)} frames (*.jpg); expected "
        f"{MIN_FRAMES} or more, as the first and the last are not scored"
      )
    files.require_files(masks, folder)
    for frame, mask in zip(frames, masks, strict=True):
      sizes = frame.stat().st_size, mask.stat().st_size
      rows.append((name, frame.name, *sizes))
    objects = int(_read_mask(masks[0]).max())
    if not objects:
      raise InputError(f"{masks[0]} has no object, which is to be propagated")
    videos.append(
      examples.Video(
        name=name,
        frames=examples.open_images(frames),
        masks=examples.LazySequence(
          lambda i, masks=masks: _read_mask(masks[i]), len(masks)
        ),
        objects=objects,
      )
    )
  return examples.VideoSet(
    kind="davis",
    name=f"{folder} val",
    videos=tuple(videos),
    digest=examples.hash_rows(rows),
  )


def _read_mask(path: pathlib.Path) -> np.ndarray:
  mask = files.read_channel(path, "P", "L")
  return np.where(mask == 255, 0, mask).astype(np.uint8)
