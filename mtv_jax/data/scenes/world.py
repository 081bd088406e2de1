"""World of a built-in scene: vocabulary, objects, cameras.

Independent of the image size. Units are metres. World and camera frames follow
computer vision (x right, y down, z forward); the ground is the plane y = 0, so
an object of height h on it spans y in [-h, 0].
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Float32

Colour = tuple[int, int, int]  # sRGB.


@dataclasses.dataclass(frozen=True)
class Revolved:
  """A solid of revolution: x^2 + z^2 <= a + b u + c u^2, low <= u <= high."""

  a: float
  b: float
  c: float
  low: float = 0.0
  high: float = 1.0
  cap: float = 1.0  # Light on the flat ends; they look hollow below 1.
  accent: Colour | None = None  # Colour of this part, if it differs.


@dataclasses.dataclass(frozen=True)
class Polytope:
  """A convex solid: `normal . (x, u, z) <= offset` for each face."""

  faces: tuple[tuple[float, float, float, float], ...]  # (nx, nu, nz, offset)
  accent_faces: tuple[int, ...] = ()  # Faces with the colour `accent`.
  accent: Colour | None = None


@dataclasses.dataclass(frozen=True)
class Cutout:
  """A flat board in the plane z = 0 with the outline of a silhouette."""

  silhouette: str
  accent: None = None


@dataclasses.dataclass(frozen=True)
class SolidShape:
  """An object class: its parts and bounds."""

  parts: tuple[Revolved | Polytope | Cutout, ...]
  half: float  # Half of the width (and depth, unless flat).
  top: float = 1.0  # Height of the highest point.
  can_float: bool = False  # Whether it may float in the air.
  can_support: bool = False  # Whether an object may stand on it.

  @property
  def flat(self) -> bool:
    return isinstance(self.parts[0], Cutout)


def _ball(centre: float, radius: float) -> Revolved:
  low, high = centre - radius, centre + radius
  return Revolved(radius**2 - centre**2, 2 * centre, -1.0, low, high)


def _cone(base: float, low: float, apex: float, high: float) -> Revolved:
  """A cone with radius `base` at u = low that would close at u = apex."""
  k = (base / (apex - low)) ** 2
  return Revolved(k * apex**2, -2 * k * apex, k, low, high)


def _dome(radius: float, low: float) -> Revolved:
  """Half an ellipsoid, from u = low to its top at u = 1."""
  k = (radius / (1 - low)) ** 2
  return Revolved(radius**2 - k * low**2, 2 * k * low, -k, low, 1.0)


def _rod(
  radius: float, low: float, high: float, accent: Colour | None = None
) -> Revolved:
  return Revolved(radius**2, 0.0, 0.0, low, high, accent=accent)


def _walls(x: float, z: float, lean: float = 0.0) -> tuple:
  """Four faces, at distances x and z from the axis at u = 0."""
  return (
    (1.0, lean, 0.0, x), (-1.0, lean, 0.0, x),
    (0.0, lean, 1.0, z), (0.0, lean, -1.0, z),
  )  # fmt: skip


_TOP, _BOTTOM = (0.0, 1.0, 0.0, 1.0), (0.0, -1.0, 0.0, 0.0)
_ROOF = ((0.5, 0.42, 0.0, 0.42), (-0.5, 0.42, 0.0, 0.42))
_OCTAHEDRON = tuple(
  (x / 0.42, 1.0 / h, z / 0.42, 1.0 + 0.6 / h)
  for x, z in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
  for h in (0.4, -0.6)
)
_TRUNK, _STEM = (92, 62, 40), (238, 226, 200)
_HAT, _SLATE = (30, 28, 32), (92, 48, 44)

SHAPES = {
  "ball": SolidShape((_ball(0.5, 0.5),), 0.5, can_float=True),
  "cylinder": SolidShape((_rod(0.34, 0.0, 1.0),), 0.34, can_support=True),
  "cone": SolidShape((_cone(0.45, 0.0, 1.0, 1.0),), 0.45),
  "bucket": SolidShape((Revolved(0.1024, 0.096, 0.0225, cap=0.4),), 0.47),
  "hourglass": SolidShape((Revolved(0.1892, -0.7, 0.7),), 0.44),
  "mushroom": SolidShape((_rod(0.13, 0.0, 0.55, _STEM), _dome(0.5, 0.5)), 0.5),
  "tree": SolidShape(
    (
      _rod(0.08, 0.0, 0.25, _TRUNK),
      _cone(0.42, 0.2, 0.85, 0.7),
      _cone(0.32, 0.52, 1.0, 1.0),
    ),
    0.42,
  ),
  "snowman": SolidShape(
    (
      _ball(0.32, 0.32),
      _ball(0.7, 0.2),
      _rod(0.2, 0.83, 0.87, _HAT),
      _rod(0.13, 0.87, 1.0, _HAT),
    ),
    0.32,
  ),
  "cube": SolidShape(
    (Polytope((*_walls(0.5, 0.5), _TOP, _BOTTOM)),), 0.5, can_support=True
  ),
  "pyramid": SolidShape((Polytope((*_walls(0.6, 0.6, 0.6), _BOTTOM)),), 0.6),
  "house": SolidShape(
    (Polytope((*_walls(0.42, 0.5), *_ROOF, _BOTTOM), (4, 5), _SLATE),), 0.5
  ),
  "gem": SolidShape((Polytope(_OCTAHEDRON),), 0.42, can_float=True),
  "star": SolidShape((Cutout("star"),), 0.5, 0.94, can_float=True),
  "heart": SolidShape((Cutout("heart"),), 0.5, 0.92, can_float=True),
  "moon": SolidShape((Cutout("moon"),), 0.45, can_float=True),
  "cross": SolidShape((Cutout("cross"),), 0.5),
  "ring": SolidShape((Cutout("ring"),), 0.5),
  "arrow": SolidShape((Cutout("arrow"),), 0.36, can_float=True),
  "flower": SolidShape((Cutout("flower"),), 0.43),
  "fish": SolidShape((Cutout("fish"),), 0.5, 0.52, can_float=True),
}
CLASS_NAMES = tuple(SHAPES)


# sRGB; distinguishable under shading.
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
PATTERNS = ("striped", "dotted", "checkered", "zigzag")  # Two named colours.
MATERIALS = ("plain", "wooden", "brick", "marble", "woven", "speckled")
TEXTURES = MATERIALS + PATTERNS
SIZES = {"small": 0.5, "medium": 0.85, "large": 1.3}  # Heights in metres.


# By caption name: (texture, metres per tile, two colours).
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

  `focal` is in units of the image side. A world point X has camera coordinates
  `rotation @ (X - position)`, and projects to `0.5 + focal * (x, y) / z` in
  unit coordinates.
  """

  focal: float
  rotation: Float[np.ndarray, "3 3"]
  position: Float[np.ndarray, "3"]

  def intrinsics(self, size: int) -> Float32[np.ndarray, "3 3"]:
    """K in pixels; the centre of pixel (row i, column j) is (i, j) + 0.5."""
    f = self.focal * size
    return np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]], "f4")

  def __post_init__(self):
    # Plain floats: the layout projects hundreds of single points.
    object.__setattr__(self, "_rows", self.rotation.tolist())
    object.__setattr__(self, "_origin", self.position.tolist())

  def angles(self) -> tuple[float, float]:
    """Yaw and pitch in radians, as in `make_camera`."""
    (cos, _, sin), _, (_, pitch, _) = self._rows
    return math.atan2(-sin, cos), math.asin(pitch)

  def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
    """Projects a point to (across, down) in unit coordinates, and depth."""
    x -= self._origin[0]
    y -= self._origin[1]
    z -= self._origin[2]
    r = self._rows
    depth = max(r[2][0] * x + r[2][1] * y + r[2][2] * z, 0.05)
    scale = self.focal / depth
    return (
      0.5 + scale * (r[0][0] * x + r[0][1] * y + r[0][2] * z),
      0.5 + scale * (r[1][0] * x + r[1][1] * y + r[1][2] * z),
      depth,
    )


def make_camera(
  position: tuple[float, float, float], yaw: float, pitch: float, focal: float
) -> Camera:
  """Makes a camera without roll; yaw turns right, pitch down (radians)."""
  cy, sy = math.cos(yaw), math.sin(yaw)
  cp, sp = math.cos(pitch), math.sin(pitch)
  rotation = np.array(
    [[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]]
  )
  return Camera(focal, rotation, np.array(position, float))


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """An object: its appearance (words) and its pose (metres, radians)."""

  name: str
  colour: str
  second: str  # Second colour of a pattern; '' for a material.
  texture: str
  size: str
  height: float
  yaw: float
  texture_map: tuple[float, float, float]  # Metres per tile, two offsets.
  x: float = 0.0
  z: float = 0.0
  base: float = 0.0  # Height of the lowest point above the ground.
  support: int = -1  # Index of the object it stands on, or -1.

  @functools.cached_property
  def shape(self) -> SolidShape:
    return SHAPES[self.name]

  @functools.cached_property
  def radius(self) -> float:
    return self.shape.half * self.height


_MORTAR = (206, 198, 188)


def shade(colour: tuple[int, int, int]) -> tuple[float, float, float]:
  """Second tone of a material: darker, or lighter if the first is dark."""
  if sum(colour) < 150:
    return tuple(1.35 * c + 42 for c in colour)
  return tuple(0.62 * c for c in colour)


def colours(obj: SceneObject) -> tuple[tuple, tuple]:
  """Returns the two colours that an object's texture mixes."""
  colour = COLOURS[obj.colour]
  if obj.second:
    return colour, COLOURS[obj.second]
  if obj.texture == "brick":
    is_bright = sum(colour) > 480
    return colour, tuple(0.5 * c for c in colour) if is_bright else _MORTAR
  if obj.texture == "marble" and sum(colour) < 480:
    return colour, tuple(0.45 * c + 130 for c in colour)
  return colour, shade(colour)


@dataclasses.dataclass(frozen=True)
class Rect:
  """Bounds of an object in unit coordinates, and the depth of its axis."""

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


def bounding_rect(camera: Camera, obj: SceneObject) -> Rect:
  """Approximate bounds of an object in the image, unclipped."""
  x, z = obj.x, obj.z
  top = obj.base + obj.shape.top * obj.height
  across, y1, depth = camera.project(x, -obj.base, z)
  _, y0, _ = camera.project(x, -top, z)
  if isinstance(obj.shape.parts[0], Revolved):
    half = camera.focal * obj.radius / depth
    return Rect(min(y0, y1), across - half, max(y0, y1), across + half, depth)
  cos = obj.radius * math.cos(obj.yaw)
  sin = obj.radius * math.sin(obj.yaw)
  y, corners = -(obj.base + top) / 2, ((cos, -sin), (-cos, sin))
  if not obj.shape.flat:
    a, b = cos + sin, cos - sin
    y, corners = -obj.base, ((a, b), (b, -a), (-a, -b), (-b, a))
  projections = [camera.project(x + dx, y, z + dz) for dx, dz in corners]
  columns, rows, _ = zip(*projections, strict=True)
  if not obj.shape.flat:
    y1 = max(rows)
  return Rect(min(y0, y1), min(columns), max(y0, y1), max(columns), depth)


def hidden_share(rects: list[Rect], i: int) -> float:
  """Upper bound of the share of rectangle i that is occluded or outside."""
  a = rects[i]
  outside = a.area - _overlap_area(a, Rect(0.0, 0.0, 1.0, 1.0, 0.0))
  occluded = (_overlap_area(a, b) for b in rects if b.depth < a.depth)
  return sum(occluded, outside) / a.area


def _overlap_area(a: Rect, b: Rect) -> float:
  height = min(a.y1, b.y1) - max(a.y0, b.y0)
  width = min(a.x1, b.x1) - max(a.x0, b.x0)
  return max(height, 0.0) * max(width, 0.0)


@dataclasses.dataclass(frozen=True)
class World:
  """Everything about a scene except its pixels."""

  objects: tuple[SceneObject, ...]  # The main object comes first.
  ground: str
  backdrop: str  # The plane sin(turn) x + cos(turn) z = distance.
  turn: float
  distance: float
  light: tuple[float, float, float]  # Unit vector towards the light.
  tint: tuple[float, float, float]  # Multiplies every colour.
  offsets: tuple[float, float, float, float]  # Ground, backdrop textures.
  camera: Camera
  noise: tuple[float, float]  # Offsets of the sensor noise.
  caption_kinds: tuple[str, ...]  # See `layout.CAPTIONS`.
