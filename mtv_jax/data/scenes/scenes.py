"""Built-in scenes: labelled pictures rendered from their number.

A data set with nothing to download, on which every objective and every
evaluation runs. `render(index)` is a pure function of the index, the seed and
the size: textured things at different depths on a ground before a backdrop,
with exact captions, boxes, metric depth, segmentation and class. The size
changes the pixels only, never the scene. `render_pair` looks at the same
scene twice and says which pixel went where.

The geometry is truly three-dimensional (`scene_trace`), so that parallax,
occlusion and depth are right; light does not depend on the view.
"""

import dataclasses
import operator
from typing import SupportsIndex

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from mtv_jax.data.records import Record
from mtv_jax.data.scenes import (
  captions as scene_words,
)
from mtv_jax.data.scenes import (
  layout as scene_layout,
)
from mtv_jax.data.scenes import (
  paint,
  solids,
  trace,
)
from mtv_jax.data.scenes import (
  world as scene_world,
)
from mtv_jax.data.scenes.world import Camera, World

CLASS_NAMES = scene_world.CLASS_NAMES
SEGMENT_NAMES = ("background", "ground", *CLASS_NAMES)

MIN_SIZE = 16
_LEAST_PIXELS = 0.001  # a box needs this share of the picture, and 4 pixels
_VISIBLE = 0.55  # captions of a second view leave out what is more hidden
_AGREE = 2e-3  # relative difference of depths that still is the same point


@dataclasses.dataclass(frozen=True)
class Scene:
  """One view of a scene, with everything that is known about it.

  Attributes:
    image: sRGB.
    depth: metres along the optical axis, at the pixels' centres.
    segmentation: position in `SEGMENT_NAMES`; 0 is the background.
    instances: 0 background, 1 ground, 2 + i for `things[i]`.
    boxes: (y0, x0, y1, x1) in the unit square, tight around the visible
      pixels; one for each thing that is not all but hidden.
    phrases: the boxes' names, such as 'large red ball with white dots'.
    box_things: position in `things` for each box.
    captions: five, the first a full description (see `scene_words`).
    label: position in `CLASS_NAMES` of the main thing, the largest.
    things: what there is, in words and metres; the main one first.
    camera: where the picture was taken from.
  """

  image: UInt8[np.ndarray, "s s 3"]
  depth: Float32[np.ndarray, "s s"]
  segmentation: UInt8[np.ndarray, "s s"]
  instances: UInt8[np.ndarray, "s s"]
  boxes: Float32[np.ndarray, "n 4"]
  phrases: tuple[str, ...]
  box_things: tuple[int, ...]
  captions: tuple[str, ...]
  label: int
  things: tuple[scene_world.Thing, ...]
  camera: Camera

  @property
  def inverse_depth(self) -> Float32[np.ndarray, "s s"]:
    """1 / depth, in 1 / m: what depth objectives learn."""
    return 1 / self.depth

  @property
  def points(self) -> Float32[np.ndarray, "s s 3"]:
    """The surface point of each pixel in the camera's frame, in metres."""
    x, y = _grid(self.depth.shape[0])
    scale = self.depth / np.float32(self.camera.focal)
    return np.stack([x * scale, y * scale, self.depth], -1)


@dataclasses.dataclass(frozen=True)
class ScenePair:
  """Two views of one scene and what connects them.

  Attributes:
    first, second: the views; `first` equals `render(index)`.
    correspondence: where the surface point of each pixel of the first view
      appears in the second: (y, x) in unit coordinates, pixel (i, j) being
      centred at ((i + 0.5) / size, (j + 0.5) / size). It may lie outside.
    visible: whether that point is inside the second picture and not hidden.
    rotation, translation: the first camera's frame to the second's,
      `rotation @ point + translation`, in metres.
  """

  first: Scene
  second: Scene
  correspondence: Float32[np.ndarray, "s s 2"]
  visible: Bool[np.ndarray, "s s"]
  rotation: Float[np.ndarray, "3 3"]
  translation: Float[np.ndarray, "3"]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Rays through the pixels' centres: unit coordinates minus one half."""
  axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
  return axis[None, :], axis[:, None]


def _check(index: int, size: int, seed: int) -> None:
  if not 0 <= index < 2**63:
    raise IndexError(
      f"Scene index {index}: expected 0 or more, below 2**63. Scenes are"
      " endless upwards and there are none before 0."
    )
  if size < MIN_SIZE:
    raise ValueError(
      f"Scene size {size}: expected at least {MIN_SIZE} pixels a side; below"
      " that the things can't be told apart."
    )
  if not 0 <= seed < 2**63:
    raise ValueError(f"Scene seed {seed}: expected 0 or more, below 2**63.")


def render(index: int, *, size: int = 96, seed: int = 0) -> Scene:
  """Renders scene `index` of the series `seed`.

  Args:
    index: 0 or more; each index is another scene.
    size: pixels a side, at least 16. Another size shows the same scene.
    seed: another seed is another series of scenes.

  Raises:
    IndexError: the index is negative.
    ValueError: the size is below 16 or the seed negative.
  """
  _check(index, size, seed)
  world = scene_layout.sample_world(index, seed)
  draw = scene_layout.Draw(seed, index, stream=2)
  return _photograph(world, world.camera, size, draw, world.noise)


def render_pair(index: int, *, size: int = 96, seed: int = 0) -> ScenePair:
  """Renders scene `index` from two cameras, with dense correspondences.

  The second camera is 8 to 28 degrees around the main thing, at another
  distance and height. Arguments and errors are those of `render`.
  """
  first = render(index, size=size, seed=seed)
  world = scene_layout.sample_world(index, seed)
  camera = scene_layout.second_camera(world, index, seed)
  draw = scene_layout.Draw(seed, index, stream=3)
  noise = (draw.uniform(), draw.uniform())
  second = _photograph(world, camera, size, draw, noise)
  rotation = camera.rotation @ first.camera.rotation.T
  translation = camera.rotation @ (first.camera.position - camera.position)
  points = first.points @ rotation.T + translation
  depth = np.maximum(points[..., 2], 1e-3)
  x = (camera.focal * points[..., 0] / depth).astype(np.float32)
  y = (camera.focal * points[..., 1] / depth).astype(np.float32)
  inside = (points[..., 2] > 1e-3) & (abs(x) < 0.5) & (abs(y) < 0.5)
  # Rays cast exactly there, not a look into the second view's pixels: what is
  # visible then does not depend on the size.
  hits = trace.trace(
    world, camera, np.clip(x, -1, 1), np.clip(y, -1, 1), pitch=1 / size
  )
  same = paint.owners(hits) == first.instances
  visible = inside & same & (abs(hits.inverse * depth - 1) < _AGREE)
  return ScenePair(
    first=first,
    second=second,
    correspondence=np.stack([y + 0.5, x + 0.5], -1).astype(np.float32),
    visible=visible,
    rotation=rotation,
    translation=translation,
  )


def _photograph(
  world: World,
  camera: Camera,
  size: int,
  draw: scene_layout.Draw,
  noise: tuple[float, float],
) -> Scene:
  """One view of a world with its labels; `draw` words the captions."""
  x, y = _grid(size)
  hits = trace.trace(world, camera, x, y, pitch=1 / size)
  instances = paint.owners(hits)
  boxes, kept = _boxes(instances, hits.boxes)
  things = world.things
  rects = [scene_world.outline(camera, thing) for thing in things]
  visible = list(range(len(things)))
  if camera is not world.camera:
    visible = [
      i for i in visible if scene_world.hidden(rects, i) < _VISIBLE
    ] or [0]
  segments = np.zeros((1, 256), np.uint8)
  segments[0, 1] = 1
  labels = [CLASS_NAMES.index(thing.name) for thing in things]
  segments[0, 2 : 2 + len(things)] = [2 + label for label in labels]
  return Scene(
    image=paint.paint(hits, noise),
    depth=1 / hits.inverse,
    segmentation=cv2.LUT(instances, segments),
    instances=instances,
    boxes=boxes,
    phrases=tuple(scene_words.phrase(things[i]) for i in kept),
    box_things=kept,
    captions=scene_words.captions(world, rects, visible, draw),
    label=labels[0],
    things=things,
    camera=camera,
  )


def _boxes(
  instances: np.ndarray, bounds: list[solids.Box]
) -> tuple[Float32[np.ndarray, "n 4"], tuple[int, ...]]:
  """Boxes around visible pixels, and which things they are."""
  size = instances.shape[0]
  least = max(_LEAST_PIXELS * size * size, 4)
  boxes, kept = [], []
  for i, (rows, columns) in enumerate(bounds):
    mask = (instances[rows, columns] == 2 + i).view(np.uint8)
    if not mask.size or cv2.countNonZero(mask) < least:
      continue
    x, y, width, height = cv2.boundingRect(mask)
    x += columns.start or 0
    y += rows.start or 0
    boxes.append((y, x, y + height, x + width))
    kept.append(i)
  unit = np.array(boxes, np.float32).reshape(-1, 4) / np.float32(size)
  return unit, tuple(kept)


class SceneSource:
  """Scenes as a data source: record i is scene `first + i`.

  A source like tar files or ArrayRecord files: `len`, indexing, `fields`,
  `name` and `shards`. It holds a few numbers, so that copies of it in worker
  processes cost nothing.

  Args:
    size: pixels a side of the rendered images.
    length: number of records; also the length of an epoch.
    first: number of the first scene. Training and evaluation take disjoint
      ranges, such as `first=1_000_000` for evaluation.
    seed: the series of scenes.
  """

  name = "scenes"
  fields = frozenset(
    (
      "key",
      "image",
      "captions",
      "depth",
      "segmentation",
      "boxes",
      "phrases",
      "box_scores",
      "label",
    )
  )

  def __init__(
    self, size: int = 96, *, length: int = 10_000, first: int = 0, seed: int = 0
  ):
    _check(first, size, seed)
    if length < 1:
      raise ValueError(f"Scenes length {length}: expected 1 or more records.")
    self.size, self.length, self.first, self.seed = size, length, first, seed
    # Rendered records lie in no file: one stretch for a shuffle by blocks.
    self.shards = np.array([length], np.int64)

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Record i: see `Scene`; depth is given inverse, boxes with scores of 1.

    Raises:
      IndexError: i is outside [0, length).
    """
    i = operator.index(i)
    if not 0 <= i < self.length:
      raise IndexError(
        f"Record {i} of {self!r}: expected 0 to {self.length - 1}."
      )
    scene = render(self.first + i, size=self.size, seed=self.seed)
    return {
      "key": f"scene-{self.seed}-{self.first + i}",
      "image": scene.image,
      "captions": list(scene.captions),
      "depth": scene.inverse_depth,
      "segmentation": scene.segmentation,
      "boxes": scene.boxes,
      "phrases": list(scene.phrases),
      "box_scores": np.ones(len(scene.boxes), np.float32),
      "label": scene.label,
    }

  def __repr__(self) -> str:
    return (
      f"SceneSource(size={self.size}, length={self.length},"
      f" first={self.first}, seed={self.seed})"
    )
