"""Draws the contents of built-in scenes: which things, where, seen from where.

Things are placed so that each is mostly in the picture and mostly in front:
whatever a caption mentions can be seen, at every image size. The first thing
drawn is the main one; it appears larger than every other.
"""

import dataclasses
import math

import numpy as np

from mtv_jax.data.scenes import world as scene_world
from mtv_jax.data.scenes.world import Camera, Rect, Thing, World

_TRIES = 10
_FRONT = 0.8  # how far in front of the scene the light is, against its height
_BOARD_YAW = 0.6  # how far a board may turn from facing the camera, rad
_MAIN_HIDDEN = 0.25  # largest hidden share of the main thing
_HIDDEN = 0.4  # and of any other
_SMALLER = 0.6  # others cover at most this share of the main thing's area


class Draw:
  """Cheap random numbers for one scene.

  One call of the Philox block cipher makes a batch of uniform numbers that
  Python then takes one by one, where `numpy.random.Generator` would cost
  microseconds a number. `random_raw` is covered by NumPy's promise of stable
  streams, unlike the distributions built on it.
  """

  def __init__(self, seed: int, index: int, *, stream: int = 0):
    self._bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])
    self._left: list[float] = []

  def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
    if not self._left:
      self._left = (self._bits.random_raw(128) * 2.0**-64).tolist()
    return low + (high - low) * self._left.pop()

  def choice(self, options):
    return options[min(int(self.uniform() * len(options)), len(options) - 1)]


def _contrast(colour: str) -> tuple[str, ...]:
  """The colours that read well as a pattern on another."""
  a = scene_world.COLOURS[colour]
  return tuple(
    name
    for name, b in scene_world.COLOURS.items()
    if sum(abs(p - q) for p, q in zip(a, b, strict=True)) > 220
  )


_CONTRAST = {name: _contrast(name) for name in scene_world.COLOURS}
_COLOURS = tuple(scene_world.COLOURS)
_SIZES = tuple(scene_world.SIZES)
_GROUNDS = tuple(scene_world.GROUNDS)
_BACKDROPS = tuple(scene_world.BACKDROPS)
_COUNTS = (0, 1, 1, 2, 2, 2, 3, 3, 4)  # things beside the main one


def _draw_thing(draw: Draw) -> Thing:
  """What a thing is and how it is turned; it stands at the origin."""
  name = draw.choice(scene_world.CLASS_NAMES)
  colour = draw.choice(_COLOURS)
  texture = draw.choice(scene_world.TEXTURES)
  second = ""
  if texture in scene_world.PATTERNS:
    second = draw.choice(_CONTRAST[colour])
  size = draw.choice(_SIZES)
  height = scene_world.SIZES[size] * draw.uniform(0.93, 1.07)
  flat = scene_world.SHAPES[name].flat
  yaw = (
    draw.uniform(-_BOARD_YAW, _BOARD_YAW)
    if flat
    else draw.uniform(0.0, 2 * math.pi)
  )
  return Thing(
    name=name,
    colour=colour,
    second=second,
    texture=texture,
    size=size,
    height=height,
    x=0.0,
    z=0.0,
    base=0.0,
    yaw=yaw,
    support=-1,
    # A tile spans about the thing, so that a pattern shows on a small one too.
    paint=(height * draw.uniform(0.8, 1.2), draw.uniform(), draw.uniform()),
  )


def _stand(
  thing: Thing, x: float, z: float, base: float, *, support: int = -1
) -> Thing:
  """A thing from the origin put there; a board turns its face to us."""
  yaw = thing.yaw
  if thing.shape.flat:
    yaw += math.atan2(x, z)
  return dataclasses.replace(
    thing, x=x, z=z, base=base, yaw=yaw, support=support
  )


def _nearest(camera: Camera, pitch: float) -> float:
  """Distance of the ground seen just above the lower edge of the picture."""
  k = 0.44 / camera.focal
  cp, sp = math.cos(pitch), math.sin(pitch)
  return -float(camera.position[1]) * (cp - k * sp) / (sp + k * cp)


def _main_thing(draw: Draw, camera: Camera, near: float) -> Thing:
  """The main thing, large and whole in the picture."""
  drawn = _draw_thing(draw)
  base = 0.0
  if drawn.shape.floats and draw.uniform() < 0.25:
    base = draw.uniform(0.2, 0.45)
  near += (0.5 if drawn.shape.flat else 0.8) * drawn.radius
  for attempt in range(_TRIES):
    # Of the picture's height; a tall thing near a low camera needs less.
    share = draw.uniform(0.36, 0.58) * 0.93**attempt
    z = camera.focal * drawn.shape.top * drawn.height / share
    z = max(z, near)
    x = (draw.uniform(0.25, 0.75) - 0.5) * z / camera.focal
    thing = _stand(drawn, x, z, base)
    if scene_world.hidden([scene_world.outline(camera, thing)], 0) < 0.06:
      break
  return thing


def _place(
  draw: Draw, camera: Camera, things: list[Thing], near: float, far: float
) -> Thing:
  """Another thing somewhere: beside, before, behind, above or on top."""
  thing = _draw_thing(draw)
  if draw.uniform() < 0.12:  # a twin of the main thing, elsewhere
    twin = things[0]
    thing = dataclasses.replace(
      twin,
      x=0.0,
      z=0.0,
      yaw=draw.uniform(-_BOARD_YAW, _BOARD_YAW),
      paint=(twin.paint[0], *thing.paint[1:]),
    )
  carriers = [
    i
    for i, other in enumerate(things)
    if other.shape.carries and all(t.support != i for t in things)
  ]
  if carriers and draw.uniform() < 0.5:
    i = draw.choice(carriers)
    below = things[i]
    if thing.radius < 1.1 * below.radius and thing.height < 1.2 * below.height:
      top = below.base + below.height
      return _stand(thing, below.x, below.z, top, support=i)
  far = min(far, camera.focal * thing.height / 0.13)
  z = draw.uniform(min(near + thing.radius, far), far)
  x = (draw.uniform(0.07, 0.93) - 0.5) * z / camera.focal
  base = 0.0
  if thing.shape.floats and draw.uniform() < 0.35:
    base = draw.uniform(0.3, 1.1)
  return _stand(thing, x, z, base)


def _fits(
  thing: Thing, things: list[Thing], turn: float, distance: float
) -> bool:
  """Whether a thing runs into no other and not into the backdrop."""
  gap = distance - math.sin(turn) * thing.x - math.cos(turn) * thing.z
  if gap < 1.5 * thing.radius:
    return False
  if thing.support >= 0:
    return True
  return all(
    math.hypot(thing.x - other.x, thing.z - other.z)
    > 1.2 * (thing.radius + other.radius)
    for other in things
  )


def _seen(rects: list[Rect]) -> bool:
  """Whether all things are mostly visible and the first is the largest."""
  if scene_world.hidden(rects, 0) > _MAIN_HIDDEN:
    return False
  if rects[-1].area > _SMALLER * rects[0].area:
    return False
  return all(
    scene_world.hidden(rects, i) <= _HIDDEN for i in range(1, len(rects))
  )


def sample_world(index: int, seed: int) -> World:
  """Scene `index` of the endless series `seed`."""
  draw = Draw(seed, index)
  pitch = draw.uniform(0.12, 0.3)
  camera = scene_world.look(
    (0.0, -draw.uniform(0.65, 1.15), 0.0),
    yaw=0.0,
    pitch=pitch,
    focal=draw.uniform(0.95, 1.25),
  )
  near = _nearest(camera, pitch)
  main = _main_thing(draw, camera, near)
  things = [main]
  turn = draw.uniform(-0.35, 0.35)
  ahead = math.sin(turn) * main.x + math.cos(turn) * main.z
  distance = max(draw.uniform(6.0, 11.0), ahead + 2 * main.radius)
  rects = [scene_world.outline(camera, things[0])]
  for _ in range(draw.choice(_COUNTS)):
    for _ in range(_TRIES):
      thing = _place(draw, camera, things, near, 0.85 * distance)
      if not _fits(thing, things, turn, distance):
        continue
      rect = scene_world.outline(camera, thing)
      if _seen([*rects, rect]):
        things.append(thing)
        rects.append(rect)
        break
  side, height = draw.uniform(-0.8, 0.8), draw.uniform(0.6, 1.0)
  length = math.sqrt(side**2 + height**2 + _FRONT**2)
  warm = draw.uniform(-0.06, 0.06)
  bright = draw.uniform(0.88, 1.08)
  return World(
    things=tuple(things),
    ground=draw.choice(_GROUNDS),
    backdrop=draw.choice(_BACKDROPS),
    turn=turn,
    distance=distance,
    light=(side / length, -height / length, -_FRONT / length),
    tint=(bright * (1 + warm), bright, bright * (1 - warm)),
    paint=(draw.uniform(), draw.uniform(), draw.uniform(), draw.uniform()),
    camera=camera,
    noise=(draw.uniform(), draw.uniform()),
  )


def second_camera(world: World, index: int, seed: int) -> Camera:
  """Another camera, 8 to 28 degrees around the main thing, aimed near it.

  It keeps the first camera's focal length and has no roll. Where something
  would hide the main thing, the angle is drawn again and smaller.
  """
  draw = Draw(seed, index, stream=1)
  first, main = world.camera, world.things[0]
  lift = float(first.position[1]) * draw.uniform(0.85, 1.2)
  reach = math.hypot(main.x, main.z) * draw.uniform(0.88, 1.15)
  bearing = math.atan2(main.x, main.z)
  middle = main.base + 0.5 * main.height
  aside, below = draw.uniform(-0.15, 0.15), draw.uniform(-0.08, 0.12)
  for attempt in range(_TRIES):
    angle = draw.choice((-1, 1)) * math.radians(draw.uniform(8.0, 28.0))
    yaw = bearing + angle * 0.8**attempt
    position = (
      main.x - reach * math.sin(yaw),
      lift,
      main.z - reach * math.cos(yaw),
    )
    pitch = math.atan2(-lift - middle, reach)
    camera = scene_world.look(
      position, yaw=yaw + aside, pitch=pitch + below, focal=first.focal
    )
    rects = [scene_world.outline(camera, thing) for thing in world.things]
    if scene_world.hidden(rects, 0) <= _MAIN_HIDDEN + 0.1:
      break
  return camera
