"""Images with metric depth, whatever layout they come in."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.scenes import scenes
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import registry as datasets
from mtv_jax.evals.datasets import scene_options

SPLITS = ("train", "test")
# The farthest backdrop is nearer than this.
SCENES_MAX_DEPTH = 20.0


class DepthMaps(examples.Late):
  """Depth maps in metres, float32 `[h, w]`, each of its image's size."""

  what = "depth map"


@dataclasses.dataclass(frozen=True)
class DepthSet:
  """Images and the true depth of their pixels.

  Attributes:
    kind: `scenes`, `nyu` or `kitti`, whose published limits and crops differ.
    name: what it is, for the protocol.
    images: n of them.
    depths: n of them, each of its image's size: metres, 0 where unknown.
    source: how the depth was made, for the protocol.
    digest: hash of names and file sizes.
  """

  kind: str
  name: str
  images: datasets.Images
  depths: DepthMaps
  source: str
  digest: str


@dataclasses.dataclass(frozen=True)
class Files:
  """An image file and its depth file."""

  image: pathlib.Path
  depth: pathlib.Path


def of_files(
  files: Sequence[Files],
  *,
  read_depth: Callable[[Files], np.ndarray],
  kind: str,
  name: str,
  source: str,
  count: int | None,
) -> DepthSet:
  """A set of pairs of files.

  Args:
    files: all there are.
    read_depth: from a pair to metres.
    kind, name, source: see `DepthSet`.
    count: how many to use, evenly spaced; None for all.

  Raises:
    FileNotFoundError: if some of those files are missing.
  """
  files = examples.spaced(files, count)
  lost = [p for f in files for p in (f.image, f.depth) if not p.is_file()]
  if lost:
    raise FileNotFoundError(
      f"{name}: {len(lost)} of {2 * len(files)} files are missing, such as "
      f"{lost[0]}. Is the data set unpacked in full?"
    )
  digest = datasets.Digest()
  for f in files:
    sizes = f.image.stat().st_size, f.depth.stat().st_size
    digest.add(f.image.name, f.depth.name, *sizes)
  return DepthSet(
    kind=kind,
    name=name,
    images=datasets.Images(
      lambda i: canvas.decode(
        files[i].image.read_bytes(), key=str(files[i].image)
      ),
      len(files),
    ),
    depths=DepthMaps(lambda i: read_depth(files[i]), len(files)),
    source=source,
    digest=digest.hex(),
  )


def read_list(path: pathlib.Path) -> list[tuple[str, str]]:
  """Image and depth of each line "rgb depth focal", as paths from a root.

  Raises:
    ValueError: for another kind of file.
  """
  rows = [line.split() for line in path.read_text().splitlines() if line]
  bad = [row for row in rows if len(row) not in (2, 3)]
  if bad or not rows:
    got = f"the line {' '.join(bad[0])!r}" if bad else "an empty file"
    raise ValueError(f"{path}: expected lines 'rgb depth focal', got {got}")
  return [(row[0].lstrip("/"), row[1].lstrip("/")) for row in rows]


def read_grey(path: pathlib.Path) -> np.ndarray:
  """The values of a PNG with one channel, of 8 or 16 bits.

  Raises:
    ValueError: for a damaged file, or one with colours.
  """
  values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
  if values is None or values.ndim != 2:
    found = "can't be read" if values is None else f"has shape {values.shape}"
    raise ValueError(
      f"{path} {found}; expected a grey PNG of depth, of 8 or 16 bits"
    )
  return values


def of_scenes(series: scene_options.Series) -> DepthSet:
  """Built-in scenes with their exact depth."""
  numbers, count = series.numbers, len(series.numbers)

  # An image and its depth are asked for one after the other.
  @functools.lru_cache(maxsize=64)
  def render(i: int) -> scenes.Scene:
    return scenes.render(numbers[i], size=series.size, seed=series.seed)

  return DepthSet(
    kind="scenes",
    name="scenes",
    images=datasets.Images(lambda i: render(i).image, count),
    depths=DepthMaps(lambda i: render(i).depth, count),
    source="exact",
    digest=series.digest(),
  )
