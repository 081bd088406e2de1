"""Built-in scenes as data for matching: two views of one scene, or two scenes.

Geometric: the things of a scene from two cameras 8 to 28 degrees apart, with
exact depth and pose. Semantic: main things of one class in two scenes, with
three points a thing that are placed by its bounding box.
"""

from __future__ import annotations

import collections
import functools

import numpy as np

from mtv_jax.data import scenes
from mtv_jax.evals import datasets, examples
from mtv_jax.evals.keypoints import KeyPointPair, KeyPointPairs
from mtv_jax.evals.posed import Frame, PosedFrames

_FIRST_THING = 2  # of a scene's instances: 0 and 1 are backdrop and ground
_LARGEST = 384  # pixels a side that scenes are rendered at for a view
_SIDE = 192  # of the scenes with key points
# Places (x, y) in a thing's bounding box.
_PLACES = ((0.5, 0.5), (0.5, 0.15), (0.5, 0.85))


def posed_scenes(count: int) -> PosedFrames:
  """Both views of the first `count` held-out scenes; a scene is a group."""
  first = datasets.HELD_OUT_SCENES

  # Both frames of a pair are asked for one after the other.
  @functools.lru_cache(maxsize=32)
  def pair(index: int, size: int) -> scenes.ScenePair:
    return scenes.render_pair(first + index, size=size)

  def read(index: int, size: int) -> Frame:
    size = min(2 * size, _LARGEST)
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
  for index in range(count):
    # The camera does not depend on the size.
    both = scenes.render_pair(first + index, size=scenes.MIN_SIZE)
    cameras += [both.first.camera, both.second.camera]
  return PosedFrames(
    name="scenes",
    layout="scenes",
    names=tuple(
      f"scene-{first + index}/{view}" for index in range(count) for view in "01"
    ),
    groups=tuple((2 * i, 2 * i + 1) for i in range(count)),
    poses=np.stack([_pose(camera) for camera in cameras]),
    read=read,
    fingerprint=lambda i: tuple(np.round(cameras[i].position, 6).tolist()),
    stored=None,
    overlaps=None,
    about={"mask": "things, without ground and backdrop"},
  )


def _pose(camera: scenes.Camera) -> np.ndarray:
  pose = np.eye(4)
  pose[:3, :3] = camera.rotation
  pose[:3, 3] = -camera.rotation @ camera.position
  return pose


def key_points(count: int) -> KeyPointPairs:
  """Main things of the first `count` held-out scenes, paired within classes.

  A scene is paired with the next one whose main thing is of its class, the last
  one with the first. Key points are the middle of the main thing's bounding
  box, and the points at 15 and 85 % of its height.
  """
  first = datasets.HELD_OUT_SCENES
  shown = [scenes.render(first + i, size=_SIDE) for i in range(count)]
  by_class = collections.defaultdict(list)
  for i, scene in enumerate(shown):
    if 0 in scene.box_things:
      by_class[scene.label].append(i)
  digest, pairs = examples.Digest(), []
  for label, members in sorted(by_class.items()):
    if len(members) < 2:
      continue
    for i, j in zip(members, members[1:] + members[:1], strict=True):
      digest.add(first + i, first + j)
      pairs.append(
        KeyPointPair(
          category=scenes.CLASS_NAMES[label],
          viewpoint=None,
          first=i,
          second=j,
          first_points=_points(_box(shown[i])),
          second_points=_points(_box(shown[j])),
          second_box=_box(shown[j]),
          first_side=_SIDE,
          second_side=_SIDE,
        )
      )
  images = [scene.image for scene in shown]
  return KeyPointPairs(
    name="scenes",
    layout="scenes",
    images=examples.Images(lambda i: images[i], count),
    pairs=tuple(pairs),
    digest=digest.hex(),
    about={
      "key_points": "in the main thing's bounding box: its middle, and 15 and "
      "85 % of its height",
    },
  )


def _box(scene: scenes.Scene) -> np.ndarray:
  """The main thing's (x0, y0, x1, y1) in pixels."""
  y0, x0, y1, x1 = scene.boxes[scene.box_things.index(0)] * _SIDE
  return np.array([x0, y0, x1, y1], np.float64)


def _points(box: np.ndarray) -> np.ndarray:
  return box[:2] + np.array(_PLACES) * (box[2:] - box[:2])
