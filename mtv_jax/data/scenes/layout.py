"""Random layout of built-in scenes: objects, their poses, the cameras.

Each object is mostly inside the image and mostly unoccluded, so whatever a
caption mentions is visible at every image size. The first object is the main
one and appears largest.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from mtv_jax.data.scenes import world as world_lib
from mtv_jax.data.scenes.world import SHAPES, Camera, Rect, SceneObject, World

_TRIES = 10
_LIGHT_FRONT = 0.8  # Depth of the light's direction before normalization.
_MAX_MAIN_OCCLUSION = 0.25  # Maximum hidden share of the main object.
_MAX_OCCLUSION = 0.4  # Maximum hidden share of an additional object.
# Maximum area of an additional object, relative to the main one.
_MAX_AREA = 0.6

Level = Literal["easy", "medium", "hard"]
Interval = tuple[float, float]
CaptionKind = Literal["full", "main", "relation", "count", "surroundings"]
# In the order of `captions.captions`.
CAPTIONS: tuple[CaptionKind, ...] = get_args(CaptionKind)


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """Sampling ranges of scenes; the defaults are the hardest.

  Lengths are in metres, angles in radians. Positions and apparent sizes are
  fractions of the image side.
  """

  others: tuple[int, ...] = (0, 1, 1, 2, 2, 2, 3, 3, 4)  # Besides the main one.
  colours: tuple[str, ...] = tuple(world_lib.COLOURS)
  textures: tuple[str, ...] = world_lib.TEXTURES
  sizes: tuple[str, ...] = tuple(world_lib.SIZES)
  yaw: Interval = (0.0, 2 * math.pi)  # Yaw of solids.
  board_yaw: float = 0.6  # Maximum turn of a board away from the camera.
  main_height: Interval = (0.36, 0.58)
  main_column: Interval = (0.25, 0.75)
  other_height: float = 0.13  # Minimum for objects on the ground.
  # Three probabilities. Caches on disk record field names: don't rename any.
  floats: tuple[float, float] = (0.25, 0.35)  # Main, other object floats.
  copies: float = 0.12  # An additional object is a copy of the main one.
  stacks: float = 0.5  # An additional object stands on another object.
  turn: float = 0.35  # Maximum turn of the backdrop.
  distance: Interval = (6.0, 11.0)  # Distance to the backdrop.
  camera_height: Interval = (0.65, 1.15)
  camera_pitch: Interval = (0.12, 0.3)
  grounds: tuple[str, ...] = tuple(world_lib.GROUNDS)
  backdrops: tuple[str, ...] = tuple(world_lib.BACKDROPS)
  captions: tuple[str, ...] = CAPTIONS


DIFFICULTIES: dict[str, Difficulty] = {
  "easy": Difficulty(
    others=(0, 1, 1),
    colours=("red", "orange", "yellow", "turquoise", "blue", "purple"),
    textures=("plain",),
    sizes=("medium",),
    yaw=(-0.5, 0.5),
    board_yaw=0.3,
    main_height=(0.56, 0.7),
    main_column=(0.38, 0.62),
    other_height=0.25,
    floats=(0.0, 0.0),
    copies=0.0,
    stacks=0.0,
    turn=0.1,
    distance=(5.0, 7.0),
    camera_height=(0.8, 1.0),
    camera_pitch=(0.16, 0.24),
    grounds=("grass", "sand", "a tiled floor", "snow"),
    backdrops=("a brick wall", "a white wall", "a hedge", "a cloudy sky"),
    # Captions that name only classes teach the classes soonest.
    captions=("full", "main", "count"),
  ),
  "medium": Difficulty(
    others=(0, 1, 1, 2),
    textures=("plain", "striped", "dotted", "checkered"),
    yaw=(-0.8, 0.8),
    board_yaw=0.4,
    main_height=(0.42, 0.62),
    main_column=(0.3, 0.7),
    other_height=0.18,
    floats=(0.15, 0.2),
    copies=0.06,
    stacks=0.25,
    turn=0.2,
    distance=(5.0, 9.0),
  ),
  "hard": Difficulty(),
}


class Draw:
  """Cheap random numbers for one scene.

  Draws batches with Philox, since `numpy.random.Generator` costs microseconds
  per number. NumPy guarantees a stable stream for `random_raw`, but not for its
  distributions.
  """

  def __init__(self, seed: int, index: int, *, stream: int = 0):
    self._bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])
    self._buffer: list[float] = []

  def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
    if not self._buffer:
      self._buffer = (self._bits.random_raw(128) * 2.0**-64).tolist()
    return low + (high - low) * self._buffer.pop()

  def choice(self, options: Iterable):
    options = tuple(options)
    return options[min(int(self.uniform() * len(options)), len(options) - 1)]


def _list_contrasts(colour: tuple[int, int, int]) -> list[str]:
  """Lists colours in which a pattern on `colour` is easy to see."""
  table = world_lib.COLOURS.items()
  return [n for n, c in table if np.abs(np.subtract(colour, c)).sum() > 220]


_CONTRASTS = {name: _list_contrasts(c) for name, c in world_lib.COLOURS.items()}


def _draw_object(draw: Draw, limits: Difficulty) -> SceneObject:
  name = draw.choice(SHAPES)
  colour = draw.choice(limits.colours)
  texture = draw.choice(limits.textures)
  second = ""
  if texture in world_lib.PATTERNS:
    second = draw.choice(_CONTRASTS[colour])
  size = draw.choice(limits.sizes)
  height = world_lib.SIZES[size] * draw.uniform(0.93, 1.07)
  turn = limits.board_yaw
  yaw = draw.uniform(*((-turn, turn) if SHAPES[name].flat else limits.yaw))
  # Tiles are about as large as the object, so small objects show a pattern.
  tile = height * draw.uniform(0.8, 1.2)
  texture_map = (tile, draw.uniform(), draw.uniform())
  return SceneObject(
    name, colour, second, texture, size, height, yaw, texture_map
  )


def _move(
  obj: SceneObject, x: float, z: float, base: float, *, support: int = -1
) -> SceneObject:
  """Moves an object from the origin; boards turn to face the camera."""
  yaw = obj.yaw + (math.atan2(x, z) if obj.shape.flat else 0)
  return dataclasses.replace(obj, x=x, z=z, base=base, yaw=yaw, support=support)


def _place_main(
  draw: Draw, limits: Difficulty, camera: Camera, near: float
) -> SceneObject:
  """Draws the main object, large and entirely in the image."""
  origin = _draw_object(draw, limits)
  base = 0.0
  if origin.shape.can_float and draw.uniform() < limits.floats[0]:
    base = draw.uniform(0.2, 0.45)
  near += (0.5 if origin.shape.flat else 0.8) * origin.radius
  for attempt in range(_TRIES):
    # Share of the image height; less for tall objects near a low camera.
    share = draw.uniform(*limits.main_height) * 0.93**attempt
    z = max(camera.focal * origin.shape.top * origin.height / share, near)
    x = (draw.uniform(*limits.main_column) - 0.5) * z / camera.focal
    obj = _move(origin, x, z, base)
    if world_lib.hidden_share([world_lib.bounding_rect(camera, obj)], 0) < 0.06:
      break
  return obj


def _place_other(
  draw: Draw,
  limits: Difficulty,
  camera: Camera,
  objects: list,
  near: float,
  far: float,
) -> SceneObject:
  """Draws an object beside, before, behind, above or on top of others."""
  obj = _draw_object(draw, limits)
  if draw.uniform() < limits.copies:  # A copy of the main object.
    texture_map = (objects[0].texture_map[0], *obj.texture_map[1:])
    yaw = draw.uniform(-limits.board_yaw, limits.board_yaw)
    pose = {"x": 0.0, "z": 0.0, "yaw": yaw}
    obj = dataclasses.replace(objects[0], **pose, texture_map=texture_map)
  carriers = [
    i
    for i, other in enumerate(objects)
    if other.shape.can_support and all(o.support != i for o in objects)
  ]
  if carriers and draw.uniform() < limits.stacks:
    i = draw.choice(carriers)
    below = objects[i]
    if obj.radius < 1.1 * below.radius and obj.height < 1.2 * below.height:
      return _move(obj, below.x, below.z, below.base + below.height, support=i)
  far = min(far, camera.focal * obj.height / limits.other_height)
  z = draw.uniform(min(near + obj.radius, far), far)
  x = (draw.uniform(0.07, 0.93) - 0.5) * z / camera.focal
  base = 0.0
  if obj.shape.can_float and draw.uniform() < limits.floats[1]:
    base = draw.uniform(0.3, 1.1)
  return _move(obj, x, z, base)


def _is_free(
  obj: SceneObject, objects: list[SceneObject], turn: float, distance: float
) -> bool:
  """Whether an object intersects neither the objects nor the backdrop."""
  gap = distance - math.sin(turn) * obj.x - math.cos(turn) * obj.z
  if gap < 1.5 * obj.radius:
    return False
  return obj.support >= 0 or all(
    math.hypot(obj.x - other.x, obj.z - other.z)
    > 1.2 * (obj.radius + other.radius)
    for other in objects
  )


def _is_visible(rects: list[Rect]) -> bool:
  """Whether all objects are mostly visible and the first is the largest."""
  limits = [_MAX_MAIN_OCCLUSION] + [_MAX_OCCLUSION] * (len(rects) - 1)
  return rects[-1].area <= _MAX_AREA * rects[0].area and all(
    world_lib.hidden_share(rects, i) <= limit for i, limit in enumerate(limits)
  )


def sample_world(index: int, seed: int, difficulty: Level = "hard") -> World:
  """Samples scene `index` of the endless series `seed`."""
  draw, limits = Draw(seed, index), DIFFICULTIES[difficulty]
  pitch = draw.uniform(*limits.camera_pitch)
  camera = world_lib.make_camera(
    (0.0, -draw.uniform(*limits.camera_height), 0.0),
    yaw=0.0,
    pitch=pitch,
    focal=draw.uniform(0.95, 1.25),
  )
  # Ground distance just above the lower edge of the image.
  k, cp, sp = 0.44 / camera.focal, math.cos(pitch), math.sin(pitch)
  near = -float(camera.position[1]) * (cp - k * sp) / (sp + k * cp)
  main = _place_main(draw, limits, camera, near)
  objects = [main]
  turn = draw.uniform(-limits.turn, limits.turn)
  ahead = math.sin(turn) * main.x + math.cos(turn) * main.z
  distance = max(draw.uniform(*limits.distance), ahead + 2 * main.radius)
  rects = [world_lib.bounding_rect(camera, objects[0])]
  for _ in range(draw.choice(limits.others)):
    for _ in range(_TRIES):
      obj = _place_other(draw, limits, camera, objects, near, 0.85 * distance)
      if not _is_free(obj, objects, turn, distance):
        continue
      rect = world_lib.bounding_rect(camera, obj)
      if _is_visible([*rects, rect]):
        objects.append(obj)
        rects.append(rect)
        break
  side, height = draw.uniform(-0.8, 0.8), draw.uniform(0.6, 1.0)
  length = math.sqrt(side**2 + height**2 + _LIGHT_FRONT**2)
  warmth = draw.uniform(-0.06, 0.06)
  brightness = draw.uniform(0.88, 1.08)
  return World(
    objects=tuple(objects),
    ground=draw.choice(limits.grounds),
    backdrop=draw.choice(limits.backdrops),
    turn=turn,
    distance=distance,
    light=(side / length, -height / length, -_LIGHT_FRONT / length),
    tint=(brightness * (1 + warmth), brightness, brightness * (1 - warmth)),
    offsets=(draw.uniform(), draw.uniform(), draw.uniform(), draw.uniform()),
    camera=camera,
    noise=(draw.uniform(), draw.uniform()),
    caption_kinds=limits.captions,
  )


def second_camera(world: World, index: int, seed: int) -> Camera:
  """Samples a camera 8 to 28 degrees around the main object, aimed near it."""
  draw = Draw(seed, index, stream=1)
  first_camera, main = world.camera, world.objects[0]
  camera_y = float(first_camera.position[1]) * draw.uniform(0.85, 1.2)
  distance = math.hypot(main.x, main.z) * draw.uniform(0.88, 1.15)
  bearing = math.atan2(main.x, main.z)
  middle = main.base + 0.5 * main.height
  yaw_jitter, pitch_jitter = (
    draw.uniform(-0.15, 0.15),
    draw.uniform(-0.08, 0.12),
  )
  for attempt in range(_TRIES):
    angle = draw.choice((-1, 1)) * math.radians(draw.uniform(8.0, 28.0))
    yaw = bearing + angle * 0.8**attempt
    x, z = main.x - distance * math.sin(yaw), main.z - distance * math.cos(yaw)
    position = (x, camera_y, z)
    pitch = math.atan2(-camera_y - middle, distance)
    camera = world_lib.make_camera(
      position,
      yaw=yaw + yaw_jitter,
      pitch=pitch + pitch_jitter,
      focal=first_camera.focal,
    )
    rects = [world_lib.bounding_rect(camera, obj) for obj in world.objects]
    if world_lib.hidden_share(rects, 0) <= _MAX_MAIN_OCCLUSION + 0.1:
      break
  return camera
