"""Rendering of built-in scenes with exact labels.

A data set without downloads, on which every objective and evaluation runs.
`render(index)` is a pure function of index, seed and size: textured objects on
a ground before a backdrop, with exact captions, boxes, metric depth,
segmentation and class. The size only affects pixels. Parallax, occlusion and
depth are exact; lighting is view-independent.
"""

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from mtv_jax.data.scenes import captions as captions_lib
from mtv_jax.data.scenes import layout, textures
from mtv_jax.data.scenes.layout import Level
from mtv_jax.data.scenes.raycast import OBJECTS, Hits
from mtv_jax.data.scenes.world import (
  CLASS_NAMES,
  Camera,
  SceneObject,
  World,
  bounding_rect,
  hidden_share,
  make_camera,
)
from mtv_jax.utils.errors import InputError

SEGMENT_NAMES = ("background", "ground", *CLASS_NAMES)
STUFF_COUNT = 2  # First entries of SEGMENT_NAMES: background and ground.
MIN_SIZE = 16
_MAX_SIZE = 4096

_MIN_BOX_SHARE = 0.001  # Minimum image share of a box, and at least 4 pixels.
_MAX_OCCLUSION = 0.55  # Maximum hidden share in captions of a second view.
_DEPTH_TOLERANCE = 2e-3  # Maximum relative difference of a point's depths.
_NOISE = 2.5  # Standard deviation of the sensor noise; white is 255.
_SHIFTS = 64  # Noise offsets along each axis.


@dataclasses.dataclass(frozen=True)
class Scene:
  """One view of a scene with its labels."""

  image: UInt8[np.ndarray, "s s 3"]  # sRGB.
  # Metres along the optical axis, at pixel centres.
  depth: Float32[np.ndarray, "s s"]
  segmentation: UInt8[np.ndarray, "s s"]  # Indices into `SEGMENT_NAMES`.
  # 0 background, 1 ground, 2 + i for `objects[i]`.
  instances: UInt8[np.ndarray, "s s"]
  # (y0, x0, y1, x1) in the unit square, around the objects' visible pixels.
  boxes: Float32[np.ndarray, "n 4"]
  phrases: tuple[str, ...]  # One per box: 'large red ball with dots'.
  box_objects: tuple[int, ...]  # Indices into `objects`.
  captions: tuple[str, ...]  # See `captions.captions`; five for hard scenes.
  label: int  # Index into `CLASS_NAMES` of the main object.
  objects: tuple[SceneObject, ...]  # The main (largest) object comes first.
  camera: Camera

  @property
  def inverse_depth(self) -> Float32[np.ndarray, "s s"]:
    """1 / depth, in 1 / m: the label of depth objectives."""
    return 1 / self.depth

  @property
  def points(self) -> Float32[np.ndarray, "s s 3"]:
    """Surface point of each pixel in the camera frame, in metres."""
    x, y = pixel_grid(self.depth.shape[0])
    scale = self.depth / np.float32(self.camera.focal)
    return np.stack([x * scale, y * scale, self.depth], -1)


@dataclasses.dataclass(frozen=True)
class ScenePair:
  """Two views of one scene and their correspondence.

  `rotation @ point + translation` maps a point (in metres) from the first
  camera's frame to the second's.
  """

  first: Scene  # Equals `render(index)`.
  second: Scene
  # For the surface point at each pixel centre of the first view: its (y, x) in
  # the second view, in unit coordinates, possibly outside the image.
  correspondence: Float32[np.ndarray, "s s 2"]
  # Whether that point is inside the second image and unoccluded.
  visible: Bool[np.ndarray, "s s"]
  rotation: Float[np.ndarray, "3 3"]
  translation: Float[np.ndarray, "3"]


def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """A row of x and a column of y, in unit coordinates minus one half."""
  axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
  return axis[None, :], axis[:, None]


def check_arguments(index: int, size: int, seed: int) -> None:
  """Checks the ranges of `render`'s arguments."""
  if not 0 <= index < 2**63:
    raise InputError(f"Scene index {index}: expected 0 or more, below 2**63.")
  if not MIN_SIZE <= size <= _MAX_SIZE:
    expected = f"expected {MIN_SIZE} to {_MAX_SIZE} pixels"
    raise InputError(f"Scene size {size}: {expected}.")
  if not 0 <= seed < 2**63:
    raise InputError(f"Scene seed {seed}: expected 0 or more, below 2**63.")


def render(
  index: int, *, size: int = 96, seed: int = 0, difficulty: Level = "hard"
) -> Scene:
  """Renders scene `index` of the series `seed`, at `size` pixels per side."""
  check_arguments(index, size, seed)
  world = layout.sample_world(index, seed, difficulty)
  draw = layout.Draw(seed, index, stream=2)
  return _render_view(world, world.camera, size, draw, world.noise)


def render_pair(
  index: int, *, size: int = 96, seed: int = 0, difficulty: Level = "hard"
) -> ScenePair:
  """Renders scene `index` from two cameras, with dense correspondences.

  The second camera is 8 to 28 degrees around the main object, at a different
  distance and height. Arguments and errors as in `render`.
  """
  first = render(index, size=size, seed=seed, difficulty=difficulty)
  world = layout.sample_world(index, seed, difficulty)
  camera = layout.second_camera(world, index, seed)
  draw = layout.Draw(seed, index, stream=3)
  noise = (draw.uniform(), draw.uniform())
  second = _render_view(world, camera, size, draw, noise)
  rotation = camera.rotation @ first.camera.rotation.T
  translation = camera.rotation @ (first.camera.position - camera.position)
  points = first.points @ rotation.T + translation
  depth = np.maximum(points[..., 2], 1e-3)
  x = (camera.focal * points[..., 0] / depth).astype(np.float32)
  y = (camera.focal * points[..., 1] / depth).astype(np.float32)
  is_inside = (points[..., 2] > 1e-3) & (abs(x) < 0.5) & (abs(y) < 0.5)
  # Cast rays exactly to these points instead of the second view's pixels, so
  # that visibility doesn't depend on the size.
  rays = np.clip(x, -1, 1), np.clip(y, -1, 1)
  hits = Hits(world, camera, *rays, ray_spacing=1 / size)
  same_object = hits.owners == first.instances
  same_depth = abs(hits.inverse * depth - 1) < _DEPTH_TOLERANCE
  return ScenePair(
    first=first,
    second=second,
    correspondence=np.stack([y + 0.5, x + 0.5], -1).astype(np.float32),
    visible=is_inside & same_object & same_depth,
    rotation=rotation,
    translation=translation,
  )


def render_video(
  index: int,
  *,
  frames: int,
  size: int = 96,
  seed: int = 0,
  difficulty: Level = "hard",
) -> tuple[Scene, ...]:
  """Renders scene `index` from a camera that moves between two views.

  The first and last frame use the cameras of `render_pair`; position, yaw and
  pitch change in equal steps. Object indices in `instances` are constant.
  Arguments and errors as in `render`.
  """
  check_arguments(index, size, seed)
  world = layout.sample_world(index, seed, difficulty)
  cameras = world.camera, layout.second_camera(world, index, seed)
  angles = [camera.angles() for camera in cameras]
  scenes = []
  for frame, share in enumerate(np.linspace(0, 1, frames)):
    position = (1 - share) * cameras[0].position + share * cameras[1].position
    # The two yaws differ by less than half a turn.
    change = np.remainder(np.subtract(*angles[::-1]) + np.pi, 2 * np.pi) - np.pi
    yaw, pitch = np.add(angles[0], share * change)
    camera = make_camera(tuple(position), yaw, pitch, cameras[0].focal)
    draw = layout.Draw(seed, index, stream=4 + frame)
    noise = (draw.uniform(), draw.uniform())
    scenes.append(_render_view(world, camera, size, draw, noise))
  return tuple(scenes)


def _render_view(
  world: World, camera: Camera, size: int, draw: layout.Draw, noise: tuple
) -> Scene:
  """Renders one view with its labels; `draw` selects caption wordings."""
  hits = Hits(world, camera, *pixel_grid(size), ray_spacing=1 / size)
  instances = hits.owners
  boxes, box_objects = _find_boxes(instances, hits)
  objects = world.objects
  rects = [bounding_rect(camera, obj) for obj in objects]
  visible = list(range(len(objects)))
  if camera is not world.camera:
    visible = [i for i in visible if hidden_share(rects, i) < _MAX_OCCLUSION]
  labels = [CLASS_NAMES.index(obj.name) for obj in objects]
  segments = np.zeros((1, 256), np.uint8)
  segments[0, 1] = 1
  segments[0, OBJECTS : OBJECTS + len(objects)] = np.add(labels, STUFF_COUNT)
  return Scene(
    image=_shade_image(hits, noise),
    depth=1 / hits.inverse,
    segmentation=cv2.LUT(instances, segments),
    instances=instances,
    boxes=boxes,
    phrases=tuple(captions_lib.phrase(objects[i]) for i in box_objects),
    box_objects=box_objects,
    captions=captions_lib.captions(world, rects, visible or [0], draw),
    label=labels[0],
    objects=objects,
    camera=camera,
  )


def _find_boxes(
  instances: np.ndarray, hits: Hits
) -> tuple[Float32[np.ndarray, "n 4"], tuple[int, ...]]:
  size = instances.shape[0]
  min_pixels = max(_MIN_BOX_SHARE * size * size, 4)
  boxes, indices = [], []
  for i, (rows, columns) in enumerate(hits.boxes):
    mask = (instances[rows, columns] == OBJECTS + i).view(np.uint8)
    if mask.size and cv2.countNonZero(mask) >= min_pixels:
      x, y, width, height = cv2.boundingRect(mask)
      x, y = x + columns.start, y + rows.start
      boxes.append((y, x, y + height, x + width))
      indices.append(i)
  unit_boxes = np.array(boxes, np.float32).reshape(-1, 4) / np.float32(size)
  return unit_boxes, tuple(indices)


def _shade_image(hits: Hits, noise: tuple[float, float]) -> np.ndarray:
  """Shades a square grid of rays to sRGB; `noise` is in [0, 1)^2."""
  surface = hits.surface
  texels, left, top = (cv2.LUT(surface, t) for t in _make_tables(hits.tiles))
  # The centre of texel i is at i + 0.5.
  x = (hits.u - np.floor(hits.u)) * texels + left - 0.5
  y = (hits.v - np.floor(hits.v)) * texels + top - 0.5
  mix = cv2.remap(textures.build_atlas().pixels, x, y, cv2.INTER_LINEAR)
  mix = mix.astype(np.float32)
  first, change = np.split(_make_tables(hits.colours), 2)
  planes = [
    (cv2.LUT(surface, b * (1 / 255)) * mix + cv2.LUT(surface, a)) * hits.light
    for a, b in zip(first, change, strict=True)
  ]
  size = surface.shape[0]
  i, j = (int(n * _SHIFTS) for n in noise)
  noise = _make_noise(size)[i : i + size, j : j + size]
  image = cv2.add(cv2.merge(planes), noise, dtype=cv2.CV_8U)
  # One ray per pixel leaves jagged outlines. Blurring only these pixels hides
  # them at a fraction of the cost of more rays.
  cross = np.ones((3, 3), np.uint8)
  edges = cv2.morphologyEx(hits.owners, cv2.MORPH_GRADIENT, cross)
  return cv2.copyTo(cv2.GaussianBlur(image, (3, 3), 0), edges, image)


def _make_tables(rows: list) -> Float32[np.ndarray, "k 1 256"]:
  """Turns the columns of `rows` into look-up tables for `cv2.LUT`."""
  tables = np.zeros((len(rows[0]), 1, 256), np.float32)
  tables[:, 0, : len(rows)] = np.array(rows, np.float32).T
  return tables


@functools.lru_cache(maxsize=8)
def _make_noise(size: int) -> Float32[np.ndarray, "n n 3"]:
  side = size + _SHIFTS
  noise = np.random.default_rng(7).standard_normal((side, side, 3), np.float32)
  return _NOISE * noise
