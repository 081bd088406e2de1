"""What a built-in scene consists of: vocabulary, things, cameras.

No image size enters here, so that a scene is the same at every size.

Units are metres. The frames of world and camera are those of computer vision
(x right, y down, z forward); the ground is the plane y = 0, so that a thing of
height h spans y in [-h, 0].
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Float32

# sRGB, chosen so that they stay apart under shading.
COLOURS = {
  "red": (205, 30, 35),
  "orange": (245, 125, 20),
  "yellow": (245, 215, 45),
  "green": (45, 150, 55),
  "turquoise": (50, 200, 190),
  "blue": (35, 75, 210),
  "purple": (125, 45, 170),
  "pink": (250, 140, 185),
  "brown": (115, 68, 35),
  "white": (242, 242, 238),
  "black": (32, 32, 36),
  "grey": (135, 138, 142),
}
PATTERNS = ("striped", "dotted", "checkered", "zigzag")  # two named colours
MATERIALS = ("plain", "wooden", "brick", "marble", "woven", "speckled")
TEXTURES = MATERIALS + PATTERNS
SIZES = {"small": 0.5, "medium": 0.85, "large": 1.3}  # height in metres


@dataclasses.dataclass(frozen=True)
class Revolved:
  """A solid of revolution: x^2 + z^2 <= a + b u + c u^2 for low <= u <= high.

  u is the height above the base; the thing's whole height is the unit. `cap`
  scales the light on the flat ends (below 1 they look hollow); `accent` is a
  fixed colour of this part, whatever the thing's own colour is.
  """

  a: float
  b: float
  c: float
  low: float = 0.0
  high: float = 1.0
  cap: float = 1.0
  accent: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Polytope:
  """A convex solid: `normal . (x, u, z) <= offset` for each plane.

  `faces` are rows (nx, nu, nz, offset); rows listed in `accented` are painted
  in the colour `accent`.
  """

  faces: tuple[tuple[float, float, float, float], ...]
  accented: tuple[int, ...] = ()
  accent: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Cutout:
  """A flat board in the plane z = 0 with the outline of a silhouette."""

  silhouette: str


@dataclasses.dataclass(frozen=True)
class Shape:
  """A class: its parts and its bounds, in units of its height.

  `half` is half of the width (and depth, unless flat), `top` the height of
  its highest point, `floats` whether it may hang in the air, `carries`
  whether something may stand on it.
  """

  parts: tuple[Revolved | Polytope | Cutout, ...]
  half: float
  top: float = 1.0
  floats: bool = False
  carries: bool = False

  @property
  def flat(self) -> bool:
    return isinstance(self.parts[0], Cutout)


def _ball(centre: float, radius: float) -> Revolved:
  return Revolved(
    radius**2 - centre**2,
    2 * centre,
    -1.0,
    centre - radius,
    centre + radius,
  )


def _cone(base: float, low: float, apex: float, high: float) -> Revolved:
  """A cone of radius `base` at u = low that would close at u = apex."""
  k = (base / (apex - low)) ** 2
  return Revolved(k * apex**2, -2 * k * apex, k, low, high)


def _dome(radius: float, low: float) -> Revolved:
  """Half an ellipsoid standing on u = low with its top at u = 1."""
  k = (radius / (1 - low)) ** 2
  return Revolved(radius**2 - k * low**2, 2 * k * low, -k, low, 1.0)


def _rod(radius: float, low: float, high: float, **options) -> Revolved:
  return Revolved(radius**2, 0.0, 0.0, low, high, **options)


_BARK = (92, 62, 40)
_CREAM = (238, 226, 200)
_COAL = (30, 28, 32)
_SLATE = (92, 48, 44)

SHAPES = {
  "ball": Shape((_ball(0.5, 0.5),), 0.5, floats=True),
  "cylinder": Shape((_rod(0.34, 0.0, 1.0),), 0.34, carries=True),
  "cone": Shape((_cone(0.45, 0.0, 1.0, 1.0),), 0.45),
  "bucket": Shape((Revolved(0.1024, 0.096, 0.0225, cap=0.4),), 0.47),
  "hourglass": Shape((Revolved(0.1892, -0.7, 0.7),), 0.44),
  "mushroom": Shape(
    (_rod(0.13, 0.0, 0.55, accent=_CREAM), _dome(0.5, 0.5)), 0.5
  ),
  "tree": Shape(
    (
      _rod(0.08, 0.0, 0.25, accent=_BARK),
      _cone(0.42, 0.2, 0.85, 0.7),
      _cone(0.32, 0.52, 1.0, 1.0),
    ),
    0.42,
  ),
  "snowman": Shape(
    (
      _ball(0.32, 0.32),
      _ball(0.7, 0.2),
      _rod(0.2, 0.83, 0.87, accent=_COAL),
      _rod(0.13, 0.87, 1.0, accent=_COAL),
    ),
    0.32,
  ),
  "cube": Shape(
    (
      Polytope(
        (
          (1.0, 0.0, 0.0, 0.5),
          (-1.0, 0.0, 0.0, 0.5),
          (0.0, 0.0, 1.0, 0.5),
          (0.0, 0.0, -1.0, 0.5),
          (0.0, 1.0, 0.0, 1.0),
          (0.0, -1.0, 0.0, 0.0),
        )
      ),
    ),
    0.5,
    carries=True,
  ),
  "pyramid": Shape(
    (
      Polytope(
        (
          (1.0, 0.6, 0.0, 0.6),
          (-1.0, 0.6, 0.0, 0.6),
          (0.0, 0.6, 1.0, 0.6),
          (0.0, 0.6, -1.0, 0.6),
          (0.0, -1.0, 0.0, 0.0),
        )
      ),
    ),
    0.6,
  ),
  "house": Shape(
    (
      Polytope(
        (
          (1.0, 0.0, 0.0, 0.42),
          (-1.0, 0.0, 0.0, 0.42),
          (0.0, 0.0, 1.0, 0.5),
          (0.0, 0.0, -1.0, 0.5),
          (0.5, 0.42, 0.0, 0.42),
          (-0.5, 0.42, 0.0, 0.42),
          (0.0, -1.0, 0.0, 0.0),
        ),
        accented=(4, 5),
        accent=_SLATE,
      ),
    ),
    0.5,
  ),
  "gem": Shape(
    (
      Polytope(
        tuple(
          (x / 0.42, 1.0 / h, z / 0.42, 1.0 + 0.6 / h)
          for x, z in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
          for h in (0.4, -0.6)
        )
      ),
    ),
    0.42,
    floats=True,
  ),
  "star": Shape((Cutout("star"),), 0.5, 0.94, floats=True),
  "heart": Shape((Cutout("heart"),), 0.5, 0.92, floats=True),
  "moon": Shape((Cutout("moon"),), 0.45, floats=True),
  "cross": Shape((Cutout("cross"),), 0.5),
  "ring": Shape((Cutout("ring"),), 0.5),
  "arrow": Shape((Cutout("arrow"),), 0.36, floats=True),
  "flower": Shape((Cutout("flower"),), 0.43),
  "fish": Shape((Cutout("fish"),), 0.5, 0.52, floats=True),
}
CLASS_NAMES = tuple(SHAPES)

# Name as a caption has it -> (texture, metres a tile, the two colours).
GROUNDS = {
  "grass": ("grass", 1.4, (52, 96, 38), (128, 160, 72)),
  "sand": ("sand", 1.6, (188, 158, 108), (232, 208, 158)),
  "a wooden floor": ("planks", 1.6, (142, 100, 62), (200, 158, 108)),
  "a tiled floor": ("tiles", 1.8, (178, 182, 186), (92, 96, 104)),
  "gravel": ("gravel", 1.3, (138, 132, 126), (66, 62, 60)),
  "a blue carpet": ("carpet", 1.2, (60, 72, 120), (104, 118, 170)),
  "a red carpet": ("carpet", 1.2, (112, 46, 52), (164, 84, 84)),
  "snow": ("snow", 2.4, (206, 214, 226), (246, 248, 252)),
}
BACKDROPS = {
  "a brick wall": ("brick", 1.5, (150, 92, 74), (196, 184, 172)),
  "a white wall": ("plaster", 2.0, (214, 210, 202), (240, 238, 232)),
  "a green wall": ("plaster", 2.0, (140, 166, 138), (172, 194, 168)),
  "striped wallpaper": ("striped", 2.2, (206, 194, 168), (168, 150, 128)),
  "dotted wallpaper": ("dotted", 2.0, (176, 190, 206), (222, 226, 230)),
  "wooden panels": ("panels", 2.2, (120, 84, 56), (168, 126, 88)),
  "a hedge": ("leaves", 1.6, (28, 54, 26), (88, 126, 58)),
  "a cloudy sky": ("clouds", 9.0, (126, 170, 216), (238, 242, 246)),
}


@dataclasses.dataclass(frozen=True)
class Camera:
  """A pinhole camera with square pixels and a centred principal point.

  `focal` is in units of the image's side. A world point X is at
  `rotation @ (X - position)` in the camera's frame, and appears at
  `0.5 + focal * (x, y) / z` in unit coordinates.
  """

  focal: float
  rotation: Float[np.ndarray, "3 3"]
  position: Float[np.ndarray, "3"]

  def intrinsics(self, size: int) -> Float32[np.ndarray, "3 3"]:
    """K in pixels, with pixel (row i, column j) centred at (i, j) + 0.5."""
    f = self.focal * size
    return np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]], "f4")

  def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
    """World point -> (across, down) in unit coordinates and its depth."""
    x -= self._place[0]
    y -= self._place[1]
    z -= self._place[2]
    r = self._rows
    depth = max(r[2][0] * x + r[2][1] * y + r[2][2] * z, 0.05)
    scale = self.focal / depth
    return (
      0.5 + scale * (r[0][0] * x + r[0][1] * y + r[0][2] * z),
      0.5 + scale * (r[1][0] * x + r[1][1] * y + r[1][2] * z),
      depth,
    )

  def __post_init__(self):
    # Plain floats: the layout projects hundreds of points one at a time.
    object.__setattr__(self, "_rows", self.rotation.tolist())
    object.__setattr__(self, "_place", self.position.tolist())


def look(
  position: tuple[float, float, float], yaw: float, pitch: float, focal: float
) -> Camera:
  """A camera without roll; yaw turns it right, pitch tilts it down (rad)."""
  cy, sy = math.cos(yaw), math.sin(yaw)
  cp, sp = math.cos(pitch), math.sin(pitch)
  rotation = np.array(
    [[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]]
  )
  return Camera(focal, rotation, np.array(position, float))


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object: what it is (words) and where (metres, radians).

  `second` is the second colour of a pattern and '' for a material. `base` is
  the height of its lowest point above the ground; `support` is the position
  in the scene's list of the thing it stands on, -1 for none. `paint` places
  the texture: metres a tile, and two offsets.
  """

  name: str
  colour: str
  second: str
  texture: str
  size: str
  height: float
  x: float
  z: float
  base: float
  yaw: float
  support: int
  paint: tuple[float, float, float]

  @functools.cached_property
  def shape(self) -> Shape:
    return SHAPES[self.name]

  @functools.cached_property
  def radius(self) -> float:
    return self.shape.half * self.height


def shade_of(colour: tuple[int, int, int]) -> tuple[float, float, float]:
  """The second tone of a material: darker, or lighter where it is dark."""
  if sum(colour) < 150:
    return tuple(1.35 * c + 42 for c in colour)
  return tuple(0.62 * c for c in colour)


_MORTAR = (206, 198, 188)


def colours(thing: Thing) -> tuple[tuple, tuple]:
  """The two colours that a thing's texture mixes."""
  first = COLOURS[thing.colour]
  if thing.second:
    return first, COLOURS[thing.second]
  if thing.texture == "brick":
    dark = sum(first) > 480
    return first, tuple(0.5 * c for c in first) if dark else _MORTAR
  if thing.texture == "marble" and sum(first) < 480:
    return first, tuple(0.45 * c + 130 for c in first)
  return first, shade_of(first)


@dataclasses.dataclass(frozen=True)
class Rect:
  """Where a thing appears: unit coordinates, and depth of its axis."""

  y0: float
  x0: float
  y1: float
  x1: float
  depth: float

  @property
  def area(self) -> float:
    return (self.y1 - self.y0) * (self.x1 - self.x0)

  @property
  def centre(self) -> float:
    return (self.x0 + self.x1) / 2


def outline(camera: Camera, thing: Thing) -> Rect:
  """About where a thing appears; not clipped to the image."""
  x, z = thing.x, thing.z
  top = thing.base + thing.shape.top * thing.height
  across, y1, depth = camera.project(x, -thing.base, z)
  _, y0, _ = camera.project(x, -top, z)
  if isinstance(thing.shape.parts[0], Revolved):
    half = camera.focal * thing.radius / depth
    return Rect(min(y0, y1), across - half, max(y0, y1), across + half, depth)
  cos = thing.radius * math.cos(thing.yaw)
  sin = thing.radius * math.sin(thing.yaw)
  if thing.shape.flat:
    middle = -(thing.base + top) / 2
    ends = [
      camera.project(x + cos, middle, z - sin),
      camera.project(x - cos, middle, z + sin),
    ]
  else:
    ends = [
      camera.project(x + a, -thing.base, z + b)
      for a, b in (
        (cos + sin, cos - sin),
        (cos - sin, -cos - sin),
        (-cos - sin, sin - cos),
        (sin - cos, cos + sin),
      )
    ]
    y1 = max(end[1] for end in ends)
  columns = [end[0] for end in ends]
  return Rect(min(y0, y1), min(columns), max(y0, y1), max(columns), depth)


def hidden(rects: list[Rect], i: int) -> float:
  """Upper bound of the share of rectangle i behind nearer ones or outside."""
  a = rects[i]
  height = max(0.0, min(a.y1, 1) - max(a.y0, 0))
  width = max(0.0, min(a.x1, 1) - max(a.x0, 0))
  covered = a.area - height * width
  for b in rects:
    if b.depth < a.depth:
      height = min(a.y1, b.y1) - max(a.y0, b.y0)
      width = min(a.x1, b.x1) - max(a.x0, b.x0)
      if height > 0 and width > 0:
        covered += height * width
  return covered / a.area


@dataclasses.dataclass(frozen=True)
class World:
  """Everything about a scene but its pixels. `things[0]` is the main one.

  The backdrop is the plane `sin(turn) x + cos(turn) z = distance`; `light` is
  the unit vector towards the light; `tint` multiplies every colour; `paint`
  offsets the textures of ground and backdrop, `noise` places the sensor noise.
  """

  things: tuple[Thing, ...]
  ground: str
  backdrop: str
  turn: float
  distance: float
  light: tuple[float, float, float]
  tint: tuple[float, float, float]
  paint: tuple[float, float, float, float]
  camera: Camera
  noise: tuple[float, float]
