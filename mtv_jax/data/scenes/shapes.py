"""Shapes of objects in built-in scenes, in units of their height.

A shape is a union of convex parts with closed-form ray intersections: solids of
revolution, polytopes and flat cutouts. Coordinates are (x, u, z); u is the
height above the base.
"""

import dataclasses

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
