"""Where rays meet the shapes of built-in scenes, and what is recorded there.

Everything is solved in inverse depth w = 1 / z along rays (x, y, 1) of the
camera. In w a plane is affine in the pixel, a convex solid is the least of
some affine functions against the greatest of others, and a solid of
revolution is one quadratic, so that a thing costs a few passes over its own
rectangle of pixels.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes.world import Cutout, Polytope, Revolved, Thing

AMBIENT, DIFFUSE = 0.58, 0.52  # light on a surface: AMBIENT + DIFFUSE * cosine

_FAR = 1e-6  # least inverse depth that counts as a hit, 1 / m

Box = tuple[slice, slice]


@dataclasses.dataclass
class Surfaces:
  """The table that surface numbers point into."""

  colours: list[list[float]]  # first colour, then second minus first; 0..255
  tiles: list[tuple[int, int, int]]  # texels, left, top in the atlas
  owners: list[int]  # 0 backdrop, 1 ground, 2 + i for thing i


@dataclasses.dataclass
class Hits:
  """What each ray meets; arrays have the shape of the rays.

  `u`, `v` are texture coordinates in tiles; `boxes[i]` bounds thing i.
  """

  inverse: np.ndarray  # inverse depth, float32, 1 / m
  u: np.ndarray
  v: np.ndarray
  light: np.ndarray
  number: np.ndarray  # uint8
  surfaces: Surfaces
  boxes: list[Box]

  def write(self, box: Box, hit, inverse, u, v, light, number) -> None:
    """Keeps what is nearer than everything so far."""
    target = self.inverse[box]
    hit &= inverse > target
    np.copyto(target, inverse, where=hit)
    np.copyto(self.u[box], u, where=hit)
    np.copyto(self.v[box], v, where=hit)
    np.copyto(self.light[box], light, where=hit)
    np.copyto(self.number[box], number, where=hit)


def affine(row, x, y):
  """The affine function of pixels with coefficients of x, y and 1."""
  return (row[0] * x + row[2]) + row[1] * y


@dataclasses.dataclass(frozen=True)
class Local:
  """Rays in a thing's own frame (x, up, z), its height being the unit.

  A point is `origin + direction * z` for the depth z of the camera.
  """

  rows: list[list[float]]  # (x, y, 1) of a ray -> direction
  origin: list[float]
  light: list[float]
  x: np.ndarray
  y: np.ndarray

  def along(self, a: float, b: float, c: float) -> np.ndarray:
    """The component of all directions along (a, b, c)."""
    r, s, t = self.rows
    return affine([a * r[i] + b * s[i] + c * t[i] for i in range(3)],
                   self.x, self.y)  # fmt: skip

  @functools.cached_property
  def directions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(affine(row, self.x, self.y) for row in self.rows)

  def lambert(self, x: float, up: float, z: float) -> float:
    """Light on a flat face with this normal."""
    l = self.light
    length = math.sqrt(x * x + up * up + z * z)
    return AMBIENT + DIFFUSE * max(
      (l[0] * x + l[1] * up + l[2] * z) / length, 0.0
    )


def meet(
  part: Revolved | Polytope | Cutout,
  thing: Thing,
  local: Local,
  numbers: tuple[int, int],
  hits: Hits,
  box: Box,
) -> None:
  """Records in `hits` where rays meet one part of a thing first.

  `numbers` are the surfaces of the thing and of the part's accent.
  """
  if isinstance(part, Revolved):
    _revolved(part, thing, local, numbers[1], hits, box)
  elif isinstance(part, Polytope):
    _polytope(part, thing, local, numbers, hits, box)
  else:
    _cutout(part, thing, local, numbers[0], hits, box)


def _cutout(part: Cutout, thing, local: Local, number, hits, box):
  ox, ou, oz = local.origin
  dx, du, dz = local.directions
  inverse = dz * (-1 / oz)
  seen = inverse > _FAR
  depth = 1 / np.maximum(inverse, _FAR)
  across = dx * depth
  across += ox
  up = du * depth
  up += ou
  n = textures.SILHOUETTE
  inside = cv2.remap(
    textures.silhouettes()[part.silhouette],
    across * n + (0.5 * n - 0.5),
    up * -n + (n - 0.5),
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=-1,
  )
  metres, pu, pv = thing.paint
  k = thing.height / metres
  # Both sides are lit alike, so that views agree on a board's brightness.
  light = AMBIENT + DIFFUSE * abs(local.light[2])
  seen &= inside > 0
  hits.write(box, seen, inverse, across * k + pu, up * -k + pv, light, number)


def _polytope(part: Polytope, thing, local: Local, numbers, hits, box) -> None:
  ox, ou, oz = local.origin
  entered, left = None, None
  fronts = []
  for f, (nx, nu, nz, offset) in enumerate(part.faces):
    room = offset - (nx * ox + nu * ou + nz * oz)
    k = 1 / (room if abs(room) > 1e-9 else 1e-9)
    inverse = local.along(nx * k, nu * k, nz * k)
    if room < 0:  # the camera is on the outer side: rays enter here
      fronts.append((f, inverse))
      entered = inverse if entered is None else np.minimum(entered, inverse)
    else:
      left = inverse if left is None else np.maximum(left, inverse)
  if entered is None:
    return
  hit = entered > np.maximum(left, _FAR)
  depth = 1 / np.maximum(entered, _FAR)
  metres, pu, pv = thing.paint
  k = thing.height / metres
  for f, inverse in fronts:
    a, b = _face_axes(part.faces[f][:3])
    u = local.along(*(k * c for c in a)) * depth
    u += k * (a[0] * ox + a[1] * ou + a[2] * oz) + pu
    v = local.along(*(k * c for c in b)) * depth
    v += k * (b[0] * ox + b[1] * ou + b[2] * oz) + pv
    light = local.lambert(*part.faces[f][:3])
    number = numbers[f in part.accented]
    hits.write(box, hit & (inverse <= entered), inverse, u, v, light, number)


def _revolved(part: Revolved, thing, local: Local, number, hits, box) -> None:
  ox, ou, oz = local.origin
  dx, du, dz = local.directions
  a, b, c = part.a, part.b, part.c
  # On the surface x^2 + z^2 = a + b u + c u^2 with (x, u, z) = o + d / w:
  # outside * w^2 + 2 half * w + square = 0; the greater root is the nearer.
  outside = ox * ox + oz * oz - a - ou * (b + c * ou)
  half = local.along(ox, -(0.5 * b + c * ou), oz)
  square = dx * dx
  square += dz * dz
  if c:
    square -= c * (du * du)
  square *= -outside
  square += half * half
  hit = square > 0
  inverse = np.sqrt(np.maximum(square, 0))
  inverse -= half
  inverse *= 1 / max(outside, 1e-9)
  hit &= inverse > _FAR
  depth = 1 / np.maximum(inverse, _FAR)
  up = du * depth
  up += ou
  hit &= (up >= part.low) & (up <= part.high)
  x = dx * depth
  x += ox
  z = dz * depth
  z += oz
  # The normal (x, -(b + 2 c u) / 2, z); its square is a polynomial in u.
  lx, lu, lz = local.light
  lit = x * lx
  lit += z * lz
  lit -= up * (c * lu) + 0.5 * b * lu
  length = up * (c + c * c)
  length += b + b * c
  length *= up
  length += a + 0.25 * b * b
  lit /= np.sqrt(np.maximum(length, 1e-9))
  np.maximum(lit, 0, out=lit)
  lit *= DIFFUSE
  lit += AMBIENT
  metres, pu, pv = thing.paint
  k = thing.height / metres
  # A whole number of tiles around, so that the pattern closes.
  around = max(round(2 * math.pi * thing.shape.half * k), 1)
  u = np.arctan2(x, z)
  u *= around / (2 * math.pi)
  u += pu
  hits.write(box, hit, inverse, u, up * -k + pv, lit, number)
  _end(part, thing, local, number, hits, box)


def _end(part: Revolved, thing, local: Local, number, hits, box):
  """The flat top, or for a camera below it the flat bottom."""
  ox, ou, oz = local.origin
  dx, du, dz = local.directions
  if ou > part.high:
    at, facing = part.high, 1.0
  elif ou < part.low:
    at, facing = part.low, -1.0
  else:
    return
  radius2 = part.a + at * (part.b + part.c * at)
  if radius2 < 1e-6:
    return
  inverse = du * (1 / (at - ou))
  depth = 1 / np.maximum(inverse, _FAR)
  x = dx * depth
  x += ox
  z = dz * depth
  z += oz
  hit = x * x + z * z <= radius2
  hit &= inverse > _FAR
  metres, pu, pv = thing.paint
  k = thing.height / metres
  light = local.lambert(0.0, facing, 0.0) * part.cap
  hits.write(box, hit, inverse, x * k + pu, z * k + pv, light, number)


@functools.cache
def _face_axes(normal: tuple) -> tuple[tuple, tuple]:
  """Unit vectors across and down a face, for its texture."""
  nx, nu, nz = normal
  flat = math.hypot(nx, nz)
  if flat < 1e-9:
    return (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
  across = (nz / flat, 0.0, -nx / flat)
  length = math.hypot(flat, nu)
  nx, nu, nz = nx / length, nu / length, nz / length
  down = (nx * nu * length / flat, -flat / length, nz * nu * length / flat)
  return across, down
