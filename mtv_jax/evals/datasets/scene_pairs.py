"""Built-in scenes as data for matching: two views of one scene, or two scenes.

Geometric: the things of a scene from two cameras 8 to 28 degrees apart, with
exact depth and pose. Semantic: main things of one class in two scenes, with
three points a thing that are placed by its bounding box.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtv_jax.data.scenes import scenes
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import registry as datasets
from mtv_jax.evals.datasets.keypoints import KeyPointPair, KeyPointPairs
from mtv_jax.evals.datasets.posed import Frame, PosedFrames

_FIRST_THING = 2  # of a scene's instances: 0 and 1 are backdrop and ground
_LARGEST = 384  # pixels a side that scenes are rendered at for a view
_SIDE = 192  # of the scenes with key points
# Places (x, y) in a thing's bounding box.
_PLACES = ((0.5, 0.5), (0.5, 0.15), (0.5, 0.85))


@dataclasses.dataclass(frozen=True)
class Series:
  """Which scenes.

  Attributes:
    numbers: of the scenes.
    seed: of their series.
    size: pixels a side that they are rendered at, where that is given.
  """

  numbers: tuple[int, ...]
  seed: int = 0
  size: int | None = None

  @property
  def extra(self) -> tuple[int | None, ...]:
    """What a digest takes in beside the numbers."""
    given = (self.seed, self.size)
    return given if given != (0, None) else ()

  def protocol(self) -> dict[str, Any]:
    """For JSON."""
    first = self.numbers[0]
    return {"scenes": {"first": first, "seed": self.seed, "size": self.size}}


def series(data: datasets.Data, *, count: int) -> Series:
  """The scenes that `data` names, as a source of training data or not.

  Args:
    data: `scenes`, or `{type="scenes", first=..., length=..., seed=...,
      size=...}`; the first one that is held out if that is left open.
    count: how many at most, evenly spaced where `length` gives more.

  Raises:
    ValueError: for an option that scenes don't have.
  """
  from mtv_jax.data.sources import registry as sources

  given = dict(data) if isinstance(data, Mapping) else {}
  default = {"first": datasets.HELD_OUT_SCENES, "length": count}
  source = sources.build_source({**default, **given, "type": "scenes"})
  numbers = range(source.first, source.first + source.length)
  return Series(
    tuple(examples.spaced(numbers, count)), source.seed, given.get("size")
  )


def posed_scenes(chosen: Series) -> PosedFrames:
  """Both views of each scene; a scene is a group."""
  numbers, seed = chosen.numbers, chosen.seed

  # Both frames of a pair are asked for one after the other.
  @functools.lru_cache(maxsize=32)
  def pair(index: int, size: int) -> scenes.ScenePair:
    return scenes.render_pair(numbers[index], size=size, seed=seed)

  def read(index: int, size: int) -> Frame:
    size = chosen.size or min(2 * size, _LARGEST)
    both = pair(index // 2, size)
    scene = both.second if index % 2 else both.first
    things = scene.instances >= _FIRST_THING
    return Frame(
      image=scene.image,
      depth=np.where(things, scene.depth, 0).astype(np.float32),
      focal=scene.camera.focal * size,
      pose=_pose(scene.camera),
    )

  cameras = []
  for number in numbers:
    # The camera does not depend on the size.
    both = scenes.render_pair(number, size=scenes.MIN_SIZE, seed=seed)
    cameras += [both.first.camera, both.second.camera]
  return PosedFrames(
    name="scenes",
    layout="scenes",
    names=tuple(
      f"scene-{number}/{view}" for number in numbers for view in "01"
    ),
    groups=tuple((2 * i, 2 * i + 1) for i in range(len(numbers))),
    poses=np.stack([_pose(camera) for camera in cameras]),
    read=read,
    fingerprint=lambda i: (
      *np.round(cameras[i].position, 6).tolist(),
      *chosen.extra,
    ),
    stored=None,
    overlaps=None,
    about={"mask": "things, without ground and backdrop", **chosen.protocol()},
  )


def _pose(camera: scenes.Camera) -> np.ndarray:
  pose = np.eye(4)
  pose[:3, :3] = camera.rotation
  pose[:3, 3] = -camera.rotation @ camera.position
  return pose


def key_points(chosen: Series) -> KeyPointPairs:
  """Main things of scenes, paired within classes.

  A scene is paired with the next one whose main thing is of its class, the last
  one with the first. Key points are the middle of the main thing's bounding
  box, and the points at 15 and 85 % of its height.

  Raises:
    ValueError: for too few scenes to have two of one class.
  """
  numbers, side = chosen.numbers, chosen.size or _SIDE
  shown = [scenes.render(n, size=side, seed=chosen.seed) for n in numbers]
  by_class = collections.defaultdict(list)
  for i, scene in enumerate(shown):
    if 0 in scene.box_things:
      by_class[scene.label].append(i)
  digest, pairs = examples.Digest(), []
  for label, members in sorted(by_class.items()):
    if len(members) < 2:
      continue
    for i, j in zip(members, members[1:] + members[:1], strict=True):
      digest.add(numbers[i], numbers[j], *chosen.extra)
      pairs.append(
        KeyPointPair(
          category=scenes.CLASS_NAMES[label],
          viewpoint=None,
          first=i,
          second=j,
          first_points=_points(_box(shown[i], side)),
          second_points=_points(_box(shown[j], side)),
          second_box=_box(shown[j], side),
          first_side=side,
          second_side=side,
        )
      )
  if not pairs:
    enough = len(scenes.CLASS_NAMES) + 1
    raise ValueError(
      f"scenes: {len(numbers)} of them (from number {numbers[0]}) show no two "
      f"main things of one class, so there is nothing to pair. Of {enough} "
      f"scenes two have the same of {enough - 1} classes: set count={enough} "
      "or more"
    )
  images = [scene.image for scene in shown]
  return KeyPointPairs(
    name="scenes",
    layout="scenes",
    images=examples.Images(lambda i: images[i], len(images)),
    pairs=tuple(pairs),
    digest=digest.hex(),
    about={
      "key_points": "in the main thing's bounding box: its middle, and 15 and "
      "85 % of its height",
      **chosen.protocol(),
    },
  )


def _box(scene: scenes.Scene, side: int) -> np.ndarray:
  """The main thing's (x0, y0, x1, y1) in pixels."""
  y0, x0, y1, x1 = scene.boxes[scene.box_things.index(0)] * side
  return np.array([x0, y0, x1, y1], np.float64)


def _points(box: np.ndarray) -> np.ndarray:
  return box[:2] + np.array(_PLACES) * (box[2:] - box[:2])
